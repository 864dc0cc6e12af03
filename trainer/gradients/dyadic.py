"""Virtual shards and the one fixed tree that sums them: pure index arithmetic.

A step's batch is cut into V virtual shards; W <= V ranks share them. Sums in floating point depend on the
order of the additions, so the order is fixed once, by V alone: a binary tree over the shard numbers, padded
to the next power of two, absent leaves skipped. A rank's shards are contiguous; it can finish every subtree
that lies wholly inside its range (the maximal aligned blocks, at most 2*log2(V) of them), and whoever holds
all blocks finishes the rest of the tree. Which rank did which addition then changes nothing.

    V = 8, W = 3: rank 0 owns 0..1, rank 1 owns 2..4, rank 2 owns 5..7
    blocks: rank 0: (0,2)   rank 1: (2,2) (4,1)   rank 2: (5,1) (6,2)
    tree:   ((0,2)+(2,2)) + (((4,1)+(5,1)) + (6,2))

Invariant: `tree_sum` over any rank split performs the same additions with the same operands. This module
knows nothing of torch or communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Block(NamedTuple):
    """An aligned run of virtual shards: ``size`` is a power of two that divides ``start``."""

    start: int
    size: int

    @property
    def shards(self) -> range:
        """The virtual shards in it."""
        return range(self.start, self.start + self.size)


class Division(NamedTuple):
    """Who brings what to the sum of a step.

    Attributes:
      kept: per rank, blocks that it has from an attempt at the step that was broken off.
      shards: per rank, the virtual shards that it computes, ascending.
    """

    kept: list[list[Block]]
    shards: list[list[int]]

    @property
    def repairs(self) -> bool:
        """Whether anything was kept."""
        return any(self.kept)

    @property
    def blocks(self) -> list[list[Block]]:
        """Per rank, the blocks that it ends with."""
        return [
            stacked((Block(shard, 1) for shard in shards), kept)
            for kept, shards in zip(self.kept, self.shards, strict=True)
        ]


def owned_shards(num_shards: int, world: int, rank: int) -> range:
    """Returns the virtual shards of one rank: contiguous, covering, sizes differing by at most one."""
    return range(num_shards * rank // world, num_shards * (rank + 1) // world)


def blocks_of_ranks(num_shards: int, world: int) -> list[list[Block]]:
    """Returns, for each rank, the blocks it can finish alone."""
    return usual_division(num_shards, world).blocks


def usual_division(num_shards: int, world: int) -> Division:
    """Returns the division of a step of which nothing is there yet."""
    shards = [list(owned_shards(num_shards, world, rank)) for rank in range(world)]
    return Division([[] for _ in range(world)], shards)


def repaired(kept: Sequence[Sequence[Block]], num_shards: int) -> Division:
    """Returns the division of a step that begins again: what ranks have stays, the rest is dealt out evenly.

    So a rank that is gone costs its own shards, computed by all that are left, and no rank gives up what it
    has because others own other shards now. With 8 shards, of which rank 3 of 4 took 6 and 7 with it:

        repaired([[(0, 2)], [(2, 2)], [(4, 2)]], 8).shards   is   [[], [6], [7]]

    Args:
      kept: per rank, what it has; of two that have the same shard, which no two should, the first counts.
      num_shards: V.
    """
    taken: set[int] = set()
    counted: list[list[Block]] = []
    for blocks in kept:
        counted.append([])
        for block in blocks:
            if taken.isdisjoint(block.shards):
                taken.update(block.shards)
                counted[-1].append(block)
    if not taken:
        return usual_division(num_shards, len(kept))
    missing = [shard for shard in range(num_shards) if shard not in taken]
    dealt = [owned_shards(len(missing), len(kept), rank) for rank in range(len(kept))]
    return Division(counted, [missing[part.start : part.stop] for part in dealt])


def stacked(blocks: Iterable[Block], kept: Sequence[Block] = ()) -> list[Block]:
    """Returns the nodes of the tree that a rank has which finishes these blocks one after another.

    Of blocks in order of their shards these are all that the tree allows:
    ``stacked([(0, 2), (2, 2), (4, 1), (5, 1)])`` is ``[(0, 4), (4, 2)]``.

    Args:
      blocks: in the order in which they are finished.
      kept: what was there before.
    """
    stack = list(kept)
    for block in blocks:
        num_merged, merged = merge_chain(stack, *block)
        stack[len(stack) - num_merged :] = [merged]
    return stack


def merge_chain(stack: Sequence[Block], start: int, size: int = 1) -> tuple[int, Block]:
    """Returns how many blocks on top of ``stack`` merge when a block is finished, and the result.

    This is a binary counter: with blocks (0,4) (4,2) (6,1) finished, shard 7 merges with all three and
    leaves (0,8); shard 4 after (2,2) merges with none.

    Args:
      stack: finished blocks.
      start: of the new one, by default a single shard.
      size: of it.
    """
    block = Block(start, size)
    num_merged = 0
    for below in reversed(stack):
        is_sibling = below.size == block.size and below.start + below.size == block.start
        # And their parent is aligned.
        if not is_sibling or below.start % (2 * below.size):
            break
        block = Block(below.start, 2 * block.size)
        num_merged += 1
    return num_merged, block


def merged(blocks: Iterable[tuple[Block, T]], add: Callable[[T, T], T]) -> list[tuple[Block, T]]:
    """Returns blocks and their sums, of neighbours as far as the tree allows, in the tree's order.

    Args:
      blocks: finished ones with their sums, in order of their shards.
      add: sums a left and a right subtree; it may reuse the left operand.
    """
    stack: list[tuple[Block, T]] = []
    for block, value in blocks:
        num_merged, block = merge_chain([below for below, _ in stack], *block)
        for _ in range(num_merged):
            value = add(stack.pop()[1], value)
        stack.append((block, value))
    return stack


def tree_sum(blocks: Mapping[Block, T], num_shards: int, add: Callable[[T, T], T]) -> T:
    """Returns the sum of all shards in the fixed tree's order.

    Args:
      blocks: finished blocks that together cover ``range(num_shards)`` exactly once.
      num_shards: V, at least 1.
      add: as of `merged`.
    Raises:
      ValueError: the blocks leave a shard out.
    """
    there = sorted(blocks)
    missing = set(range(num_shards)).difference(*(block.shards for block in there))
    if missing:
        raise ValueError(f"virtual shard {min(missing)} of {num_shards} is in none of the blocks {there}")
    *rest, (_, total) = merged(((block, blocks[block]) for block in there), add)
    # Right of what is left over the tree has absent leaves alone.
    for _, value in reversed(rest):
        total = add(value, total)
    return total
