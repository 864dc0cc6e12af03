"""How mmCIF entries become chains: random entries against plain loops, and each rule by hand."""

import gzip
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store import StructureParseError
from foldfeed.feature_store.exchange_errors import SourceTooLargeError
from foldfeed.feature_store.format.structure import ATOM_NAMES, NO_NUMBER
from foldfeed.feature_store.parsers.mmcif.entry import load_mmcif, read_mmcif

pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")

import mmcif_texts

# fmt: off
ROWS = [
    # group id el atom  alt comp asym ent seq ins  x      y     z     occ   b    auth_seq auth_asym model
    "ATOM 1 N N . ALA A 1 1 ? 1.0 2.0 3.0 1.00 10.0 -3 H 1",
    "ATOM 2 C CA . ALA A 1 1 ? 2.0 2.5 3.5 1.00 11.0 -3 H 1",
    "HETATM 3 SE SE . MSE A 1 3 A 4.0 5.0 6.0 0.00 12.0 7 H 1",
    "ATOM 4 C CA A SER A 1 4 ? 7.0 8.0 9.0 0.50 13.0 8 H 1",
    "ATOM 5 C CA B SER A 1 4 ? 7.5 8.5 9.5 0.50 14.0 8 H 1",
    "ATOM 6 H HA . SER A 1 4 ? 7.1 8.1 9.1 1.00 14.0 8 H 1",
    "HETATM 7 O O . HOH B 2 . ? 0.0 0.0 0.0 1.00 15.0 99 H 1",
    "ATOM 8 C CA . ALA A 1 1 ? 9.0 9.0 9.0 1.00 11.0 -3 H 2",
]
# fmt: on
TEXT = """data_9ABC
_entry.id 9ABC
_exptl.method 'X-RAY DIFFRACTION'
_refine.ls_d_res_high 1.50
loop_
_pdbx_audit_revision_history.ordinal
_pdbx_audit_revision_history.revision_date
1 2021-03-04
2 2020-02-01
loop_
_entity_poly.entity_id
_entity_poly.type
_entity_poly.pdbx_seq_one_letter_code_can
1 'polypeptide(L)' AGMSP
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
1 1 ALA
1 2 GLY
1 3 MSE
1 4 SER
1 5 HYP
loop_
"""
TEXT += "".join(f"_atom_site.{item}\n" for item in mmcif_texts.ATOM_ITEMS)


def text(rows=None, **changes: str) -> bytes:
    """The entry above with other rows or with pieces of text exchanged."""
    whole = TEXT + "\n".join(ROWS if rows is None else rows) + "\n"
    for old, new in changes.values():
        assert old in whole
        whole = whole.replace(old, new)
    return whole.encode()


def only(data: bytes, **options):
    (chain,) = read_mmcif(data, "x.cif", **options)
    return chain


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_entries_read_as_the_rules_say(seed):
    rng = random.Random(seed)
    entry = mmcif_texts.random_entry(rng)
    data = mmcif_texts.text_of(entry)
    for at, model in enumerate(entry.models):
        there = [
            name for name, residues in entry.chains.items() if any(residue.atoms[at] for residue in residues)
        ]
        asked = None if at == 0 else model
        if not there:
            with pytest.raises(StructureParseError, match="nothing to take"):
                read_mmcif(data, model=asked)
            continue
        modified = rng.choice(["parent", "X"])
        read = read_mmcif(data, model=asked, modified=modified)
        assert list(read.chain_ids) == there
        assert read.chain_ids == {name: entry.auth_names[name] for name in there}
        for chain in read:
            wanted = mmcif_texts.expected(entry, chain.label_asym_id, at)
            for name, array in chain.structure.arrays.items():
                np.testing.assert_array_equal(array, wanted[name], err_msg=name)
            assert chain.sequence == wanted[modified]
            assert chain.microheterogeneity == wanted["several"]
            assert chain.altloc_residues == wanted["altlocs"]
            source = chain.structure.source
            assert (source["model"], source["num_models"]) == (str(model), str(len(entry.models)))
            assert int(source.get("arginine_swaps", 0)) == wanted["swaps"]


def test_one_entry_by_hand():
    read = read_mmcif(text())
    assert read.chain_ids == {"A": "H"}
    chain = read.chain("A")
    assert (chain.sequence, only(text(), modified="X").sequence) == ("AGMSP", "AGMSX")
    structure = chain.structure
    assert structure.residue_number.tolist() == [-3, NO_NUMBER, 7, 8, NO_NUMBER]
    assert structure.insertion_code.tolist() == [0, 0, ord("A"), 0, 0]
    assert structure.observed.tolist() == [True, False, True, True, False]
    slot = ATOM_NAMES.index
    assert structure.atom_positions[2, slot("SD")].tolist() == [4, 5, 6], "selenium, of occupancy zero"
    assert structure.atom_positions[3, slot("CA")].tolist() == [7, 8, 9], "the first alternate on a tie"
    assert structure.atom_mask.sum() == 4, "hydrogens and water are left out"
    facts = {"method": "X-RAY DIFFRACTION", "resolution_angstrom": "1.50", "release_date": "2020-02-01"}
    assert facts.items() <= structure.source.items()
    assert only(text(), model=2).structure.atom_positions[0, 1].tolist() == [9, 9, 9]
    assert chain.modified.tolist() == [False, False, True, False, True]


def test_letters_of_modified_residues():
    no_canonical = (
        "_entity_poly.pdbx_seq_one_letter_code_can\n1 'polypeptide(L)' AGMSP",
        "1 'polypeptide(L)'",
    )
    assert only(text(a=no_canonical)).sequence == "AGMSP", "gemmi's table"
    assert only(text(a=("AGMSP", "AGMSY"))).sequence == "AGMSY", "the entry's own word"
    assert only(text(a=("AGMSP", "AGMSTYG"))).sequence == "AGMSP", "three letters for one monomer fit nobody"
    assert only(text(a=("HYP", "QQQ"), b=("AGMSP", "?"))).sequence == "AGMSX", "nobody knows it"
    assert only(text(a=("AGMSP", "YYYYY"))).sequence == "AGMSY", "standard residues are what they are"


def test_what_is_absent_stays_absent():
    pieces = {
        "a": ("_exptl.method 'X-RAY DIFFRACTION'\n", ""),
        "b": ("_refine.ls_d_res_high 1.50\n", "_refine.ls_d_res_high ?\n_reflns.d_resolution_high 1.4\n"),
        "c": ("2021-03-04", "?"),
        "d": ("2020-02-01", "."),
    }
    source = only(text(**pieces)).structure.source
    assert source["resolution_angstrom"] == "1.4"
    assert {"method", "release_date"}.isdisjoint(source)


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [
        ("1.50(2)", "1.5"),
        ("-1.0", "1.4"),
        ("0.00", "1.4"),
        ("inf", "1.4"),
        ("1e1", "10.0"),
        ("1e-5", "0.00001"),
        ("1e-30", "1.4"),
        ("1e300", "1.4"),
    ],
)
def test_a_resolution_is_a_number_above_0_in_plain_decimals(spelled, wanted):
    value = (
        "_refine.ls_d_res_high 1.50\n",
        f"_refine.ls_d_res_high {spelled}\n_reflns.d_resolution_high 1.4\n",
    )
    assert only(text(a=value)).structure.source["resolution_angstrom"] == wanted


def test_a_resolution_is_the_first_that_a_column_gives():
    rows = "loop_\n_refine.pdbx_refine_id\n_refine.ls_d_res_high\nA ?\nB 0.0\nC 2.10\nD 1.9\n"
    source = only(text(a=("_refine.ls_d_res_high 1.50\n", rows))).structure.source
    assert source["resolution_angstrom"] == "2.10"


@pytest.mark.parametrize("mark", ["?", "."])
def test_an_occupancy_or_b_factor_that_is_not_given_is_that_of_a_file_without_the_column(mark):
    plain = only(text()).structure
    # Rows 4 and 5 are alternates of occupancy 0.5, of which the first counts; 1 is more.
    found = only(text(a=("9.5 0.50 14.0", f"9.5 {mark} {mark}"))).structure
    np.testing.assert_array_equal(found.atom_mask, plain.atom_mask)
    assert plain.atom_positions[3, 1].tolist() == [7.0, 8.0, 9.0]
    assert found.atom_positions[3, 1].tolist() == [7.5, 8.5, 9.5]
    assert found.b_factor[3, 1] == 0


def test_a_protein_chain_whose_atoms_name_no_entity_is_reported_as_that(tmp_path):
    from foldfeed.feature_store.importers.layouts import AlignmentImport

    chain = [row.replace(" A 1 ", " D ? ") for row in ROWS if " A 1 " in row]
    names = "loop_\n_struct_asym.id\n_struct_asym.entity_id\nA 1\nB 2\nC 1\nD 1\n"
    data = text([*ROWS, *chain], a=("loop_\n_entity_poly_seq", names + "loop_\n_entity_poly_seq"))
    entry = read_mmcif(data, "x.cif")
    assert (list(entry.chain_ids), entry.without_atoms, entry.without_entity) == (["A"], ("C",), ("D",))
    (tmp_path / "x.cif").write_bytes(data)
    reasons = [reject.reason for reject in AlignmentImport(tmp_path / "x.cif").rejects]
    assert len(reasons) == 2
    assert reasons[0].startswith("chain C (label_asym_id) has no atom")
    assert reasons[1].startswith("chain D (label_asym_id) is a polypeptide, but the label_entity_id")


def test_the_scheme_stands_in_for_the_sequence_and_says_so():
    scheme = "_pdbx_poly_seq_scheme"
    names = ("asym_id", "entity_id", "seq_id", "mon_id", "pdb_seq_num")
    head = "loop_\n" + "".join(f"{scheme}.{name}\n" for name in names)
    rows = "".join(
        f"{asym} 1 {number} {name} {number + 10}\n"
        for asym in "AC"
        for number, name in enumerate(["ALA", "GLY", "MSE", "SER", "HYP"], start=1)
    )
    start, stop = TEXT.index("loop_\n_entity_poly_seq"), TEXT.index("loop_\n_atom_site")
    data = (TEXT[:start] + head + rows + TEXT[stop:] + "\n".join(ROWS) + "\n").encode()
    read = read_mmcif(data)
    chain = read.chain("A")
    assert (chain.sequence, chain.structure.source["sequence_from"]) == ("AGMSP", scheme)
    assert chain.structure.residue_number.tolist() == [-3, 12, 7, 8, 15], "atoms first, then the scheme"
    assert read.without_atoms == ("C",)


def test_arginine_names_are_exchanged_with_their_b_factors_unless_refused():
    rows = [
        f"ATOM {number} C {name} . ARG A 1 1 ? {x} 0 0 1.0 {number} 1 A 1"
        for number, (name, x) in enumerate({"CD": 0.0, "NH1": 4.5, "NH2": 3.5, "NE": 1.0}.items(), start=1)
    ]
    data = text(rows, a=("1 1 ALA", "1 1 ARG"), b=("AGMSP", "?"))
    slots = [ATOM_NAMES.index(name) for name in ("NH1", "NH2")]
    fixed, kept = only(data).structure, only(data, fix_arginine=False).structure
    assert fixed.atom_positions[0, slots, 0].tolist() == [3.5, 4.5]
    assert fixed.b_factor[0, slots].tolist() == [3, 2]
    assert fixed.source["arginine_swaps"] == "1"
    assert kept.atom_positions[0, slots, 0].tolist() == [4.5, 3.5]
    assert "arginine_swaps" not in kept.source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"a": ("1 3 MSE", "1 3 LEU")},
            "_atom_site row 3: residue 3 is MSE here and LEU in _entity_poly_seq",
        ),
        ({"a": ("1 4 SER\n1 5 HYP\n", "")}, "_atom_site row 4: label_seq_id 4 is not in the sequence"),
        ({"a": ("1 2 GLY\n", "")}, "_entity_poly_seq row 2: monomer 3 of entity 1 follows 1"),
        ({"a": ("1 2 GLY", "1 x GLY")}, "_entity_poly_seq row 2: the number 'x' of a monomer"),
        ({"a": ("A SER A 1 4 ? 7.0", "A SER A 1 4 ? ?")}, "_atom_site row 4: Cartn_x, y, z of atom CA"),
        ({"a": ("A SER A 1 4 ? 7.0", "A SER A 1 4 ? 1e39")}, "is not a number that 32 bits can hold"),
        ({"a": ("9.0 0.50 13.0", "9.0 high 13.0")}, "_atom_site row 4: occupancy of atom CA of residue 4"),
        ({"a": ("B SER A", "A SER A")}, "_atom_site row 5: atom CA of residue 4 comes twice"),
        ({"a": ("12.0 7 H", "12.0 7x H")}, "row 3: the author's residue number '7x' is not a 32-bit integer"),
        ({"a": ("MSE A 1 3 A", "MSE A 1 3 AB")}, "row 3: the insertion code 'AB' is not one ASCII character"),
        ({"a": ("MSE A 1 3 A", "MSE A 1 x A")}, "label_seq_id 'x' is not a positive 32-bit integer"),
        ({"a": ("MSE A 1 3 A", "MSE A 1 . A")}, "has no label_seq_id"),
        ({"a": ("MSE A 1 3 A", "MSE A 2 3 A")}, "row 3: chain A has atoms of entity 2 and of 1"),
        ({"a": ("12.0 7 H", "12.0 7 J")}, "row 3: chain A has two names of the author"),
        ({"a": ("14.0 8 H", "14.0 9 H")}, "row 5: residue 4 of chain A has two numbers of the author"),
        ({"a": ("2020-02-01", "2020-02-31")}, "_pdbx_audit_revision_history: '2020-02-31' is no date"),
        ({"a": ("2020-02-01", "20200201")}, "'20200201' is no date (YYYY-MM-DD)"),
        ({"a": ("2020-02-01", "2020-W05-6")}, "'2020-W05-6' is no date (YYYY-MM-DD)"),
        ({"a": ("polypeptide(L)", "polyribonucleotide")}, "model 1 has no atom whose label_entity_id is"),
        ({"a": ("_entity_poly.type", "_entity_poly.kind")}, "_entity_poly: it has no such column"),
        ({"a": ("_entity_poly_seq", "_odd_poly_seq")}, "a sequence cannot be told from atoms alone"),
        ({"a": ("_atom_site.Cartn_y", "_atom_site.y")}, "(_atom_site.Cartn_y); give the file as"),
        ({"a": ("data_9ABC", "data_x\n_x.y 1\ndata_y\n_x.y 1\ndata_9ABC")}, None),
        ({"a": ("_atom_site.", "_atoms.")}, "0 of its 1 data blocks have atoms"),
        ({"a": ("data_9ABC", "loop_")}, "line 1: it is not CIF text"),
        (
            {"a": ("ATOM 2 C CA .", "ATOM 2 C CA")},
            "it is not CIF text (Wrong number of values in loop _atom_site",
        ),
        ({"a": ("_refine.ls_d_res_high", "_entry.id")}, "line 4: it is not CIF text (duplicate tag"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_the_place(changes, message):
    if message is None:
        assert only(text(**changes)).sequence == "AGMSP", "blocks without atoms are none of ours"
        return
    with pytest.raises(StructureParseError) as caught:
        list(read_mmcif(text(**changes), "x.cif"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.cif")


def test_any_language_is_text_and_other_bytes_are_not():
    chain = only(text(a=("_entry.id 9ABC", "_entry.id 'Größe'")))
    assert chain.structure.source["entry_id"] == "Größe"
    with pytest.raises(StructureParseError, match=r"x\.cif, line 2: byte 0xf6 is no UTF-8"):
        only(text(a=("_entry.id 9ABC", "_entry.id 'Größe'")).decode().encode("latin-1"))


def test_messages_stay_short_and_errors_travel_between_processes():
    with pytest.raises(StructureParseError) as caught:
        list(read_mmcif(text(a=("1 3 MSE", "1 3 " + "L" * 100_000))))
    assert len(str(caught.value)) < 400
    again = caught.value.__reduce__()
    assert str(again[0](*again[1])) == str(caught.value)


def test_a_model_or_a_mode_that_does_not_exist():
    with pytest.raises(StructureParseError, match="there is no model 3; the models are 1, 2"):
        read_mmcif(text(), model=3)
    with pytest.raises(ValueError, match="modified 'Y' is not one of parent, X"):
        read_mmcif(text(), modified="Y")
    with pytest.raises(KeyError):
        read_mmcif(text()).chain("B")


def test_the_smallest_atom_table_has_no_loop():
    row = dict(zip(mmcif_texts.ATOM_ITEMS, ROWS[1].split(), strict=True))
    pairs = "".join(f"_atom_site.{name} {value}\n" for name, value in row.items())
    start = TEXT.index("loop_\n_atom_site")
    chain = only((TEXT[:start] + pairs).encode())
    assert chain.structure.atom_positions[0, 1].tolist() == [2.0, 2.5, 3.5]


def test_files_are_plain_or_compressed_and_bounded(tmp_path):
    (tmp_path / "x.cif").write_bytes(text())
    (tmp_path / "x.cif.gz").write_bytes(gzip.compress(text() + b"#" * (64 << 20)))
    assert load_mmcif(tmp_path / "x.cif").chain("A").sequence == "AGMSP"
    with pytest.raises(SourceTooLargeError):
        load_mmcif(tmp_path / "x.cif.gz", max_bytes=1 << 20)
    (tmp_path / "x.cif.gz").write_bytes(gzip.compress(text()))
    assert load_mmcif(tmp_path / "x.cif.gz", max_bytes=1 << 20).chain("A").sequence == "AGMSP"


def test_a_small_text_cannot_stand_for_a_huge_entry():
    long = "".join(f"1 {number} GLY\n" for number in range(6, 20_001))
    chains = [row.replace(" A 1 1 ", f" C{number} 1 1 ") for number in range(101) for row in ROWS[:1]]
    with pytest.raises(StructureParseError, match="its chains have 2020000 residues; the most"):
        read_mmcif(text(chains, a=("1 5 HYP\n", "1 5 HYP\n" + long)))
    with pytest.raises(StructureParseError, match="more than 1000 data blocks"):
        read_mmcif(b"".join(b"Data_%d _a.b 1 " % number for number in range(400_000)))
    many = [row.replace(" A 1 1 ", f" C{number} 1 1 ") for number in range(50_001) for row in ROWS[:1]]
    with pytest.raises(StructureParseError, match="it has 50001 protein chains; the most is 50000"):
        read_mmcif(text(many))
    longer = "".join(f"1 {number} GLY\n" for number in range(6, 100_002))
    with pytest.raises(StructureParseError, match="entity 1 has more than 100000 residues"):
        list(read_mmcif(text(a=("1 5 HYP\n", "1 5 HYP\n" + longer))))


def test_without_gemmi_the_message_says_what_to_install():
    code = (
        "import sys; sys.modules['gemmi'] = None\n"
        "from foldfeed.feature_store.parsers.mmcif.entry import read_mmcif\n"
        "from foldfeed.feature_store import MissingExtraError\n"
        "try:\n    read_mmcif(b'data_x')\nexcept MissingExtraError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "gemmi is not installed; run: pip install 'foldfeed[structures]'"
