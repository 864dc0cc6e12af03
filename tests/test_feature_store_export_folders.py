"""Records as folders of files, one file per database, and back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.exchange_errors import ExportError
from foldfeed.feature_store.exporters.folders import to_openproteinset, write_openfold_db
from foldfeed.feature_store.exporters.formats import ExportOptions, export_files
from foldfeed.feature_store.exporters.rows import rows_of_msa
from foldfeed.feature_store.exporters.texts import to_colabfold
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.layouts import AlignmentImport, detect_layout
from foldfeed.feature_store.importers.rows import ImportOptions


def named(record: MsaRecord, *names: str) -> MsaRecord:
    databases = tuple(dataclasses.replace(record.databases[0], name=name) for name in names)
    return dataclasses.replace(record, databases=databases)


def back_from(folder: Path, *databases: str) -> MsaRecord:
    options = ImportOptions(databases=databases)
    (record,) = list(AlignmentImport(folder, "openproteinset", options))
    return record


@settings(max_examples=20, deadline=None)
@given(
    depth=st.sampled_from([1, 2, 3, 9, 130]),
    # Long enough that no two random rows are equal: the import takes equal rows once.
    length=st.sampled_from([13, 65]),
    seed=st.integers(0, 10**6),
    order=st.permutations(["uniref90", "mgnify"]),
)
def test_rows_come_back_database_by_database(tmp_path_factory, depth, length, seed, order):
    record = named(make_record("rec.1", depth, length, seed=seed), *order)
    folder = tmp_path_factory.mktemp("ops") / "rec.1"
    folder.mkdir()
    for name, data in to_openproteinset(rows_of_msa(record)).items():
        (folder / name).write_bytes(data)
    back = back_from(folder, *order)
    # What was interleaved is grouped; within a database nothing moves.
    places = np.argsort(record.rows.database, kind="stable")
    np.testing.assert_array_equal(back.msa, record.msa[places])
    np.testing.assert_array_equal(back.deletions, record.deletions[places])
    np.testing.assert_array_equal(back.rows.database, record.rows.database[places])
    assert [use.name for use in back.databases] == list(order)
    assert list(back.rows.hit_id[1:]) == [record.rows.hit_id[row] for row in places[1:]]


def test_a_database_without_rows_has_a_file_with_the_query(tmp_path):
    record = named(make_record("rec.1", 5, 9), "uniref90", "mgnify")
    rows = dataclasses.replace(record.rows, database=np.array([-1, 0, 0, 0, 0], np.int16))
    files = to_openproteinset(rows_of_msa(dataclasses.replace(record, rows=rows)))
    assert {name: data.count(b">") for name, data in files.items()} == {
        "uniref90_hits.a3m": 5,
        "mgnify_hits.a3m": 1,
    }


@pytest.mark.parametrize("name", ["a/b", "", "..", "pdb70_hits", "hmm_output", "two words"])
def test_databases_that_cannot_name_a_file_are_refused(name):
    record = named(make_record("rec.1", 5, 9), "uniref90", name)
    if name in ("pdb70_hits", "hmm_output"):
        # With the ending that files of databases have these are names like any other.
        assert f"{name}_hits.a3m" in to_openproteinset(rows_of_msa(record))
        return
    with pytest.raises(ExportError, match="cannot name a file of alignments"):
        to_openproteinset(rows_of_msa(record))


def test_a_record_without_a_database_is_refused():
    record = make_record("rec.1", 1, 9)
    with pytest.raises(ExportError, match="no database was searched"):
        to_openproteinset(rows_of_msa(dataclasses.replace(record, databases=())))


def test_a_store_goes_out_as_openproteinset_and_comes_back(tmp_path):
    store = FeatureStore.create(tmp_path / "store")
    records = [named(make_record(f"r{n}", 30, 13 + n, seed=n), "uniref90", "mgnify") for n in range(3)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")

    def run(*args: object):
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    out = tmp_path / "out"
    words = ("export", store.url, *store.ids, "--format", "openproteinset")
    assert run(*words).exit_code == 2
    result = run(*words, "--output", out, "--compress", ".gz")
    assert (result.exit_code, result.stderr) == (0, f"6 files in {out}\n")
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.gz"))[:2] == [
        "r0/mgnify_hits.a3m.gz",
        "r0/uniref90_hits.a3m.gz",
    ]
    assert detect_layout(out) == "openproteinset"
    again = run("ingest", "--alignments", out, "--store", tmp_path / "again")
    assert again.exit_code == 0, again.output
    copy = FeatureStore.open(tmp_path / "again")
    assert copy.ids == store.ids
    for name in store.ids:
        order = store[name].rows().append_column("place", [list(range(30))]).to_pylist()
        order.sort(key=lambda row: (row["rank"] > 0, row["database"] == "mgnify", row["place"]))
        places = [row["place"] for row in order]
        np.testing.assert_array_equal(copy[name].msa(), store[name].msa()[places])
        np.testing.assert_array_equal(copy[name].deletions(), store[name].deletions()[places])
    # One record is a folder as well, and few rows are few.
    assert run(*words[:2], "r1", *words[-2:], "--output", tmp_path / "one", "--rows", 2).exit_code == 0
    texts = [path.read_text() for path in (tmp_path / "one" / "r1").iterdir()]
    assert sum(text.count(">") for text in texts) == 3


def test_a_store_goes_out_as_an_alignment_database_and_comes_back(tmp_path):
    store = FeatureStore.create(tmp_path / "store")
    records = [named(make_record(f"r{n}", 20, 13 + n, seed=n), "uniref90", "mgnify") for n in range(3)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="j")

    def run(*args: object):
        return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)

    words = ("export", store.url, *store.ids, "--format", "openfold-db", "--output", tmp_path / "out")
    assert run(*words, "--compress", ".gz").exit_code == 2
    result = run(*words)
    assert (result.exit_code, result.stderr) == (0, f"6 files in {tmp_path / 'out'}\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alignments.db", "alignments.index"]
    # The same files as OpenProteinSet's folders, and the same records when they are read.
    run("export", store.url, *store.ids, "--format", "openproteinset", "--output", tmp_path / "folders")
    index = json.loads((tmp_path / "out" / "alignments.index").read_text())
    data = (tmp_path / "out" / "alignments.db").read_bytes()
    for name, entry in index.items():
        for file, start, size in entry["files"]:
            assert data[start : start + size] == (tmp_path / "folders" / name / file).read_bytes()
    for source in ("out", "folders"):
        assert (
            run(
                "ingest", "--alignments", tmp_path / source, "--store", tmp_path / f"{source}-store"
            ).exit_code
            == 0
        )
    first, second = (FeatureStore.open(tmp_path / f"{source}-store") for source in ("out", "folders"))
    assert first.ids == second.ids == store.ids
    for name in store.ids:
        np.testing.assert_array_equal(first[name].msa(), second[name].msa())
        np.testing.assert_array_equal(first[name].deletions(), second[name].deletions())
    again = run(*words)
    assert again.exit_code == 1
    assert "exists; export the database to another folder" in again.stderr


def test_a_database_appears_whole_or_not_at_all(tmp_path):
    good = rows_of_msa(named(make_record("a", 3, 5), "uniref90", "mgnify"))
    bad = rows_of_msa(named(make_record("b", 3, 5), "uniref90", "a/b"))
    with pytest.raises(ExportError, match="'a/b'"):
        write_openfold_db(tmp_path, [good, bad])
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_record_have_safe_names():
    record = named(make_record("sp|P1", 3, 5), "uniref90", "mgnify")

    class Stored:
        """What export asks of a record of a store."""

        record_id, sequence, description, depth = record.record_id, record.sequence, "", 3
        databases = tuple(dataclasses.asdict(use) for use in record.databases)

        def crop(self, rows):
            return record

        def rows(self):
            import pyarrow as pa

            names = [None, "uniref90", "mgnify"]
            return pa.table(
                {"database": names, "hit_id": ["q", "a", "b"], "species": [""] * 3, "pairing_key": [""] * 3}
            )

    files = export_files(Stored(), ExportOptions(form="openproteinset"), ".gz")
    assert list(files) == ["sp%7CP1/uniref90_hits.a3m.gz", "sp%7CP1/mgnify_hits.a3m.gz"]


def test_colabfold_text_begins_as_colabfold_writes_it():
    record = make_record("rec.1", 3, 5)
    lines = to_colabfold(rows_of_msa(record)).decode().splitlines()
    assert lines[:2] == ["#5\t1", ">101"]
    assert "".join(letter for letter in lines[2] if not letter.islower()) == record.sequence
