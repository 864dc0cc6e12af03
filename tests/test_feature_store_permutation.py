"""The keyed permutation: a bijection for every size, evenly spread over keys, unrelated between epochs."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store.format import permute_kernel
from foldfeed.feature_store.format.permutation import MAX_SIZE, KeyedPermutation

BIG_SIZES = (2**16 - 1, 2**16, 2**16 + 1, 99_991, 250_007)


def chi_square_sigmas(counts: np.ndarray) -> float:
    """How far counts are from even, in standard deviations of chi-square (normal approximation)."""
    expected = counts.sum() / counts.size
    free = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


def test_every_size_up_to_2000_is_a_bijection_with_an_inverse():
    for size in range(1, 2001):
        permutation = KeyedPermutation(size, (3, size % 7))
        order = permutation.forward(np.arange(size))
        assert np.array_equal(np.sort(order), np.arange(size)), size
        assert np.array_equal(permutation.inverse(order), np.arange(size)), size


@pytest.mark.parametrize("size", BIG_SIZES)
def test_big_odd_sizes_are_bijections(size):
    permutation = KeyedPermutation(size, (1, 2))
    order = permutation.forward(np.arange(size))
    assert np.array_equal(np.bincount(order, minlength=size), np.ones(size))
    assert np.array_equal(permutation.inverse(order), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, MAX_SIZE),
    key=st.lists(st.integers(-(2**70), 2**70), max_size=3),
    data=st.data(),
)
def test_inverse_undoes_forward_at_any_size(size, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=9)), dtype=np.int64)
    permutation = KeyedPermutation(size, key)
    items = permutation.forward(positions)
    assert items.shape == positions.shape
    assert items.dtype == np.int64
    assert np.all((items >= 0) & (items < size))
    assert np.array_equal(permutation.inverse(items), positions)
    assert np.array_equal(permutation.forward(permutation.inverse(positions)), positions)


@pytest.mark.skipif(not permute_kernel.is_usable(), reason="installed without it (no C compiler)")
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, MAX_SIZE) | st.integers(1, 2**20),
    seed=st.integers(0, 2**70),
    count=st.sampled_from((0, 1, 31, 33, 1023, 1024, 1025, 3000)),
)
def test_the_compiled_form_equals_numpy(size, seed, count):
    """All in one domain: values that walk stay in the block while fresh ones come."""
    permutation = KeyedPermutation(size, (seed, 1))
    positions = np.random.default_rng(seed % 97).integers(0, size, count)
    for inverse in (False, True):
        walked = positions.astype(np.uint64)
        permutation._walk_by_numpy(walked, inverse=inverse)
        together = permutation.inverse(positions) if inverse else permutation.forward(positions)
        assert np.array_equal(walked.view(np.int64), together)


def test_without_the_compiled_form_orders_are_the_same(monkeypatch):
    permutation = KeyedPermutation(99_991, (7, 3))
    order = permutation.forward(np.arange(99_991))
    monkeypatch.setattr(permute_kernel, "_functions", lambda: None)
    assert np.array_equal(permutation.forward(np.arange(99_991)), order)
    assert np.array_equal(permutation.inverse(order), np.arange(99_991))


def test_one_position_at_a_time_equals_all_at_once():
    permutation = KeyedPermutation(1237, (5, 9))
    together = permutation.forward(np.arange(1237).reshape(1, -1))
    assert together.shape == (1, 1237)
    for one in (permutation.__getitem__, permutation._walk_one):
        assert [one(i) for i in range(0, 1237, 11)] == together[0, ::11].tolist()
    assert len(permutation) == 1237


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, MAX_SIZE) | st.integers(1, 2**26),
    seed=st.integers(0, 2**70),
    count=st.integers(1, 70_000),
)
def test_arrays_of_any_length_equal_plain_integers(size, seed, count):
    """Long arrays look hashes up and run in blocks, short ones compute them, `_walk_one` is plain Python."""
    permutation = KeyedPermutation(size, (seed, 1))
    positions = np.random.default_rng(seed % 97).integers(0, size, count)
    together = permutation.forward(positions)
    some = slice(None, None, max(1, count // 30))
    for one in (permutation.__getitem__, permutation._walk_one):
        assert [one(position) for position in positions[some].tolist()] == together[some].tolist()
    assert np.array_equal(permutation.forward(positions[some]), together[some])
    assert np.array_equal(permutation.inverse(together), positions)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_small_sets_take_all_their_orders_evenly(size):
    num_keys = 2400
    rank_of = {order: rank for rank, order in enumerate(itertools.permutations(range(size)))}
    counts = np.zeros(len(rank_of))
    for epoch in range(num_keys):
        counts[rank_of[tuple(KeyedPermutation(size, (11, epoch)).forward(np.arange(size)).tolist())]] += 1
    assert abs(chi_square_sigmas(counts)) < 4.5


@pytest.mark.parametrize("size", [7, 10, 17, 64, 101])
def test_every_item_is_at_every_position_equally_often_over_keys(size):
    num_keys = 25 * size
    counts = np.zeros((size, size))
    for epoch in range(num_keys):
        counts[np.arange(size), KeyedPermutation(size, (0, epoch)).forward(np.arange(size))] += 1
    # Rows and columns of the table have fixed sums: (size - 1)**2 degrees of freedom.
    expected = num_keys / size
    free = (size - 1) ** 2
    # A permutation spreads its counts a little more evenly than independent draws: scale n / (n - 1).
    chi = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert abs(chi - free) / math.sqrt(2 * free) < 4.5


@pytest.mark.parametrize("size", [101, 1000, 4099])
def test_neighbours_are_not_related(size):
    """The step from one position to the next is as often any distance as any other."""
    counts = np.zeros(10)
    correlations = []
    for epoch in range(200):
        order = KeyedPermutation(size, (2, epoch)).forward(np.arange(size))
        step = (order[1:] - order[:-1]) % size
        counts += np.histogram(step, bins=10, range=(0.5, size - 0.5))[0]
        correlations.append(np.corrcoef(order[:-1], order[1:])[0, 1])
    edges = np.linspace(0.5, size - 0.5, 11)
    width = np.diff(np.floor(edges))
    expected = counts.sum() * width / width.sum()
    chi = ((counts - expected) ** 2 / expected).sum()
    assert (chi - 9) / math.sqrt(18) < 4.5
    # Mean of 200 correlations, each about -1/n with a standard deviation of 1/sqrt(n).
    assert abs(np.mean(correlations) + 1 / size) < 4.5 / math.sqrt(size * 200)


def test_epochs_and_seeds_differ_and_do_not_run_into_each_other():
    def order(*key: int) -> list[int]:
        return KeyedPermutation(97, key).forward(np.arange(97)).tolist()

    orders = {(s, e): order(s, e) for s in range(4) for e in range(4)}
    assert len({tuple(o) for o in orders.values()}) == 16
    assert orders[0, 1] != orders[1, 0]
    # Two random orders agree at one position on average.
    same = [sum(a == b for a, b in zip(orders[0, e], orders[0, e + 1], strict=True)) for e in range(3)]
    assert max(same) < 10


def test_the_order_never_changes_between_releases():
    """A resumed run must see the same records; if this fails, raise SCHEME and say so in the changelog."""
    order = KeyedPermutation(20, (42, 1)).forward(np.arange(20)).tolist()
    assert order == GOLDEN
    for (size, *key), digest in GOLDEN_DIGESTS.items():
        num = min(size, 20_000)
        order = KeyedPermutation(size, key).forward(np.arange(num) * (size // num))
        assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == digest, size


def test_bad_arguments_are_refused():
    for size in (0, -1, MAX_SIZE + 1):
        with pytest.raises(ValueError, match="must be 1 to"):
            KeyedPermutation(size, (1,))
    permutation = KeyedPermutation(5, (1,))
    for positions in ([5], [-1], [0, 7]):
        with pytest.raises(IndexError, match=r"range\(5\)"):
            permutation.forward(positions)
        with pytest.raises(IndexError, match=r"range\(5\)"):
            permutation[positions[-1]]
    with pytest.raises(TypeError, match="must be integers"):
        permutation.forward([0.5])
    with pytest.raises(TypeError):
        KeyedPermutation(5, (1.5,))
    assert permutation.forward([]).shape == (0,)


GOLDEN = [7, 8, 17, 1, 11, 14, 4, 2, 13, 18, 16, 10, 3, 6, 12, 0, 19, 5, 9, 15]
# Made by the first release of the arithmetic: (size, key...).
GOLDEN_DIGESTS = {
    (1000, 0, 0): "d359cc1cc1f84677",
    (1_000_003, 3, 1): "8d8064ca4ffe3a4a",
    (10**10, 7, 2): "8c2dbb124d3e299a",
    (2**62, 1, -5): "f4b6578dabf82a59",
}
