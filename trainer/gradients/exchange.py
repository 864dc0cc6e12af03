"""Moves one bucket between ranks and sums it in the fixed tree: the transport under the reducer.

`Exchange` is what the reducer needs of a transport; `TreeExchange` is the usual one (others: stream.py, the
same over own sockets on CPUs; two_level.py, for nodes with several ranks; and ring.py). Per bucket, two
phases on two process groups:
  1. all-to-all: every rank sends chunk c of each block it finished (dyadic.py) to rank c, which then holds
     all blocks of its chunk and adds them in the tree's order;
  2. all-gather: the finished chunks go to everyone.
When each rank owns one aligned block this moves 2(W-1)/W of the bucket, the bytes of a ring all-reduce.

Messages are fp32 or bf16. Any node of the tree but the root crosses the wire for some number of ranks, so
with bf16 every node is rounded, whether it travels or not: leaves are (reducer.py), and torch adds two bf16
values in fp32 and rounds once. A sum of V shards is then off by at most (1 + log2 V) 2^-8 of the sum of
magnitudes; adding along a ring in bf16 may be off by V 2^-8. Equal bits on any ranks are worth it.

Phase 2 of a bucket runs while phase 1 of the next is under way. One thread (the caller's) issues all
collectives, in bucket order, on every rank: A2A(0), AG(0), A2A(1), AG(1), ... so no two ranks can wait for
each other's other phase, and NCCL sees one issue order for both communicators.

Owns: the message buffers, sized for the largest bucket and reused. Does not own: when a bucket is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.dyadic import Block, blocks_of_ranks, tree_sum
from foldfeed.trainer.groups.ranks import Ranks

# What rows are added as: a call of numpy takes less time, torch has bfloat16. The bits are the same.
Values = TypeVar("Values", torch.Tensor, np.ndarray[Any, Any])


class Exchange(Protocol):
    """A transport: sums buckets over the ranks, in order, from one thread."""

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        """Starts one bucket; its sum is in the output after `drain`, or after the next `reduce`.

        Args:
          bucket: which elements.
          blocks: (bucket.numel,) each, this rank's finished blocks in order.
        Raises:
          CommunicationError: a peer died or stalled.
        """
        ...

    def progress(self, wake: int) -> None:
        """Goes on with what is under way until nothing is, or a descriptor is readable.

        For a transport that moves bytes in its caller's thread; nothing where a backend moves them by itself.
        """
        return

    def drain(self) -> None:
        """Finishes what is under way; nothing where no exchange outlives its `reduce`."""
        return

    def divide(self, blocks: Sequence[Sequence[Block]]) -> None:
        """Prepares for other blocks of the ranks; nothing may be under way.

        Nothing where what ranks bring is summed whatever it is.

        Args:
          blocks: per rank, in the order in which it gives them; together they cover all shards once.
        """
        return


class TreeExchange(Exchange):
    """Two-phase exchange of buckets, in order, from one thread."""

    def __init__(
        self,
        ranks: Ranks,
        num_shards: int,
        max_numel: int,
        output: torch.Tensor,
        wire: torch.dtype = torch.float32,
    ) -> None:
        """Allocates message buffers.

        Args:
          ranks: the groups.
          num_shards: V.
          max_numel: elements of the largest bucket.
          output: fp32 (flat numel,), receives the summed buckets.
          wire: of messages and sums.
        """
        self._ranks = ranks
        self._num_shards = num_shards
        self._output = output
        world, chunk = ranks.world, -(-max_numel // ranks.world)
        self._chunk = torch.zeros(chunk, dtype=wire, device=output.device)
        self._gathered = torch.zeros(world * chunk, dtype=wire, device=output.device)
        self._in_flight: tuple[Callable[[], None], Bucket] | None = None
        self.divide(blocks_of_ranks(num_shards, world))

    def divide(self, blocks: Sequence[Sequence[Block]]) -> None:
        """Allocates messages for other blocks of the ranks, see `Exchange.divide`."""
        world, chunk = self._ranks.world, len(self._chunk)
        self._blocks = blocks
        self._all_blocks = [block for mine in blocks for block in mine]
        self._in_order = self._all_blocks == sorted(self._all_blocks)
        mine = len(blocks[self._ranks.rank])
        self._send = self._chunk.new_zeros(world * mine * chunk)
        # A single process sums what it packed; nothing is received.
        self._recv = self._chunk.new_zeros(len(self._all_blocks) * chunk if world > 1 else 0)

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        """Exchanges one bucket, see `Exchange.reduce`."""
        world = self._ranks.world
        chunk = -(-bucket.numel // world)
        rows = pack(self._send, blocks, world, chunk)[0]
        if world > 1:
            rows = self._scatter(bucket, chunk)
        self.drain()
        summed = sum_rows(rows, self._all_blocks, self._num_shards, in_order=self._in_order)
        if world == 1:
            self._output[bucket.start : bucket.stop].copy_(summed)
            return
        self._chunk[:chunk].copy_(summed)
        with self._ranks.guard(f"the all-gather of gradient bucket {bucket.index}"):
            wait = self._ranks.gather.all_gather(self._gathered[: world * chunk], self._chunk[:chunk])
        self._in_flight = (wait, bucket)

    def drain(self) -> None:
        """Finishes the all-gather that is under way, if any."""
        if self._in_flight is None:
            return
        wait, bucket = self._in_flight
        self._in_flight = None
        with self._ranks.guard(f"the all-gather of gradient bucket {bucket.index}"):
            wait()
        # The last chunks may be padding: world * chunk >= numel.
        self._output[bucket.start : bucket.stop].copy_(self._gathered[: bucket.numel])

    def _scatter(self, bucket: Bucket, chunk: int) -> torch.Tensor:
        """Runs the all-to-all; returns all ranks' blocks of this rank's chunk, a row each, in rank order."""
        world, counts = self._ranks.world, [len(blocks) for blocks in self._blocks]
        mine = counts[self._ranks.rank]
        received = self._recv[: sum(counts) * chunk]
        with self._ranks.guard(f"the all-to-all of gradient bucket {bucket.index}"):
            self._ranks.scatter.all_to_all(
                received,
                self._send[: world * mine * chunk],
                [count * chunk for count in counts],
                [mine * chunk] * world,
            )
        return received.view(sum(counts), chunk)


def elements_sent(num_shards: int, world: int, numel: int) -> list[int]:
    """Returns how many elements each rank sends for one bucket of a `TreeExchange`.

    ``elements_sent(8, 4, 1000)`` is ``[1500] * 4``: 2 (W - 1) / W of the bucket, as a ring's.
    """
    chunk = -(-numel // world)
    return [(world - 1) * chunk * (len(blocks) + 1) for blocks in blocks_of_ranks(num_shards, world)]


def pack(buffer: torch.Tensor, blocks: Sequence[torch.Tensor], parts: int, chunk: int) -> torch.Tensor:
    """Lays blocks out by destination, zero padded; returns (parts, number of blocks, chunk), a view.

    Args:
      buffer: at least that long; what is packed gets its dtype.
      blocks: of at most ``parts * chunk`` elements.
      parts: destinations; the first gets the first chunk of every block.
      chunk: elements of a block for one destination.
    """
    packed = buffer[: parts * len(blocks) * chunk].view(parts, len(blocks), chunk)
    for position, block in enumerate(blocks):
        full, rest = divmod(block.numel(), chunk)
        packed[:full, position].copy_(block[: full * chunk].view(full, chunk))
        if full < parts:
            packed[full:, position].zero_()
            packed[full, position, :rest].copy_(block[full * chunk :])
    return packed


def sum_rows(rows: Values, blocks: Sequence[Block], num_shards: int, *, in_order: bool = True) -> Values:
    """Returns the sum of all shards in the fixed tree's order.

    Args:
      rows: (number of blocks, n), the blocks' values; written over.
      blocks: that cover all shards.
      num_shards: V.
      in_order: whether the blocks are in the order of their shards.
    """
    if not in_order or len({block.size for block in blocks}) > 1:
        return tree_sum(dict(zip(blocks, rows, strict=True)), num_shards, add_in_place)
    # Equal blocks: the same additions, a level of the tree at once; a dozen operations for 4,096 ranks.
    while len(rows) > 1:
        pairs = len(rows) // 2 * 2
        add_in_place(rows[0:pairs:2], rows[1:pairs:2])
        rows = rows[::2]
    return rows[0]


def add_in_place(left: Values, right: Values) -> Values:
    """Returns ``left``, to which ``right`` was added."""
    # A row is an operand once. IEEE addition of two values does not depend on where they lie.
    left += right
    return left


def finish_blocks(
    stack: Sequence[tuple[Block, torch.Tensor]],
    leaf: torch.Tensor | None,
    num_merged: int,
    scratch: torch.Tensor,
) -> list[torch.Tensor]:
    """Returns this rank's finished blocks of one bucket; neither stack nor leaf is written.

    The last virtual shard's gradient is still in ``leaf``: it merges with the top ``num_merged`` blocks
    here, out of place, so that a bucket can be exchanged again if a late gradient changes the leaf.

    Args:
      stack: finished blocks with their values restricted to the bucket, bottom first.
      leaf: the last shard's gradient restricted to the bucket, fp32; None where all are on the stack.
      num_merged: from `dyadic.merge_chain`.
      scratch: at least as long as the leaf, of the dtype of sums.
    """
    if leaf is None:
        return [values for _, values in stack]
    kept = len(stack) - num_merged
    last = leaf if leaf.dtype is scratch.dtype else scratch[: leaf.numel()].copy_(leaf)
    for _, below in reversed(stack[kept:]):
        last = torch.add(below, last, out=scratch[: leaf.numel()])
    return [values for _, values in stack[:kept]] + [last]
