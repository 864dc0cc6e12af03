"""Chooses how gradients travel: the transport, by name or by measurement, and the bucket plan for it.

    tree           one fixed tree over the virtual shards, equal bits on any number of ranks (exchange.py)
    hierarchical   the same tree, inside nodes first (two_level.py): equal bits, fewer messages between nodes
    auto           measures both where nodes have several ranks, and takes the quicker one
    ring           the backend's all-reduce (ring.py): bits depend on the number of ranks

Owns the choice. It is made once a run starts and costs a few exchanges; nothing of it is kept in a snapshot,
because the first three give the same bits under any plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from foldfeed.trainer.buckets import Bucket, auto_bucket_bytes, plan_buckets, plan_ramp
from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.dyadic import blocks_of_ranks
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.exchange import Exchange, TreeExchange
from foldfeed.trainer.flat import Segment
from foldfeed.trainer.probe import Link, measure
from foldfeed.trainer.ranks import Ranks
from foldfeed.trainer.ring import RingExchange
from foldfeed.trainer.two_level import TwoLevelExchange, node_groups

# From (output, elements of the largest bucket).
MakeExchange = Callable[[torch.Tensor, int], Exchange]


class Transport(NamedTuple):
    """How gradients travel.

    Attributes:
      name: of the transport.
      buckets: the plan.
      make: makes its exchange.
      why: one line for people.
    """

    name: str
    buckets: Sequence[Bucket]
    make: MakeExchange
    why: str


def choose(config: RunConfig, ranks: Ranks, segments: Sequence[Segment], ranks_per_node: int) -> Transport:
    """Returns the transport of a run. A collective.

    Args:
      config: which transport, and the limit of a bucket if one is given.
      ranks: the run.
      segments: the flat buffer's.
      ranks_per_node: of this rank's node.
    Raises:
      TrainerConfigError: a hierarchical exchange where nodes have one rank, or not equally many.
      CommunicationError: a peer died or stalled.
    """
    num_shards = config.data.num_shards
    sizes = [segment.padded for segment in segments]
    total_bytes = 4 * sum(sizes)

    given = int(config.bucket_mb * 2**20)
    if config.reducer == "ring" or ranks.world == 1 or ranks.generation:
        # The ring's bits depend on the plan, so it must not depend on a measurement. And the ranks of an
        # elastic run meet anew in less time than one takes.
        name = "ring" if config.reducer == "ring" else "tree"
        usual = plan_buckets(sizes, bucket_bytes=given or auto_bucket_bytes(total_bytes))
        if name == "ring":
            return Transport(name, usual, lambda output, numel: RingExchange(ranks, output), "")
        return Transport(name, usual, _tree(config, ranks), "")
    makers = _candidates(config, ranks, num_shards, ranks_per_node)
    num_blocks = len(blocks_of_ranks(num_shards, ranks.world)[ranks.rank])
    links = {name: measure(ranks, make, num_blocks) for name, make in makers.items()}
    plans = {name: plan_for(link, sizes, given) for name, link in links.items()}
    costs = {name: sum(links[name].seconds(4 * bucket.numel) for bucket in plans[name]) for name in makers}
    name = min(costs, key=lambda candidate: costs[candidate])
    return Transport(name, plans[name], makers[name], _explain(name, links, costs))


def plan_for(link: Link, sizes: Sequence[int], bucket_bytes: int = 0) -> list[Bucket]:
    """Returns the bucket plan for a measured link.

    Args:
      link: as measured.
      sizes: elements of each segment in flat-buffer order.
      bucket_bytes: limit of a bucket that the user gave; 0 for none.
    """
    if bucket_bytes:
        return plan_buckets(sizes, bucket_bytes=bucket_bytes)
    limit = link.bucket_bytes(4 * sum(sizes))
    return plan_ramp(sizes, bucket_bytes=limit, least_bytes=link.least_bytes)


def wire_dtype(config: RunConfig) -> torch.dtype:
    """Returns what a run's gradients are rounded to before they are added."""
    return torch.float32 if config.wire == "fp32" else torch.bfloat16


def _tree(config: RunConfig, ranks: Ranks) -> MakeExchange:
    wire = wire_dtype(config)
    return lambda output, numel: TreeExchange(ranks, config.data.num_shards, numel, output, wire)


def _candidates(
    config: RunConfig, ranks: Ranks, num_shards: int, ranks_per_node: int
) -> dict[str, MakeExchange]:
    """Returns the transports to measure, by name."""
    makers: dict[str, MakeExchange] = {}
    if config.reducer != "hierarchical":
        makers["tree"] = _tree(config, ranks)
    if config.reducer == "tree":
        return makers
    # Alike on all ranks: they all say what they see.
    seen = {int(row[0]) for row in ranks.gather_floats([float(ranks_per_node)], "the ranks of each node")}
    fits = len(seen) == 1 and 1 < ranks_per_node < ranks.world and ranks.world % ranks_per_node == 0
    if config.reducer == "hierarchical" and not fits:
        raise TrainerConfigError(
            f"--reducer hierarchical: nodes have {sorted(seen)} ranks of {ranks.world}; it needs several "
            "nodes with equally many ranks each, and more than one. Use --reducer tree."
        )
    if fits:
        groups = node_groups(ranks, ranks_per_node, config.timeout_s)
        wire = wire_dtype(config)
        inside = torch.float32 if config.wire == "bf16-between" else wire
        makers["hierarchical"] = lambda output, numel: TwoLevelExchange(
            ranks, num_shards, numel, output, groups, wire, inside
        )
    return makers


def _explain(name: str, links: dict[str, Link], costs: dict[str, float]) -> str:
    others = [
        f"{other} would take {1e3 * costs[other]:.1f} ms ({links[other]})" for other in costs if other != name
    ]
    return f"measured {links[name]}: {1e3 * costs[name]:.1f} ms a step" + "".join(
        f"; {text}" for text in others
    )


def ranks_per_node() -> int:
    """Returns how many ranks torchrun started on this node; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
