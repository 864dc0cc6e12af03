"""Structures go out as mmCIF and as AlphaFold 2's labels, and come back bit by bit."""

import io
import random

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mmcif_samples import sample

from foldfeed.feature_store import ExportOptions, FeatureStore, Structure, import_into
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.exchange_errors import ExportError, SourceFileError
from foldfeed.feature_store.exporters.formats import export_record, render
from foldfeed.feature_store.exporters.mmcif import decimals, to_mmcif
from foldfeed.feature_store.exporters.rows import ExportRows, rows_of_msa
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.structure import ATOM_NAMES, NO_NUMBER
from foldfeed.feature_store.importers.labels import structure_of_labels
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.parsers.mmcif.entry import load_mmcif, read_mmcif

pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")

import gemmi
import mmcif_texts

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=4)


def rows_of(sequence: str, structure: Structure | None) -> ExportRows:
    length = len(sequence)
    return ExportRows(
        record_id="r",
        description="a 'small' \"protein\" of é",
        sequence=sequence,
        msa=alphabet.encode(sequence)[None],
        deletions=np.zeros((1, length), dtype=np.int32),
        databases=[""],
        hit_ids=["r"],
        species=[""],
        pairing_keys=[""],
        structure=structure,
    )


@st.composite
def structures(draw) -> tuple[str, Structure]:
    """Any sequence with any structure that has an atom."""
    length = draw(st.integers(1, 6))
    sequence = draw(st.text("ACDEFGHIKLMNPQRSTVWYXBZUJO", min_size=length, max_size=length))
    mask = draw(hnp.arrays(np.uint8, (length, 37), elements=st.integers(0, 1), fill=st.just(0)))
    mask[draw(st.integers(0, length - 1)), draw(st.integers(0, 36))] = 1
    numbers = st.integers(-(2**31) + 1, 2**31 - 1) | st.just(NO_NUMBER)
    facts = {
        "entry_id": "1 abc",
        "label_asym_id": draw(NAMES),
        "auth_asym_id": draw(NAMES),
        "method": "A 'b' \"c\"",
    }
    return sequence, Structure(
        atom_positions=draw(hnp.arrays(np.float32, (length, 37, 3), elements=FLOATS))
        * (mask[..., None] == 1),
        atom_mask=mask,
        b_factor=draw(hnp.arrays(np.float32, (length, 37), elements=FLOATS)) * (mask == 1),
        residue_number=draw(hnp.arrays(np.int32, length, elements=numbers)),
        insertion_code=draw(hnp.arrays(np.uint8, length, elements=st.integers(33, 126) | st.just(0))),
        source=facts | {"model": "7", "release_date": "2020-02-29", "resolution_angstrom": "1.50"},
    )


@settings(max_examples=200, deadline=None)
@given(case=structures())
def test_any_structure_comes_back_bit_by_bit(case):
    sequence, structure = case
    (chain,) = read_mmcif(to_mmcif(rows_of(sequence, structure)), fix_arginine=False)
    assert chain.sequence == sequence
    for name, array in structure.arrays.items():
        np.testing.assert_array_equal(getattr(chain.structure, name), array, err_msg=name)
    assert structure.source.items() <= chain.structure.source.items()


@settings(max_examples=300, deadline=None)
@given(values=hnp.arrays(np.float32, 20, elements=FLOATS))
def test_decimals_give_the_same_float_however_they_are_rounded(values):
    texts = decimals(values)
    np.testing.assert_array_equal(np.array([np.float32(text) for text in texts]), values)
    np.testing.assert_array_equal(
        np.array([gemmi.cif.as_number(text) for text in texts]).astype(np.float32), values
    )


def test_decimals_are_those_of_the_file():
    texts = ["20.255", "-0.003", "1000.125", "0.0", "9.5"]
    assert decimals(np.array(texts, dtype=np.float32)) == texts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_chain_of_an_entry_comes_back(seed):
    for chain in chains_of(seed):
        (again,) = read_mmcif(to_mmcif(rows_of(chain.sequence, chain.structure)), fix_arginine=False)
        assert again.sequence == chain.sequence
        for name, array in chain.structure.arrays.items():
            np.testing.assert_array_equal(getattr(again.structure, name), array)
        kept = {"entry_id", "label_asym_id", "auth_asym_id", "model", "method", "polymer_type"}
        kept |= {"resolution_angstrom", "release_date"}
        ours, theirs = chain.structure.source, again.structure.source
        assert {name: theirs.get(name) for name in kept} == {name: ours.get(name) for name in kept}


def chains_of(seed: int) -> list:
    """The chains of a random entry; none where nothing of its first model was observed."""
    entry = mmcif_texts.random_entry(random.Random(seed))
    is_seen = any(residue.atoms[0] for residues in entry.chains.values() for residue in residues)
    return list(read_mmcif(mmcif_texts.text_of(entry))) if is_seen else []


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_other_readers_find_the_same_atoms(seed):
    for chain in chains_of(seed):
        numbers = zip(chain.structure.residue_number, chain.structure.insertion_code, strict=True)
        if len(set(numbers)) < chain.structure.length:
            continue  # gemmi knows a residue by its author's number, and random ones may repeat
        data = to_mmcif(rows_of(chain.sequence, chain.structure))
        found = gemmi.make_structure_from_block(gemmi.cif.read_string(data)[0])
        found.setup_entities()
        polymer = [residue for residue in found[0][0] if residue.entity_type == gemmi.EntityType.Polymer]
        residues = np.flatnonzero(chain.structure.observed)
        assert len(polymer) == len(residues)
        for at, residue in zip(residues, polymer, strict=True):
            assert residue.label_seq == at + 1
            assert residue.seqid.num == chain.structure.residue_number[at]
            assert (residue.seqid.icode.strip() or "\0") == chr(chain.structure.insertion_code[at])
            assert len(residue) == chain.structure.atom_mask[at].sum()
            for atom in residue:
                place = chain.structure.atom_positions[at, ATOM_NAMES.index(atom.name)]
                np.testing.assert_array_equal(np.float32(atom.pos.tolist()), place)


def test_gemmi_reads_the_sequence_of_a_real_chain(real_file):
    chain = next(iter(load_mmcif(real_file("structures/7rye.cif.gz"))))
    found = gemmi.make_structure_from_block(
        gemmi.cif.read_string(to_mmcif(rows_of(chain.sequence, chain.structure)))[0]
    )
    found.setup_entities()
    assert gemmi.one_letter_code(found.entities[0].full_sequence) == chain.sequence
    assert len(found[0][0].get_polymer()) == chain.structure.observed.sum()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"atom": False}, "its structure has no atom"),
        ({"code": 10}, "its insertion code 10 is no printable ASCII character"),
        ({"source": {"release_date": "soon"}}, "its release date 'soon' is no date"),
        ({"source": {"resolution_angstrom": "high"}}, "its resolution 'high' is no number"),
    ],
)
def test_what_mmcif_cannot_hold_is_refused(changes, reason):
    mask = np.zeros((1, 37), dtype=np.uint8)
    mask[0, 1] = changes.get("atom", True)
    structure = Structure(
        atom_positions=np.zeros((1, 37, 3), dtype=np.float32),
        atom_mask=mask,
        b_factor=np.zeros((1, 37), dtype=np.float32),
        residue_number=np.array([1], dtype=np.int32),
        insertion_code=np.array([changes.get("code", 0)], dtype=np.uint8),
        source=changes.get("source", {}),
    )
    with pytest.raises(ExportError, match="record 'r' cannot be exported") as caught:
        to_mmcif(rows_of("A", structure))
    assert reason in str(caught.value)


LABELS = {
    "all_atom_positions": np.ones((5, 37, 3), dtype=np.float32),
    "all_atom_mask": np.ones((5, 37), dtype=np.float32),
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"all_atom_mask": None}, "'all_atom_positions' is there without its other half"),
        ({"all_atom_mask": np.ones((5, 36))}, "'all_atom_mask' must be numbers of shape (5, 37)"),
        ({"all_atom_mask": np.full((5, 37), 0.5)}, "'all_atom_mask' has other values than 0 and 1"),
        ({"all_atom_positions": np.full((5, 37, 3), "x")}, "must be numbers of shape (5, 37, 3)"),
        ({"all_atom_positions": np.full((5, 37, 3), 1e39)}, "a number that 32 bits cannot hold"),
        ({"release_date": np.array([b"soon"])}, "release_date 'soon' is no date"),
        ({"release_date": np.array([b"20200201"])}, "release_date '20200201' is no date"),
    ],
)
def test_labels_that_are_none_are_refused(changes, reason):
    features = {name: value for name, value in (LABELS | changes).items() if value is not None}
    with pytest.raises(SourceFileError) as caught:
        structure_of_labels(features, 5, "features.npz")
    assert reason in str(caught.value)


def test_what_is_no_atom_has_no_place_and_an_unknown_resolution_is_absent():
    mask = np.eye(5, 37)
    found = structure_of_labels(LABELS | {"all_atom_mask": mask, "resolution": np.zeros(1, "f4")}, 5, "x")
    assert (found.atom_positions == mask[..., None]).all()
    assert found.source == {"source_format": "alphafold2"}
    assert structure_of_labels({}, 5, "x") is None


@pytest.fixture
def store(tmp_path):
    (tmp_path / "9abc.cif").write_bytes(sample("9ABC", {"A": "H"}))
    import_into(tmp_path / "store", AlignmentImport(tmp_path, "mmcif"))
    (tmp_path / "x.a3m").write_text(">x\nACDE\n")
    import_into(tmp_path / "store", AlignmentImport(tmp_path / "x.a3m"))
    return FeatureStore.open(tmp_path / "store")


def test_the_command_writes_structures_and_reads_them_back(store, tmp_path):
    done = CliRunner().invoke(
        main, ["export", store.url, "9abc_H", "--format", "mmcif", "--output", f"{tmp_path}/o.cif.gz"]
    )
    assert done.exit_code == 0, done.output
    (chain,) = load_mmcif(tmp_path / "o.cif.gz")
    assert chain.sequence == store["9abc_H"].sequence
    for name, array in store["9abc_H"].structure().arrays.items():
        np.testing.assert_array_equal(getattr(chain.structure, name), array)
    none = CliRunner().invoke(main, ["export", store.url, "x", "--format", "mmcif"])
    assert (none.exit_code, "it has no structure; give it one with `foldfeed structures`" in none.output) == (
        1,
        True,
    )
    rows = CliRunner().invoke(main, ["export", store.url, "x", "--format", "mmcif", "--rows", "3"])
    assert (rows.exit_code, "max_rows 3 has no effect on mmcif" in rows.output) == (2, True)


def test_labels_of_alphafold_2(store, tmp_path):
    options = ExportOptions(form="alphafold2-npz")
    with np.load(io.BytesIO(export_record(store["9abc_H"], options))) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    structure = store["9abc_H"].structure()
    np.testing.assert_array_equal(found["all_atom_positions"], structure.atom_positions)
    np.testing.assert_array_equal(found["all_atom_mask"], structure.atom_mask)
    assert found["all_atom_mask"].dtype == found["all_atom_positions"].dtype == np.float32
    np.testing.assert_array_equal(found["aatype"].argmax(axis=1), alphabet.encode("AGMSP"))
    np.testing.assert_array_equal(found["residue_index"], np.arange(5))
    assert found["resolution"] == np.float32(1.5)
    assert found["release_date"].tolist() == [b"2020-02-01"]
    with np.load(io.BytesIO(export_record(store["x"], options))) as arrays:
        assert not any("atom" in name for name in arrays.files)
    (tmp_path / "features.npz").write_bytes(export_record(store["9abc_H"], options))
    (back,) = AlignmentImport(tmp_path / "features.npz")
    np.testing.assert_array_equal(back.structure.atom_positions, structure.atom_positions)
    np.testing.assert_array_equal(back.structure.atom_mask, structure.atom_mask)
    assert (back.structure.residue_number == NO_NUMBER).all()
    assert back.structure.source["resolution_angstrom"] == "1.5"
    assert back.extra["release_date"] == back.structure.source["release_date"] == "2020-02-01"
    # A record that is not in a store yet has its structure, too.
    (record,) = AlignmentImport(tmp_path / "9abc.cif", "mmcif")
    assert render(rows_of_msa(record), options) == export_record(store["9abc_H"], options)
