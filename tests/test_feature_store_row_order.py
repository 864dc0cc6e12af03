"""Row order `permuted`: the same answers as `rank`, and runs of stored rows that are uniform samples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import (
    CropRequest,
    ExportOptions,
    FeatureStore,
    Slab,
    StoredRun,
    StoreSettings,
    StoreSettingsError,
    export_record,
    write_part,
)
from foldfeed.feature_store.format.row_order import RowOrder

SEEDS = st.integers(0, 2**53 - 1)


def build(folder, records, store_settings) -> FeatureStore:
    store = FeatureStore.create(folder, store_settings)
    half = len(records) // 2
    parts = [
        write_part(store.url, piece, store.settings) for piece in (records[:half], records[half:]) if piece
    ]
    store.commit([part.part_id for part in parts], job_id="1")
    return store


def permuted(tile_rows: int, tile_cols: int, seed: int = 0) -> StoreSettings:
    return StoreSettings(tile_rows=tile_rows, tile_cols=tile_cols, row_order="permuted", row_order_seed=seed)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=4),
    tile_rows=st.integers(1, 20),
    tile_cols=st.integers(1, 9),
    seed=SEEDS,
    data=st.data(),
)
def test_both_row_orders_say_the_same(tmp_path_factory, shapes, tile_rows, tile_cols, seed, data):
    folder = tmp_path_factory.mktemp("orders")
    records = [make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(shapes)]
    plain = build(folder / "rank", records, StoreSettings(tile_rows=tile_rows, tile_cols=tile_cols))
    store = build(folder / "permuted", records, permuted(tile_rows, tile_cols, seed))
    for record in records:
        a, b = plain[record.record_id], store[record.record_id]
        assert a.fingerprint == b.fingerprint == record.fingerprint
        np.testing.assert_array_equal(b.msa(), record.msa)
        np.testing.assert_array_equal(b.deletions(), record.deletions)
        assert a.rows().equals(b.rows())
        assert export_record(a, ExportOptions(form="a3m")) == export_record(b, ExportOptions(form="a3m"))
        for name, values in a.features().items():
            np.testing.assert_array_equal(b.features()[name], values)
        left = data.draw(st.integers(0, record.length - 1))
        window = slice(left, data.draw(st.integers(left + 1, record.length)))
        top = data.draw(st.integers(0, record.depth - 1))
        ranks = data.draw(st.lists(st.integers(0, record.depth - 1), min_size=1, max_size=70))
        for rows in (slice(top, data.draw(st.integers(top + 1, record.depth))), np.array(ranks)):
            piece = b.crop(window, rows)
            np.testing.assert_array_equal(piece.msa, record.msa[rows, window])
            np.testing.assert_array_equal(piece.deletions, record.deletions[rows, window])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=st.integers(1, 70),
    length=st.integers(1, 20),
    store_settings=st.one_of(
        st.builds(permuted, st.integers(1, 20), st.integers(1, 9), SEEDS),
        st.builds(StoreSettings, tile_rows=st.integers(1, 20), tile_cols=st.integers(1, 9)),
    ),
    data=st.data(),
)
def test_a_slab_is_the_query_and_a_cyclic_run_of_stored_rows(
    tmp_path_factory, depth, length, store_settings, data
):
    record = make_record("r", depth, length)
    stored = build(tmp_path_factory.mktemp("slab") / "s", [record], store_settings)["r"]
    start = data.draw(st.integers(0, max(depth - 2, 0)))
    num_rows = data.draw(st.integers(1, depth))
    left = data.draw(st.integers(0, length - 1))
    window = slice(left, data.draw(st.integers(left + 1, length)))
    slab = stored.slab(window, start=start, num_rows=num_rows)
    order = RowOrder(store_settings, "r", depth)
    hits = [1 + (start + i) % max(depth - 1, 1) for i in range(num_rows - 1)]
    assert slab.ranks.tolist() == order.ranks(np.array([0, *hits])).tolist()
    np.testing.assert_array_equal(slab.msa, record.msa[slab.ranks, window])
    np.testing.assert_array_equal(slab.deletions, record.deletions[slab.ranks, window])
    plan = stored.plan(window, StoredRun(start, num_rows))
    assert plan.num_rows == num_rows
    # A run of n hits enters at most one band more than n needs, and one more where it wraps around.
    across = -(-window.stop // store_settings.tile_cols) - window.start // store_settings.tile_cols
    bands = 2 + -(-(num_rows - 1) // store_settings.tile_rows)
    assert len(plan.msa_tiles) <= across * bands
    assert isinstance(stored.crop(window, StoredRun(start, num_rows)), Slab)


@pytest.mark.parametrize(
    ("start", "num_rows"), [(-1, 2), (6, 2), (0, 0), (0, 9), (3, -1)], ids=lambda value: str(value)
)
def test_a_slab_outside_the_record_is_an_error(tmp_path, start, num_rows):
    store = build(tmp_path / "s", [make_record("r", 7, 5)], permuted(4, 4))
    with pytest.raises(IndexError, match=r"record of 7 rows; start is 0 to 5 and num_rows"):
        store["r"].slab(start=start, num_rows=num_rows)
    with pytest.raises(IndexError, match="record 'r': a run of"):
        store.crops([CropRequest("r", None, StoredRun(start, num_rows))])


def test_orders_differ_by_seed_record_and_depth():
    def order(seed: int, name: str, depth: int) -> list[int]:
        return RowOrder(permuted(4, 4, seed), name, depth).ranks(np.arange(depth)).tolist()

    assert order(1, "a", 90) == order(1, "a", 90)
    orders = [order(seed, name, 90) for seed in (1, 2, 3) for name in ("a", "b", "c")]
    # Two random orders agree at one hit on average, besides the query.
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert order(1, "a", 91)[:90] != order(1, "a", 90)
    assert all(sorted(found) == list(range(90)) and found[0] == 0 for found in orders)


def test_settings_of_the_row_order_are_checked_and_kept(tmp_path):
    with pytest.raises(ValueError, match="row_order_seed 5 has no effect with row_order 'rank'"):
        StoreSettings(row_order_seed=5)
    with pytest.raises(ValueError, match="row_order 'shuffled' is unknown"):
        StoreSettings(row_order="shuffled")
    for seed in (-1, 2**53, 1.5, True, "7"):
        with pytest.raises(ValueError, match="row_order_seed"):
            StoreSettings(row_order="permuted", row_order_seed=seed)
    made = StoreSettings(row_order="permuted")
    assert made.row_order_seed == 0
    assert StoreSettings.from_json(made.to_json(), "x") == made
    # Stores in rank order keep the bytes they had before there was another one.
    assert b"row_order_seed" not in StoreSettings().to_json()
    store = FeatureStore.create(tmp_path / "s", permuted(4, 4, 9))
    assert FeatureStore.open(store.url).settings == permuted(4, 4, 9)
    with pytest.raises(StoreSettingsError, match="row_order_seed=9"):
        FeatureStore.create(store.url, permuted(4, 4, 8))


def slab_statistics(inclusions: np.ndarray) -> tuple[float, float]:
    """Returns how uneven samples, bool (trials, items), are in their items and in their pairs of items.

    Every row of the table has k of n items. The first number is chi-square of the counts of items against k
    of n without replacement, in sigmas (normal approximation). The second is the mean square deviation of
    the counts of pairs as a share of its expectation: 1 for random samples. Pairs of one trial depend on
    each other, so chi-square's own spread does not apply to it.
    """
    trials, n = inclusions.shape
    k = int(inclusions[0].sum())
    counts = inclusions.sum(axis=0)
    share = k / n
    # The counts of one trial add up to k, so they vary together: scale (n - 1) / n.
    chi = ((counts - trials * share) ** 2).sum() / (trials * share * (1 - share)) * (n - 1) / n
    free = n - 1
    items = (chi - free) / math.sqrt(2 * free)
    together = inclusions.T.astype(np.int64) @ inclusions
    pairs = together[np.triu_indices(n, 1)]
    pair_share = k * (k - 1) / (n * (n - 1))
    spread = ((pairs - trials * pair_share) ** 2).mean() / (trials * pair_share * (1 - pair_share))
    return items, float(spread)


def slabs(order_of, depth: int, num_rows: int, trials: int, rng) -> np.ndarray:
    """Returns which hits, (trials, depth - 1), a slab from a random start holds; each trial has its order."""
    found = np.zeros((trials, depth - 1), dtype=bool)
    for trial in range(trials):
        start = int(rng.integers(depth - 1))
        stored = 1 + (start + np.arange(num_rows - 1)) % (depth - 1)
        found[trial, order_of(trial)(stored) - 1] = True
    return found


# Standard deviation of the second statistic over 60 tables of 4,000 samples drawn by numpy.
PAIR_SIGMA = {(30, 8): 0.11, (65, 33): 0.114, (101, 20): 0.042}


@pytest.mark.parametrize(("depth", "num_rows"), PAIR_SIGMA)
def test_over_records_slabs_are_samples_like_those_of_randperm(depth, num_rows):
    """Items and pairs of items come as often as in samples by numpy's permutation."""
    rng = np.random.default_rng(5)
    trials = 4000
    ours = slabs(
        lambda trial: RowOrder(permuted(8, 8, 3), f"record-{trial}", depth).ranks,
        depth,
        num_rows,
        trials,
        rng,
    )
    assert (ours.sum(axis=1) == num_rows - 1).all()
    reference = np.zeros_like(ours)
    for trial in range(trials):
        reference[trial, rng.permutation(depth - 1)[: num_rows - 1]] = True
    for table in (ours, reference):
        items, pairs = slab_statistics(table)
        assert abs(items) < 4.5
        assert abs(pairs - 1) < 4.5 * PAIR_SIGMA[depth, num_rows]


@pytest.mark.parametrize(("depth", "num_rows"), [(200, 50), (1000, 300)])
def test_in_one_record_a_random_start_takes_every_hit_equally_often(depth, num_rows):
    """Exactly equally: over all starts, each hit is in num_rows - 1 slabs. And every place has all ranks."""
    order = RowOrder(permuted(8, 8, 3), "one", depth)
    counts = np.zeros(depth, dtype=int)
    for start in range(depth - 1):
        stored = 1 + (start + np.arange(num_rows - 1)) % (depth - 1)
        np.add.at(counts, order.ranks(stored), 1)
    assert counts[0] == 0
    assert (counts[1:] == num_rows - 1).all()


@pytest.mark.parametrize(("depth", "num_rows"), [(200, 50), (1000, 300)])
def test_ranks_in_a_slab_are_spread_as_in_a_random_sample(depth, num_rows):
    """The mean rank of a slab, over records, has mean and variance of a sample without replacement."""
    hits, k = depth - 1, num_rows - 1
    means = []
    for number in range(1500):
        order = RowOrder(permuted(8, 8, 11), f"r{number}", depth)
        means.append(order.ranks(1 + (number + np.arange(k)) % hits).mean())
    expected, variance = (hits + 1) / 2, (hits**2 - 1) / 12 / k * (hits - k) / (hits - 1)
    assert abs(np.mean(means) - expected) < 4.5 * math.sqrt(variance / len(means))
    # The variance of a sample variance of nearly normal numbers: 2 / (n - 1).
    assert abs(np.var(means, ddof=1) / variance - 1) < 4.5 * math.sqrt(2 / (len(means) - 1))


def test_the_statistics_notice_orders_that_are_not_random():
    """The same tests fail on rank order, on one order for all records, and on rotations."""
    rng = np.random.default_rng(5)
    depth, num_rows, trials = 65, 33, 4000
    one = rng.permutation(depth - 1)
    broken = {
        "rank": lambda _: lambda stored: stored,
        "one order": lambda _: lambda stored: 1 + one[stored - 1],
        "rotation": lambda trial: lambda stored: 1 + (stored + trial) % (depth - 1),
        "swapped pairs": lambda _: lambda stored: 1 + ((stored - 1) ^ 1),
    }
    for name, order_of in broken.items():
        _, pairs = slab_statistics(slabs(order_of, depth, num_rows, trials, rng))
        assert abs(pairs - 1) > 4.5 * PAIR_SIGMA[depth, num_rows], (name, pairs)
    biased = np.zeros((trials, depth - 1), dtype=bool)
    for trial in range(trials):
        weights = np.linspace(1, 1.4, depth - 1)
        biased[trial, rng.choice(depth - 1, num_rows - 1, replace=False, p=weights / weights.sum())] = True
    assert abs(slab_statistics(biased)[0]) > 4.5
