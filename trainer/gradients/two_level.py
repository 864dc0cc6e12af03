"""The transport for nodes with several ranks: sums inside a node first, then between nodes, in the same tree.

Which ranks share a node the topology says (topology.py): any numbers, and as many as there are. Per bucket of
S bytes, with n nodes, of which the smallest has c ranks; the first c ranks of every node are its speakers:
  1. all-to-all inside the node: speaker l gets chunk l (1/c of the bucket) of all its neighbours' blocks and
     merges them as far as the tree allows, into the blocks of the node's shards;
  2. all-to-all between the speakers l of all nodes, on 1/n of that chunk, where the tree is finished;
     all-gather between them;
  3. all-gather inside the node.
Only step 2 leaves a node: 2(n-1)/n of S per node when a node's shards are one aligned block, however many
ranks it has, in c messages at once. A flat exchange sends as many times the bytes as a node has ranks, in
smaller messages. The smallest node sends that through c ranks anyway, so more speakers elsewhere would wait
for it.

The additions are those of `dyadic.tree_sum` with the same operands, so the bits are those of the flat one.
One thread issues all collectives in bucket order, as in exchange.py.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.dyadic import Block, blocks_of_ranks, merged, stacked
from foldfeed.trainer.gradients.exchange import Exchange, add_in_place, pack, sum_rows
from foldfeed.trainer.groups.ranks import Group, Ranks


class NodeGroups(NamedTuple):
    """Where a rank stands among nodes, and its groups.

    Attributes:
      nodes: the ranks of every node.
      node: this rank's, by its place in ``nodes``.
      place: of this rank in its node.
      speakers: c, how many ranks of each node talk to other nodes.
      inside: of the ranks of this node.
      between: of the ranks of all nodes with this rank's place, if it is a speaker; else of itself.
    """

    nodes: Sequence[Sequence[int]]
    node: int
    place: int
    speakers: int
    inside: Group
    between: Group


def node_groups(ranks: Ranks, nodes: Sequence[Sequence[int]]) -> NodeGroups:
    """Makes this rank's groups. A collective.

    Args:
      ranks: the joined run.
      nodes: from `topology.nodes_of`, equal on all ranks.
    """
    node = next(number for number, members in enumerate(nodes) if ranks.rank in members)
    place, speakers = nodes[node].index(ranks.rank), min(len(members) for members in nodes)
    # Every rank makes two, in this order: torch names groups by how many there are.
    inside = ranks.scatter.part(nodes[node])
    speaks = place < speakers
    between = ranks.gather.part([members[place] for members in nodes] if speaks else [ranks.rank])
    return NodeGroups(nodes, node, place, speakers, inside, between)


class TwoLevelExchange(Exchange):
    """Four collectives per bucket, two inside the node and two between nodes."""

    def __init__(
        self,
        ranks: Ranks,
        num_shards: int,
        output: torch.Tensor,
        groups: NodeGroups,
        wire: torch.dtype = torch.float32,
        inside: torch.dtype | None = None,
    ) -> None:
        """Plans the blocks; message buffers grow to what the largest bucket needs.

        Args:
          ranks: the run.
          num_shards: V.
          output: fp32 (flat numel,), receives the summed buckets.
          groups: from `node_groups`.
          wire: of sums, and of messages between nodes.
          inside: of messages inside a node, which may be wider; as ``wire`` when None.
        """
        self._ranks, self._groups, self._output = ranks, groups, output
        self._wire, self._inside = wire, inside or wire
        self._num_shards = num_shards
        self._speaks = groups.place < groups.speakers
        self._buffers: dict[str, torch.Tensor] = {}
        self.divide(blocks_of_ranks(num_shards, ranks.world))

    def divide(self, blocks: Sequence[Sequence[Block]]) -> None:
        """Plans for other blocks of the ranks, see `exchange.Exchange.divide`."""
        nodes = self._groups.nodes
        self._blocks = [blocks[rank] for rank in nodes[self._groups.node]]
        self._node_blocks = [
            stacked(sorted(block for rank in members for block in blocks[rank])) for members in nodes
        ]
        self._all_blocks = [block for found in self._node_blocks for block in found]
        # Not where nodes hold no neighbouring shards.
        self._in_order = self._all_blocks == sorted(self._all_blocks)

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        """Exchanges one bucket, see `exchange.Exchange.reduce`; it is done when this returns."""
        chunk = -(-bucket.numel // self._groups.speakers)
        share = -(-chunk // len(self._groups.nodes))
        with self._ranks.guard(f"the hierarchical exchange of gradient bucket {bucket.index}"):
            parts = self._merge_in_node(blocks, chunk)
            whole = self._sum_over_nodes(parts, share)[:chunk].to(self._inside) if self._speaks else None
            everything = self._tell_node(whole, chunk)
        self._output[bucket.start : bucket.stop].copy_(everything[: bucket.numel])

    def _merge_in_node(self, blocks: Sequence[torch.Tensor], chunk: int) -> list[torch.Tensor]:
        """Returns a speaker's chunk of each of the node's blocks; nothing on other ranks."""
        speakers, local = self._groups.speakers, len(self._blocks)
        packed = pack(
            self._buffer("send", speakers * len(blocks) * chunk, self._inside), blocks, speakers, chunk
        )
        counts = [len(found) if self._speaks else 0 for found in self._blocks]
        sizes = [packed[0].numel()] * speakers + [0] * (local - speakers)
        rows = self._exchange(self._groups.inside, packed, sizes, counts, chunk, "received")
        if not self._speaks:
            return []
        everybody = [block for found in self._blocks for block in found]
        known = sorted(zip(everybody, rows.unbind(0), strict=True), key=operator.itemgetter(0))
        return [values for _, values in merged(known, add_in_place)]

    def _sum_over_nodes(self, parts: Sequence[torch.Tensor], share: int) -> torch.Tensor:
        """Returns the finished sum of this speaker's chunk, padded."""
        nodes = len(self._groups.nodes)
        packed = pack(self._buffer("send_out", nodes * len(parts) * share, self._wire), parts, nodes, share)
        counts = [len(found) for found in self._node_blocks]
        sizes = [packed[0].numel()] * nodes
        rows = self._exchange(self._groups.between, packed, sizes, counts, share, "received_out")
        mine = sum_rows(rows, self._all_blocks, self._num_shards, in_order=self._in_order)
        return self._gather(self._groups.between, mine, nodes, "chunk")

    def _tell_node(self, whole: torch.Tensor | None, chunk: int) -> torch.Tensor:
        """Returns the finished bucket, padded, which the node's speakers have in chunks."""
        speakers, local = self._groups.speakers, len(self._blocks)
        if whole is not None and speakers == local:
            return self._gather(self._groups.inside, whole, local, "bucket")
        received = self._buffer("bucket", speakers * chunk, self._inside)
        sent = received[:0] if whole is None else whole.repeat(local)
        sizes = [chunk] * speakers + [0] * (local - speakers)
        self._groups.inside.all_to_all(received, sent, sizes, [sent.numel() // local] * local)
        return received

    def _exchange(
        self,
        group: Group,
        packed: torch.Tensor,
        sizes: list[int],
        counts: Sequence[int],
        chunk: int,
        name: str,
    ) -> torch.Tensor:
        """Runs an all-to-all; returns everybody's blocks of this rank's chunk, a row each."""
        if len(sizes) == 1:
            return packed[0].to(self._wire)
        received = self._buffer(name, sum(counts) * chunk, packed.dtype)
        group.all_to_all(received, packed.flatten(), [count * chunk for count in counts], sizes)
        # Sums round as the wire does, however wide the message was.
        return received.view(sum(counts), chunk).to(self._wire)

    def _gather(self, group: Group, mine: torch.Tensor, parts: int, name: str) -> torch.Tensor:
        if parts == 1:
            return mine
        everyone = self._buffer(name, parts * mine.numel(), mine.dtype)
        group.all_gather(everyone, mine.contiguous())()
        return everyone

    def _buffer(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the first elements of a buffer that grows to what its largest bucket needs."""
        found = self._buffers.get(name)
        if found is None or found.numel() < numel:
            found = self._buffers[name] = torch.zeros(numel, dtype=dtype, device=self._output.device)
        return found[:numel]
