"""The tree's exchange over own sockets: its bits, and what becomes of peers that are ahead, odd or gone."""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore
from transport_sums import reduce_plan

from foldfeed.trainer.errors import CommunicationError, WireError
from foldfeed.trainer.gradients import stream
from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.dyadic import Block, blocks_of_ranks, tree_sum
from foldfeed.trainer.gradients.exchange import TreeExchange, add_in_place, elements_sent
from foldfeed.trainer.gradients.stream import StreamExchange, tree_exchange
from foldfeed.trainer.groups.meeting import meet
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.groups.wire import MeshGroup

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(120)


@contextmanager
def worlds(world: int, timeout_s: float = 30.0) -> Iterator[list[Ranks]]:
    """The ranks of a world in this process, with sockets between them."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(world)]
    for one, other in itertools.combinations(range(world), 2):
        ends[one][other], ends[other][one] = socket.socketpair()
    groups = [MeshGroup(rank, ends[rank], timeout_s) for rank in range(world)]
    yield [Ranks(rank=rank, world=world, device=CPU, scatter=groups[rank]) for rank in range(world)]
    for group in groups:
        group.close()


def on_all(work: Callable[[Ranks], torch.Tensor], ranks: Sequence[Ranks]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(work, rank) for rank in ranks]]


def plan_of(cuts: Sequence[int]) -> list[Bucket]:
    return [
        Bucket(index=index, start=start, stop=stop, segments=range(1))
        for index, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(0, 9), st.lists(st.integers(1, 3000), min_size=1, max_size=12))
@example(4, 0, [1, 2, 100_000, 3, 100_000, 1])
def test_any_world_sums_to_the_bits_of_the_tree(
    wire: torch.dtype, world: int, more: int, sizes: list[int]
) -> None:
    """Buckets smaller than the world, many of them; then shards wherever they are, some ranks none."""
    num_shards, plan = world + more, plan_of([0, *itertools.accumulate(sizes)])
    draw = torch.Generator().manual_seed(num_shards)
    leaves = [torch.randn(sum(sizes), generator=draw).to(wire) for _ in range(num_shards)]
    dealer = random.Random(more)
    owners = [dealer.randrange(world) for _ in range(num_shards)]
    dealt = [[Block(v, 1) for v in range(num_shards)[::-1] if owners[v] == rank] for rank in range(world)]
    expected = tree_sum(
        {Block(v, 1): leaf.clone() for v, leaf in enumerate(leaves)}, num_shards, add_in_place
    )

    def work(ranks: Ranks) -> torch.Tensor:
        found = []
        output = torch.full((sum(sizes),), torch.nan)
        exchange = StreamExchange(ranks, num_shards, max(sizes), output, wire)
        for division in (blocks_of_ranks(num_shards, world), dealt):
            exchange.divide(division)
            output.fill_(torch.nan)
            reduce_plan(exchange, plan, leaves, division[ranks.rank])
            found.append(output.clone())
        return torch.stack(found)

    with worlds(world) as ranks:
        for found in on_all(work, ranks):
            assert torch.equal(found, expected.float().expand(2, -1))


@pytest.mark.parametrize("slots", [2, 3])
def test_a_peer_that_is_far_ahead_waits_for_room(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 begins each bucket late; the others are as far ahead as slots let them be."""
    monkeypatch.setattr(stream, "MOST_SLOTS", slots)
    plan = plan_of(range(0, 20_001, 1000))

    def work(ranks: Ranks) -> torch.Tensor:
        output = torch.zeros(20_000)
        exchange = StreamExchange(ranks, 3, 1000, output)
        for bucket in plan:
            time.sleep(0.005 * (ranks.rank == 2))
            exchange.reduce(bucket, [torch.full((1000,), float(ranks.rank + bucket.index))])
            assert exchange._launched - exchange._done <= slots
        exchange.drain()
        return output

    with worlds(3) as ranks:
        for output in on_all(work, ranks):
            assert torch.equal(output[::1000], torch.tensor([3.0 + 3 * b.index for b in plan]))


def test_a_descriptor_ends_the_wait_and_nothing_is_lost() -> None:
    plan = plan_of([0, 900, 1000])
    begins = threading.Event()
    wake, waker = os.pipe()

    def work(ranks: Ranks) -> torch.Tensor:
        output = torch.zeros(1000)
        exchange = StreamExchange(ranks, 2, 900, output)
        if ranks.rank:
            assert begins.wait(30)
        exchange.reduce(plan[0], [torch.ones(900)])
        if not ranks.rank:
            os.write(waker, b"t")
            # The other rank has not begun.
            exchange.progress(wake)
            assert exchange._done == 0
            begins.set()
        exchange.reduce(plan[1], [torch.ones(100)])
        exchange.drain()
        # Nothing is under way: it does not wait.
        exchange.progress(wake)
        return output

    with worlds(2) as ranks:
        for output in on_all(work, ranks):
            assert torch.equal(output, torch.full((1000,), 2.0))
    os.close(wake)
    os.close(waker)


def test_other_collectives_may_use_the_connections_between_exchanges() -> None:
    """Nobody waits for the others in between, so a rank may be in the next collective while one reads."""

    def work(ranks: Ranks) -> torch.Tensor:
        output, gathered = torch.zeros(5000), torch.zeros(3)
        for turn in range(20):
            exchange = StreamExchange(ranks, 3, 5000, output)
            exchange.reduce(plan_of([0, 5000])[0], [torch.full((5000,), float(ranks.rank + turn))])
            exchange.drain()
            assert isinstance(ranks.scatter, MeshGroup)
            ranks.scatter.all_gather(gathered, torch.tensor([float(ranks.rank)]))()
            assert gathered.tolist() == [0, 1, 2]
        return output

    with worlds(3) as ranks:
        for output in on_all(work, ranks):
            assert torch.equal(output, torch.full((5000,), 3.0 + 3 * 19))


def test_a_silent_a_lost_and_an_odd_peer_are_errors() -> None:
    bucket = plan_of([0, 8])[0]
    for world, trouble, text in (
        (2, None, r"ranks \[1\] sent and took nothing for 0.2 s"),
        (2, lambda end: end.shutdown(socket.SHUT_RDWR), "rank 1: (closed by the other side|.*Broken pipe)"),
        (
            2,
            lambda end: end.sendall(struct.pack("<QQ", 0, 12)),
            "rank 1: 12 bytes for phase 1 of exchange 0; .* 16",
        ),
        (2, lambda end: end.sendall(struct.pack("<QQ", 7, 16)), "rank 1: 16 bytes for phase 2 of exchange 3"),
    ):
        with worlds(world, timeout_s=0.2) as ranks:
            exchange = StreamExchange(ranks[0], world, 8, torch.zeros(8))
            if trouble is not None:
                assert isinstance(ranks[1].scatter, MeshGroup)
                trouble(ranks[1].scatter.connection(0))

            def exchanges(exchange: StreamExchange = exchange) -> None:
                exchange.reduce(bucket, [torch.ones(8)])
                exchange.drain()

            with pytest.raises(CommunicationError, match=f"gradient bucket 0.*{text}"):
                exchanges()


def test_a_peer_is_not_silent_as_long_as_a_byte_comes() -> None:
    """Over TCP, where the poll does not wake before a message is whole."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    group = MeshGroup(0, {1: ours}, 0.6)
    output = torch.zeros(8)
    exchange = StreamExchange(Ranks(rank=0, world=2, device=CPU, scatter=group), 2, 8, output)
    part = struct.pack("<QQ4f", 0, 16, *[1.0] * 4)

    def trickle() -> None:
        for at in range(0, len(part), 4):
            theirs.sendall(part[at : at + 4])
            time.sleep(0.1)
        theirs.sendall(struct.pack("<QQ4f", 1, 16, *[3.0] * 4))

    with theirs, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(trickle)
        exchange.reduce(plan_of([0, 8])[0], [torch.ones(8)])
        exchange.drain()
        sent.result()
    assert output.tolist() == [2.0] * 4 + [3.0] * 4
    # Whatever comes next may be shorter.
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    group.close()


def test_abort_ends_the_wait() -> None:
    with worlds(2) as ranks:
        exchange = StreamExchange(ranks[0], 2, 8, torch.zeros(8))
        exchange.reduce(plan_of([0, 8])[0], [torch.ones(8)])
        assert isinstance(ranks[0].scatter, MeshGroup)
        threading.Timer(0.1, ranks[0].scatter.abort, ["the generation ends"]).start()
        with pytest.raises(CommunicationError, match="the generation ends"):
            exchange.drain()


def test_it_sends_no_more_than_the_trees_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    real = stream._Peer.queue
    monkeypatch.setattr(
        stream._Peer,
        "queue",
        lambda peer, n, phase, views: (sent.extend(views), real(peer, n, phase, views))[1],
    )

    def work(ranks: Ranks) -> torch.Tensor:
        output = torch.zeros(4003)
        exchange = StreamExchange(ranks, 4, 4003, output)
        exchange.reduce(plan_of([0, 4003])[0], [torch.ones(4003)])
        exchange.drain()
        return output

    with worlds(4) as ranks:
        on_all(work, ranks)
    formula = 4 * sum(elements_sent(4, 4, 4003))
    assert 0.99 * formula < sum(map(len, sent)) <= formula


def test_ranks_that_share_a_store_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the interface that gloo is told, or the way to the first rank; only over own sockets streams."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    for name in ("", "lo"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
        store = HashStore()
        with ThreadPoolExecutor(3) as pool:
            groups = list(pool.map(lambda rank, store=store: meet(store, rank, 3, 20.0), range(3)))
        ranks = [Ranks(rank=rank, world=3, device=CPU, scatter=group) for rank, group in enumerate(groups)]

        def work(ranks: Ranks) -> torch.Tensor:
            output = torch.zeros(9)
            exchange = tree_exchange(ranks, 3, 9, output)
            assert isinstance(exchange, StreamExchange)
            exchange.reduce(plan_of([0, 9])[0], [torch.ones(9)])
            exchange.drain()
            return output

        assert all(torch.equal(output, torch.full((9,), 3.0)) for output in on_all(work, ranks))
        for group in groups:
            group.close()
    for group in (None, MeshGroup(0, {}, 1.0)):
        alone = Ranks(rank=0, world=1, device=CPU, scatter=group)
        assert isinstance(tree_exchange(alone, 1, 9, torch.zeros(9)), TreeExchange)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-one")
    with pytest.raises(WireError, match="GLOO_SOCKET_IFNAME=no-such-one: no address"):
        meet(HashStore(), 0, 2, 1.0)
