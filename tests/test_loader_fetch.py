"""`fetch`: what it takes from the crop instead of reading it, and what it says about sizes."""

import threading

import numpy as np
import pytest
from records import make_record
from slow_blobs import slowed

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader.reading.cached_reader import _ranges_of
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import Recipe

ROWS = {"crop_residues": 20, "num_clusters": 6}
RECIPES = {
    "af2": Recipe(name="af2", num_extra=30, labels=True, **ROWS),
    "crop_first": Recipe(name="crop_first", num_extra=30, labels=True, **ROWS),
    "af3": Recipe.named("af3", **ROWS | {"num_clusters": 36}),
    "masked_lm": Recipe.named("masked_lm", **ROWS | {"num_clusters": 36}),
}


def build(url, **settings) -> FeatureStore:
    store = FeatureStore.create(url, StoreSettings(tile_rows=16, tile_cols=8, **settings))
    records = [make_record(f"r{n}", 9 + 40 * n, 11 + 17 * n, seed=n) for n in range(5)]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id="1")
    return store


@pytest.fixture(scope="module", params=["rank", "permuted"])
def store(tmp_path_factory, request) -> FeatureStore:
    return build(tmp_path_factory.mktemp("fetch") / "s", row_order=request.param)


def reader_of(store: FeatureStore, recipe: Recipe) -> SampleReader:
    return SampleReader(store, recipe, None, seed=2, global_batch=1, virtual_shards=1)


@pytest.mark.parametrize("name", RECIPES)
def test_the_query_is_the_crops_first_row_and_sizes_are_those_of_a_plan(store, name):
    reader = reader_of(store, RECIPES[name])
    for sample in range(25):
        planned = reader.planned(sample)
        plan, record = planned.plan, planned.record
        arrays, sizes = reader.fetch(planned)
        np.testing.assert_array_equal(arrays.aatype, record.aatype(slice(*plan.crop)))
        tiles = record.plan(slice(*plan.columns), plan.selection)
        assert sizes == {
            "stored_bytes": tiles.num_bytes,
            "decoded_bytes": tiles.num_cells,
            "used_bytes": arrays.msa.size + arrays.deletions.size,
        }


@pytest.mark.parametrize("name", RECIPES)
def test_a_sample_from_far_away_is_one_round_of_reads(store, name, monkeypatch):
    """As many reads as `Record.ranges` says, so a cache brings all of them, and all in flight at once."""
    far, blobs = slowed(store.url, 0.0)
    reader = reader_of(far, RECIPES[name])
    seen = set()
    for sample in range(12):
        planned = reader.planned(sample)
        ranges = [found for found in _ranges_of(planned) if "overflow" not in found.path]
        known = planned.record.part.part_id in seen
        seen.add(planned.record.part.part_id)
        blobs.reads.clear()
        reader.fetch(planned)
        read = [entry for entry in blobs.reads if "overflow" not in entry[0]]
        if known:
            assert sorted((path, start) for path, start, _ in read) == sorted(
                (found.path, found.start) for found in ranges
            )
    # No read is answered until all have been asked for; large deletion counts would come after them.
    assert len(ranges) >= 3
    blobs.together = threading.Barrier(len(ranges), timeout=30)
    monkeypatch.setattr(planned.record.part.tiles, "finish", lambda job: None)
    reader.fetch(planned)
