"""What every transport makes of the same random gradients; runs on the ranks of `trainer_ranks`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.dyadic import Block, blocks_of_ranks, merged, owned_shards
from foldfeed.trainer.gradients.exchange import Exchange, TreeExchange, add_in_place
from foldfeed.trainer.gradients.probe import measure
from foldfeed.trainer.gradients.ring import RingExchange
from foldfeed.trainer.gradients.two_level import TwoLevelExchange, node_groups
from foldfeed.trainer.groups.topology import nodes_of


def reduce_plan(
    exchange: Exchange,
    plan: Sequence[Bucket],
    leaves: Sequence[torch.Tensor],
    blocks: Sequence[Block],
) -> None:
    """Gives an exchange all buckets of a plan, as a rank that has these blocks of the leaves."""
    for bucket in plan:
        known = [(Block(v, 1), leaf[bucket.start : bucket.stop].clone()) for v, leaf in enumerate(leaves)]
        sums = [merged(known[block.start : block.start + block.size], add_in_place) for block in blocks]
        exchange.reduce(bucket, [values for ((_, values),) in sums])
    exchange.drain()


def sums_by_transport(ranks: Any, nodes: Sequence[str], shard_counts: Sequence[int]) -> Any:
    """Returns each transport's sums by name, number of shards and nodes, and a measured link.

    Nodes are given as a letter for each rank.
    """
    results: dict[str, Any] = {}
    for local in nodes:
        groups = node_groups(ranks, nodes_of(local, []))
        for num_shards in shard_counts:
            # Sizes that nothing divides, one smaller than the world; a large one follows a small one.
            sizes = [1009, 3, 4099, 1]
            total = sum(sizes)
            shards = {
                v: torch.randn(total, generator=torch.Generator().manual_seed(v)) for v in range(num_shards)
            }
            stops = list(itertools.accumulate(sizes))
            plan = [
                Bucket(index=index, start=stop - size, stop=stop, segments=range(1))
                for index, (size, stop) in enumerate(zip(sizes, stops, strict=True))
            ]
            blocks = blocks_of_ranks(num_shards, ranks.world)[ranks.rank]
            names = ("tree", "two_level", "ring", "tree bf16", "two_level bf16", "two_level bf16-between")
            for name in names:
                output = torch.full((total,), torch.nan)
                wire = torch.bfloat16 if "bf16" in name else torch.float32
                inside = torch.float32 if "between" in name else wire
                if name.startswith("two_level"):
                    exchange: Any = TwoLevelExchange(ranks, num_shards, output, groups, wire, inside)
                elif name.startswith("tree"):
                    exchange = TreeExchange(ranks, num_shards, max(sizes), output, wire)
                else:
                    exchange = RingExchange(ranks, output)
                reduce_plan(exchange, plan, [value.to(wire) for value in shards.values()], blocks)
                results[f"{name} {num_shards} {local}"] = output.tolist()
            exact = sum(value.double() for value in shards.values())
            results[f"exact {num_shards} {local}"] = exact.tolist()
            assert owned_shards(num_shards, ranks.world, ranks.rank)
    count = len(blocks_of_ranks(8, ranks.world)[ranks.rank])
    link = measure(ranks, lambda output, numel: TreeExchange(ranks, 8, numel, output), count)
    results["link"] = [link.latency_s, link.bytes_per_s]
    return results
