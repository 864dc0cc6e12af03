"""Chooses how gradients travel: the transport, by name or by measurement, and the bucket plan for it.

    tree           one fixed tree over the virtual shards, equal bits on any number of ranks (exchange.py)
    hierarchical   the same tree, inside nodes first (two_level.py): equal bits, fewer messages between nodes
    auto           measures both where nodes have several ranks, and takes the quicker one
    ring           the backend's all-reduce (ring.py): bits depend on the number of ranks

Owns the choice. It is made once a run starts and costs a few exchanges. An elastic run measures the link in
its first generation of ranks and plans the later ones by that; it takes the transport that was asked for, the
tree for ``auto``. A snapshot only names it, because the first three give the same bits under any plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.gradients.buckets import Bucket, auto_bucket_bytes, plan_buckets, plan_ramp
from foldfeed.trainer.gradients.dyadic import blocks_of_ranks
from foldfeed.trainer.gradients.exchange import Exchange
from foldfeed.trainer.gradients.flat import Segment
from foldfeed.trainer.gradients.probe import Link, measure
from foldfeed.trainer.gradients.ring import RingExchange
from foldfeed.trainer.gradients.stream import tree_exchange
from foldfeed.trainer.gradients.two_level import TwoLevelExchange, node_groups
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.groups.topology import nodes_of, own_place, told_place

# From (output, elements of the largest bucket).
MakeExchange = Callable[[torch.Tensor, int], Exchange]


class Transport(NamedTuple):
    """How gradients travel.

    Attributes:
      name: of the transport.
      buckets: the plan.
      make: makes its exchange.
      why: one line for people.
      link: that the plan is for; None where none was measured.
    """

    name: str
    buckets: Sequence[Bucket]
    make: MakeExchange
    why: str
    link: Link | None


def choose(
    config: RunConfig, ranks: Ranks, segments: Sequence[Segment], known: Link | None = None
) -> Transport:
    """Returns the transport of a run. A collective.

    Args:
      config: which transport, and the limit of a bucket if one is given.
      ranks: the run.
      segments: the flat buffer's.
      known: link that an earlier generation of an elastic run measured; equal on all ranks.
    Raises:
      TrainerConfigError: a hierarchical exchange of one node, or of nodes that have one rank each; or only
        some ranks know their place.
      CommunicationError: a peer died or stalled.
    """
    sizes = [segment.padded for segment in segments]
    given = int(config.bucket_mb * 2**20)
    usual = plan_buckets(sizes, bucket_bytes=given or auto_bucket_bytes(4 * sum(sizes)))
    if config.reducer == "ring":
        # Its bits depend on the plan, so that must not depend on a measurement.
        return Transport("ring", usual, lambda output, numel: RingExchange(ranks, output), "", None)
    if ranks.world == 1:
        return Transport("tree", usual, _tree(config, ranks), "", known)
    by_nodes = config.reducer == "hierarchical" or (config.reducer == "auto" and not ranks.generation)
    nodes = find_nodes(ranks) if by_nodes else []
    makers = _candidates(config, ranks, nodes)
    num_blocks = len(blocks_of_ranks(config.data.num_shards, ranks.world)[ranks.rank])
    # The ranks of an elastic run meet again in less time than a measurement takes.
    links = {name: known or measure(ranks, make, num_blocks) for name, make in makers.items()}
    plans = {name: usual if given else plan_for(link, sizes) for name, link in links.items()}
    costs = {name: sum(links[name].seconds(4 * bucket.numel) for bucket in plans[name]) for name in makers}
    name = min(costs, key=lambda candidate: costs[candidate])
    why = "" if known else _explain(name, links, costs)
    if ranks.generation and name == "hierarchical":
        why = f"{len(nodes)} nodes have {'+'.join(str(len(node)) for node in nodes)} ranks"
    return Transport(name, plans[name], makers[name], why, links[name])


def plan_for(link: Link, sizes: Sequence[int]) -> list[Bucket]:
    """Returns the bucket plan for a measured link.

    Args:
      link: as measured.
      sizes: elements of each segment in flat-buffer order.
    """
    limit = link.bucket_bytes(4 * sum(sizes))
    return plan_ramp(sizes, bucket_bytes=limit, least_bytes=link.least_bytes)


def wire_dtype(config: RunConfig) -> torch.dtype:
    """Returns what a run's gradients are rounded to before they are added."""
    return torch.float32 if config.wire == "fp32" else torch.bfloat16


def _tree(config: RunConfig, ranks: Ranks) -> MakeExchange:
    wire = wire_dtype(config)
    return lambda output, numel: tree_exchange(ranks, config.data.num_shards, numel, output, wire)


def _hierarchical(config: RunConfig, ranks: Ranks, nodes: Sequence[Sequence[int]]) -> MakeExchange:
    groups, wire = node_groups(ranks, nodes), wire_dtype(config)
    inside = torch.float32 if config.wire == "bf16-between" else wire
    num_shards = config.data.num_shards
    return lambda output, _: TwoLevelExchange(ranks, num_shards, output, groups, wire, inside)


def find_nodes(ranks: Ranks) -> list[list[int]]:
    """Returns the ranks of each node, see `topology.nodes_of`; an elastic run's by host if nothing is told.

    A collective: all ranks say what they know.
    """
    place = own_place() if ranks.generation else told_place()
    rows = ranks.gather_json([place, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))], "the ranks of each node")
    return nodes_of([row[0] for row in rows], [row[1] for row in rows])


def fits(nodes: Sequence[Sequence[int]]) -> bool:
    """Returns whether there is something to sum inside nodes, and something between them."""
    return len(nodes) > 1 and max(len(node) for node in nodes) > 1


def _candidates(config: RunConfig, ranks: Ranks, nodes: Sequence[Sequence[int]]) -> dict[str, MakeExchange]:
    """Returns the transports to measure, by name."""
    two_level = fits(nodes)
    if config.reducer == "hierarchical" and not two_level and not ranks.generation:
        sizes = sorted({len(node) for node in nodes})
        raise TrainerConfigError(
            f"--reducer hierarchical: nodes have {sizes} ranks of {ranks.world}; it needs several nodes, one "
            "of them with several ranks. Say where ranks stand (FOLDFEED_PLACE), or use --reducer tree."
        )
    makers: dict[str, MakeExchange] = {}
    # An elastic run has the tree while its nodes do not fit; and one transport, whose link is handed on.
    if config.reducer != "hierarchical" or not two_level:
        makers["tree"] = _tree(config, ranks)
    if two_level:
        makers["hierarchical"] = _hierarchical(config, ranks, nodes)
    return makers


def _explain(name: str, links: dict[str, Link], costs: dict[str, float]) -> str:
    others = [
        f"; {other} would take {1e3 * costs[other]:.1f} ms ({links[other]})"
        for other in costs
        if other != name
    ]
    return f"measured {links[name]}: {1e3 * costs[name]:.1f} ms a step" + "".join(others)
