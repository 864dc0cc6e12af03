"""What a loader can do at once: processes, caches, recycling, whole steps, damage; samples stay the same."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from range_server import range_server
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import CacheConfig, CropLoader, Recipe, SampleError, loader
from foldfeed.loader.features.device import HostFeatures, StepFeatures
from foldfeed.loader.features.draws import draw_numbers, stacked_draws
from foldfeed.loader.features.forms import COMPACT, FULL
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.meters.reports import prometheus_text, table
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import RESAMPLED

pytestmark = pytest.mark.timeout(200)
SIZES = {"crop_residues": 12, "num_clusters": 3, "num_extra": 4, "masked_fraction": 0.3}
RECIPES = {
    "recycling": Recipe.named("af2_initial_recycled", **SIZES),
    "none": Recipe.named("crop_first", **SIZES, labels=True),
}
SEED, BATCH, STEPS = 3, 5, 4
MAKERS = {
    "single samples": lambda recipe, device, form, steps: HostFeatures(recipe, form),
    "whole steps": lambda recipe, device, form, steps: StepFeatures(
        recipe, device, form, num_blocks=steps + 1
    ),
}
WAYS = [{"num_threads": 3}]
if hasattr(os, "memfd_create"):
    # Room for few samples, so that it is used again and again.
    WAYS.append({"num_processes": 1, "read_ahead_bytes": 40_000})


def build_store(url) -> FeatureStore:
    store = FeatureStore.create(url, StoreSettings(tile_rows=8, tile_cols=8))
    records = [make_record(f"r{n}", 20 + 9 * n, 7 + 6 * n, seed=n) for n in range(6)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("together") / "store")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A store of which three records have damaged tiles behind their first rows: some draws meet them."""
    store = build_store(tmp_path_factory.mktemp("together") / "damaged")
    for name in ("r2", "r3", "r5"):
        record = store[name]
        array, first = record.part.arrays["msa"], record.tiled.grid.first_tile
        with (Path(store.url) / array.path).open("r+b") as file:
            for tile in range(record.tiled.grid.num_tiles // 2, record.tiled.grid.num_tiles):
                for piece in array.ranges(first + tile, first + tile + 1):
                    file.seek(piece.start + piece.size // 2)
                    byte = file.read(1)
                    file.seek(piece.start + piece.size // 2)
                    file.write(bytes([byte[0] ^ 0x55]))
    return FeatureStore.open(store.url)


def open_loader(store, recipe, **values) -> CropLoader:
    return CropLoader(store, recipe, seed=SEED, global_batch=BATCH, virtual_shards=1, **values)


def check(batch, sample: int, slot: int, want: dict[str, torch.Tensor]) -> None:
    (shard,) = batch.shards
    assert shard.features.keys() == want.keys()
    for name, tensor in shard.features.items():
        assert tensor.is_contiguous(), name
        assert torch.equal(tensor[slot], want[name]), (sample, name)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_samples_are_the_same_whatever_ways_are_taken_together(store, tmp_path, monkeypatch, way):
    found = set()
    with range_server(Path(store.url)) as (url, _):
        far = FeatureStore.open(url)
        for recipe_name, maker, is_cached in itertools.product(RECIPES, MAKERS, (False, True)):
            recipe = RECIPES[recipe_name]
            monkeypatch.setattr(loader, "feature_maker", MAKERS[maker])
            cache = CacheConfig(
                folder=tmp_path / f"{recipe_name}", block_bytes=1024, memory_bytes=24 << 10, hedge=False
            )
            values = {"features": COMPACT if maker == "whole steps" and is_cached else FULL}
            alone = open_loader(store, recipe, **values)
            values |= way | ({"cache": cache} if is_cached else {})
            with open_loader(far if is_cached else store, recipe, **values) as us:
                num_read = 0
                for step in range(STEPS):
                    batch = next(us)
                    recycles = alone.num_recycles(step)
                    assert batch.num_recycles == recycles
                    for slot, g in enumerate(batch.shards[0].samples):
                        want = alone.sample(g)
                        if recipe.num_draws > 1:
                            heads = {name: want[name][: recycles + 1] for name in want if name in RESAMPLED}
                            want |= heads
                        check(batch, g, slot, want)
                        num_read += len(draw_numbers(recipe, g, recycles))
                        found.add((recipe_name, recycles))
                meters = us.meters()
            assert meters["samples"] == BATCH * STEPS
            assert meters["samples_read"] >= num_read
            assert bool(meters["cache"]) == is_cached
            assert not is_cached or meters["cache"]["folder_hits"] + meters["cache"]["store_hits"] > 0
    assert len({recycles for name, recycles in found if name == "recycling"}) > 1


def readable(reader, numbers: range) -> tuple[list[int], int, dict[str, torch.Tensor]]:
    """Returns by hand the first attempts that single draws can be read at, that all can, and the features."""
    alone, last = [], None
    for attempt in itertools.count():
        arrays = []
        for number in numbers:
            try:
                arrays.append(reader.fetch(reader.planned(number, attempt)).arrays)
            except SampleError:
                arrays.append(None)
        alone.append([one is not None for one in arrays])
        if all(alone[-1]):
            last = attempt
            break
    firsts = [next(a for a, can in enumerate(alone) if can[place]) for place in range(len(numbers))]
    features = [host_features(RawSample.of(one), reader.recipe) for one in arrays]
    whole = stacked_draws(reader.recipe, features, 1)
    return firsts, last, {name: tensor[0] for name, tensor in whole.items()}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_all_draws_of_a_sample_are_of_the_same_substitute(damaged, monkeypatch, caplog, maker, way):
    recipe = RECIPES["recycling"]
    monkeypatch.setattr(loader, "feature_maker", MAKERS[maker])
    reader = SampleReader(damaged, recipe, None, seed=SEED, global_batch=BATCH, virtual_shards=1)
    num_mixed = num_replaced = 0
    with open_loader(damaged, recipe, on_unreadable="substitute", **way) as us:
        for batch in itertools.islice(us, STEPS):
            (shard,) = batch.shards
            replaced = {one.sample: one for one in shard.substitutions}
            for slot, g in enumerate(shard.samples):
                firsts, attempt, want = readable(reader, draw_numbers(recipe, g, batch.num_recycles))
                check(batch, g, slot, want)
                assert (g in replaced) == (attempt > 0)
                if attempt:
                    own, other = (reader.planned(recipe.num_draws * g, a).record for a in (0, attempt))
                    found = replaced[g]
                    assert (found.record_id, found.substitute_id) == (own.record_id, other.record_id)
                    assert found.attempt == attempt
                    assert f"sample {g} is made from record {other.record_id!r}" in caplog.text
                num_mixed += len(set(firsts)) > 1
                num_replaced += attempt > 0
        assert us.stats["substituted"] == num_replaced
        meters = us.meters()
        assert meters["substituted"] == num_replaced
        assert meters["samples_read"] >= meters["samples"]
    assert f"samples_substituted_total {num_replaced}" in prometheus_text(meters)
    assert f"{num_replaced} samples were made from another record" in "\n".join(table(meters))
    assert num_mixed > 3, "every sample met damage in all of its draws: this test has tested little"


def test_a_sample_alone_is_of_one_record_too(damaged):
    recipe = RECIPES["recycling"]
    reader = SampleReader(damaged, recipe, None, seed=SEED, global_batch=BATCH, virtual_shards=1)
    with open_loader(damaged, recipe, on_unreadable="substitute") as us:
        attempts = []
        for g in range(12):
            _, attempt, want = readable(reader, draw_numbers(recipe, g, recipe.max_recycles))
            have = us.sample(g)
            assert have.keys() == want.keys()
            assert all(torch.equal(have[name], want[name]) for name in want)
            attempts.append(attempt)
    assert max(attempts) > 0
