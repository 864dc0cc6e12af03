"""A network that fails between a store and its bucket: nothing lost, nothing wrong, an end to every attempt.

The faults come from a proxy before a real S3-compatible server; what was stored is looked at without them.
tests/campaigns/feature_store_network.py does more of it.
"""

import concurrent.futures
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from fault_proxy import ALL, BODY, FaultProxy, fault_proxy
from records import make_record

from foldfeed.feature_store import FeatureStore, FoldfeedError, StorageError, StoreSettings, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=16)
RECORDS = [make_record("a1", 1, 9), make_record("b2", 70, 33, seed=2), make_record("c3", 37, 65, seed=3)]


@pytest.fixture
def proxy(s3, s3_endpoint, monkeypatch) -> Iterator[FaultProxy]:
    """A proxy that clients of this process go through; it breaks nothing yet."""
    with fault_proxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setenv("FOLDFEED_STORAGE_PAUSE_S", "0.002")
        yield running


def after_requests(number: int) -> Callable[[str, str], bool]:
    """True from that request on: the network goes for good."""
    counter = itertools.count()
    # next() of a counter is one step for all threads.
    return lambda method, path: next(counter) >= number


def build(url: str) -> FeatureStore:
    """One job: two parts, a replaced record, a column, a tag, a deletion. It may be run again."""
    store = FeatureStore.create(url, SETTINGS)
    if "paper" in versions.tag_names(open_blobs(url)):
        return FeatureStore.open(url)
    store.commit([write_part(url, RECORDS, SETTINGS).part_id], job_id="1")
    other = write_part(url, [make_record("b2", 5, 33, seed=9), make_record("d4", 3, 8)], SETTINGS)
    store.commit([other.part_id], job_id="2", on_existing="replace")
    store.annotate(pa.table({"record_id": ["a1"], "year": [1999]}), job_id="3")
    store.delete(["c3"], job_id="4")
    versions.set_tag(url, "paper", store.version)
    return FeatureStore.open(url)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> FeatureStore:
    """The same job on a disk."""
    return build(str(tmp_path_factory.mktemp("expected") / "s"))


def check(url: str, expected: FeatureStore) -> None:
    """The store is as without faults: versions, records, parts, and no second copy of anything."""
    found = FeatureStore.open(url)
    assert (found.ids, found.fingerprint, found.version) == (
        expected.ids,
        expected.fingerprint,
        expected.version,
    )
    assert [e.job_id for e in found.log()] == [e.job_id for e in expected.log()]
    for name in found.ids:
        np.testing.assert_array_equal(found[name].msa(), expected[name].msa())
        np.testing.assert_array_equal(found[name].deletions(), expected[name].deletions())
    assert open_blobs(url).list("parts") == open_blobs(expected.url).list("parts")
    assert verify(url).problems == ()


def test_a_job_over_a_faulty_network_makes_the_same_store(s3, proxy, expected, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "20")
    proxy.inject(0.2, 1)
    store = build(s3)
    for name in store.ids:
        np.testing.assert_array_equal(store[name].msa(), expected[name].msa())
    proxy.calm()
    check(s3, expected)
    assert proxy.done.total() - proxy.done["requests"] > 10


@pytest.mark.parametrize("kind", ALL)
def test_each_kind_of_fault_alone(s3, proxy, kind, monkeypatch):
    """Among them answers that get lost after the server did what it was asked for."""
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "20")
    blobs = open_blobs(s3)
    proxy.inject(0.4, 7, kinds=(kind,))
    store = FeatureStore.create(s3, SETTINGS)
    result = store.commit([write_part(s3, RECORDS[1:], SETTINGS).part_id], job_id="1")
    assert (result.version, result.num_added, result.already_done) == (1, 2, False)
    assert FeatureStore.open(s3)["b2"].msa().tobytes() == RECORDS[1].msa.tobytes()
    blobs.touch("foldfeed.json")
    versions.set_tag(s3, "paper")
    store.delete(["c3"])
    proxy.calm()
    assert proxy.done[kind] > 3
    assert FeatureStore.open(s3).ids == ["b2"]
    assert [entry.tags for entry in store.log()] == [(), ("paper",), ()]
    assert verify(s3).problems == ()


def test_a_job_that_dies_of_faults_is_run_again_and_makes_the_same_store(s3, proxy, expected, monkeypatch):
    """Few attempts, many faults: each run gets a little further, whatever the last one left."""
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    failures = 0
    for number in range(200):
        proxy.inject(0.2, 100 + number)
        try:
            build(s3)
            break
        except StorageError:
            failures += 1
    proxy.calm()
    assert failures > 0
    check(s3, expected)
    collect_garbage(s3, grace_s=0)
    check(s3, expected)


def test_commits_whose_answers_get_lost_are_counted_once(s3, proxy):
    """Every PUT of the log lands, and its first answers do not."""
    store = FeatureStore.create(s3, SETTINGS)
    parts = [write_part(s3, [make_record(f"r{n}", 2, 5)], SETTINGS).part_id for n in range(4)]
    proxy.inject(
        0.7, 3, kinds=("cut after",), only=lambda method, path: method == "PUT" and "_delta_log" in path
    )
    for number, part in enumerate(parts):
        result = store.commit([part], job_id=str(number))
        assert (result.version, result.num_added, result.already_done) == (number + 1, 1, False)
    assert proxy.done["cut after"] > 2
    assert FeatureStore.open(s3).ids == ["r0", "r1", "r2", "r3"]


def test_a_name_that_we_took_ourselves_is_ours(s3, proxy, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "40")
    blobs = open_blobs(s3)
    assert blobs.create_exclusive("first", b"x")
    proxy.inject(0.4, 5, kinds=("cut after", "error 500 after"))
    assert all(blobs.create_exclusive(f"n{number}", b"%d" % number) for number in range(10))
    assert not any(blobs.create_exclusive(f"n{number}", b"other") for number in range(10))


def test_committers_at_once_over_a_faulty_network(s3, proxy, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "20")
    store = FeatureStore.create(s3, SETTINGS)
    parts = [write_part(s3, [make_record(f"r{n}", 2, 5)], SETTINGS).part_id for n in range(6)]
    proxy.inject(0.15, 11)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda n: FeatureStore.open(s3).commit([parts[n]], job_id=str(n)), range(len(parts)))
        )
    proxy.calm()
    assert sorted(result.version for result in results) == list(range(1, 7))
    assert FeatureStore.open(s3).ids == sorted(f"r{n}" for n in range(6))
    assert len(store.log()) == 1
    assert verify(s3).problems == ()


@pytest.mark.parametrize("kind", BODY)
def test_a_read_of_too_few_or_too_many_bytes_is_never_used(s3, proxy, kind, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "30")
    blobs = open_blobs(s3)
    data = np.random.default_rng(1).bytes(10_000)
    blobs.write_atomic("x", data)
    proxy.inject(0.5, 2, kinds=(kind,))
    for start, size in ((0, 10_000), (17, 1), (5_000, 99_999), (9_999, 2), (10_000, 5), (3, 4_000)):
        assert blobs.read_range("x", start, size) == data[start : start + size]
    assert blobs.read("x") == data
    assert [file.num_bytes for file in blobs.walk("")] == [10_000]
    assert proxy.done[kind] > 0


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("error 500", "injected"),
        ("error 503", "injected"),
        ("cut before", "Connection"),
        ("short, length right", "ShortReadError: 5 bytes came of a file of 10|ChecksumError"),
        (
            "cut in the body",
            "ClientPayloadError|IncompleteRead|ResponseStreamingError|not enough data|Connection",
        ),
    ],
)
def test_a_fault_that_stays_ends_in_one_clear_error(s3, proxy, kind, cause, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "3")
    blobs = open_blobs(s3)
    blobs.write_atomic("x", b"0123456789")
    before = proxy.done["requests"]
    proxy.inject(1.0, kinds=(kind,))
    with pytest.raises(
        StorageError, match=rf"read '{s3}/x' failed 3 times; the last time: .*({cause})"
    ) as caught:
        blobs.read("x")
    error = caught.value
    assert (error.url, error.operation, error.attempts) == (f"{s3}/x", "read", 3)
    # Below all else sits aiohttp, which sends a request again when a connection that was kept open is gone.
    assert before + 3 <= proxy.done["requests"] <= before + 6
    assert isinstance(error, FoldfeedError)


def test_the_command_line_says_so_in_one_line(s3, proxy, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    build(s3)
    proxy.inject(1.0, kinds=("error 503",))
    for command in (["show", s3], ["query", s3, "select 1"], ["verify", s3], ["gc", s3, "--dry-run"]):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.stderr
        assert "failed 2 times" in result.stderr


def test_wrong_keys_are_not_tried_again(s3, proxy, monkeypatch):
    build(s3)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    before = proxy.done["requests"]
    with pytest.raises(StorageError, match="failed once; the last time: PermissionError"):
        FeatureStore.open(s3)
    assert proxy.done["requests"] == before + 1


def test_silence_is_a_fault_too(s3, proxy, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_TIMEOUT_S", "0.5")
    blobs = open_blobs(s3)
    blobs.write_atomic("x", b"0123456789")
    proxy.inject(0.5, 1, kinds=("stalled",))
    assert [blobs.read("x") for _ in range(4)] == [b"0123456789"] * 4
    assert proxy.done["stalled"] > 0


@pytest.mark.parametrize(
    "care",
    [
        lambda url: verify(url),
        lambda url: repair(url, rebuild_lost_index=True, quarantine=True, on_ambiguous="newest"),
        lambda url: compact(url),
        lambda url: collect_garbage(url, grace_s=0),
    ],
    ids=["verify", "repair", "compact", "gc"],
)
def test_a_network_that_fails_is_never_taken_for_damage(s3, proxy, expected, care, monkeypatch):
    """Wherever the network goes for good: the command ends with that, and the store is as it was."""
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "1")
    build(s3)
    before = {file.path: file.num_bytes for file in open_blobs(s3).walk("") if "/_delta_log/" in file.path}
    needed = proxy.done["requests"]
    for after in (0, 4, 30):
        proxy.inject(1.0, kinds=("error 503",), only=after_requests(after))
        with contextlib.suppress(StorageError):
            care(s3)
        proxy.calm()
        found = FeatureStore.open(s3)
        assert (found.ids, found.fingerprint) == (expected.ids, expected.fingerprint)
        names = {file.path: file.num_bytes for file in open_blobs(s3).walk("") if "/_delta_log/" in file.path}
        assert names.items() >= before.items()
        assert not [name for name in open_blobs(s3).list("") if name.startswith("index.damaged")]
    assert verify(s3).problems == ()
    assert proxy.done["requests"] > needed


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_copy_over_a_faulty_network_resumes(s3, proxy, tmp_path, direction, monkeypatch):
    records = [make_record(f"r{number}", 30, 40, seed=number) for number in range(3)]
    source = FeatureStore.create(s3 if direction == "down" else tmp_path / "here", SETTINGS)
    parts = [write_part(source.url, [record], SETTINGS).part_id for record in records]
    source.commit(parts, job_id="1")
    target = str(tmp_path / "there") if direction == "down" else s3
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    proxy.inject(1.0, kinds=("error 503",), only=after_requests(60))
    with pytest.raises(StorageError):
        copy_store(source.url, target)
    for number in range(200):
        proxy.inject(0.15, number)
        try:
            copy_store(source.url, target)
            break
        except StorageError:
            continue
    proxy.calm()
    assert FeatureStore.open(target).fingerprint == FeatureStore.open(source.url).fingerprint
    assert verify(target, level="deep").problems == ()
    assert sorted(open_blobs(target).list("parts")) == sorted(parts)


def test_an_upload_in_pieces_survives_and_leaves_no_pieces(s3, proxy, tmp_path, monkeypatch):
    from foldfeed.feature_store.storage import fsspec_requests as remote_files
    from foldfeed.feature_store.storage import s3_requests as s3_files

    monkeypatch.setattr(s3_files, "UPLOAD_PIECE_BYTES", 5 << 20)
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "20")
    data = np.random.default_rng(1).bytes((11 << 20) + 3)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "big").write_bytes(data)
    blobs = open_blobs(s3)
    for seed in range(2):
        proxy.inject(0.4, seed)
        blobs.publish_folder(tmp_path / "f", f"p{seed}")
        proxy.calm()
        assert blobs.read(f"p{seed}/big") == data
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    proxy.inject(1.0, kinds=("error 500",), only=lambda method, path: "partNumber=2" in path)
    with pytest.raises(StorageError, match=r"upload .* failed 2 times"):
        blobs.publish_folder(tmp_path / "f", "p9")
    proxy.calm()
    files = remote_files.file_system(s3)[0]
    prefix = s3.removeprefix("s3://bucket/")
    left = files.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])
    assert [upload["Key"] for upload in left if upload["Key"] == f"{prefix}/p9/big"] == []
    assert not blobs.exists("p9/big")
    assert os.path.getsize(tmp_path / "f" / "big") == len(data)
