"""Processes that read samples: the same batches, whatever dies, however small their memory; nothing stays."""

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import alive, children_of
from test_loader_stream import RECIPE, assert_equal, build_store, by_sample, make_loader, take
from waiting import wait_until

from foldfeed.feature_store import CorruptDataError
from foldfeed.loader import LoaderConfigError, LoaderUseError, ReadingProcessError, Recipe, SampleError
from foldfeed.loader.features.device import StepFeatures
from foldfeed.loader.meters.meters import Meters
from foldfeed.loader.notes import MISSING, PieceNote
from foldfeed.loader.reading import reading
from foldfeed.loader.reading.fetch import ARRAYS, DTYPES, fetch, shapes_of
from foldfeed.loader.reading.packed import row_of, sample_at, shift
from foldfeed.loader.reading.pieces import Piece
from foldfeed.loader.reading.ring import ALIGNMENT, RingClosedError, RingSpace
from foldfeed.loader.reading.slots import place, slot_bytes

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name is Linux's"),
]
SMALL = 4096


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("reading") / "store")


@pytest.fixture(scope="module")
def truth(store):
    with make_loader(store) as loader:
        return {g: loader.sample(g) for g in range(48)}


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 900), max_size=60),
    # Not `st.randoms`: drawing from it may end an example while a thread still waits.
    st.integers(0, 2**32 - 1),
)
def test_pieces_of_a_ring_never_overlap_and_the_oldest_always_gets_room(capacity, sizes, seed):
    capacity *= 128
    ring = RingSpace(capacity)
    live: list[tuple[int, int]] = []
    choice = random.Random(seed)
    for size in sizes:
        size = min(size, capacity)
        taken: list[int] = []
        thread = threading.Thread(
            target=lambda size=size, taken=taken: taken.append(ring.take(size)), daemon=True
        )
        thread.start()
        while True:
            thread.join(0.002 if live else 20)
            if taken:
                break
            assert live, "an empty ring has no room"
            # Any of them may come back first; with all of them back there must be room.
            ring.give_back(live.pop(choice.randrange(len(live)))[0])
        thread.join()
        start, stop = taken[0], taken[0] + size
        assert start % ALIGNMENT == 0
        assert stop <= capacity
        assert all(stop <= other_start or start >= other_stop for other_start, other_stop in live)
        live.append((start, stop))


def test_a_ring_that_is_closed_ends_all_waiting():
    ring = RingSpace(128)
    ring.take(128)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            ring.take(64)
        except RingClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    ring.close()
    thread.join(20)
    assert len(caught) == 1
    for size in (0, 129, -5):
        with pytest.raises(ValueError, match="in a ring of 128"):
            ring.take(size)


@pytest.mark.parametrize("name", ["af2", "crop_first"])
def test_what_is_read_into_a_slot_is_what_is_read_anywhere(store, name):
    import mmap

    recipe = dataclasses.replace(RECIPE, name=name)
    with make_loader(store, recipe) as loader:
        for sample in range(12):
            planned = loader._reader.planned(sample)
            want = fetch(planned.record, planned.plan).arrays
            shapes = shapes_of(planned.plan)
            size = slot_bytes(shapes)
            memory = mmap.mmap(-1, size + 640)
            memory.write(b"\xab" * (size + 640))
            got = fetch(planned.record, planned.plan, place(memory, 640, shapes)).arrays
            assert memory[:640] == b"\xab" * 640
            # Places in rows count from any byte, and move with the samples.
            rows = np.array([row_of(got, 640), row_of(got, 0)], dtype=np.int64)
            again = sample_at(memory, rows[1], 640)
            shift(rows[1:], 640)
            np.testing.assert_array_equal(rows[0], rows[1])
            for array in ARRAYS:
                view = getattr(sample_at(memory, rows[0]), array)
                assert view.size == 0 or np.shares_memory(view, getattr(got, array))
            for array in ARRAYS:
                mine, theirs = getattr(again, array), getattr(want, array)
                assert mine.dtype == theirs.dtype == DTYPES[array]
                np.testing.assert_array_equal(mine, theirs)
            assert again.crop_in_columns == want.crop_in_columns
            assert again.first_residue == want.first_residue
            assert want.num_bytes == sum(getattr(want, array).nbytes for array in ARRAYS) <= size


@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1) | st.just(MISSING), st.floats(0, 1e6)), min_size=1),
    st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    st.binary(max_size=99),
)
def test_a_note_says_what_was_put_into_it(samples, sizes, facts):
    numbers, read_s = (list(values) for values in zip(*samples, strict=True))
    start, size, num_bytes, *read = sizes
    note = PieceNote(start, size, numbers, read_s, num_bytes, tuple(read), 12.5, facts)
    assert PieceNote.unpack(note.pack()) == note


@pytest.mark.parametrize(
    ("num_processes", "num_threads", "read_ahead_bytes"),
    [(1, 1, 1 << 20), (1, 3, SMALL), (3, 1, 20_000), (2, 2, 1)],
)
def test_batches_do_not_depend_on_processes_or_their_memory(
    store, truth, num_processes, num_threads, read_ahead_bytes
):
    sizes = {"num_processes": num_processes, "num_threads": num_threads, "read_ahead_bytes": read_ahead_bytes}
    with make_loader(store, **sizes) as loader:
        assert_equal(by_sample(take(loader, 6)), truth)
        stats = loader.stats
    assert stats["fetch_s"] > 0
    assert stats["bytes"] > 0


def test_features_outlive_the_memory_that_they_were_made_from(store, truth, monkeypatch):
    """Nothing that a consumer gets may be a view of a slot: each is overwritten when it is given back."""
    init = reading.ReadSample.__init__

    def poisoned(self, *, arrays, read_s, release, **others):
        def overwrite():
            for name in ARRAYS:
                getattr(arrays, name).view(np.uint8)[...] = 0xA5
            release()

        init(self, arrays=arrays, read_s=read_s, release=overwrite, **others)

    monkeypatch.setattr(reading.ReadSample, "__init__", poisoned)
    with make_loader(store, num_processes=2) as loader:
        assert_equal(by_sample(take(loader, 6)), truth)


@pytest.mark.parametrize(
    ("num_processes", "num_threads", "read_ahead_bytes"), [(1, 2, 1 << 20), (2, 1, 30_000), (1, 3, SMALL)]
)
def test_whole_steps_outlive_memory_and_process(
    store, truth, monkeypatch, num_processes, num_threads, read_ahead_bytes
):
    """Samples that are taken as they lie together: their memory is overwritten, the processes are killed."""
    give_back = Piece.give_back
    taken = []

    def overwrite(self, num_samples=1):
        taken.append(num_samples)
        assert num_samples == len(self.numbers), "they are given back together"
        np.frombuffer(self._memory, np.uint8)[self._start : self._stop] = 0xA5
        give_back(self, num_samples)

    monkeypatch.setattr(Piece, "give_back", overwrite)
    sizes = {"num_processes": num_processes, "num_threads": num_threads, "read_ahead_bytes": read_ahead_bytes}
    with make_loader(store, **sizes) as loader:
        loader._maker = StepFeatures(RECIPE, loader.device)
        batches = take(loader, 2)
        for pid in loader._supply.pids:
            os.kill(pid, signal.SIGKILL)
        batches += take(loader, 4)
    found = loader.meters()
    assert_equal(by_sample(batches), truth)
    # One piece holds a step, where it has room.
    assert (max(taken) == 8) == (read_ahead_bytes == 1 << 20)
    assert sum(taken) >= 48
    assert found["latencies"]["sample_prepare"]["count"] == sum(taken)
    assert loader.stats["bytes"] > 0
    assert [one.name for one in threading.enumerate() if one.name.startswith("foldfeed")] == []


def test_room_that_is_told_late_is_told_in_time(store, monkeypatch):
    """What is free is told when somebody waits, though it is never much here and nothing else is sent."""
    monkeypatch.setattr(reading, "LATE_SHARE", 1)
    reader = make_loader(store)._reader
    supply = reading.ReadingProcesses(reader, 1, 1, 40_000, Meters())
    try:
        numbers = list(range(200))
        supply.ask(numbers)
        for first in range(0, 200, 8):
            for piece in supply.take(first)[1]:
                for _ in piece.numbers:
                    piece.give_back()
        assert supply.queued() == {"samples_asked": 0, "samples_read_ahead": 0}
    finally:
        supply.close()


def test_resume_and_ranks(store, truth):
    with make_loader(store, num_processes=1) as loader:
        take(loader, 2)
        state = loader.state_dict()
        loader.load_state_dict(state | {"step": 1})
        first = by_sample(take(loader, 1))
        loader.load_state_dict(state)
        rest = by_sample(take(loader, 4))
    assert_equal(first | rest, {g: truth[g] for g in range(8, 48)})
    found = {}
    for rank in range(3):
        with make_loader(store, num_processes=2, rank=rank, world=3) as loader:
            found |= by_sample(take(loader, 3))
    assert_equal(found, {g: truth[g] for g in range(24)})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_started_again_and_no_sample_is_lost(store, truth, number):
    with make_loader(store, num_processes=2, read_ahead_bytes=30_000) as loader:
        batches = take(loader, 1)
        seen = set()
        for _ in range(5):
            pids = loader._supply.pids
            seen |= set(pids)
            # One that the round before told to end may do so just now.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], number)
            batches += take(loader, 1)
        assert_equal(by_sample(batches), truth)
        seen |= set(loader._supply.pids)
    assert len(seen) > 2
    wait_until(lambda: not any(map(alive, seen)))


def test_a_process_that_never_lives_is_an_error_that_says_so(store, monkeypatch):
    monkeypatch.setattr(
        reading, "_PROGRAM", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    )
    with (
        make_loader(store, num_processes=1) as loader,
        pytest.raises(ReadingProcessError, match=r"killed by SIGSEGV, for the 3th time.*num_processes=0"),
    ):
        next(loader)
    monkeypatch.setattr(reading, "_PROGRAM", ("-c", "raise SystemExit(7)"))
    with make_loader(store, num_processes=1) as loader, pytest.raises(ReadingProcessError, match="status 7"):
        next(loader)
    assert [one.name for one in threading.enumerate() if one.name.startswith("foldfeed")] == []


@pytest.mark.parametrize(
    ("again", "text"),
    [(3, "status 7, for the 3th time"), (1, "status 7, and could not be started again .*no memory for it")],
)
def test_what_is_asked_of_a_process_that_was_given_up_is_an_error(store, monkeypatch, again, text):
    """Also where it was owed nothing when it died: nobody was there to hear of it."""
    monkeypatch.setattr(reading, "_PROGRAM", ("-c", "raise SystemExit(7)"))
    real, lives = reading._Life, []

    def begun(*arguments):
        if len(lives) == again:
            raise OSError("no memory for it")
        lives.append(real(*arguments))
        return lives[-1]

    monkeypatch.setattr(reading, "_Life", begun)
    with make_loader(store) as loader:
        supply = reading.ReadingProcesses(loader._reader, 1, 1, 1 << 20, Meters())
    try:
        wait_until(lambda: supply._processes[0]._given_up is not None)
        supply.ask([3, 4])
        for sample in (3, 4):
            with pytest.raises(ReadingProcessError, match=text):
                supply.get(sample)
    finally:
        supply.close()


def test_processes_end_where_not_all_of_them_can_begin(store, monkeypatch):
    real, lives = reading._Life, []

    def begun(*arguments):
        if len(lives) == 1:
            raise OSError("no descriptor for it")
        lives.append(real(*arguments))
        return lives[-1]

    monkeypatch.setattr(reading, "_Life", begun)
    with make_loader(store, num_processes=2) as loader, pytest.raises(OSError, match="no descriptor for it"):
        next(loader)
    assert lives[0].child.poll() is not None
    assert [one.name for one in threading.enumerate() if one.name.startswith("foldfeed")] == []


def test_a_plan_that_fails_in_whatever_way_is_an_error_of_its_sample(store):
    with make_loader(store) as loader:
        reader = loader._reader
    reader.order = None
    supply = reading.ReadingProcesses(reader, 1, 1, 1 << 20, Meters())
    try:
        supply.ask([3, 4])
        for sample in (3, 4):
            with pytest.raises(SampleError, match=f"sample {sample}.*AttributeError"):
                supply.get(sample)
    finally:
        supply.close()


def test_a_sample_that_cannot_be_read_raises_what_it_raises_in_threads(tmp_path):
    store = build_store(tmp_path / "store")
    shard = max((tmp_path / "store" / "parts").glob("*/msa/c/0/0/0"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    shard.write_bytes(data)
    errors = []
    for num_processes in (0, 2):
        with make_loader(store, num_processes=num_processes) as loader:
            with pytest.raises(SampleError) as caught:
                take(loader, 6)
            errors.append(caught.value)
            position = loader.state_dict()["step"]
            # The position stays: asking again tries again.
            with pytest.raises(SampleError):
                next(loader)
            assert loader.state_dict()["step"] == position
    assert isinstance(errors[0].__cause__, CorruptDataError)
    assert (errors[0].sample, errors[0].record_id, errors[0].reason) == (
        errors[1].sample,
        errors[1].record_id,
        errors[1].reason,
    )


def test_a_process_that_reads_loads_little(store):
    """Before its first sample: each of these takes a quarter of a second or more, torch two."""
    check = """
import sys
import foldfeed.loader.reading.process
from foldfeed.feature_store import FeatureStore
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import Recipe
reader = SampleReader(
    FeatureStore.open(sys.argv[1]), Recipe.named("crop_first"), None, seed=1, global_batch=1, virtual_shards=1
)
reader.read(0)
sys.exit(", ".join({"torch", "duckdb", "pandas", "zarr", "fsspec"} & set(sys.modules)) or 0)
"""
    subprocess.run([sys.executable, "-c", check, store.url], check=True, timeout=120)


ORPHAN = """
import os, sys, time
from foldfeed.feature_store import FeatureStore
from foldfeed.loader import CropLoader, Recipe

recipe = Recipe.named("crop_first", crop_residues=8, num_clusters=4, num_extra=4)
loader = CropLoader(FeatureStore.open(sys.argv[1]), recipe, seed=1, global_batch=2, num_processes=2)
next(loader)
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)
print(*loader._supply.pids, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["kill", "fork"])
def test_processes_end_with_the_loaders_process_however_it_ends(store, how):
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, store.url, how], stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        children = children_of(parent.pid)
        running = list(map(alive, pids))
        parent.kill()
        try:
            assert running == [True, True]
            wait_until(lambda: not any(map(alive, pids)))
        finally:
            for child in set(children) - set(pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def test_an_early_break_and_close_leave_nothing(store):
    loader = make_loader(store, num_processes=2)
    for _ in loader:
        break
    pids = loader._supply.pids
    loader.close()
    loader.close()
    assert not any(map(alive, pids))
    assert [one.name for one in threading.enumerate() if one.name.startswith("foldfeed")] == []
    with pytest.raises(LoaderUseError, match="closed"):
        next(loader)


def test_two_loaders_in_one_process(store, truth):
    with make_loader(store, num_processes=1) as one, make_loader(store, num_processes=1) as other:
        for step in range(4):
            want = {g: truth[g] for g in range(8 * step, 8 * step + 8)}
            assert_equal(by_sample(take(one, 1)), want)
            assert_equal(by_sample(take(other, 1)), want)


@pytest.mark.parametrize("values", [{"num_processes": -1}, {"num_processes": True}, {"read_ahead_bytes": 0}])
def test_values_that_cannot_work(store, values):
    with pytest.raises(LoaderConfigError, match="must be an integer of at least"):
        make_loader(store, **values)


def test_interrupts_of_the_terminal_do_not_end_the_readers(store, truth):
    with make_loader(store, num_processes=1) as loader:
        batches = take(loader, 1)
        (pid,) = loader._supply.pids
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        batches += take(loader, 5)
        assert loader._supply.pids == [pid]
    assert_equal(by_sample(batches), truth)
    assert torch.is_tensor(next(iter(truth[0].values())))
    assert Recipe.named("af2").name == "af2"
