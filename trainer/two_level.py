"""The transport for nodes with several ranks: sums inside a node first, then between nodes, in the same tree.

Per bucket of S bytes, with n nodes of L ranks:
  1. all-to-all inside the node: rank l gets chunk l (1/L of the bucket) of its neighbours' blocks and merges
     them as far as the tree allows, into the blocks of the node's shards;
  2. all-to-all between the ranks l of all nodes, on 1/n of that chunk, where the tree is finished; all-gather
     between them;
  3. all-gather inside the node.
Only step 2 leaves a node: 2(n-1)/n of S per node when a node's shards are one aligned block, whatever L is,
in L messages at once. A flat exchange sends up to L times as many, smaller messages between nodes.

The additions are those of `dyadic.tree_sum` with the same operands, so the bits are those of the flat one.
One thread issues all collectives in bucket order, as in exchange.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from foldfeed.trainer.buckets import Bucket
from foldfeed.trainer.dyadic import (
    Block,
    aligned_blocks,
    blocks_of_ranks,
    owned_shards,
    subtree_sum,
)
from foldfeed.trainer.exchange import add_in_place, pack, sum_rows
from foldfeed.trainer.ranks import Group, Ranks, TorchGroup


class NodeGroups(NamedTuple):
    """The groups of a rank that has neighbours on its node.

    Attributes:
      ranks_per_node: L.
      inside: of the ranks of this node.
      between: of the ranks of all nodes with this rank's place in its node.
    """

    ranks_per_node: int
    inside: Group
    between: Group


def node_groups(ranks: Ranks, ranks_per_node: int, timeout_s: float) -> NodeGroups:
    """Makes the groups of every node and of every place in a node. A collective.

    Args:
      ranks: the joined run; ranks of a node are neighbours in number, as torchrun gives them.
      ranks_per_node: L, equal on all nodes, a divisor of the world.
      timeout_s: as of the run's other groups.
    """
    assert ranks.world % ranks_per_node == 0, (ranks.world, ranks_per_node)
    nodes = [range(start, start + ranks_per_node) for start in range(0, ranks.world, ranks_per_node)]
    places = [range(place, ranks.world, ranks_per_node) for place in range(ranks_per_node)]
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    mine: list[Group] = []
    for members in (*nodes, *places):
        # Every rank makes every group, in the same order: torch asks for it.
        group = dist.new_group(list(members), backend=backend, timeout=datetime.timedelta(seconds=timeout_s))
        if ranks.rank in members:
            assert isinstance(group, dist.ProcessGroup), group
            mine.append(TorchGroup(group))
    inside, between = mine
    return NodeGroups(ranks_per_node, inside, between)


class TwoLevelExchange:
    """Four collectives per bucket, two inside the node and two between nodes."""

    def __init__(
        self,
        ranks: Ranks,
        num_shards: int,
        max_numel: int,
        output: torch.Tensor,
        groups: NodeGroups,
        wire: torch.dtype = torch.float32,
        inside: torch.dtype | None = None,
    ) -> None:
        """Plans the blocks and allocates message buffers.

        Args:
          ranks: the run.
          num_shards: V.
          max_numel: elements of the largest bucket.
          output: fp32 (flat numel,), receives the summed buckets.
          groups: from `node_groups`.
          wire: of sums, and of messages between nodes.
          inside: of messages inside a node, which may be wider; as ``wire`` when None.
        """
        self._ranks, self._groups, self._output = ranks, groups, output
        self._wire, self._inside = wire, inside or wire
        self._num_shards = num_shards
        local = groups.ranks_per_node
        self._local, self._nodes = local, ranks.world // local
        node = ranks.rank // local
        self._blocks = blocks_of_ranks(num_shards, ranks.world)[node * local : (node + 1) * local]
        self._node_blocks = [
            node_blocks(num_shards, ranks.world, local, number) for number in range(self._nodes)
        ]
        self._node = node
        self._buffers: dict[str, torch.Tensor] = {}

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        """Exchanges one bucket, see `exchange.Exchange.reduce`; it is done when this returns."""
        chunk = -(-bucket.numel // self._local)
        share = -(-chunk // self._nodes)
        with self._ranks.guard(f"the hierarchical exchange of gradient bucket {bucket.index}"):
            merged = self._merge_in_node(blocks, chunk)
            mine = self._sum_over_nodes(merged, share)
            whole = self._gather(self._groups.between, mine, self._nodes, "chunk")[:chunk].to(self._inside)
            everything = self._gather(self._groups.inside, whole, self._local, "bucket")
        self._output[bucket.start : bucket.stop].copy_(everything[: bucket.numel])

    def drain(self) -> None:
        """Does nothing: no exchange outlives its `reduce`."""

    def _merge_in_node(self, blocks: Sequence[torch.Tensor], chunk: int) -> list[torch.Tensor]:
        """Returns this rank's chunk of each of the node's blocks."""
        counts = [len(found) for found in self._blocks]
        buffer = self._buffer("send", self._local * len(blocks) * chunk, self._inside)
        packed = pack(buffer, blocks, self._local, chunk)
        received = self._exchange(self._groups.inside, packed, counts, chunk, "received")
        everybody = [block for found in self._blocks for block in found]
        known = dict(zip(everybody, received.unbind(0), strict=True))
        return [
            subtree_sum(known, block, self._num_shards, add_in_place)
            for block in self._node_blocks[self._node]
        ]

    def _sum_over_nodes(self, merged: Sequence[torch.Tensor], share: int) -> torch.Tensor:
        """Returns the finished sum of this rank's share of its chunk."""
        counts = [len(found) for found in self._node_blocks]
        buffer = self._buffer("send_out", self._nodes * len(merged) * share, self._wire)
        packed = pack(buffer, merged, self._nodes, share)
        received = self._exchange(self._groups.between, packed, counts, share, "received_out")
        everybody = [block for found in self._node_blocks for block in found]
        return sum_rows(received, everybody, self._num_shards)

    def _exchange(
        self, group: Group, packed: torch.Tensor, counts: Sequence[int], chunk: int, name: str
    ) -> torch.Tensor:
        """Runs an all-to-all; returns everybody's blocks of this rank's chunk, a row each, in shard order."""
        received = self._buffer(name, sum(counts) * chunk, packed.dtype)
        group.all_to_all(
            received,
            packed.flatten(),
            [count * chunk for count in counts],
            [packed.shape[1] * chunk] * packed.shape[0],
        )
        # Sums round as the wire does, however wide the message was.
        return received.view(sum(counts), chunk).to(self._wire)

    def _gather(self, group: Group, mine: torch.Tensor, parts: int, name: str) -> torch.Tensor:
        everyone = self._buffer(name, parts * mine.numel(), mine.dtype)
        group.all_gather(everyone, mine.contiguous())()
        return everyone

    def _buffer(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the first elements of a buffer that grows to what its largest bucket needs."""
        found = self._buffers.get(name)
        if found is None or found.numel() < numel:
            found = self._buffers[name] = torch.zeros(numel, dtype=dtype, device=self._output.device)
        return found[:numel]


def node_blocks(num_shards: int, world: int, ranks_per_node: int, node: int) -> list[Block]:
    """Returns the blocks that the ranks of one node can finish together."""
    first, last = node * ranks_per_node, (node + 1) * ranks_per_node - 1
    start, stop = owned_shards(num_shards, world, first).start, owned_shards(num_shards, world, last).stop
    return aligned_blocks(start, stop)
