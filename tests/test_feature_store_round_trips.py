"""Out in a format and in again, several times: ids, descriptions and repeated rows stay what they are."""

import dataclasses

import numpy as np
import pytest
from import_reference import read_all
from records import make_record

from foldfeed.feature_store import DatabaseUse, FeatureStore, MsaRecord, write_part
from foldfeed.feature_store.exporters.formats import (
    EXPORT_FORMATS,
    ExportOptions,
    export_database,
    export_files,
    write_file,
)
from foldfeed.feature_store.parsers.conventions import KEEPS_REPEATS

LAYOUTS = {"alphafold2-npz": "alphafold2"}
ALIGNMENTS = sorted(name for name, form in EXPORT_FORMATS.items() if form.has_alignment)
# ColabFold calls every query 101 and Boltz's arrays have no texts at all.
DESCRIBED = sorted(set(ALIGNMENTS) - {"colabfold", "boltz-npz", "chai-pqt"})
IDS = ("sp|P69905|HBA_HUMAN", "pdb:1abc_A", "rec.1", "query", "1A")


def record_of(name: str, description: str, seed: int) -> MsaRecord:
    """A record of rows of two databases, the rows of each neighbours, some of them equal."""
    record = make_record(name, 9, 12, seed, big_deletions=False)
    record.deletions[0] = 0
    # Equal to the query, to a row of the same database and to one of the other.
    msa = record.msa.copy()
    msa[2], msa[4], msa[7] = msa[0], msa[3], msa[1]
    database = np.array([-1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int16)
    uses = tuple(
        DatabaseUse(name=name, digest="", tool="import", tool_version="", num_hits=4, num_rows=4)
        for name in ("uniref90", "mgnify")
    )
    rows = dataclasses.replace(record.rows, database=database)
    return dataclasses.replace(
        record, description=description, msa=msa, rows=rows, databases=uses, structure=None, neff=None
    )


def cycle(records, form: str, folder, **options) -> list[MsaRecord]:
    """Commits records, exports them all as a user's folder of that format, and imports the folder."""
    store = FeatureStore.create(folder / "store")
    part = write_part(store.url, sorted(records, key=lambda one: one.record_id), store.settings)
    store.commit([part.part_id], job_id="x")
    store = FeatureStore.open(store.url)
    out = folder / "out"
    out.mkdir()
    chosen = ExportOptions(form=form, chai_source="mgnify" if form == "chai-pqt" else None)
    if EXPORT_FORMATS[form].is_database:
        export_database(out, [store[name] for name in store.ids], chosen)
    else:
        for name in store.ids:
            for path, data in export_files(store[name], chosen).items():
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                write_file(out / path, data)
    found, read = read_all(out, **options)
    assert found.layout == LAYOUTS.get(form, form)
    assert (found.rejects, found.renamed) == ([], {})
    return read


@pytest.mark.parametrize("form", ALIGNMENTS)
def test_ids_and_rows_stay_over_three_cycles(tmp_path, form):
    records = [record_of(name, f"what {name} is", seed) for seed, name in enumerate(IDS)]
    now = records
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        now = cycle(now, form, folder)
        assert [record.record_id for record in now] == sorted(IDS)
        for record, want in zip(now, sorted(records, key=lambda one: one.record_id), strict=True):
            np.testing.assert_array_equal(record.msa, want.msa)
            np.testing.assert_array_equal(record.deletions, want.deletions)
            if form in DESCRIBED:
                assert record.description == want.description


@pytest.mark.parametrize("form", DESCRIBED)
def test_no_description_stays_none(tmp_path, form):
    (record,) = cycle([record_of("rec.1", "", 1)], form, tmp_path)
    assert record.description == ""


def test_repeated_rows_of_others_files_still_go(tmp_path):
    folder = tmp_path / "1abc_A"
    folder.mkdir()
    text = ">q\nACDE\n>a\nA-DE\n>b\nA-DE\n>c\nACDE\n"
    (folder / "uniref90_hits.a3m").write_text(text)
    (folder / "mgnify_hits.a3m").write_text(text)
    assert read_all(tmp_path)[1][0].depth == 2
    (folder / KEEPS_REPEATS).write_text("")
    assert read_all(tmp_path)[1][0].rows.hit_id == ["1abc_A", *"abcabc"]
    assert read_all(tmp_path, dedup="rows")[1][0].depth == 2


def test_pairing_keys_go_to_chai_and_boltz_and_come_back(tmp_path):
    record = record_of("rec.1", "", 1)
    keys = ["", "9606", "", "taxon number one", "", "7", "x" * 32, "", "9606"]
    rows = dataclasses.replace(record.rows, pairing_key=keys, species=[""] * 9)
    record = dataclasses.replace(record, rows=rows)
    for name in ("chai", "boltz"):
        (tmp_path / name).mkdir()
    (chai,) = cycle([record], "chai-pqt", tmp_path / "chai")
    assert chai.rows.pairing_key == keys
    assert chai.extra["assembly"] == "out"
    (boltz,) = cycle([record], "boltz-npz", tmp_path / "boltz")
    assert boltz.rows.species == [key if key.isdecimal() else "" for key in keys]
