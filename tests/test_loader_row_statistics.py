"""Which rows a sample has: block deletion by rank, and slabs of a permuted store, against plain references.

The references draw with NumPy's generator and follow the supplement line by line; what is compared is what a
model sees of the choice: how often each rank comes, the identity of the rows to the query, and how many
different ones there are (N_eff).
"""

import numpy as np
import pytest

from foldfeed.feature_store import FeatureStore, MsaRecord, RowProvenance, StoreSettings, write_part
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.effective_rows import effective_rows
from foldfeed.loader import Recipe
from foldfeed.loader.order.counter_rng import Purpose, stream
from foldfeed.loader.reading.plan import delete_blocks, draw_rows, draw_slab

DEPTH, LENGTH, NUM_ROWS = 400, 40, 24
RECIPE = Recipe(name="crop_first", num_clusters=NUM_ROWS, num_extra=0)
NUM_SAMPLES = 900


def family() -> np.ndarray:
    """uint8 (400, 40): identity falls with the rank, and rows come in groups of near copies."""
    rng = np.random.default_rng(11)
    query = rng.integers(0, 20, LENGTH)
    msa = np.empty((DEPTH, LENGTH), np.uint8)
    msa[0] = query
    for group in range(1, DEPTH, 3):
        share = 0.9 - 0.75 * group / DEPTH
        parent = np.where(rng.random(LENGTH) < share, query, rng.integers(0, 22, LENGTH))
        for row in range(group, min(group + 3, DEPTH)):
            msa[row] = np.where(rng.random(LENGTH) < 0.93, parent, rng.integers(0, 22, LENGTH))
    return msa


MSA = family()
IDENTITY = (MSA[0] == MSA).mean(axis=1)


def statistics(rows: np.ndarray) -> tuple[float, float, float, float]:
    """Number of rows of a sample (now and then all hits are deleted), mean identity, its spread, N_eff."""
    return len(rows), IDENTITY[rows].mean(), IDENTITY[rows].std(), effective_rows(MSA[rows])


def assert_same_distribution(one: np.ndarray, other: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov at p = 1e-5, and means within 4.5 standard errors."""
    both = np.concatenate([one, other])
    steps = [np.searchsorted(np.sort(side), both, side="right") / side.size for side in (one, other)]
    scale = np.sqrt((one.size + other.size) / (one.size * other.size))
    assert np.abs(steps[0] - steps[1]).max() < np.sqrt(-np.log(1e-5 / 2) / 2) * scale
    error = np.sqrt(one.var() / one.size + other.var() / other.size)
    assert abs(one.mean() - other.mean()) <= 4.5 * error


def reference_block_deletion(rng: np.random.Generator) -> np.ndarray:
    """Rows of a sample by supplementary algorithm 1, then a random choice of centres."""
    kept = set(range(DEPTH))
    for _ in range(5):
        start = int(rng.integers(0, DEPTH))
        kept -= set(range(start, start + int(0.3 * DEPTH)))
    hits = sorted(kept - {0})
    return np.array([0, *rng.permutation(hits)[: NUM_ROWS - 1]], dtype=np.int64)


def test_block_deletion_leaves_each_rank_with_the_chance_that_arithmetic_gives():
    """A block covers rank i from min(i + 1, b) of the N starts; five of them must miss it."""
    size = int(0.3 * DEPTH)
    chance = (1 - np.minimum(np.arange(DEPTH) + 1, size) / DEPTH) ** 5
    trials = 4000
    survived = np.zeros(DEPTH)
    for sample in range(trials):
        survived[delete_blocks(RECIPE, stream(9, sample, Purpose.BLOCK_DELETE), DEPTH)] += 1
    assert survived[0] == trials
    # Ranks that are a block apart hardly depend on each other: chi-square over every 133rd, from each start.
    sigma = np.sqrt(trials * chance * (1 - chance))
    off = ((survived - trials * chance) / sigma)[1:]
    assert np.abs(off).max() < 5
    for first in range(0, 133, 19):
        few = off[first::133]
        assert ((few**2).sum() - few.size) / np.sqrt(2 * few.size) < 4.5


def test_rows_by_rank_have_the_statistics_of_the_reference():
    rng = np.random.default_rng(2)
    ours, theirs = [], []
    for sample in range(NUM_SAMPLES):
        ours.append(statistics(draw_rows(RECIPE, 3, sample, DEPTH)[1]))
        theirs.append(statistics(reference_block_deletion(rng)))
    for one, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert_same_distribution(one, other)
    # The comparison sees a difference where there is one: an even sample of all rows is another scheme.
    even = np.array([statistics(uniform_sample(rng)) for _ in range(NUM_SAMPLES)]).T
    with pytest.raises(AssertionError):
        assert_same_distribution(np.array(ours)[:, 1], even[1])


def uniform_sample(rng: np.random.Generator) -> np.ndarray:
    return np.array([0, *(1 + rng.permutation(DEPTH - 1)[: NUM_ROWS - 1])], dtype=np.int64)


@pytest.fixture(scope="module")
def permuted(tmp_path_factory) -> FeatureStore:
    """Thirty records of one alignment, each with a row order of its own."""
    store = FeatureStore.create(
        tmp_path_factory.mktemp("statistics") / "store",
        StoreSettings(tile_rows=32, tile_cols=64, row_order="permuted", row_order_seed=4),
    )
    records = [
        MsaRecord(
            record_id=f"r{number:02}",
            description="",
            sequence=alphabet.decode(MSA[0]),
            msa=MSA,
            deletions=np.zeros(MSA.shape, np.int32),
            rows=RowProvenance(
                database=np.full(DEPTH, -1, np.int16),
                e_value=np.full(DEPTH, np.nan),
                bit_score=np.full(DEPTH, np.nan, np.float32),
                hit_id=[""] * DEPTH,
                species=[""] * DEPTH,
            ),
            databases=(),
        )
        for number in range(30)
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


def test_slabs_have_the_statistics_of_an_even_sample(permuted):
    """As many draws from `randperm` as slabs of 30 stored orders: ranks, identity and N_eff agree."""
    recipe = Recipe(name="crop_first", num_clusters=NUM_ROWS, num_extra=0, block_delete=False)
    rng = np.random.default_rng(5)
    ours, theirs = [], []
    counts = np.zeros(DEPTH)
    for number, record_id in enumerate(permuted):
        record = permuted[record_id]
        for sample in range(NUM_SAMPLES // 30):
            run, centres, _ = draw_slab(recipe, 7, 1000 * number + sample, DEPTH)
            ranks = record.slab(start=run.start, num_rows=run.num_rows).ranks[centres]
            counts[ranks] += 1
            ours.append(statistics(ranks))
            theirs.append(statistics(uniform_sample(rng)))
    assert counts[0] == NUM_SAMPLES
    expected = counts[1:].mean()
    free = DEPTH - 2
    # Rows of one sample exclude each other, which takes a share of the variance away.
    chi_square = ((counts[1:] - expected) ** 2 / expected).sum() / (1 - (NUM_ROWS - 1) / (DEPTH - 1))
    assert abs(chi_square - free) / np.sqrt(2 * free) < 4.5
    for one, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert_same_distribution(one, other)
