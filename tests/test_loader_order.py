"""Order and chance: which record comes when, and random words that depend on (seed, sample, purpose) only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.loader import LoaderConfigError
from foldfeed.loader.order.counter_rng import Purpose, Stream, stream
from foldfeed.loader.order.order import SampleOrder, rank_shards


@settings(max_examples=40, deadline=None)
@given(
    num_records=st.integers(1, 60),
    seed=st.integers(-5, 2**40),
    per_shard=st.integers(1, 3),
    v=st.integers(1, 7),
)
def test_every_epoch_visits_every_record_once(num_records, seed, per_shard, v):
    order = SampleOrder(num_records=num_records, seed=seed, global_batch=v * per_shard, virtual_shards=v)
    for epoch in (0, 1, 7):
        addresses = [order.locate(epoch * num_records + i) for i in range(num_records)]
        assert sorted(address.record for address in addresses) == list(range(num_records))
        assert {address.epoch for address in addresses} == {epoch}
        assert [address.position for address in addresses] == list(range(num_records))


def test_the_order_depends_on_seed_and_epoch_alone():
    def epoch_order(seed, epoch, batch, shards):
        order = SampleOrder(num_records=50, seed=seed, global_batch=batch, virtual_shards=shards)
        return [order.locate(epoch * 50 + i).record for i in range(50)]

    assert epoch_order(3, 1, 4, 2) == epoch_order(3, 1, 15, 5)
    assert epoch_order(3, 1, 4, 2) != epoch_order(3, 2, 4, 2)
    assert epoch_order(3, 1, 4, 2) != epoch_order(2, 2, 4, 2)


@given(v=st.integers(1, 40), data=st.data())
def test_ranks_own_contiguous_shards_and_all_of_them(v, data):
    world = data.draw(st.integers(1, v))
    owned = [rank_shards(v, rank, world) for rank in range(world)]
    assert [shard for shards in owned for shard in shards] == list(range(v))
    sizes = [len(shards) for shards in owned]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_three_ranks_share_eight_shards_as_documented():
    assert [len(rank_shards(8, rank, 3)) for rank in range(3)] == [2, 3, 3]


def test_shards_of_a_step_hold_its_samples_in_order():
    order = SampleOrder(num_records=7, seed=0, global_batch=6, virtual_shards=3)
    assert [list(order.shard_samples(2, v)) for v in range(3)] == [[12, 13], [14, 15], [16, 17]]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_records": 0}, "num_records"),
        ({"global_batch": 0}, "global_batch"),
        ({"virtual_shards": 0}, "virtual_shards"),
        ({"virtual_shards": 4}, "virtual_shards"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
    ],
)
def test_an_order_that_cannot_work_names_the_value(values, field):
    good = {"num_records": 3, "seed": 0, "global_batch": 6, "virtual_shards": 2}
    with pytest.raises(LoaderConfigError, match=field) as caught:
        SampleOrder(**(good | values))
    assert caught.value.field == field
    assert caught.value.value == values[field]


def test_ranks_that_cannot_work_are_refused():
    for rank, world in ((0, 0), (0, 9), (3, 3), (-1, 2)):
        with pytest.raises(LoaderConfigError):
            rank_shards(8, rank, world)
    with pytest.raises(LoaderConfigError, match="counted from 0"):
        SampleOrder(num_records=3, seed=0, global_batch=1, virtual_shards=1).locate(-1)


def test_streams_repeat_and_do_not_touch_each_other():
    first = stream(7, 3, Purpose.ROWS).words(100)
    stream(7, 3, Purpose.CROP).words(10)
    assert np.array_equal(stream(7, 3, Purpose.ROWS).words(100), first)
    others = [stream(7, 4, Purpose.ROWS), stream(8, 3, Purpose.ROWS), stream(7, 3, Purpose.CROP)]
    others += [stream(4, 7, Purpose.ROWS), stream(3, 7, Purpose.ROWS), stream(-7, 3, Purpose.ROWS)]
    for other in others:
        assert not np.intersect1d(other.words(100), first).size
    in_two_parts = stream(7, 3, Purpose.ROWS)
    assert np.array_equal(np.concatenate([in_two_parts.words(33), in_two_parts.words(67)]), first)


def test_words_never_change_between_releases():
    """A resumed run must draw the same crops; if this fails, raise SCHEME and say so in the changelog."""
    assert stream(1, 2, Purpose.MASKING).words(2).tolist() == GOLDEN_WORDS
    assert stream(1, 2, Purpose.ROWS).order(8).tolist() == GOLDEN_ORDER


@settings(max_examples=60, deadline=None)
@given(key=st.integers(0, 2**128 - 1), counts=st.lists(st.integers(0, 11), max_size=8))
def test_streams_are_numpys_philox_in_whatever_pieces_and_turns(key, counts):
    philox, mine, other = np.random.Philox(key=key), Stream(key), Stream(key ^ 1)
    for count in counts:
        assert mine.words(count).tolist() == philox.random_raw(count).tolist()
        other.words(3)


@pytest.mark.parametrize("tie", [False, True])
def test_long_orders_are_those_of_a_stable_sort(monkeypatch, tie):
    words = np.random.default_rng(1).integers(0, 2**63, 5000).astype(np.uint64)
    if tie:
        words[4000:4400] = words[:400]
    monkeypatch.setattr(Stream, "words", lambda self, count: words[:count])
    for count in (4095, 4096, 5000):
        assert np.array_equal(Stream(0).order(count), np.argsort(words[:count], kind="stable"))


def test_integers_and_orders_are_even():
    counts = np.bincount(stream(0, 0, Purpose.BLOCK_DELETE).integers(7, 70_000), minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square, 6 degrees, p = 1e-4
    firsts = np.bincount([stream(0, g, Purpose.ROWS).order(5)[0] for g in range(2000)], minlength=5)
    assert ((firsts - 400) ** 2 / 400).sum() < 23.5  # 4 degrees, p = 1e-4
    assert stream(0, 0, Purpose.ROWS).order(0).shape == (0,)


GOLDEN_WORDS = [14412938024728219599, 15545187955955079394]
GOLDEN_ORDER = [1, 4, 7, 0, 6, 2, 5, 3]
