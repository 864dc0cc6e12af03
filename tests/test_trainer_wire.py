"""Own sockets: who is let in, what is read from whom, and that a wait ends when it must."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.trainer.errors import WireError
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.groups.wire import Frames, MeshGroup, dial, frame, greet

KEY = b"k" * 32
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def greeted(listener: socket.socket, key: bytes = KEY) -> dict[str, object]:
    connection, _ = listener.accept()
    with connection:
        return greet(connection, key, 2.0)


def test_both_sides_show_that_they_know_the_key(listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(greeted, listener)
        dial(listener.getsockname(), KEY, {"uid": "a"}, 2.0).close()
        assert answer.result() == {"uid": "a"}


def test_a_caller_without_the_key_is_not_read(listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(greeted, listener)
        with pytest.raises(WireError, match=r"no greeting from 127\.0\.0\.1"):
            dial(listener.getsockname(), b"x" * 32, {"uid": "a"}, 2.0)
        with pytest.raises(WireError, match="does not know the key of the run"):
            answer.result()


def test_a_listener_without_the_key_is_not_believed(listener: socket.socket) -> None:
    def pretend() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(bytes(16))
            connection.recv(1 << 16)
            connection.sendall(bytes(32))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(pretend)
        with pytest.raises(WireError, match="it does not know its key"):
            dial(listener.getsockname(), KEY, {"uid": "a"}, 2.0)


def test_a_caller_that_says_nothing_or_too_much_is_left(listener: socket.socket) -> None:
    for text in (b"", bytes(48) + struct.pack("<I", 1 << 20)):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(greeted, listener)
            with socket.create_connection(listener.getsockname()) as caller:
                caller.sendall(text)
                with pytest.raises(WireError, match=r"no greeting|a greeting of 1048576 bytes"):
                    answer.result()


@given(
    messages=st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=4), max_size=6),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
def test_messages_come_whole_however_the_bytes_are_cut(
    messages: list[dict[str, int]], cuts: list[int]
) -> None:
    raw = b"".join(map(frame, messages))
    frames, found = Frames(), []
    position = turn = 0
    while position < len(raw):
        found += frames.feed(raw[position : position + cuts[turn % len(cuts)]])
        position += cuts[turn % len(cuts)]
        turn += 1
    assert found == messages


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (struct.pack("<I", 101), "a message of 101 bytes; at most 100 are read"),
        (struct.pack("<I", 2) + b"[]", "no JSON object but list"),
        (struct.pack("<I", 3) + b"\x80ab", "no JSON"),
    ],
)
def test_messages_that_are_too_long_or_no_objects_are_refused(raw: bytes, text: str) -> None:
    with pytest.raises(WireError, match=text):
        Frames(limit=100).feed(raw)


def mesh(world: int, timeout_s: float = 20.0) -> list[MeshGroup]:
    ends: list[dict[int, socket.socket]] = [{} for _ in range(world)]
    for one in range(world):
        for other in range(one):
            ends[one][other], ends[other][one] = socket.socketpair()
    return [MeshGroup(rank, ends[rank], timeout_s) for rank in range(world)]


def on_all(work: Callable[[int], object], world: int) -> list[object]:
    with ThreadPoolExecutor(world) as pool:
        return [future.result() for future in [pool.submit(work, rank) for rank in range(world)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_collectives_equal_their_definition(world: int, dtype: torch.dtype) -> None:
    """Uneven runs, empty ones, more bytes than a socket holds, several collectives one after another."""
    draw = random.Random(world)
    counts = [draw.choice([0, 1, 5, 300_000]) for _ in range(world)]
    groups = mesh(world)
    sent = [torch.randn(world * counts[rank]).to(dtype) for rank in range(world)]
    mine = [torch.full((rank_numel := 70_001,), float(rank), dtype=dtype) for rank in range(world)]

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        received, gathered = (torch.empty(n, dtype=dtype) for n in (sum(counts), world * rank_numel))
        groups[rank].all_to_all(received, sent[rank], counts, [counts[rank]] * world)
        wait = groups[rank].all_gather(gathered, mine[rank])
        wait()
        return received, gathered

    for rank, (received, gathered) in enumerate(on_all(work, world)):  # type: ignore[misc]
        expected = [sent[other].view(world, counts[other])[rank] for other in range(world)]
        assert torch.equal(received, torch.cat(expected))
        assert torch.equal(gathered, torch.cat(mine))
    for group in groups:
        group.close()


@settings(max_examples=10, deadline=None)
@given(world=st.integers(2, 4), sizes=st.lists(st.integers(0, 50), min_size=4, max_size=4))
def test_ranks_gather_bytes_and_floats_over_a_mesh(world: int, sizes: list[int]) -> None:
    groups = mesh(world)
    cpu = torch.device("cpu")

    def work(rank: int) -> object:
        ranks = Ranks(rank=rank, world=world, device=cpu, control=groups[rank])
        return ranks.gather_bytes(bytes([rank]) * sizes[rank], "x"), ranks.gather_floats([rank, 0.1], "y")

    expected = [bytes([rank]) * sizes[rank] for rank in range(world)], [[rank, 0.1] for rank in range(world)]
    assert on_all(work, world) == [expected] * world
    for group in groups:
        group.close()


def test_abort_ends_a_wait_for_a_silent_peer_everywhere_at_once() -> None:
    """Rank 3 does nothing, as a stopped process: the others wait for it until one of them aborts."""
    groups = mesh(4)
    buffers = [[bytearray(8) for _ in range(4)] for _ in range(4)]

    def work(rank: int) -> tuple[str, float]:
        others = [other for other in range(4) if other != rank]
        with pytest.raises(WireError) as raised:
            groups[rank].exchange(
                {other: memoryview(b"12345678") for other in others},
                {other: memoryview(buffers[rank][other]) for other in others},
            )
        return str(raised.value), time.monotonic()

    ended: list[tuple[str, float]] = []
    threads = [threading.Thread(target=lambda r=rank: ended.append(work(r))) for rank in range(3)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert not ended
    groups[0].abort("rank 3 is silent")
    for thread in threads:
        thread.join(10)
    assert len(ended) == 3
    assert sum("rank 3 is silent" in text for text, _ in ended) == 1
    assert sum("rank 0" in text for text, _ in ended) == 2
    # And nothing can be begun any more.
    with pytest.raises(WireError, match="rank 3 is silent"):
        groups[0].exchange({}, {3: memoryview(bytearray(1))})
    for group in groups:
        group.close()


def test_silence_and_messages_out_of_step_are_errors() -> None:
    one, other = mesh(2, timeout_s=0.2)
    with pytest.raises(WireError, match=r"ranks \[1\] sent and took nothing for 0.2 s"):
        one.exchange({}, {1: memoryview(bytearray(4))})
    one.close()
    other.close()
    one, other = mesh(2)
    one.exchange({1: memoryview(b"1234")}, {})
    with pytest.raises(WireError, match=r"a message \(1, 4\) where \(1, 8\) belongs"):
        other.exchange({}, {0: memoryview(bytearray(8))})
    one.close()
    other.close()
