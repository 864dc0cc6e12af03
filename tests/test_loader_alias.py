"""Weighted draws: a table holds exactly its weights, words depend on (seed, sample) alone, draws are even."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.loader import LoaderConfigError
from foldfeed.loader.order.alias_table import AliasTable
from foldfeed.loader.order.counter_rng import Purpose, words_at
from foldfeed.loader.order.order import SampleOrder

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-9, 1e9), st.sampled_from([1.0, 2.0])), min_size=1, max_size=70
).filter(any)


def chi_square_sigmas(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How far counts are from what was expected, in standard deviations of chi-square."""
    assert counts[probabilities == 0].sum() == 0
    counts, expected = counts[probabilities > 0], counts.sum() * probabilities[probabilities > 0]
    assert expected.min() > 5, "too few draws for the test"
    free = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


@settings(deadline=None)
@given(weights=WEIGHTS)
def test_the_parts_of_every_item_are_its_weight(weights):
    table = AliasTable(weights)
    shares, whole = table.shares, len(weights) << table.bits
    assert int(shares.sum()) == whole
    assert shares.min() >= 0
    total = math.fsum(weights)
    for share, weight in zip(shares.tolist(), weights, strict=True):
        assert abs(share - weight / total * whole) <= 1 + len(weights) + share * 2**-48
        assert weight or not share
    assert np.isclose(table.probabilities.sum(), 1, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(weights=WEIGHTS, scale=st.sampled_from([2.0**-40, 2.0, 2.0**300]))
def test_only_ratios_of_weights_count(weights, scale):
    assert AliasTable(weights).data == AliasTable(np.array(weights) * scale).data


@settings(deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=16).filter(any))
def test_evenly_spread_words_give_evenly_spread_parts(weights):
    """Words on a grid that every column divides: each item gets its share of them, to one word a border."""
    table, per_column = AliasTable(weights), 4096
    count = len(weights) * per_column
    words = np.array([(2 * k + 1) * 2**64 // (2 * count) for k in range(count)], dtype=np.uint64)
    counts = np.bincount(table.draw(words), minlength=len(weights))
    assert np.abs(counts - table.probabilities * count).max() <= len(weights) + 1


def test_draws_equal_the_definition_in_plain_integers():
    table = AliasTable(np.random.default_rng(0).random(1237) ** 3)
    kept, alias = (np.frombuffer(data, kind) for data, kind in zip(table.data, ("<u8", "<i8"), strict=True))
    words = words_at(1, np.arange(40_000), Purpose.RECORD)
    for word, item in zip(words[::97].tolist(), table.draw(words)[::97].tolist(), strict=True):
        column, place = divmod(word * len(table), 2**64)
        keeps = place >> (64 - table.bits) < kept[column]
        assert item == (column if keeps else alias[column])


@settings(deadline=None)
@given(seed=st.integers(-(2**70), 2**70), samples=st.lists(st.integers(0, 2**63 - 1), max_size=40))
def test_words_depend_on_seed_and_sample_alone(seed, samples):
    numbers = np.array(samples, dtype=np.int64)
    together = words_at(seed, numbers, Purpose.RECORD)
    alone = [int(words_at(seed, sample, Purpose.RECORD)) for sample in samples]
    assert together.tolist() == alone
    assert np.array_equal(words_at(seed, numbers[::-1].copy(), Purpose.RECORD), together[::-1])
    if len(set(samples)) > 1:
        assert not np.intersect1d(words_at(seed + 1, numbers, Purpose.RECORD), together).size


def test_words_never_change_between_releases_and_are_even():
    """A resumed run must draw the same records; if this fails, raise SCHEME and say so in the changelog."""
    words = words_at(1, np.arange(2**20), Purpose.RECORD)
    assert words[:2].tolist() == GOLDEN_WORDS
    assert len(np.unique(words)) == len(words)
    for shift in (0, 20, 44, 56):
        counts = np.bincount(((words >> np.uint64(shift)) & np.uint64(255)).astype(np.int64), minlength=256)
        assert abs(chi_square_sigmas(counts, np.full(256, 1 / 256))) < 4.5
    # Neighbours in place and in seed: pairs of upper bits are even.
    for other in (np.roll(words, 1), words_at(2, np.arange(2**20), Purpose.RECORD)):
        pairs = (words >> np.uint64(60) << np.uint64(4)) | (other >> np.uint64(60))
        counts = np.bincount(pairs.astype(np.int64), minlength=256)
        assert abs(chi_square_sigmas(counts, np.full(256, 1 / 256))) < 4.5
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / 2**10
    with pytest.raises(TypeError, match="must be integers"):
        words_at(1, [0.5], Purpose.RECORD)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_draws_follow_their_probabilities(seed):
    weights = np.random.default_rng(seed % 7).random(400) ** 2 + 0.05
    weights[::9] = 0
    table = AliasTable(weights)
    order = SampleOrder(num_records=400, seed=seed, global_batch=1, virtual_shards=1, table=table)
    counts = np.bincount(order.records(np.arange(2_000_000)), minlength=400)
    assert abs(chi_square_sigmas(counts, weights / weights.sum())) < 4.5
    # Consecutive draws are independent: pairs of a few classes.
    classes = order.records(np.arange(1_000_000)) % 4
    chance = np.bincount(np.arange(400) % 4, weights=weights) / weights.sum()
    pairs = np.bincount(4 * classes[:-1] + classes[1:], minlength=16)
    assert abs(chi_square_sigmas(pairs, np.outer(chance, chance).ravel())) < 4.5


@settings(max_examples=30, deadline=None)
@given(
    num_records=st.integers(1, 300),
    weighted=st.booleans(),
    epoch_samples=st.none() | st.integers(1, 90),
    samples=st.lists(st.integers(0, 2000), max_size=30),
)
def test_arrays_of_samples_equal_one_by_one(num_records, weighted, epoch_samples, samples):
    table = AliasTable(np.arange(1, num_records + 1)) if weighted else None
    order = SampleOrder(
        num_records=num_records,
        seed=5,
        global_batch=1,
        virtual_shards=1,
        table=table,
        epoch_samples=epoch_samples if weighted else None,
    )
    together = order.records(np.array(samples, dtype=np.int64))
    assert together.dtype == np.int64
    assert together.tolist() == [order.locate(sample).record for sample in samples]
    assert np.array_equal(order.records(np.arange(2001))[samples], together)


def test_ten_billion_records_need_no_memory():
    order = SampleOrder(num_records=10**10 + 19, seed=3, global_batch=8, virtual_shards=8)
    samples = np.arange(10**10 - 1000, 10**10 + 1000)
    records = order.records(samples)
    assert len(np.unique(records[:1019])) == 1019
    assert records.max() < 10**10 + 19
    assert [order.locate(int(g)).record for g in samples[::333]] == records[::333].tolist()
    assert [order.locate(int(samples[end])).epoch for end in (0, -1)] == [0, 1]
    with pytest.raises(LoaderConfigError, match="counted from 0"):
        order.records([3, -1])
    with pytest.raises(TypeError, match="must be integers"):
        order.records([0.5])


@pytest.mark.parametrize("weights", [[], [[1.0]], [0.0, 0.0], [1.0, -1.0], [math.nan], [1.0, math.inf]])
def test_weights_that_cannot_work_are_refused(weights):
    with pytest.raises(LoaderConfigError, match="weights"):
        AliasTable(weights)


def test_a_table_survives_pickling():
    table = AliasTable([1, 2, 3.5])
    assert pickle.loads(pickle.dumps(table)).data == table.data


GOLDEN_WORDS = [10006920087762499157, 3263736033927573636]
