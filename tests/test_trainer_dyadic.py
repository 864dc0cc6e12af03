"""Shard blocks, the fixed tree and the bucket plan: index arithmetic, without torch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldfeed.trainer.gradients.buckets import TAIL_SHARE, auto_bucket_bytes, plan_buckets
from foldfeed.trainer.gradients.dyadic import (
    Block,
    blocks_of_ranks,
    owned_shards,
    repaired,
    stacked,
    tree_sum,
    usual_division,
)

splits = st.integers(1, 40).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v)))


def expression(start: int, size: int, num_shards: int) -> str:
    """The tree written out by recursion over single shards: the independent reference."""
    if start >= num_shards:
        return ""
    if size == 1:
        return str(start)
    left = expression(start, size // 2, num_shards)
    right = expression(start + size // 2, size // 2, num_shards)
    return f"({left}+{right})" if right else left


def test_the_example_of_the_docstring() -> None:
    blocks = blocks_of_ranks(8, 3)
    assert blocks == [[(0, 2)], [(2, 2), (4, 1)], [(5, 1), (6, 2)]]


@given(splits)
def test_every_shard_is_owned_once_and_loads_differ_by_one(split: tuple[int, int]) -> None:
    num_shards, world = split
    owned = [owned_shards(num_shards, world, rank) for rank in range(world)]
    assert [shard for shards in owned for shard in shards] == list(range(num_shards))
    sizes = [len(shards) for shards in owned]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(st.integers(0, 200), st.integers(0, 200))
def test_blocks_are_aligned_maximal_and_few(start: int, length: int) -> None:
    blocks = stacked(Block(shard, 1) for shard in range(start, start + length))
    assert [shard for b in blocks for shard in range(b.start, b.start + b.size)] == list(
        range(start, start + length)
    )
    for block in blocks:
        assert block.size & (block.size - 1) == 0
        assert block.start % block.size == 0
        # Maximal: the parent block would stick out of the range.
        parent = block.start - block.start % (2 * block.size)
        assert parent < start or parent + 2 * block.size > start + length
    assert len(blocks) <= 2 * max(1, length.bit_length())


@given(splits)
def test_the_sum_is_the_same_expression_for_every_world_size(split: tuple[int, int]) -> None:
    num_shards, world = split
    size = 1
    while size < num_shards:
        size *= 2
    blocks = {
        block: expression(block.start, block.size, num_shards)
        for owned in blocks_of_ranks(num_shards, world)
        for block in owned
    }
    summed = tree_sum(blocks, num_shards, lambda left, right: f"({left}+{right})")
    assert summed == expression(0, size, num_shards)


@given(splits, st.data())
def test_steps_that_break_again_and_again_give_the_same_expression(
    split: tuple[int, int], data: st.DataObject
) -> None:
    """Ranks die and join between attempts; nobody computes what somebody who lives has."""
    num_shards, world = split
    size = 1 << (num_shards - 1).bit_length()
    division = usual_division(num_shards, world)
    for _ in range(data.draw(st.integers(1, 3))):
        held = []
        for kept, shards in zip(division.kept, division.shards, strict=True):
            if data.draw(st.booleans()):
                done = shards[: data.draw(st.integers(0, len(shards)))]
                held.append(stacked((Block(shard, 1) for shard in done), kept))
        held = held[: max(1, num_shards)] or [[]]
        if len(held) < num_shards and data.draw(st.booleans()):
            held.append([])
        there = {shard for blocks in held for block in blocks for shard in block.shards}
        division = repaired(held, num_shards)
        assert not there or division.kept == held
        assert sorted(itertools.chain(*division.shards)) == sorted(set(range(num_shards)) - there)
        assert all(shards == sorted(shards) for shards in division.shards)
        sizes = [len(shards) for shards in division.shards]
        assert max(sizes) - min(sizes) <= 1
    blocks = {
        block: expression(block.start, block.size, num_shards) for mine in division.blocks for block in mine
    }
    assert tree_sum(blocks, num_shards, lambda left, right: f"({left}+{right})") == expression(
        0, size, num_shards
    )


def test_of_two_ranks_that_have_the_same_shard_the_first_counts() -> None:
    division = repaired([[Block(0, 2)], [Block(1, 1), Block(2, 1)]], 4)
    assert division.kept == [[Block(0, 2)], [Block(2, 1)]]
    assert division.shards == [[], [3]]


def test_a_missing_shard_is_an_error() -> None:
    with pytest.raises(ValueError, match="virtual shard 2 of 4 is in none of"):
        tree_sum({Block(0, 2): 1, Block(3, 1): 1}, 4, lambda a, b: a + b)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(4, 40_000))
def test_a_plan_covers_every_segment_once_within_its_limits(sizes: list[int], limit_bytes: int) -> None:
    buckets = plan_buckets(sizes, bucket_bytes=limit_bytes)
    assert [position for bucket in buckets for position in bucket.segments] == list(range(len(sizes)))
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert buckets[0].start == 0
    assert buckets[-1].stop == sum(sizes)
    limit = max(1, limit_bytes // 4)
    for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
        assert bucket.numel == sum(sizes[position] for position in bucket.segments)
        assert following is None or following.start == bucket.stop
        assert bucket.numel <= limit or len(bucket.segments) == 1
    tail = buckets[-1]
    assert tail.numel <= limit // TAIL_SHARE or len(tail.segments) == 1


def test_the_plan_of_the_docstring() -> None:
    buckets = plan_buckets([10, 10, 10, 2, 1], bucket_bytes=80)
    assert [list(bucket.segments) for bucket in buckets] == [[0, 1], [2], [3, 4]]
    assert plan_buckets([], bucket_bytes=80) == []


@pytest.mark.parametrize(("total", "expected"), [(1000, 65536), (8 * 2**20, 2**20), (2**30, 16 * 2**20)])
def test_automatic_buckets_keep_sane_message_sizes(total: int, expected: int) -> None:
    assert auto_bucket_bytes(total) == expected
