"""Everything a store does, in a bucket of a real S3-compatible server."""

import concurrent.futures
import json
import multiprocessing
import os

import numpy as np
import pyarrow as pa
import pytest
from commit_storm import storm_at
from records import make_record

from foldfeed.feature_store import (
    CommitConflictError,
    FeatureStore,
    NotAStoreError,
    StorageRefusedError,
    StoreSettings,
    StoreUrlError,
    TagError,
    write_part,
)
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.storage import fsspec_requests as remote_files
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.storage import remote as blobs_remote
from foldfeed.feature_store.storage import s3_requests as s3_files
from foldfeed.feature_store.storage.options import delta_options

SETTINGS = StoreSettings(tile_rows=16, tile_cols=16)
RECORDS = [make_record("a1", 1, 9), make_record("b2", 70, 33, seed=2), make_record("c3", 37, 65, seed=3)]


@pytest.fixture
def store(s3) -> FeatureStore:
    """Two versions: three records, then one of them replaced."""
    store = FeatureStore.create(s3, SETTINGS)
    store.commit([write_part(s3, RECORDS, SETTINGS).part_id], job_id="1")
    other = write_part(s3, [make_record("b2", 5, 33, seed=9)], SETTINGS)
    store.commit([other.part_id], job_id="2", on_existing="replace")
    return store


def same_records(left: FeatureStore, right: FeatureStore) -> bool:
    for name in left.ids:
        np.testing.assert_array_equal(left[name].msa(), right[name].msa())
        np.testing.assert_array_equal(left[name].deletions(), right[name].deletions())
        assert left[name].rows().equals(right[name].rows())
    return left.ids == right.ids and left.fingerprint == right.fingerprint


def test_a_store_in_a_bucket_is_the_store_on_a_disk(store, tmp_path):
    """The same calls lead to the same versions, records and parts."""
    local = FeatureStore.create(tmp_path / "s", SETTINGS)
    local.commit([write_part(local.url, RECORDS, SETTINGS).part_id], job_id="1")
    part = write_part(local.url, [make_record("b2", 5, 33, seed=9)], SETTINGS)
    local.commit([part.part_id], job_id="2", on_existing="replace")
    assert same_records(FeatureStore.open(store.url), local)
    assert same_records(FeatureStore.open(store.url, 1), FeatureStore.open(local.url, 1))
    assert open_blobs(store.url).list("parts") == open_blobs(local.url).list("parts")
    seen = [(e.version, e.operation, e.job_id, e.num_added, e.num_records) for e in store.log()]
    assert seen == [(e.version, e.operation, e.job_id, e.num_added, e.num_records) for e in local.log()]


def test_crops_and_questions_are_answered_from_there(store):
    found = FeatureStore.open(store.url, 1)
    crop = found["b2"].crop(residues=slice(3, 30), rows=slice(5, 69))
    np.testing.assert_array_equal(crop.msa, RECORDS[1].msa[5:69, 3:30])
    np.testing.assert_array_equal(crop.deletions, RECORDS[1].deletions[5:69, 3:30])
    rows = found.query("select record_id, depth from records where depth > 1 order by depth")
    assert rows.to_pylist() == [{"record_id": "c3", "depth": 37}, {"record_id": "b2", "depth": 70}]


def test_commits_are_idempotent_and_conflicts_are_refused(store):
    again = write_part(store.url, [make_record("d4", 2, 8)], SETTINGS)
    assert store.commit([again.part_id], job_id="2").already_done
    clash = write_part(store.url, [make_record("a1", 3, 9, seed=8)], SETTINGS)
    with pytest.raises(CommitConflictError, match="'a1'"):
        store.commit([clash.part_id], job_id="3")
    assert store.commit([clash.part_id], job_id="4", on_existing="skip").num_added == 0
    assert FeatureStore.open(store.url).version == 2
    store.delete(["a1"])
    store.annotate(pa.table({"record_id": ["b2"], "year": [1999]}))
    newest = FeatureStore.open(store.url)
    assert newest.ids == ["b2", "c3"]
    assert newest.table(["year"])["year"].to_pylist() == [1999, None]
    assert FeatureStore.open(store.url, 2).ids == ["a1", "b2", "c3"]


def test_names_for_versions_and_records_are_taken_once(store):
    versions.set_tag(store.url, "paper", 1)
    versions.set_tag(store.url, "paper", 1)
    with pytest.raises(TagError, match="exists already"):
        versions.set_tag(store.url, "paper", 2)
    assert FeatureStore.open(store.url, "paper").version == 1
    saved = store.save_set("deep", "select record_id from records where depth > 3")
    assert FeatureStore.open(store.url).set("deep").fingerprint == saved.fingerprint
    assert verify(store.url, level="deep").problems == ()


def test_care_works_in_a_bucket(store):
    versions.set_tag(store.url, "first", 1)
    lone = write_part(store.url, [make_record("lone", 3, 7)], SETTINGS).part_id
    blobs = open_blobs(store.url)
    blobs.write_atomic("parts/.tmp-left/x", b"left by a writer")
    part_id = store.index_rows()["part_id"][0].as_py()
    shard = next(file.path for file in blobs.walk(f"parts/{part_id}") if "/c/" in file.path)
    whole = blobs.read(shard)
    blobs.write_atomic(shard, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert any(shard in problem.where for problem in verify(store.url).problems)
    repair(store.url)
    assert blobs.read(shard) == whole
    assert compact(store.url).num_moved == 3
    paths = {item.path for item in collect_garbage(store.url, grace_s=0, dry_run=True).removed}
    assert paths >= {f"parts/{lone}", "parts/.tmp-left"}
    assert blobs.exists(f"parts/{lone}")
    assert {item.path for item in collect_garbage(store.url, grace_s=0).removed} == paths
    assert not blobs.exists(f"parts/{lone}")
    assert collect_garbage(store.url, grace_s=0).removed == ()
    report = verify(store.url, level="deep")
    assert (report.problems, report.num_records) == ((), 3)
    assert len(FeatureStore.open(store.url, "first").ids) == 3


def test_a_lost_index_is_rebuilt_from_the_parts(store):
    blobs = open_blobs(store.url)
    blobs.delete("index/_delta_log/00000000000000000001.json")
    assert verify(store.url).version is None
    assert repair(store.url, rebuild_lost_index=True, on_ambiguous="newest").index_rebuilt
    after = FeatureStore.open(store.url)
    assert after.ids == ["a1", "b2", "c3"]
    assert verify(store.url).problems == ()
    assert any(name.startswith("index.damaged-") for name in blobs.list(""))


def test_copies_there_and_back_resume(store, tmp_path, s3):
    down = copy_store(store.url, tmp_path / "c")
    assert (down.parts_copied, down.parts_skipped) == (2, 0)
    assert same_records(FeatureStore.open(tmp_path / "c"), FeatureStore.open(store.url))
    first = copy_store(tmp_path / "c", f"{s3}-2")
    assert (first.parts_copied, first.num_added) == (2, 3)
    # As an interrupted copy leaves it: one part lacks a file.
    blobs = open_blobs(f"{s3}-2")
    blobs.delete(next(file.path for file in blobs.walk("parts") if "/c/" in file.path))
    again = copy_store(tmp_path / "c", f"{s3}-2")
    assert (again.parts_copied, again.parts_skipped, again.num_added) == (1, 1, 0)
    assert same_records(FeatureStore.open(f"{s3}-2"), FeatureStore.open(store.url))
    assert verify(f"{s3}-2", level="deep").problems == ()


def test_four_processes_commit_at_once_and_nothing_is_lost(s3):
    counts = storm_at(s3, 4, 3.0)
    assert counts["versions"] >= 4


def test_of_many_creators_of_one_name_one_wins(s3):
    blobs = open_blobs(s3)
    for number in range(10):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n, k=number: blobs.create_exclusive(f"x{k}", b"%d" % n), range(8)))
        assert sum(won) == 1
        assert blobs.read(f"x{number}") == b"%d" % won.index(True)
    assert blobs.list("") == [f"x{number}" for number in range(10)]


def test_a_server_that_replaces_a_name_that_is_there_is_refused(s3, monkeypatch):
    """Old servers ignore If-None-Match: two commits at once would both seem to win."""
    monkeypatch.setattr(blobs_remote, "_exclusive_storages", set())
    monkeypatch.setattr(s3_files.S3Files, "create", lambda self, path, data, token: self.put(path, data))
    with pytest.raises(StorageRefusedError, match="two commits at once could lose one"):
        FeatureStore.create(s3, SETTINGS)
    assert open_blobs(s3).walk("") == ()


def test_delta_rs_reads_the_index_and_sees_the_same(store):
    deltalake = pytest.importorskip("deltalake")
    store.annotate(pa.table({"record_id": ["b2"], "year": [1999]}))
    table = deltalake.DeltaTable(f"{store.url}/index", storage_options=delta_options(store.url))
    newest = Index.open(store.url, None)
    assert table.version() == newest.version == 4
    assert sorted(uri.rsplit("/", 1)[-1] for uri in table.file_uris()) == newest.files
    assert [field.name for field in table.schema().fields] == newest.schema.names
    assert table.transaction_version("1") == 1
    kept = table.to_pyarrow_table() if hasattr(table, "to_pyarrow_table") else pa.table(table.to_table())
    assert sorted(kept["record_id"].to_pylist()) == store.ids


def upload(source, target: str) -> None:
    blobs = open_blobs(target)
    for file in open_blobs(str(source)).walk(""):
        blobs.write_atomic(file.path, open_blobs(str(source)).read(file.path))


def test_what_delta_rs_wrote_is_read_and_continued_and_the_other_way_round(s3, tmp_path):
    """The log on a disk is delta-rs's, in a bucket our own; a store may move by copying files."""
    local = FeatureStore.create(tmp_path / "s", SETTINGS)
    local.commit([write_part(local.url, RECORDS, SETTINGS).part_id], job_id="1")
    local.annotate(pa.table({"record_id": ["a1"], "year": [1999]}))
    upload(local.url, s3)
    there = FeatureStore.open(s3)
    assert same_records(there, local)
    assert there.commit([], job_id="1").already_done
    there.commit([write_part(s3, [make_record("d4", 2, 8)], SETTINGS).part_id], job_id="2")
    there.annotate(pa.table({"record_id": ["d4"], "place": ["x"]}))
    there.delete(["b2"])
    upload(s3, str(tmp_path / "back"))
    back = FeatureStore.open(tmp_path / "back")
    assert back.version == there.version
    assert same_records(back, FeatureStore.open(s3))
    assert back.commit([], job_id="2").already_done
    assert verify(back.url, level="deep").problems == ()
    back.commit([write_part(back.url, [make_record("e5", 2, 8)], SETTINGS).part_id], job_id="3")
    assert verify(back.url, level="deep").problems == ()


def test_a_large_file_goes_up_in_pieces(s3, tmp_path, monkeypatch):
    """S3 wants pieces of 5 MiB or more."""
    monkeypatch.setattr(s3_files, "UPLOAD_PIECE_BYTES", 5 << 20)
    data = np.random.default_rng(1).bytes((11 << 20) + 3)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "big").write_bytes(data)
    blobs = open_blobs(s3)
    blobs.publish_folder(tmp_path / "f", "p")
    assert blobs.read("p/big") == data
    assert blobs.read_range("p/big", (5 << 20) - 2, 4) == data[(5 << 20) - 2 : (5 << 20) + 2]


def test_gc_removes_pieces_of_uploads_that_nobody_completed(store):
    files = remote_files.file_system(store.url)[0]
    prefix = store.url.removeprefix("s3://bucket/")
    for key in (f"{prefix}/parts/x/msa/c/0/0/0", f"{prefix}-other/parts/x"):
        upload = files.call_s3("create_multipart_upload", Bucket="bucket", Key=key)["UploadId"]
        files.call_s3(
            "upload_part", Bucket="bucket", Key=key, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20)
        )
    assert collect_garbage(store.url).removed == ()
    (found,) = collect_garbage(store.url, grace_s=0).removed
    assert (found.kind, found.path.split(" ")[0]) == ("unfinished upload", "parts/x/msa/c/0/0/0")
    left = files.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])
    assert [entry["Key"] for entry in left if entry["Key"].startswith(prefix)] == [f"{prefix}-other/parts/x"]


def test_ranges_at_and_behind_the_end(s3):
    blobs = open_blobs(s3)
    blobs.write_atomic("x", b"0123456789")
    blobs.write_atomic("empty", b"")
    read = blobs.open_range("x")
    assert [read(0, 10), read(8, 5), read(10, 5), read(99, 1), read(3, 0)] == [
        b"0123456789",
        b"89",
        b"",
        b"",
        b"",
    ]
    assert (blobs.read("empty"), blobs.read_range("empty", 0, 5)) == (b"", b"")
    for read_it in (blobs.read, lambda path: blobs.read_range(path, 0, 5), blobs.info, blobs.touch):
        with pytest.raises(FileNotFoundError):
            read_it("none")


def test_many_threads_read_one_file(s3):
    blobs = open_blobs(s3)
    data = np.random.default_rng(1).bytes(1 << 20)
    blobs.write_atomic("x", data)
    read = blobs.open_range("x")
    starts = np.random.default_rng(2).integers(0, len(data), 300).tolist()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda start: read(start, 1000), starts))
    assert found == [data[start : start + 1000] for start in starts]


def _read_in_child(store: FeatureStore, answers) -> None:
    crop = store["c3"].crop(residues=slice(0, 9), rows=slice(0, 5))
    opened = FeatureStore.open(store.url)
    answers.put((crop.msa.tobytes(), opened.fingerprint))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_process_reads_on(store, method):
    """fsspec's clients live in a thread, which a forked child does not have: it makes its own."""
    here = store["c3"].crop(residues=slice(0, 9), rows=slice(0, 5)).msa.tobytes()
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    children = [context.Process(target=_read_in_child, args=(store, answers)) for _ in range(2)]
    for child in children:
        child.start()
    found = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert found == [(here, store.fingerprint)] * 2
    assert store["c3"].crop(residues=slice(0, 9), rows=slice(0, 5)).msa.tobytes() == here


def test_a_bucket_without_a_store_and_a_bucket_that_is_not_there(s3):
    for url in (s3, "s3://no-such-bucket/x"):
        with pytest.raises(NotAStoreError, match="there is nothing at that path"):
            FeatureStore.open(url)
    open_blobs(s3).write_atomic("other", b"")
    with pytest.raises(NotAStoreError, match=r"holds other things, e\.g\. 'other'"):
        FeatureStore.create(s3)
    with pytest.raises(StoreUrlError, match="there is no bucket 'no-such-bucket'"):
        FeatureStore.create("s3://no-such-bucket/x")


def test_no_temporary_name_is_left_by_ordinary_work(store):
    names = [file.path for file in open_blobs(store.url).walk("")]
    assert not [name for name in names if ".tmp-" in name]
    log = [name for name in names if name.startswith("index/_delta_log/")]
    assert [os.path.basename(name) for name in log] == [f"{number:020}.json" for number in range(3)]
    for name in log:
        for line in open_blobs(store.url).read(name).splitlines():
            json.loads(line)
