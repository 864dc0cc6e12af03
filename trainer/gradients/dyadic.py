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
        return [stacked(kept, shards) for kept, shards in zip(self.kept, self.shards, strict=True)]


def owned_shards(num_shards: int, world: int, rank: int) -> range:
    """Returns the virtual shards of one rank: contiguous, covering, sizes differing by at most one."""
    return range(num_shards * rank // world, num_shards * (rank + 1) // world)


def aligned_blocks(start: int, stop: int) -> list[Block]:
    """Returns the fewest aligned power-of-two blocks that cover ``[start, stop)``, in order.

    ``aligned_blocks(2, 5)`` is ``[(2, 2), (4, 1)]``.
    """
    blocks = []
    while start < stop:
        size = 1
        while start % (2 * size) == 0 and start + 2 * size <= stop:
            size *= 2
        blocks.append(Block(start, size))
        start += size
    return blocks


def blocks_of_ranks(num_shards: int, world: int) -> list[list[Block]]:
    """Returns, for each rank, the blocks it can finish alone."""
    owned = [owned_shards(num_shards, world, rank) for rank in range(world)]
    return [aligned_blocks(shards.start, shards.stop) for shards in owned]


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


def stacked(kept: Sequence[Block], shards: Sequence[int]) -> list[Block]:
    """Returns the blocks that a rank has when it finished ``shards``, one after another, on top of others."""
    stack = list(kept)
    for shard in shards:
        num_merged, block = merge_chain(stack, shard)
        stack[len(stack) - num_merged :] = [block]
    return stack


def merge_chain(stack: Sequence[Block], leaf: int) -> tuple[int, Block]:
    """Returns how many blocks on top of ``stack`` merge when shard ``leaf`` is finished, and the result.

    This is a binary counter: with blocks (0,4) (4,2) (6,1) finished, shard 7 merges with all three and
    leaves (0,8); shard 4 after (2,2) merges with none.
    """
    block = Block(leaf, 1)
    merged = 0
    for below in reversed(stack):
        if not _are_siblings(below, block):
            break
        block = Block(below.start, 2 * block.size)
        merged += 1
    return merged, block


def _are_siblings(left: Block, right: Block) -> bool:
    """Returns whether two nodes of the tree have one parent: equal sizes, and the parent is aligned."""
    return (
        left.size == right.size and left.start + left.size == right.start and not left.start % (2 * left.size)
    )


def merged_blocks(blocks: Iterable[Block]) -> list[Block]:
    """Returns the nodes of the tree that whoever holds these blocks can finish, in order.

    ``merged_blocks([(4, 1), (0, 2), (2, 2), (5, 1)])`` is ``[(0, 4), (4, 2)]``.

    Args:
      blocks: of which none lies in another, in any order.
    """
    found: list[Block] = []
    for block in sorted(blocks):
        found.append(block)
        while len(found) > 1 and _are_siblings(found[-2], found[-1]):
            right = found.pop()
            found.append(Block(found.pop().start, 2 * right.size))
    return found


def tree_sum(blocks: Mapping[Block, T], num_shards: int, add: Callable[[T, T], T]) -> T:
    """Returns the sum of all shards in the fixed tree's order.

    Args:
      blocks: finished blocks that together cover ``range(num_shards)`` exactly once.
      num_shards: V, at least 1.
      add: sums a left and a right subtree; it may reuse the left operand.
    Raises:
      ValueError: the blocks leave a shard out.
    """
    size = 1
    while size < num_shards:
        size *= 2
    return subtree_sum(blocks, Block(0, size), num_shards, add)


def subtree_sum(blocks: Mapping[Block, T], root: Block, num_shards: int, add: Callable[[T, T], T]) -> T:
    """Returns the sum of the shards under one node of the tree, in the tree's order.

    Args:
      blocks: finished blocks; those under the root cover its shards exactly once.
      root: an aligned block; what is beyond the last shard counts as absent.
      num_shards: V, at least 1.
      add: sums a left and a right subtree; it may reuse the left operand.
    Raises:
      ValueError: the blocks leave a shard out.
    """

    def node(block: Block) -> T | None:
        if block in blocks:
            return blocks[block]
        if block.start >= num_shards:
            return None
        if block.size == 1:
            raise ValueError(
                f"virtual shard {block.start} of {num_shards} is in none of the blocks {list(blocks)}"
            )
        half = block.size // 2
        left = node(Block(block.start, half))
        right = node(Block(block.start + half, half))
        if right is None:
            return left
        assert left is not None, "a right subtree without its left one"
        return add(left, right)

    total = node(root)
    assert total is not None, f"no shard under {root}"
    return total
