"""A store that an older foldfeed wrote is read, verified, added to and compacted; nothing is migrated."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conformance_reader import ConformanceReader
from records import make_record, make_structure

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify

DATA = Path(__file__).parent / "data" / "store_before_structures.zip"
FINGERPRINT = "08b1597509e55aa0f15a19d56ac5c82719359082be516d374b7313dcd2ebc4dc"


def as_before(name: str, depth: int, length: int):
    return dataclasses.replace(make_record(name, depth, length), structure=None, neff=None)


WANTED = [as_before("a", 5, 9), as_before("b", 20, 12), as_before("c", 3, 30)]


@pytest.fixture
def older(tmp_path) -> FeatureStore:
    with zipfile.ZipFile(DATA) as archive:
        archive.extractall(tmp_path / "older")
    return FeatureStore.open(tmp_path / "older")


def check_older_records(store: FeatureStore) -> None:
    for want in WANTED:
        record = store[want.record_id]
        np.testing.assert_array_equal(record.msa(), want.msa)
        np.testing.assert_array_equal(record.deletions(), want.deletions)
        assert record.fingerprint == want.fingerprint
        assert record.structure() is None
        assert record.neff is None


def test_it_reads_as_it_did(older):
    assert older.fingerprint == FINGERPRINT
    check_older_records(older)
    assert verify(older.url, level="deep").problems == ()
    for want in WANTED:
        record = older[want.record_id]
        assert np.isnan(record.entropy()).all()
        assert np.isnan(record.neff_per_residue()).all()
        assert record.entropy().shape == (want.length,)
    assert older.query("select count(*) as n from records where neff is null")["n"].to_pylist() == [3]


def test_new_records_join_it_and_the_old_version_stays(older):
    before = older.version
    new = dataclasses.replace(make_record("d", 6, 10), structure=make_structure(10))
    part = write_part(older.url, [new], older.settings)
    older.commit([part.part_id], job_id="3")
    assert older.ids == ["a", "b", "c", "d"]
    check_older_records(older)
    assert older["d"].structure().fingerprint == new.structure.fingerprint
    assert older["d"].neff == new.neff.total
    assert older.table(["record_id"], "structure is not null")["record_id"].to_pylist() == ["d"]
    assert verify(older.url, level="deep").problems == ()
    assert FeatureStore.open(older.url, before).fingerprint == FINGERPRINT
    other = ConformanceReader(older.url)
    assert other.fingerprint("d") == new.fingerprint


def test_compaction_and_repair_write_its_records_in_the_new_form(older):
    for part in Path(older.url, "parts").iterdir():
        # Sidecars that can be derived anew, in the chunks they had: those of the profile are smaller today.
        for array in ("gap_fraction/c/0", "profile/c/0/0", "deletion_mean/c/0", "aatype/c/0"):
            (part / array).unlink()
    assert repair(older.url).after.problems == ()
    report = compact(older.url)
    assert report.parts_after == 1
    after = FeatureStore.open(older.url)
    assert after.fingerprint == FINGERPRINT
    check_older_records(after)
    for name in after.ids:
        assert np.isfinite(after[name].entropy()).all()
    assert verify(older.url, level="deep").problems == ()


def test_metadata_of_its_parts_is_made_again(older):
    """It says less than that of today's parts: fewer arrays, nothing about chunks."""
    wanted = {}
    for part in Path(older.url, "parts").iterdir():
        wanted[part] = (part / "zarr.json").read_bytes()
        (part / "zarr.json").unlink()
    report = repair(older.url)
    for part, data in wanted.items():
        assert (part / "zarr.json").read_bytes() == data
    assert report.after.problems == ()
