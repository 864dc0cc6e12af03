"""Care of deep alignments: one record is in memory at a time, however many a part holds."""

import tracemalloc

import pytest
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.care.verify import verify

DEPTH, LENGTH = 2500, 400
# Tokens, and deletions as the 32-bit numbers that records have.
RECORD_BYTES = 5 * DEPTH * LENGTH


def deep_store(url, num_records: int) -> FeatureStore:
    """A store with that many deep alignments in two parts, small enough to be worth compacting."""
    store = FeatureStore.create(url)
    half = num_records // 2
    for number, span in enumerate((range(half), range(half, num_records))):
        records = (make_record(f"r{n:03d}", DEPTH, LENGTH, seed=n, big_deletions=False) for n in span)
        store.commit([write_part(store.url, records, store.settings).part_id], job_id=f"job-{number}")
    return store


def peak_of(work) -> int:
    """Bytes that Python and NumPy had at most while it ran, more than before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("deep")
    return {number: deep_store(root / f"store-{number}", number) for number in (2, 12)}


def test_copy_and_verify_hold_pieces(stores, tmp_path):
    whole = 12 * RECORD_BYTES
    assert peak_of(lambda: verify(stores[12].url, level="full")) < whole / 2
    # Two parts are checked side by side, each with its record and the arrays derived from it.
    assert peak_of(lambda: verify(stores[12].url, level="deep")) < whole
    assert peak_of(lambda: copy_store(stores[12].url, tmp_path / "copy")) < whole / 2


def test_compact_holds_one_record_and_some_tiles(stores):
    few = peak_of(lambda: compact(stores[2].url))
    many = peak_of(lambda: compact(stores[12].url))
    for number, store in stores.items():
        opened = FeatureStore.open(store.url)
        assert len(opened.table(["part_id"])["part_id"].unique()) == 1, "it was compacted"
        assert len(opened) == number
    # The record, and once more as much for checking it and for counts of its columns; a part has twelve.
    assert many < 5 * RECORD_BYTES
    assert many < few * 1.25
