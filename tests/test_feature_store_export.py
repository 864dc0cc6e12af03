"""Export and import again: equal alignments and deletions, in every format, for records of odd sizes."""

import dataclasses
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from families import as_a3m, family
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.exchange_errors import ExportError
from foldfeed.feature_store.exporters import texts as export_text
from foldfeed.feature_store.exporters.arrays import to_boltz_npz
from foldfeed.feature_store.exporters.formats import (
    EXPORT_FORMATS,
    ExportOptions,
    file_name,
    render,
    write_file,
)
from foldfeed.feature_store.exporters.jobs import chai_file_name, to_alphafold3_json
from foldfeed.feature_store.exporters.rows import rows_of_msa, rows_of_record
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.rows import ImportOptions

LAYOUT_OF = {"alphafold2-npz": "alphafold2"}
FILES = sorted(name for name, form in EXPORT_FORMATS.items() if not form.is_folder and not form.is_database)
ALIGNMENTS = sorted(name for name in FILES if EXPORT_FORMATS[name].has_alignment)


def exact_record(depth: int, length: int, seed: int, rare_letters: bool = False):
    """A record without insertions in the query, which Stockholm and AlphaFold 3 could not state."""
    record = make_record("rec.1", depth, length, seed=seed)
    record.deletions[0] = 0
    if rare_letters:
        # The query's own letters come back, the hits' do not: B and D are one code.
        letters = np.random.default_rng(seed).choice(list("ARNDBZUJOX"), length)
        sequence = "".join(letters)
        msa = record.msa.copy()
        msa[0] = alphabet.encode(sequence)
        record = dataclasses.replace(record, sequence=sequence, msa=msa)
    return record


def through(record, form: str, suffix: str = "", **options):
    """Writes a record in a format and reads it back."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = ExportOptions(form=form, **options)
        path = Path(folder, file_name(record.record_id, record.sequence, chosen, suffix))
        write_file(path, render(rows_of_msa(record), chosen))
        found = AlignmentImport(
            path, LAYOUT_OF.get(form, form), ImportOptions(paired=form == "alphafold3-json")
        )
        (back,) = list(found)
    return back


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(ALIGNMENTS),
    depth=st.sampled_from([1, 2, 3, 7, 63, 130]),
    length=st.sampled_from([1, 2, 9, 64, 65, 257]),
    seed=st.integers(0, 10**6),
    rare_letters=st.booleans(),
)
def test_export_and_import_give_equal_alignments(form, depth, length, seed, rare_letters):
    record = exact_record(depth, length, seed, rare_letters)
    back = through(record, form)
    np.testing.assert_array_equal(back.msa, record.msa)
    np.testing.assert_array_equal(back.deletions, record.deletions)
    if form != "boltz-npz":
        assert back.sequence == record.sequence
    if form in ("a3m", "a2m", "colabfold", "alphafold3-json", "chai-pqt"):
        assert back.rows.hit_id[1:] == record.rows.hit_id[1:]
    if form == "alphafold2-npz":
        assert back.rows.species[1:] == record.rows.species[1:]
    if form == "chai-pqt":
        # One column holds both: a row with a pairing key has that there, any other its species.
        keys = list(record.rows.pairing_key or [""] * depth)
        species = ["" if key else name for key, name in zip(keys, record.rows.species, strict=True)]
        assert list(back.rows.pairing_key or [""] * depth)[1:] == keys[1:]
        assert back.rows.species[1:] == species[1:]
    if form == "chai-pqt":
        names = [[use.name for use in one.databases] for one in (record, back)]
        for row in range(1, depth):
            assert names[0][record.rows.database[row]] == names[1][back.rows.database[row]]


@settings(max_examples=25, deadline=None)
@given(
    form=st.sampled_from(["a3m", "a2m", "colabfold", "alphafold2-npz", "boltz-npz", "chai-pqt"]),
    depth=st.integers(1, 9),
    length=st.integers(1, 70),
    seed=st.integers(0, 10**6),
)
def test_insertions_in_the_query_survive_where_the_format_has_a_place(form, depth, length, seed):
    record = make_record("rec.1", depth, length, seed=seed)
    back = through(record, form)
    np.testing.assert_array_equal(back.msa, record.msa)
    np.testing.assert_array_equal(back.deletions, record.deletions)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst", ".bz2"])
def test_files_are_compressed_by_name_and_repeat_byte_for_byte(tmp_path, suffix):
    record = exact_record(9, 65, 1)
    back = through(record, "a3m", suffix)
    np.testing.assert_array_equal(back.msa, record.msa)
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}{suffix}", b"ACDE" * 1000)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert ((tmp_path / f"a{suffix}").stat().st_size < 1000) == bool(suffix)


@pytest.mark.parametrize("form", FILES)
def test_equal_records_give_equal_bytes(form):
    options = ExportOptions(form=form)
    if form == "mmcif":
        pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")
    texts = [render(rows_of_msa(exact_record(30, 41, 5)), options) for _ in range(2)]
    assert texts[0] == texts[1]


def test_blocks_of_rows_change_nothing(monkeypatch):
    record = make_record("rec.1", 50, 33)
    whole = export_text.to_a3m(rows_of_msa(record))
    monkeypatch.setattr(export_text, "BLOCK_CHARACTERS", 100)
    assert export_text.to_a3m(rows_of_msa(record)) == whole


def small_record(**changes):
    record = exact_record(3, 4, 1)
    record.deletions[1:] = 0
    record.deletions[1, 2] = 2
    rows = dataclasses.replace(record.rows, **changes)
    return dataclasses.replace(record, rows=rows)


def test_texts_letter_by_letter():
    record = small_record(hit_id=["q", "h 1", "h\t1"])
    query, first, second = (alphabet.decode(row) for row in record.msa)
    rows = rows_of_msa(record)
    assert export_text.to_a3m(rows).decode() == (
        f">rec.1 record rec.1\n{query}\n>h_1\n{first[:2]}xx{first[2:]}\n>h_1\n{second}\n"
    )
    assert export_text.to_a2m(rows).decode().split("\n")[1::2] == [
        f"{query[:2]}..{query[2:]}",
        f"{first[:2]}xx{first[2:]}",
        f"{second[:2]}..{second[2:]}",
    ]
    lines = export_text.to_stockholm(rows).decode().splitlines()
    assert lines[0] == "# STOCKHOLM 1.0"
    assert [line.split() for line in lines[4:8]] == [
        ["rec.1", f"{query[:2]}--{query[2:]}"],
        ["h_1", f"{first[:2]}xx{first[2:]}"],
        ["h_1_2", f"{second[:2]}--{second[2:]}"],
        ["#=GC", "RF", "xx..xx"],
    ]
    assert lines[-1] == "//"


@pytest.mark.parametrize(
    "hit_ids", [["", "", ""], ["q", "ss_pred", "#x"], ["q", "//", "rec.1"], ["q", ">a\n>b", "é\0"]]
)
@pytest.mark.parametrize("form", ["a3m", "a2m", "sto", "alphafold3-json", "chai-pqt"])
def test_names_cannot_break_a_format(form, hit_ids):
    record = small_record(hit_id=hit_ids)
    back = through(record, form)
    np.testing.assert_array_equal(back.msa, record.msa)
    np.testing.assert_array_equal(back.deletions, record.deletions)
    record = dataclasses.replace(record, description="a\n>b\n//\r# STOCKHOLM 1.0")
    np.testing.assert_array_equal(through(record, form).msa, record.msa)


def test_alphafold_3_json_as_its_documentation_has_it():
    record = small_record()
    databases = (record.databases[0], dataclasses.replace(record.databases[1], name="uniprot"))
    rows = dataclasses.replace(record.rows, database=np.array([-1, 1, 0], np.int16))
    record = dataclasses.replace(record, databases=databases, rows=rows)
    job = json.loads(to_alphafold3_json(rows_of_msa(record)))
    assert (job["dialect"], job["name"], job["modelSeeds"]) == ("alphafold3", "rec.1", [1])
    protein = job["sequences"][0]["protein"]
    assert (protein["id"], protein["sequence"], protein["templates"]) == ("A", record.sequence, [])
    assert protein["unpairedMsa"].count(">") == 2
    assert protein["pairedMsa"].splitlines()[1] == record.sequence
    assert protein["pairedMsa"].count(">") == 2
    back = through(record, "alphafold3-json")
    assert [use.name for use in back.databases] == ["unpaired", "paired"]
    np.testing.assert_array_equal(back.msa, record.msa[[0, 2, 1]])


def test_alphafold_2_features_as_its_pipeline_makes_them():
    record = small_record(species=["", "HUMAN", ""])
    with np.load(io.BytesIO(render(rows_of_msa(record), ExportOptions(form="alphafold2-npz")))) as features:
        got = dict(features)
    letters = "ACDEFGHIKLMNPQRSTVWYX-"
    want = [[letters.index(letter) for letter in alphabet.decode(row)] for row in record.msa]
    assert got["msa"].tolist() == want
    assert got["msa"].dtype == got["deletion_matrix_int"].dtype == got["aatype"].dtype == np.int32
    order = "ARNDCQEGHILKMFPSTWYVX"
    assert got["aatype"].tolist() == [[int(letter == other) for other in order] for letter in record.sequence]
    assert got["residue_index"].tolist() == [0, 1, 2, 3]
    assert got["seq_length"].tolist() == [4] * 4
    assert got["num_alignments"].tolist() == [3] * 4
    assert got["between_segment_residues"].tolist() == [0] * 4
    assert got["sequence"][0].decode() == record.sequence
    assert got["domain_name"][0] == b"record rec.1"
    assert got["msa_species_identifiers"].tolist() == [b"", b"HUMAN", b""]


def test_boltz_arrays_as_its_parser_makes_them():
    record = small_record(species=["", "9606", "HUMAN"])
    tokens = ["<pad>", "-", *"ARNDCQEGHILKMFPSTWYV", "X"]
    sequences, deletions, residues = [], [], []
    for number, (row, counts) in enumerate(zip(record.msa, record.deletions, strict=True)):
        start = (len(residues), len(deletions))
        residues += [tokens.index(letter) for letter in alphabet.decode(row)]
        deletions += [(column, count) for column, count in enumerate(counts.tolist()) if count]
        taxonomy = 9606 if number == 1 else -1
        sequences.append((number, taxonomy, start[0], len(residues), start[1], len(deletions)))
    with np.load(io.BytesIO(to_boltz_npz(rows_of_msa(record)))) as got:
        assert got["sequences"].tolist() == sequences
        assert got["deletions"].tolist() == deletions
        assert got["residues"]["res_type"].tolist() == residues
        assert got["sequences"].dtype.names == (
            "seq_idx",
            "taxonomy",
            "res_start",
            "res_end",
            "del_start",
            "del_end",
        )
        assert [got["sequences"].dtype[n].str for n in range(6)] == ["<i2", *["<i4"] * 5]


def test_chai_parquet_as_its_reader_checks_it():
    record = small_record(species=["", "HUMAN", ""])
    table = pq.read_table(io.BytesIO(render(rows_of_msa(record), ExportOptions(form="chai-pqt"))))
    assert table.column_names == ["sequence", "source_database", "pairing_key", "comment"]
    assert table["source_database"][0].as_py() == "query"
    assert set(table["source_database"].to_pylist()[1:]) <= {"uniref90", "mgnify"}
    assert table["sequence"][0].as_py() == record.sequence
    # The example file of chai-lab is named by the hash of its query.
    name = chai_file_name(
        "aiqrtpkiqvysrhpaengksnflncyvsgfhpsdievdllkngeriekvehsdlsfskdwsfyllyyteftptekdeyacrvnhvtlsqpkivkwdrdm"
    )
    assert name == "703adc2c74b8d7e613549b6efcf37126da7963522dc33852ad3c691eef1da06f.aligned.pqt"


def test_what_a_format_cannot_hold_is_refused_with_the_limit():
    with_insertions = make_record("rec.1", 2, 200)
    with pytest.raises(ExportError, match="its query has inserted residues"):
        export_text.to_stockholm(rows_of_msa(with_insertions))
    record = small_record()
    record.deletions[1, 2] = 2**31 - 1
    record.deletions[2, 2] = 2**31 - 1
    rows = rows_of_msa(record)
    for write, words in (
        (export_text.to_a3m, "4294967306 characters"),
        (export_text.to_a2m, "padded to the longest insertion"),
        (export_text.to_stockholm, "padded to the longest insertion"),
        (to_boltz_npz, "2147483647 inserted residues at one place and Boltz's format holds 32767"),
    ):
        with pytest.raises(ExportError, match=words) as caught:
            write(rows)
        assert caught.value.record_id == "rec.1"
    record = small_record()
    databases = (dataclasses.replace(record.databases[0], name="colabfold"), record.databases[1])
    rows = dataclasses.replace(record.rows, database=np.array([-1, 0, 0], np.int16))
    record = dataclasses.replace(record, databases=databases, rows=rows)
    with pytest.raises(ExportError, match="Chai does not know the database 'colabfold'"):
        through(record, "chai-pqt")
    assert through(record, "chai-pqt", chai_source="uniref90").databases[0].name == "uniref90"


def test_file_names_are_safe_and_do_not_meet():
    options = ExportOptions(form="a3m")
    assert file_name("sp|P1|A_B:1", "A", options) == "sp%7CP1%7CA_B%3A1.a3m"
    assert file_name("a|b", "A", options) != file_name("a:b", "A", options) != file_name("a_b", "A", options)
    assert file_name("a", "A", ExportOptions(form="sto"), ".gz") == "a.sto.gz"


def test_options_that_make_no_sense_are_refused():
    for wrong in ({"form": "x"}, {"form": "a3m", "max_rows": 0}, {"form": "a3m", "chai_source": "uniref90"}):
        with pytest.raises(ValueError, match=r"is one of|is not one of|at least 1"):
            ExportOptions(**wrong)


def test_a_stored_record_exports_as_it_was_imported(tmp_path):
    record = exact_record(700, 65, 3)
    store = FeatureStore.create(tmp_path / "store")
    store.commit([write_part(store.url, [record], store.settings).part_id], job_id="j")
    rows = rows_of_record(store["rec.1"])
    for name in ("msa", "deletions"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(record, name))
    assert rows.structure is None, "read only for formats that have a place for it"
    plain = dataclasses.replace(rows_of_msa(record), structure=None)
    # Field by field: on Python 3.13 == of dataclasses asks even the same array for one truth value.
    for field in dataclasses.fields(rows):
        if field.name not in ("msa", "deletions"):
            assert getattr(rows, field.name) == getattr(plain, field.name), field.name
    structure = rows_of_record(store["rec.1"], structure=True).structure
    assert structure is not None
    assert structure.fingerprint == record.structure.fingerprint
    first = rows_of_record(store["rec.1"], max_rows=5)
    assert (first.depth, len(first.hit_ids)) == (5, 5)


def test_an_a3m_file_comes_back_line_by_line(tmp_path):
    rows = family(400, 61)
    original = as_a3m(rows)
    (tmp_path / "query.a3m").write_text(original)
    (record,) = list(AlignmentImport(tmp_path / "query.a3m"))
    text = export_text.to_a3m(rows_of_msa(record)).decode()
    # The same, but for which letters were inserted, and those right of the last column.
    want = [
        "".join("x" if letter.islower() else letter for letter in "".join(pieces[:-1])) for _, pieces in rows
    ]
    odd = str.maketrans("BZUJO", "DECXX")
    assert text.splitlines()[1::2] == [row.translate(odd) for row in want]
    assert text.splitlines()[2::2] == [f">{name}" for name, _ in rows[1:]]
