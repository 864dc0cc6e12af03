"""A store of many parts is read with a bounded number of descriptors; what a forked child may do."""

import functools
import os
import random
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
from crash_harness import files_of
from records import make_record

from foldfeed.feature_store import FeatureStore, ForkedProcessError, StoreSettings, write_part
from foldfeed.feature_store.care.repair import repair
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.storage import open_files
from foldfeed.feature_store.storage.open_files import LocalFile

NUM_PARTS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = FeatureStore.create(tmp_path_factory.mktemp("many") / "s", StoreSettings(tile_rows=8, tile_cols=8))
    parts = [
        write_part(made.url, [make_record(f"r{number:02}", 3, 7, seed=number)], made.settings).part_id
        for number in range(NUM_PARTS)
    ]
    made.commit(parts, job_id="1")
    return made


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def read_all(store: FeatureStore, names: list[str]) -> None:
    for name in names:
        want = make_record(name, 3, 7, seed=int(name[1:]))
        np.testing.assert_array_equal(store[name].msa(), want.msa)
        np.testing.assert_array_equal(store[name].deletions(), want.deletions)
        assert store[name].rows()["hit_id"].to_pylist() == list(want.rows.hit_id)


def test_descriptors_are_bounded_and_values_right(store, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 40)
    opened = FeatureStore.open(store.url)
    before = num_descriptors()
    for _ in range(2):
        read_all(opened, opened.ids)
        assert num_descriptors() <= before + 41
    del opened


def test_threads_read_while_files_are_closed_under_them(store, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 6)
    opened = FeatureStore.open(store.url)
    errors: list[BaseException] = []

    def read(seed: int) -> None:
        names = opened.ids * 3
        random.Random(seed).shuffle(names)
        try:
            read_all(opened, names)
        except BaseException as error:  # noqa: BLE001 -- reported below
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_goes_on_reading(store):
    opened = FeatureStore.open(store.url)
    read_all(opened, opened.ids[:3])
    child = os.fork()
    if child == 0:
        try:
            read_all(opened, opened.ids)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    read_all(opened, opened.ids[:3])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "care",
    [
        verify,
        repair,
        functools.partial(repair, rebuild_lost_index=True),
        functools.partial(repair, roll_back_index=True, quarantine=True, add_missing=True),
    ],
    ids=["verify", "repair", "rebuild", "roll back"],
)
def test_a_forked_child_takes_no_store_for_damaged(tmp_path, care):
    """It cannot open one: that says nothing about the store, and above all is no reason for a new index."""
    made = FeatureStore.create(tmp_path / "s")
    made.commit([write_part(made.url, [make_record("a", 3, 9)], made.settings).part_id], job_id="1")
    before = files_of(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            care(made.url)
        except ForkedProcessError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert files_of(tmp_path) == before


def test_a_process_with_few_descriptors_reads_a_store_of_many_parts(store):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from foldfeed.feature_store import FeatureStore
store = FeatureStore.open(sys.argv[1])
for name in store.ids:
    record = store[name]
    record.msa(), record.rows(), record.features()
print(len(store))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, store.url], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == str(NUM_PARTS), result.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 128


def test_a_file_that_cannot_be_opened_leaves_nothing_behind(tmp_path):
    before = num_descriptors()
    with pytest.raises(FileNotFoundError):
        LocalFile(tmp_path / "absent")
    assert num_descriptors() == before
