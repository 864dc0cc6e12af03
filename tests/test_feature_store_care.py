"""Looking after a store: verify, repair, compact, copy, delete, own columns."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from records import make_record

from foldfeed.feature_store import (
    CommitConflictError,
    CorruptDataError,
    FeatureStore,
    MsaRecord,
    RecordNotFoundError,
    StoreSettings,
    StoreSettingsError,
    write_part,
)
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.rebuild import load_record
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=8)


def commit(store: FeatureStore, names: list[str], job: str, seed: int = 1, **options) -> str:
    records = [make_record(name, 4 + 3 * seed + len(name), 19 + seed, seed=seed) for name in sorted(names)]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id=job, **options)
    return part.part_id


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    """Six records in three parts."""
    made = FeatureStore.create(tmp_path / "s", SETTINGS)
    for number in range(3):
        commit(made, [f"r{number}a", f"r{number}bb"], f"job-{number}", seed=number)
    return made


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def shard(store: FeatureStore, record_id: str, array: str) -> Path:
    part_id = store.table(["part_id"], f"record_id = '{record_id}'")["part_id"][0].as_py()
    return next(path for path in Path(store.url, "parts", part_id, array, "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("level", ["quick", "full", "deep"])
def test_a_good_store_has_no_problems(store, level):
    report = verify(store.url, level=level)
    assert (report.problems, report.num_records, report.num_parts, report.version) == ((), 6, 3, 3)
    assert report.num_files > 80
    assert verify(store.url, level=level, version=1).num_records == 2


def test_levels_find_what_they_say(store):
    path = shard(store, "r1a", "profile")
    flip(path, 3)
    assert verify(store.url, level="quick").problems == ()
    report = verify(store.url)
    assert any(problem.where.endswith("profile/c/0/0") for problem in report.problems)
    # One chunk holds the profiles of both.
    assert report.damaged_records == ["r1a", "r1bb"]
    path.write_bytes(path.read_bytes()[:-1])
    assert verify(store.url, level="quick").damaged_records == ["r1a", "r1bb"]
    with pytest.raises(ValueError, match="'thorough' is not one of quick, full, deep"):
        verify(store.url, level="thorough")


def test_damage_to_one_record_does_not_blame_its_neighbour(store):
    flip(shard(store, "r1a", "msa"), 5)
    assert verify(store.url).damaged_records == ["r1a"]
    np.testing.assert_array_equal(store["r1bb"].msa(), make_record("r1bb", 11, 20, seed=1).msa)


def test_deep_finds_a_sidecar_that_is_intact_and_wrong(tmp_path, monkeypatch):
    """A writer that computes nonsense is the one thing that no checksum sees."""
    from foldfeed.feature_store.parts import writer

    store = FeatureStore.create(tmp_path / "s", SETTINGS)
    honest = writer.summarise

    def wrong(msa, deletions, *args, **kwargs):
        found = honest(msa, deletions, *args, **kwargs)
        found.deletion_mean[3] += 1
        return found

    monkeypatch.setattr(writer, "summarise", wrong)
    commit(store, ["a", "b"], "1")
    monkeypatch.undo()
    assert verify(store.url, level="full").problems == ()
    report = verify(store.url, level="deep")
    assert [problem.where.rsplit("/", 1)[-1] for problem in report.problems] == ["deletion_mean, chunk 0"]
    assert report.damaged_records == ["a", "b"]


def test_repair_restores_derived_files_bit_for_bit(store):
    part = shard(store, "r2a", "msa").parents[4]
    before = {path: path.read_bytes() for path in part.rglob("*") if path.is_file()}
    flip(part / "profile/c/0/0", 7)
    (part / "gap_fraction/c/0").unlink()
    (part / "msa/zarr.json").write_text("{}")
    flip(part / "aatype/c/0", 2)
    dry = repair(store.url, dry_run=True)
    assert len(dry.restored) == 4
    assert dry.after.problems
    report = repair(store.url)
    assert sorted(report.restored) == sorted(dry.restored)
    assert report.after.problems == ()
    assert {path: path.read_bytes() for path in part.rglob("*") if path.is_file()} == before


def test_repair_makes_the_metadata_of_a_part_again(store):
    path = shard(store, "r0a", "msa").parents[4] / "zarr.json"
    before = path.read_bytes()
    path.unlink()
    # A repair that was killed leaves such a file; it is none of the part's.
    (path.parent / "msa" / ".tmp-x").write_bytes(b"half")
    assert repair(store.url).after.problems == ()
    assert path.read_bytes() == before


def test_repair_takes_files_from_a_copy(store, tmp_path):
    copy_store(store.url, tmp_path / "copy")
    for array in ("msa", "record_json", "row_hit_id"):
        flip(shard(store, "r1a", array), 4)
    report = repair(store.url)
    assert report.restored == ()
    assert report.after.damaged_records == ["r1a", "r1bb"]
    report = repair(store.url, source_url=tmp_path / "copy")
    assert len(report.restored) == 3
    assert report.after.problems == ()


def test_quarantine_deletes_what_is_damaged_and_nothing_else(store):
    flip(shard(store, "r1a", "msa"), 5)
    report = repair(store.url, quarantine=True)
    assert report.quarantined == ("r1a",)
    after = FeatureStore.open(store.url)
    assert after.ids == ["r0a", "r0bb", "r1bb", "r2a", "r2bb"]
    newest = after.log()[0]
    assert (newest.operation, newest.num_removed) == ("quarantine", 1)
    assert newest.message.startswith("damaged: r1a (")
    assert "crc32c" in newest.message
    # The part stays, with its damage; compaction moves the good neighbour out of it.
    assert report.after.problems
    damaged = after.table(["part_id"], "record_id = 'r1bb'")["part_id"][0].as_py()
    compact(store.url, part_ids=[damaged])
    assert verify(store.url, level="deep").problems == ()
    assert FeatureStore.open(store.url)["r1bb"].fingerprint == after["r1bb"].fingerprint


def test_a_lost_index_is_rebuilt_from_the_parts(store):
    fingerprint = store.fingerprint
    shutil.rmtree(Path(store.url, "index"))
    report = verify(store.url)
    assert report.version is None
    assert "no index/" in report.problems[0].reason
    assert repair(store.url).after.problems, "without the flag nothing is rebuilt"
    report = repair(store.url, rebuild_lost_index=True)
    assert report.index_rebuilt
    assert report.after.problems == ()
    after = FeatureStore.open(store.url)
    assert after.fingerprint == fingerprint
    assert set(after.table(["job_id"])["job_id"].to_pylist()) == {"repair"}


def test_lost_settings_and_index_are_made_again(store):
    fingerprint = store.fingerprint
    shutil.rmtree(Path(store.url, "index"))
    Path(store.url, "foldfeed.json").unlink()
    assert repair(store.url, rebuild_lost_index=True).after.problems == ()
    assert FeatureStore.open(store.url).fingerprint == fingerprint


def test_a_damaged_index_is_moved_aside_and_replaced_records_need_a_decision(store):
    commit(store, ["r0a"], "newer", seed=9, on_existing="replace")
    fingerprint = store.fingerprint
    log = Path(store.url, "index/_delta_log/00000000000000000002.json")
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(CorruptDataError):
        FeatureStore.open(store.url)
    with pytest.raises(CommitConflictError, match="'r0a': the lost index knew"):
        repair(store.url, rebuild_lost_index=True)
    report = repair(store.url, rebuild_lost_index=True, on_ambiguous="newest")
    assert report.ambiguous == ("r0a",)
    assert FeatureStore.open(store.url).fingerprint == fingerprint
    (aside,) = Path(store.url).glob("index.damaged-*")
    assert (aside / "_delta_log").is_dir()


def test_missing_rows_are_added_on_request(store):
    store.delete(["r0a", "r2bb"])
    before = FeatureStore.open(store.url, version=3).fingerprint
    assert repair(store.url, add_missing=True, dry_run=True).added == ("r0a", "r2bb")
    assert repair(store.url, add_missing=True).added == ("r0a", "r2bb")
    assert FeatureStore.open(store.url).fingerprint == before
    assert repair(store.url, add_missing=True).added == ()


def test_settings_are_bound_to_the_index_and_restored_from_a_part(store):
    path = Path(store.url, "foldfeed.json")
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"tile_rows": 16', b'"tile_rows": 17'))
    with pytest.raises(CorruptDataError, match="not the file that the store was made with"):
        FeatureStore.open(store.url)
    assert repair(store.url).restored == ("foldfeed.json",)
    assert path.read_bytes() == before


def test_wrong_checkpoints_are_dropped(store):
    from deltalake import DeltaTable

    DeltaTable(f"{store.url}/index").create_checkpoint()
    (checkpoint,) = Path(store.url, "index/_delta_log").glob("*.checkpoint.parquet")
    assert verify(store.url).problems == ()
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    assert verify(store.url).problems
    assert repair(store.url).after.problems == ()
    assert not checkpoint.exists()
    assert FeatureStore.open(store.url).fingerprint == store.fingerprint


def test_compaction_changes_places_only(store):
    commit(store, ["r0a"], "replacement", seed=7, on_existing="replace")
    store.delete(["r2a"])
    store.annotate(pa.table({"record_id": ["r1a"], "cluster": ["c7"]}))
    before = store.table().to_pylist()
    dry = compact(store.url, dry_run=True)
    report = compact(store.url)
    assert (report.parts_before, report.parts_after, report.num_moved) == (4, 1, 5)
    assert (dry.parts_after, dry.num_moved, dry.version) == (1, 5, store.version)
    after = FeatureStore.open(store.url)
    for now, then in zip(after.table().to_pylist(), before, strict=True):
        differ = {key for key in then if now[key] != then[key]}
        assert {key for key in differ if not key.startswith("first_")} == {"part_id"}
    assert after.fingerprint == store.fingerprint
    for name in after.ids:
        np.testing.assert_array_equal(after[name].deletions(), store[name].deletions())
        assert after[name].rows().equals(store[name].rows())
    assert verify(store.url, level="deep").problems == ()
    assert [entry.operation for entry in after.log()[:2]] == ["compact", "annotate"]
    again = compact(store.url)
    assert (again.num_moved, again.version) == (0, after.version)


def test_a_record_is_read_back_whole(store):
    """A new field of a record must be read back too, or `compact` would lose it: add it to `load_record`."""
    fields = {field.name for field in dataclasses.fields(MsaRecord)}
    assert fields == {
        "record_id",
        "description",
        "sequence",
        "msa",
        "deletions",
        "rows",
        "databases",
        "extra",
        "structure",
        "neff",
        "templates",
    }
    wanted = [make_record("even", 10, 20), make_record("odd", 9, 21, templates=True)]
    part = write_part(store.url, wanted, store.settings)
    store.commit([part.part_id], job_id="whole")
    for want in wanted:
        row = store.table(where=f"record_id = '{want.record_id}'").to_pylist()[0]
        found = load_record(PartReader(open_blobs(store.url), row["part_id"]), row)
        assert found.fingerprint == want.fingerprint
        assert found.databases == want.databases
        assert found.extra == want.extra
        assert (found.structure is None) == (want.structure is None)
        assert (found.neff is None) == (want.neff is None)
    assert found.structure.fingerprint == wanted[1].structure.fingerprint
    assert found.neff.total == wanted[1].neff.total
    np.testing.assert_array_equal(found.neff.per_residue, wanted[1].neff.per_residue)


def test_compaction_fills_parts_to_the_target(store):
    report = compact(store.url, target_bytes=40_000)
    assert 1 < report.parts_after < 3
    assert verify(store.url, level="deep").problems == ()


def test_compaction_does_not_undo_what_others_do_meanwhile(store, monkeypatch):
    from foldfeed.feature_store.care import compact as module

    original = module.write_part

    def slow(url, records, settings):
        written = original(url, records, settings)
        other = FeatureStore.open(store.url)
        other.delete(["r1a"])
        commit(other, ["r2a"], "meanwhile", seed=8, on_existing="replace")
        return written

    monkeypatch.setattr(module, "write_part", slow)
    compact(store.url)
    after = FeatureStore.open(store.url)
    assert after.ids == ["r0a", "r0bb", "r1bb", "r2a", "r2bb"]
    assert after["r2a"].depth == make_record("r2a", 4 + 24 + 3, 27, seed=8).depth
    assert verify(store.url, level="deep").problems == ()


@pytest.mark.parametrize("target", ["local", "memory"])
def test_parts_are_copied_whole_or_not_at_all(store, tmp_path, target):
    from foldfeed.feature_store.care.copy import copy_part

    source = open_blobs(store.url)
    there = open_blobs(str(tmp_path / "t") if target == "local" else "memory://copied")
    part_id = store.table(["part_id"])["part_id"][0].as_py()
    assert copy_part(source, there, part_id) > 0
    assert copy_part(source, there, part_id) == 0
    names = [file.path for file in source.walk(f"parts/{part_id}")]
    assert [file.path for file in there.walk(f"parts/{part_id}")] == names
    # A damaged copy is not "there".
    there.write_atomic(f"parts/{part_id}/msa/zarr.json", b"{}")
    assert copy_part(source, there, part_id) > 0
    assert [there.read(name) for name in names] == [source.read(name) for name in names]
    there.delete(f"parts/{part_id}")
    assert there.walk("parts") == ()
    flip(Path(store.url, names[3]), 1)
    with pytest.raises(CorruptDataError):
        copy_part(source, there, part_id)
    assert there.walk("parts") == ()


def test_a_copy_goes_on_where_it_stopped(store, tmp_path):
    store.annotate(pa.table({"record_id": ["r1a"], "cluster": pa.array([7], pa.int64())}))
    target = tmp_path / "copy"
    told: list[tuple[str, int, int]] = []

    class StoppedError(Exception):
        pass

    def stop(*args):
        told.append(args)
        raise StoppedError

    with pytest.raises(StoppedError):
        copy_store(store.url, target, progress=stop)
    assert len(FeatureStore.open(target)) == 0
    report = copy_store(store.url, target)
    assert report.parts_skipped >= 1
    assert report.parts_copied + report.parts_skipped == 3
    assert report.num_added == 6
    copy = FeatureStore.open(target)
    assert copy.fingerprint == store.fingerprint
    assert copy.table(["record_id", "job_id", "cluster"]).equals(
        store.table(["record_id", "job_id", "cluster"])
    )
    assert told == [("copying parts", 1, 3)]
    again = copy_store(store.url, target)
    assert (again.parts_copied, again.num_added, again.version) == (0, 0, report.version)
    assert verify(target, level="deep").problems == ()


def test_a_copy_into_a_store_with_other_things(store, tmp_path):
    other = FeatureStore.create(tmp_path / "other", SETTINGS)
    commit(other, ["mine", "r0a"], "1", seed=5)
    with pytest.raises(CommitConflictError, match="'r0a'"):
        copy_store(store.url, other.url)
    assert copy_store(store.url, other.url, on_existing="skip").num_added == 5
    assert len(FeatureStore.open(other.url)) == 7
    assert copy_store(store.url, other.url, version=1, on_existing="replace").num_added == 1
    wrong = FeatureStore.create(tmp_path / "wrong", StoreSettings(tile_rows=8))
    with pytest.raises(StoreSettingsError):
        copy_store(store.url, wrong.url)


def test_delete_is_one_transaction_and_old_versions_stay(store):
    with pytest.raises(RecordNotFoundError, match="no record 'absent'"):
        store.delete(["r0a", "absent"])
    assert (store.version, len(store)) == (3, 6)
    result = store.delete(["r0a", "r2bb"], job_id="clean", message="both wrong")
    assert (result.version, result.num_removed, store.ids) == (4, 2, ["r0bb", "r1a", "r1bb", "r2a"])
    assert store.delete(["r0a"], job_id="clean").already_done
    assert FeatureStore.open(store.url, version=3)["r0a"].depth == 7
    entry = store.log()[0]
    assert (entry.operation, entry.message, entry.num_removed, entry.num_records) == (
        "delete",
        "both wrong",
        2,
        4,
    )
    commit(store, ["r0a"], "again")
    assert "r0a" in store


def test_own_columns_are_null_in_rows_that_are_older(store):
    fingerprint = store.fingerprint
    store.annotate(pa.table({"record_id": ["r0a", "r2a"], "cluster": ["x", "y"], "year": [1999, 2024]}))
    commit(store, ["new"], "later")
    rows = store.query("select record_id, cluster, year from records order by record_id").to_pylist()
    assert {row["record_id"]: (row["cluster"], row["year"]) for row in rows} == {
        "new": (None, None),
        "r0a": ("x", 1999),
        "r0bb": (None, None),
        "r1a": (None, None),
        "r1bb": (None, None),
        "r2a": ("y", 2024),
        "r2bb": (None, None),
    }
    store.annotate(pa.table({"record_id": ["new"], "cluster": ["z"]}))
    assert store.table(["cluster"], "record_id = 'new'")["cluster"].to_pylist() == ["z"]
    assert store.table(["year"], "record_id = 'r2a'")["year"].to_pylist() == [2024]
    old = FeatureStore.open(store.url, version=3)
    assert "cluster" not in old.table().column_names
    assert old.fingerprint == fingerprint
    np.testing.assert_array_equal(store["r0a"].msa(), old["r0a"].msa())
    with pytest.raises(CommitConflictError, match="'depth' belongs to the format"):
        store.annotate(pa.table({"record_id": ["r0a"], "depth": [1]}))
    with pytest.raises(CommitConflictError, match="'year' exists as int64, not string"):
        store.annotate(pa.table({"record_id": ["r0a"], "year": ["1999"]}))
    with pytest.raises(RecordNotFoundError, match="absent"):
        store.annotate(pa.table({"record_id": ["absent"], "year": [1]}))
    with pytest.raises(ValueError, match="give record_id and the columns"):
        store.annotate(pa.table({"cluster": ["x"]}))
    assert verify(store.url, level="deep").problems == ()


def test_a_column_of_a_newer_release_is_added_to_an_older_table(store, monkeypatch):
    """The schema of this release grows; stores that are there take the column with their next commit."""
    from foldfeed.feature_store.index import table as index_table
    from foldfeed.feature_store.index import transactions as index

    wider = index.INDEX_SCHEMA.append(pa.field("resolution", pa.float64()))
    monkeypatch.setattr(index, "INDEX_SCHEMA", wider)
    monkeypatch.setattr(index_table, "INDEX_SCHEMA", wider)
    opened = Index.open(store.url, None)
    assert opened.rows()["resolution"].null_count == 6
    rows = opened.rows().slice(0, 1).to_pylist()[0] | {
        "record_id": "z",
        "fingerprint": "f",
        "resolution": 1.8,
    }
    opened.commit(pa.Table.from_pylist([rows], schema=wider), job_id="z", message="", on_existing="error")
    assert opened.rows(["resolution"])["resolution"].to_pylist() == [None] * 6 + [1.8]
    monkeypatch.undo()
    # A reader that does not know the column goes on without it.
    assert FeatureStore.open(store.url)["r0a"].depth == store["r0a"].depth


def test_files_of_the_index_are_merged(store):
    index = Index.open(store.url, None)
    before = index.rows()
    assert len(index.files) == 3
    index.merge_files()
    assert len(index.files) == 1
    assert index.rows().equals(before)
    assert index.merge_files().version == index.version == 4


def test_many_small_files_of_the_index_are_merged_by_a_commit(store, monkeypatch):
    from foldfeed.feature_store.index import transactions as index

    monkeypatch.setattr(index, "MERGED_AT", 5)
    most = 0
    for number in range(12):
        commit(store, [f"x{number}"], f"x-{number}")
        most = max(most, len(Index.open(store.url, None).files))
    assert most == 5
    assert len(store) == 18
    assert [len(FeatureStore.open(store.url, version)) for version in (3, 9, 15)] == [6, 12, 18]
    assert verify(store.url).problems == ()


def test_parts_that_are_there_and_damaged_are_healed_by_the_job(store):
    path = shard(store, "r0a", "msa")
    before = path.read_bytes()
    flip(path, 5)
    record = [make_record("r0a", 4 + 3, 19, seed=0), make_record("r0bb", 4 + 4, 19, seed=0)]
    write_part(store.url, record, store.settings)
    assert path.read_bytes() == before
    assert [name for name in os.listdir(Path(store.url, "parts")) if name.startswith(".")] == []
