"""Committers at the same time: no update is lost, no id is there twice, a job is done once."""

import multiprocessing
import threading

import pytest
from commit_storm import run_storm
from records import make_record

from foldfeed.feature_store import (
    CommitConflictError,
    CommitContentionError,
    FeatureStore,
    StorageFullError,
    StoreSettings,
    write_part,
)
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index import transactions as index
from foldfeed.feature_store.index.table import IndexTable
from foldfeed.feature_store.index.transactions import Index


def _commit_when_told(url, part_id, job_id, on_existing, barrier, answers):
    # As if all of them committed in the same millisecond.
    index_log.now = lambda: "2026-01-01T00:00:00.000+00:00"
    store = FeatureStore.open(url)
    store._index.rows()
    barrier.wait(60)
    try:
        result = store.commit([part_id], job_id=job_id, on_existing=on_existing)
        answers.put((result.num_added, result.already_done))
    except CommitConflictError:
        answers.put("conflict")


def _together(store, parts, jobs, on_existing="error"):
    """Commits from as many processes as there are jobs, all at once; returns their answers."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(len(jobs)), context.Queue()
    workers = [
        context.Process(target=_commit_when_told, args=(store.url, part, job, on_existing, barrier, answers))
        for part, job in zip(parts, jobs, strict=True)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return found


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "s", StoreSettings(tile_rows=8, tile_cols=8))


def test_one_of_two_contents_of_a_new_id_wins(store):
    parts = [
        write_part(store.url, [make_record("x", 3 + seed, 7, seed=seed)], store.settings).part_id
        for seed in range(4)
    ]
    found = _together(store, parts, ["a", "b", "c", "d"])
    assert sorted(map(str, found)) == ["(1, False)", "conflict", "conflict", "conflict"]
    after = FeatureStore.open(store.url)
    assert (after.ids, after.version) == (["x"], 1)


def test_the_same_new_record_from_several_jobs_is_there_once(store):
    part = write_part(store.url, [make_record("x", 3, 7), make_record("y", 2, 7)], store.settings).part_id
    found = _together(store, [part] * 3, ["a", "b", "c"])
    assert sorted(found) == [(0, False), (0, False), (2, False)]
    assert FeatureStore.open(store.url).ids == ["x", "y"]


def test_a_job_that_runs_several_times_at_once_commits_once(store):
    part = write_part(store.url, [make_record("x", 3, 7)], store.settings).part_id
    found = _together(store, [part] * 3, ["job"] * 3)
    assert sorted(found) == [(0, True), (0, True), (1, False)]
    assert FeatureStore.open(store.url).version == 1


def test_a_storm_of_commits_has_one_order(tmp_path):
    counts = run_storm(tmp_path, 8, 4.0)
    assert counts["versions"] >= 8


def test_a_commit_that_always_loses_gives_up(store, monkeypatch):
    monkeypatch.setattr(index, "COMMIT_PATIENCE_S", 0.2)
    monkeypatch.setattr(IndexTable, "try_commit", lambda *args: False)
    part = write_part(store.url, [make_record("x", 3, 7)], store.settings).part_id
    with pytest.raises(CommitContentionError, match="all lost against other commits") as caught:
        store.commit([part], job_id="1")
    assert caught.value.attempts > 1
    assert caught.value.seconds >= 0.2
    assert FeatureStore.open(store.url).version == 0


def test_a_commit_whose_answer_got_lost_is_found_to_have_landed(store, monkeypatch):
    """An object store may time out after it took the commit."""
    from deltalake import DeltaTable

    original = DeltaTable.create_write_transaction

    def lost(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise OSError("timed out")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", lost)
    part = write_part(store.url, [make_record("x", 3, 7)], store.settings).part_id
    result = store.commit([part], job_id="1")
    assert (result.num_added, result.already_done, result.version) == (1, False, 1)


def test_a_commit_that_fails_for_good_says_so(store, monkeypatch):
    from deltalake import DeltaTable

    def broken(self, *args, **kwargs):
        raise OSError("the network is gone")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", broken)
    part = write_part(store.url, [make_record("x", 3, 7)], store.settings).part_id
    with pytest.raises(OSError, match="the network is gone"):
        store.commit([part], job_id="1")


def test_a_full_disk_under_delta_is_typed(store, monkeypatch):
    from deltalake import DeltaTable

    def full(self, *args, **kwargs):
        raise OSError(
            "Generic LocalFileSystem error: Unable to sync data: No space left on device (os error 28)"
        )

    monkeypatch.setattr(DeltaTable, "create_write_transaction", full)
    part = write_part(store.url, [make_record("x", 3, 7)], store.settings).part_id
    with pytest.raises(StorageFullError, match="no space left"):
        store.commit([part], job_id="1")


def test_two_creators_make_one_store(tmp_path):
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def create() -> None:
        try:
            barrier.wait()
            FeatureStore.create(tmp_path / "s")
        except BaseException as error:  # noqa: BLE001 -- the test's thread reports it
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert Index.open(str(tmp_path / "s"), None).version == 0


def test_readers_see_whole_commits_while_others_commit(store):
    """A commit of three records is never seen in part."""
    stop = threading.Event()
    wrong: list[list[str]] = []

    def read() -> None:
        while not stop.is_set():
            ids = FeatureStore.open(store.url).ids
            if len(ids) % 3:
                wrong.append(ids)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(8):
        records = [make_record(f"{number}{letter}", 2, 5) for letter in "abc"]
        part = write_part(store.url, records, store.settings)
        store.commit([part.part_id], job_id=str(number))
    stop.set()
    reader.join()
    assert wrong == []
