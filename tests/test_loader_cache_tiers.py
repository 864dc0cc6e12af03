"""The tiers of the loader's cache one by one: eviction by the future, a shared folder, second requests."""

import contextlib
import errno
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import fault_proxy
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import range_server
from slow_blobs import SlowBlobs
from test_loader_stream import build_store

from foldfeed.feature_store.storage import open_blobs
from foldfeed.loader import CacheConfig
from foldfeed.loader.cache.blocks import HEAD_BYTES, Block, opened, seal
from foldfeed.loader.cache.eviction import UNKNOWN, Evictor, unknown_uses
from foldfeed.loader.cache.files import CachedFiles
from foldfeed.loader.cache.folder import FolderTier
from foldfeed.loader.cache.future import RecordUse
from foldfeed.loader.cache.memory import MemoryTier
from foldfeed.loader.cache.requests import EXTRA_SHARE, Answer
from foldfeed.loader.cache.tiers import Tiers
from foldfeed.loader.order.order import SampleOrder
from foldfeed.loader.order.sampling import JOIN

pytestmark = pytest.mark.timeout(120)
SIZE = 1000


def misses_of_belady(uses: tuple[int, ...], room: int) -> int:
    def next_uses(names, now: int) -> list[int]:
        return [next((at for at in range(now, len(uses)) if uses[at] == name), UNKNOWN) for name in names]

    evictor: Evictor[int] = Evictor(next_uses)
    misses = 0
    for now, name in enumerate(uses):
        evictor.passed(now)
        misses += name not in evictor
        evictor.used(name, 1, now + 1)
        while evictor.num_bytes > room:
            evictor.removed(evictor.farthest()[0])
    return misses


def misses_of_lru(uses: tuple[int, ...], room: int) -> int:
    held: list[int] = []
    misses = 0
    for name in uses:
        misses += name not in held
        held = [*(other for other in held if other != name), name][-room:]
    return misses


def fewest_misses(uses: tuple[int, ...], room: int) -> int:
    """The best that any cache can do, found by trying all choices."""

    @functools.cache
    def best(place: int, held: frozenset[int]) -> int:
        if place == len(uses):
            return 0
        name = uses[place]
        full = held | {name}
        choices = [full] if len(full) <= room else [full - {gone} for gone in full]
        return (name not in held) + min(best(place + 1, choice) for choice in choices)

    return best(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=14).map(tuple), st.integers(1, 4))
def test_eviction_by_the_future_is_the_best_there_is(uses, room):
    assert misses_of_belady(uses, room) == fewest_misses(uses, room) <= misses_of_lru(uses, room)


def test_eviction_by_the_future_beats_the_least_recently_used_on_epochs():
    choice = random.Random(1)
    epochs = itertools.chain.from_iterable(choice.sample(range(40), 40) for _ in range(8))
    uses = tuple(epochs)
    # Every record once an epoch: what was used last is what is used latest.
    assert misses_of_belady(uses, 20) < 0.75 * misses_of_lru(uses, 20)


def test_what_nobody_knows_goes_first_and_of_that_the_oldest():
    evictor: Evictor[str] = Evictor(
        lambda names, now: [{"soon": 5, "late": 90}.get(name, UNKNOWN) for name in names]
    )
    for name in ("old", "late", "new", "soon"):
        evictor.used(name, 1, 0)
    evictor.used("old", 1, 0)
    gone = []
    while (found := evictor.farthest()) is not None:
        gone.append(found[0])
        evictor.removed(found[0])
    assert gone == ["new", "old", "late", "soon"]


@pytest.mark.parametrize("epoch_end", [JOIN, "short"])
@pytest.mark.parametrize(("size", "batch", "shards"), [(11, 4, 2), (5, 8, 4), (23, 6, 3)])
def test_the_next_use_is_the_first_sample_of_ours(size, batch, shards, epoch_end):
    order = SampleOrder(
        num_records=size, seed=3, global_batch=batch, virtual_shards=shards, epoch_end=epoch_end
    )
    ours = [0, shards - 1]
    steps = range(3 * max(1, size // batch) + 12)
    samples = [
        sample for step in steps for shard in sorted(set(ours)) for sample in order.shard_samples(step, shard)
    ]
    use = RecordUse(order, ours)
    for now, record in itertools.product((0, 1, size - 1, size, size + 3), range(size)):
        want = next((g for g in samples if g >= now and order.locate(g).record == record), None)
        if want is not None and want < (now // size + 4) * size:
            assert use.firsts([np.array([record])], now) == [want]
    groups = [np.array([0, 1, size - 1]), np.empty(0, np.int64), np.array([2])]
    alone = [use.firsts([group[place : place + 1]], 3)[0] for group in groups for place in range(len(group))]
    assert use.firsts(groups, 3) == [min(alone[:3]), UNKNOWN, alone[3]]


@given(st.binary(max_size=40), st.integers(0, 400), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_a_sealed_block_is_itself_or_nothing(data, place, kind):
    block = Block("part", "msa/c/0", 3)
    sealed = seal(block, data) + data
    assert opened(block, sealed) == data
    assert opened(block._replace(number=4), sealed) is None
    if kind == 0:
        changed = bytearray(sealed)
        changed[place % len(sealed)] ^= 1 << place % 8
    elif kind == 1:
        changed = bytearray(sealed[: place % len(sealed)])
    else:
        changed = bytearray(sealed + b"x")
    assert opened(block, bytes(changed)) is None


def test_memory_never_holds_more_than_it_may_whatever_is_held():
    memory = MemoryTier(4 * SIZE, unknown_uses)
    blocks = [Block("p", "f", number) for number in range(9)]
    memory.hold(blocks[:4])
    for block in blocks:
        memory.put(block, bytes(SIZE))
        assert memory.num_bytes <= 4 * SIZE
    assert [memory.has(block) for block in blocks] == [True] * 4 + [False] * 5
    memory.let_go(blocks[:2], 1)
    memory.put(blocks[8], bytes(SIZE))
    assert memory.has(blocks[8])
    assert [memory.has(block) for block in blocks[:4]] == [False, True, True, True]


def content(block: Block) -> bytes:
    return random.Random(block.name).randbytes(SIZE - block.number % 7)


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in (*folder.glob("blocks/*/*"), *folder.glob("new/*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


# Without the tests' own modules, which take seconds to import.
WORKER = """
import itertools, random, sys
from pathlib import Path
from foldfeed.loader.cache.blocks import Block
from foldfeed.loader.cache.eviction import unknown_uses
from foldfeed.loader.cache.folder import FolderTier
size = int(sys.argv[3])
tier = FolderTier(Path(sys.argv[1]), int(sys.argv[2]), size, unknown_uses)
choice = random.Random(sys.argv[4])
print("ready", flush=True)
for turn in itertools.count():
    block = Block(f"part{choice.randrange(3)}", "msa/c/0", choice.randrange(40))
    content = random.Random(block.name).randbytes(size - block.number % 7)
    if choice.random() < 0.3:
        assert tier.get(block) in (None, content), block
        assert not tier.damaged and not tier.failures, vars(tier)
    else:
        tier.put(block, content)
"""


def test_processes_that_share_a_folder_keep_its_limit_and_may_be_killed_at_any_time(tmp_path):
    limit = 12 * (SIZE + HEAD_BYTES)
    for turn in range(2):
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(tmp_path), str(limit), str(SIZE), f"{turn} {number}"],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=subprocess.PIPE,
            )
            for number in range(2)
        ]
        try:
            for worker in workers:
                assert worker.stdout.readline() == b"ready\n"
            stop = time.monotonic() + 0.7
            while time.monotonic() < stop:
                # A walk sees files come that it has not counted the end of: one for each process.
                assert folder_bytes(tmp_path) <= limit + 2 * (SIZE + HEAD_BYTES)
                time.sleep(0.01)
            assert [worker.poll() for worker in workers] == [None, None]
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGKILL)
                worker.wait(20)
                worker.stdout.close()
        assert folder_bytes(tmp_path) <= limit
    tier = FolderTier(tmp_path, limit, SIZE, unknown_uses)
    assert not list((tmp_path / "new").iterdir())
    there = sorted((tmp_path / "blocks").glob("*/*"))
    assert there
    assert int.from_bytes((tmp_path / "state").read_bytes(), "little") == folder_bytes(tmp_path)
    for path in there:
        block = Block(path.parent.name, "msa/c/0", int(path.name.rpartition("+")[2]))
        assert tier.get(block) == content(block)
    assert tier.damaged == 0
    tier.close()


def test_who_counts_anew_counts_what_others_are_writing(tmp_path):
    size = SIZE + HEAD_BYTES
    writer, other = (FolderTier(tmp_path, 2 * size, SIZE, unknown_uses) for _ in range(2))
    with other._changing():
        other._list()
    with writer._changing():
        assert writer._make_room(Block("p", "f", 0), size)
        unfinished = writer._new / f"unfinished.{size}"
        unfinished.touch()
    writer.put(Block("p", "f", 1), bytes(SIZE))
    # It knows of nothing that could go, so it counts.
    other.put(Block("p", "f", 2), bytes(SIZE))
    unfinished.write_bytes(bytes(size))
    assert folder_bytes(tmp_path) == 2 * size
    assert other.get(Block("p", "f", 2)) is not None
    writer.close()
    other.close()


def test_a_process_that_is_stopped_holds_nobody_up(tmp_path, monkeypatch):
    from foldfeed.loader.cache import folder

    monkeypatch.setattr(folder, "LOCK_WAIT_S", 0.05)
    monkeypatch.setattr(folder, "FLIGHT_WAIT_S", 0.05)
    tier = FolderTier(tmp_path, 10_000, SIZE, unknown_uses)
    other = FolderTier(tmp_path, 10_000, SIZE, unknown_uses)
    block = Block("p", "f", 0)
    with other._changing():
        tier.put(block, b"data")
    assert tier.failures == 1
    assert tier.get(block) is None
    with other.alone([block]), tier.alone([block]) as waited:
        assert not waited
    tier.close()
    other.close()


def test_a_full_disk_is_said_once_and_read_past(tmp_path, caplog):
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system here: {mounted.stderr.decode().strip()}")
    try:
        tier = FolderTier(tmp_path, 1 << 30, SIZE, unknown_uses)
        blocks = [Block("p", "f", number) for number in range(200)]
        for block in blocks:
            tier.put(block, content(block))
        assert tier.failures > 0
        kept = [block for block in blocks if tier.get(block) is not None]
        assert 0 < len(kept) < 200
        assert all(tier.get(block) == content(block) for block in kept)
        assert caplog.text.count("is full; going on without new blocks") == 1
        assert tier.damaged == 0
        assert int.from_bytes((tmp_path / "state").read_bytes(), "little") == folder_bytes(tmp_path)
        tier.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_read_is_a_miss(tmp_path, monkeypatch):
    tier = FolderTier(tmp_path, 1 << 20, SIZE, unknown_uses)
    block = Block("p", "f", 0)
    tier.put(block, b"data")
    real = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "f+0":
            raise OSError(errno.EIO, "injected", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert tier.get(block) is None
    assert tier.damaged == 1
    monkeypatch.undo()
    assert tier.get(block) is None, "what could not be read must not stay"
    tier.close()


def test_one_read_of_the_store_for_all_threads_of_all_processes(tmp_path):
    """Two caches of one folder stand for two processes: their locks are those of files."""
    store = build_store(tmp_path / "store")
    slow = SlowBlobs(open_blobs(store.url), 0.02)
    config = CacheConfig(folder=tmp_path / "cache", block_bytes=1024, memory_bytes=64 * 1024, hedge=False)
    caches = [Tiers(config, [store.url]) for _ in range(2)]
    path = max(Path(store.url).glob("parts/*/msa/c/0/0/0"), key=lambda file: file.stat().st_size)
    name, data = path.relative_to(store.url).as_posix(), path.read_bytes()
    wrong: list[int] = []

    def read(tiers: Tiers) -> None:
        file = CachedFiles(slow, tiers).open_range(name)
        for start in range(0, len(data), 700):
            if file(start, 700) != data[start : start + 700]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(tiers,)) for tiers in caches for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tiers in caches:
        tiers.close()
    assert not wrong
    starts = sorted(start for read_path, start, _ in slow.reads if read_path == name)
    assert sum(size for _, _, size in slow.reads) == len(data), starts
    assert len(starts) == len(set(starts))


def test_a_late_answer_is_overtaken_by_a_second_request_and_these_are_few(tmp_path):
    (tmp_path / "parts" / "p").mkdir(parents=True)
    data = random.Random(3).randbytes(200 * 1024)
    (tmp_path / "parts" / "p" / "f").write_bytes(data)
    config = CacheConfig(block_bytes=1024, memory_bytes=8 * 1024, in_flight=4)
    with range_server(tmp_path) as (url, _), fault_proxy(url) as proxy:
        tiers = Tiers(config, [proxy.url])
        file = CachedFiles(open_blobs(proxy.url), tiers).open_range("parts/p/f")
        for number in range(100):
            assert file(number * 1024, 1024) == data[number * 1024 : (number + 1) * 1024]
        calm = tiers.counters()["cache_hedges"]
        assert calm <= EXTRA_SHARE * 100 + 1
        first = itertools.count()
        proxy.inject(1.0, kinds=("stalled",), only=lambda method, path: next(first) == 0)
        assert file(150 * 1024, 1024) == data[150 * 1024 : 151 * 1024]
        assert proxy.done["stalled"] == 1
        counters = tiers.counters()
        assert counters["cache_hedges_won"] >= 1
        tiers.close()


def test_an_error_is_raised_to_everybody_who_waits_and_closing_ends_all_waiting(tmp_path):
    store = build_store(tmp_path / "store")
    tiers = Tiers(CacheConfig(block_bytes=1024, memory_bytes=8192), [])
    file = CachedFiles(open_blobs(store.url), tiers).open_range("parts/nothing/f")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            file(0, 10)
    slow = SlowBlobs(open_blobs(store.url), 1.0)
    name = next(Path(store.url).glob("parts/*/msa/c/0/0/0")).relative_to(store.url).as_posix()
    caught: list[BaseException] = []

    def read() -> None:
        try:
            CachedFiles(slow, tiers).open_range(name)(0, 100)
        except BaseException as error:  # noqa: BLE001  looked at below
            caught.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not slow._in_flight:
        time.sleep(0.01)
    tiers.close()
    for thread in threads:
        thread.join(20)
    assert [type(error).__name__ for error in caught] == ["LoaderUseError"] * 3
    with pytest.raises(Exception, match="cache is closed"):
        file(0, 10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("foldfeed-request")]


def test_an_answer_that_cannot_be_taken_is_an_error_to_those_who_wait():
    got: list[object] = []

    def take(found: bytes | BaseException) -> None:
        got.append(found)
        if isinstance(found, bytes):
            raise MemoryError("no room")

    assert Answer(lambda: b"data", take).ask()
    assert got[0] == b"data"
    assert isinstance(got[1], MemoryError)
    assert len(got) == 2
    # Of two requests the error of one is no answer while the other is under way.
    release, failing = threading.Event(), iter([True, False])
    results: list[object] = []

    def fetch() -> bytes:
        if next(failing):
            release.wait(20)
            raise OSError("cut")
        release.set()
        time.sleep(0.05)
        return b"late"

    answer = Answer(fetch, results.append)
    first = threading.Thread(target=answer.ask)
    first.start()
    while not answer._asked:
        time.sleep(0.001)
    answer.ask()
    first.join()
    assert results == [b"late"]
