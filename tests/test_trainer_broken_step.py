"""A step that lost a rank: what the others finished of it is kept, and the sum has the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from thread_ranks import on_threads
from trainer_ranks import toy_model, toy_shard

from foldfeed.trainer.errors import CommunicationError
from foldfeed.trainer.gradients.buckets import Bucket, plan_buckets
from foldfeed.trainer.gradients.dyadic import Block, Division, repaired, usual_division
from foldfeed.trainer.gradients.exchange import TreeExchange
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.members.transfer import divide_step


class Breaking(TreeExchange):
    """Loses a peer amid a bucket, when messages are packed, sent and added up already; at the last, at -1."""

    broken = -1

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        super().reduce(bucket, blocks)
        if bucket.index == self.broken:
            raise CommunicationError(self._ranks.rank, "a test", "a peer is gone.")


class Process:
    """Model and buffers of a rank, which outlive its reducers."""

    def __init__(self) -> None:
        self.model = toy_model().train(False)
        self.flat = FlatParameters(self.model)
        self.buckets = plan_buckets([s.padded for s in self.flat.segments], bucket_bytes=6000)
        self.reducer: TreeReducer | None = None
        self.computed: list[int] = []

    def attempt(
        self,
        ranks: Ranks,
        division: Division,
        num_shards: int,
        wire: torch.dtype,
        *,
        stop_after: int = 99,
        broken: int = -1,
    ) -> torch.Tensor | None:
        """Runs a step as far as it goes; returns the sum, None where a peer was lost."""

        def exchange(output: torch.Tensor, numel: int) -> Breaking:
            made = Breaking(ranks, num_shards, numel, output, wire)
            made.broken = broken
            return made

        before = self.reducer
        self.reducer = reducer = TreeReducer(
            self.flat, self.buckets, ranks, num_shards, make_exchange=exchange, wire=wire
        )
        if division.repairs:
            reducer.resume(division, [] if before is None else before.finished())
        self.computed = []
        try:
            reducer.begin()
            for v in division.shards[ranks.rank]:
                if len(self.computed) == stop_after:
                    raise CommunicationError(ranks.rank, "a test", "a step in vain.")
                with reducer.shard(v):
                    loss = self.model(toy_shard(0, v)).square().sum()
                    # Buckets leave at the first one, and again at the commit point.
                    (0.5 * loss).backward(retain_graph=True)
                    (0.5 * loss).backward()
                self.computed.append(v)
            reducer.finish([])
            return reducer.gradient.clone()
        except CommunicationError:
            return None
        finally:
            reducer.close()


def run(
    processes: Sequence[Process], division: Division, num_shards: int, wire: torch.dtype, **how: Any
) -> list[torch.Tensor | None]:
    def work(ranks: Ranks) -> torch.Tensor | None:
        return processes[ranks.rank].attempt(ranks, division, num_shards, wire, **how)

    if len(processes) > 1:
        return on_threads(len(processes), work)
    return [work(Ranks(rank=0, world=1, device=torch.device("cpu")))]


def repair(processes: Sequence[Process], num_shards: int) -> Division:
    kept = [
        [] if process.reducer is None else [block for block, _ in process.reducer.finished()]
        for process in processes
    ]
    return repaired(kept, num_shards)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "num_shards"), [(4, 7), (3, 8)])
def test_bits_are_equal_wherever_the_step_broke(world: int, num_shards: int, wire: torch.dtype) -> None:
    """One dies amid a bucket, another while that is made up for, and somebody joins."""
    torch.set_num_threads(1)
    usual = usual_division(num_shards, world)
    (wanted,) = run([Process()], usual_division(num_shards, 1), num_shards, wire)
    assert wanted is not None
    last = len(Process().buckets) - 1
    for broken in (0, last - 1, last):
        processes = [Process() for _ in range(world)]
        assert run(processes, usual, num_shards, wire, broken=broken) == [None] * world
        # All have computed their shards, so only those of the dead one are missing.
        dead = processes.pop(broken % world)
        division = repair(processes, num_shards)
        assert sorted(itertools.chain(*division.shards)) == dead.computed
        sizes = [len(shards) for shards in division.shards]
        assert max(sizes) - min(sizes) <= 1
        # Another one dies while they are made up for, and somebody joins.
        assert run(processes, division, num_shards, wire, broken=last) == [None] * (world - 1)
        processes[0] = Process()
        division = repair(processes, num_shards)
        assert 0 < len(list(itertools.chain(*division.shards))) < num_shards
        for gradient in run(processes, division, num_shards, wire):
            assert gradient is not None
            assert torch.equal(gradient, wanted)
        assert sorted(shard for process in processes for shard in process.computed) == sorted(
            itertools.chain(*division.shards)
        )
        # The next step is divided as usual again.
        reducer = processes[0].reducer
        assert reducer is not None
        assert reducer._division is not reducer._usual
        reducer.begin()
        assert reducer._division == usual_division(num_shards, len(processes))
        assert reducer._stack == reducer._pool == []


def test_a_shard_that_was_begun_is_not_kept_and_the_last_one_goes_on_alone() -> None:
    """Each of three ranks stops after its first shard of several."""
    num_shards, wire = 8, torch.float32
    (wanted,) = run([Process()], usual_division(num_shards, 1), num_shards, wire)
    processes = [Process() for _ in range(3)]
    assert run(processes, usual_division(num_shards, 3), num_shards, wire, stop_after=1) == [None] * 3
    division = repair(processes[1:], num_shards)
    assert division.kept == [[Block(2, 1)], [Block(5, 1)]]
    assert division.shards == [[0, 1, 3], [4, 6, 7]]
    # Only the last one is left, with what it had and did meanwhile: 4 beside 5 is a node of the tree.
    assert run(processes[1:], division, num_shards, wire, stop_after=2) == [None] * 2
    division = repair(processes[2:], num_shards)
    assert division == Division([[Block(5, 1), Block(4, 1), Block(6, 1)]], [[0, 1, 2, 3, 7]])
    (gradient,) = run(processes[2:], division, num_shards, wire)
    assert gradient is not None
    assert torch.equal(gradient, wanted)


def test_blocks_of_a_rank_that_is_behind_do_not_count() -> None:
    rows = [
        {"small": {"step": 6}, "kept": [[0, 2]]},
        {"small": {"step": 5}, "kept": [[2, 2]]},
        {"small": {"step": -1}, "kept": None},
    ]
    division, counts = divide_step(rows, 6)
    assert division == Division([[Block(0, 2)], [], []], [[2], [3], [4, 5]])
    assert counts == {"shards_kept": 2, "shards_again": 4}
    # All but the laggard have applied the step: nothing of it is computed again.
    rows[0]["kept"] = None
    assert divide_step(rows, 6) == (usual_division(6, 3), {})
    # A step that broke before anybody finished a shard.
    rows[0]["kept"] = []
    assert divide_step(rows, 6) == (usual_division(6, 3), {"shards_kept": 0, "shards_again": 6})
