"""A store on a plain web server: read as on a disk, everything else refused."""

import multiprocessing
import pickle
import threading

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from fault_proxy import fault_proxy
from range_server import range_server
from records import make_record

from foldfeed.feature_store import (
    CorruptDataError,
    FeatureStore,
    NotAStoreError,
    StorageError,
    StorageRefusedError,
    StoreSettings,
    StoreUrlError,
    write_part,
)
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.object_log import newest_version
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=16)


@pytest.fixture
def local(tmp_path) -> FeatureStore:
    """Six versions, one of them with a name."""
    store = FeatureStore.create(tmp_path / "my store", SETTINGS)
    records = [make_record("a1", 1, 9), make_record("b2", 70, 33, seed=2), make_record("c3", 37, 65, seed=3)]
    store.commit([write_part(store.url, records, SETTINGS).part_id], job_id="1")
    store.annotate(pa.table({"record_id": ["b2"], "year": [1999]}))
    versions.set_tag(store.url, "paper")
    store.save_set("deep", "select record_id from records where depth > 3")
    store.commit([write_part(store.url, [make_record("d4", 4, 8)], SETTINGS).part_id], job_id="2")
    store.delete(["a1"])
    return store


@pytest.fixture
def web(local, tmp_path):
    """The same store behind a web server."""
    with range_server(tmp_path) as (url, _):
        yield f"{url}/my%20store"


def test_a_store_on_a_web_server_reads_as_on_a_disk(local, web):
    store = FeatureStore.open(web)
    assert (store.version, store.ids, store.fingerprint) == (5, local.ids, local.fingerprint)
    for name in store.ids:
        np.testing.assert_array_equal(store[name].msa(), local[name].msa())
        np.testing.assert_array_equal(store[name].deletions(), local[name].deletions())
    crop = store["b2"].crop(residues=slice(3, 30), rows=slice(5, 69))
    np.testing.assert_array_equal(crop.msa, local["b2"].msa()[5:69, 3:30])
    question = "select record_id, depth, year from records order by record_id"
    assert store.query(question).equals(local.query(question))
    assert store.set("deep").fingerprint == local.set("deep").fingerprint


def test_every_version_and_tag_of_it_opens(local, web):
    for version in range(local.version + 1):
        there, here = FeatureStore.open(web, version), FeatureStore.open(local.url, version)
        assert (there.ids, there.fingerprint) == (here.ids, here.fingerprint)
    assert FeatureStore.open(web, "paper").version == 3
    with pytest.raises(ValueError, match="version 6 does not exist"):
        FeatureStore.open(web, 6)


def test_the_newest_version_is_found_with_few_requests(local, tmp_path):
    """Without a list of files: doubling, then halving."""
    for number in range(40):
        local.annotate(pa.table({"record_id": ["b2"], "year": [number]}))
        if number in (0, 1, 2, 5, 6, 11, 39):
            with range_server(tmp_path) as (url, requests):
                assert newest_version(open_blobs(f"{url}/my store".replace(" ", "%20"))) == local.version
                assert len(requests) <= 14


def test_the_command_line_reads_it(local, web):
    result = CliRunner().invoke(main, ["query", web, "select count(*) as n from records", "--format", "csv"])
    assert result.exit_code == 0, result.output
    assert "3" in result.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["report", "--output", "r.html"], "list"),
        (["log"], "list"),
        (["sets"], "list"),
        (["query", "select name from sets"], "list"),
        (["query", "select name from splits"], "list"),
        (["tag"], "list"),
        (["verify"], "list"),
        (["repair"], "list"),
        (["gc", "--dry-run"], "list"),
        (["delete", "b2"], "write"),
        (["compact"], "write"),
        (["save-set", "x", "select record_id from records"], "create"),
        (["tag", "paper2"], "create"),
    ],
)
def test_commands_that_the_readme_says_are_refused(local, web, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    before = FeatureStore.open(local.url)
    result = CliRunner().invoke(main, [arguments[0], web, *arguments[1:]])
    assert result.exit_code == 1, result.output
    assert f"cannot {word}" in result.output
    after = FeatureStore.open(local.url)
    assert (after.version, after.fingerprint) == (before.version, before.fingerprint)


def test_a_redirect_is_followed(local, tmp_path):
    with range_server(tmp_path) as (url, _):
        assert FeatureStore.open(f"{url}/moved/my%20store").fingerprint == local.fingerprint


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (lambda url: FeatureStore.create(f"{url}/new"), "list"),
        (lambda url: write_part(url, [make_record("x", 2, 5)], SETTINGS), "write"),
        (lambda url: FeatureStore.open(url).delete(["b2"]), "write"),
        (lambda url: FeatureStore.open(url).log(), "list"),
        (lambda url: collect_garbage(url), "list"),
        (lambda url: versions.set_tag(url, "t"), "create"),
        (lambda url: versions.delete_tag(url, "paper"), "list"),
    ],
)
def test_what_a_web_server_cannot_do_is_refused_with_the_reason(web, operation, word):
    with pytest.raises(StorageRefusedError, match=f"cannot {word}"):
        operation(web)


def test_a_copy_of_one_comes_back(local, web, tmp_path):
    report = copy_store(web, tmp_path / "copy")
    assert (report.num_added, report.names_known, report.names_copied) == (3, False, ())
    assert FeatureStore.open(tmp_path / "copy").fingerprint == local.fingerprint


def test_a_server_without_ranges_is_refused_and_not_believed(local, tmp_path):
    with range_server(tmp_path, ranges=False) as (url, _):
        store = FeatureStore.open(f"{url}/my%20store")
        with pytest.raises(StorageRefusedError, match="answers a range with the whole file"):
            store["b2"].msa()


def test_absent_stores_and_impossible_addresses(web):
    with pytest.raises(NotAStoreError, match=r"it has no foldfeed\.json"):
        FeatureStore.open(f"{web}/none")
    with pytest.raises(StoreUrlError, match="it names no host"):
        FeatureStore.open("http:///x")
    with pytest.raises(StoreUrlError, match=r"\? or # cannot be"):
        FeatureStore.open(f"{web}?token=1")


def test_nobody_listening_is_a_bounded_and_typed_error(monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    with range_server(__file__) as (url, _):
        pass
    with pytest.raises(
        StorageError, match=r"failed 2 times; the last time: ConnectionRefusedError"
    ) as caught:
        FeatureStore.open(f"{url}/s")
    assert (caught.value.url, caught.value.operation, caught.value.attempts) == (
        f"{url}/s/foldfeed.json",
        "read",
        2,
    )
    result = CliRunner().invoke(main, ["show", f"{url}/s"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_a_missing_version_in_the_middle_is_damage(local, web):
    (open_blobs(local.url).root / "index/_delta_log/00000000000000000003.json").unlink()
    with pytest.raises(CorruptDataError, match="the file is missing"):
        FeatureStore.open(web)


@pytest.mark.parametrize("seed", range(3))
def test_a_faulty_network_changes_no_value(local, web, seed, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "12")
    with fault_proxy(web.rpartition("/")[0]) as proxy:
        proxy.inject(0.3, seed)
        store = FeatureStore.open(f"{proxy.url}/my%20store")
        assert (store.ids, store.fingerprint) == (local.ids, local.fingerprint)
        for name in store.ids:
            np.testing.assert_array_equal(store[name].msa(), local[name].msa())
            np.testing.assert_array_equal(store[name].deletions(), local[name].deletions())
    assert proxy.done.total() >= proxy.done["requests"] + 3


def test_a_server_that_falls_silent_is_left_and_asked_again(local, web, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_TIMEOUT_S", "0.5")
    with fault_proxy(web.rpartition("/")[0]) as proxy:
        proxy.inject(0.2, 1, kinds=("stalled",))
        assert FeatureStore.open(f"{proxy.url}/my%20store")["b2"].msa().shape == (70, 33)
        assert proxy.done["stalled"] > 0


def _read(store: FeatureStore, answers) -> None:
    answers.put(store["b2"].msa().tobytes())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_threads_and_forked_children_have_connections_of_their_own(local, web):
    store = FeatureStore.open(web)
    whole = local["b2"].msa().tobytes()
    assert store["b2"].msa().tobytes() == whole
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_read, args=(store, answers)) for _ in range(3)]
    for child in children:
        child.start()
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(store["b2"].msa().tobytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found + [answers.get(timeout=60) for _ in children] == [whole] * 7
    for child in children:
        child.join(60)
        assert child.exitcode == 0


def test_a_server_that_denies_what_is_not_there(local, tmp_path):
    """A public bucket whose objects may be read and not listed."""
    with range_server(tmp_path, absent=403) as (url, _):
        for version in (None, 0, 4):
            there = FeatureStore.open(f"{url}/my%20store", version)
            here = FeatureStore.open(local.url, version)
            assert (there.version, there.fingerprint) == (here.version, here.fingerprint)
        # A worker process opens a store by its version.
        assert pickle.loads(pickle.dumps(there)).ids == here.ids
        # Where not even the first version can be read nothing is known.
        with pytest.raises(StorageError, match="the server answered 403"):
            newest_version(open_blobs(f"{url}/elsewhere"))
        with pytest.raises(StorageError, match="the server answered 403"):
            FeatureStore.open(f"{url}/elsewhere")
