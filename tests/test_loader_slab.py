"""`crop_first` from a permuted store: one run of stored rows, drawn evenly, equal on any threads."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_reference import reference_sample
from records import make_record

from foldfeed.feature_store import FeatureStore, StoredRun, StoreSettings, write_part
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.order.order import SampleAddress
from foldfeed.loader.reading.plan import draw_rows, draw_slab, make_plan

SHAPES = [(1, 1), (1, 23), (2, 5), (3, 9), (5, 40), (23, 17), (61, 37), (97, 12), (200, 30)]
PERMUTED = StoreSettings(tile_rows=16, tile_cols=8, row_order="permuted", row_order_seed=1)


def build(url, store_settings: StoreSettings) -> FeatureStore:
    made = FeatureStore.create(url, store_settings)
    records = [make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(SHAPES)]
    parts = [write_part(made.url, part, made.settings) for part in (records[:4], records[4:])]
    made.commit([part.part_id for part in parts], job_id="1")
    return made


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, FeatureStore]:
    folder = tmp_path_factory.mktemp("slabs")
    return {
        "permuted": build(folder / "permuted", PERMUTED),
        "rank": build(folder / "rank", StoreSettings(tile_rows=16, tile_cols=8)),
    }


def small(name: str, **values) -> Recipe:
    return Recipe.named(
        name, **({"crop_residues": 16, "num_clusters": 6, "num_extra": 9, "masked_fraction": 0.4} | values)
    )


def address(sample: int) -> SampleAddress:
    return SampleAddress(sample=sample, epoch=0, position=sample, record=0)


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 80),
    depth=st.integers(1, 300),
    sample=st.integers(0, 2**40),
    num_clusters=st.integers(1, 20),
    num_extra=st.integers(0, 40),
    block_delete=st.booleans(),
)
def test_a_plan_of_a_slab_is_consistent(length, depth, sample, num_clusters, num_extra, block_delete):
    recipe = small("crop_first", num_clusters=num_clusters, num_extra=num_extra, block_delete=block_delete)
    plan = make_plan(recipe, 3, address(sample), length, depth, "permuted")
    ranked = make_plan(recipe, 3, address(sample), length, depth)
    # Crop, masks and the number of rows are those of rank order; which rows is drawn anew.
    assert (plan.crop, plan.columns) == (ranked.crop, ranked.columns)
    assert np.array_equal(plan.masking.action, ranked.masking.action)
    assert [len(plan.rows), len(plan.centres), len(plan.extras)] == [
        len(ranked.rows),
        len(ranked.centres),
        len(ranked.extras),
    ]
    assert plan.selection == plan.slab
    assert 0 <= plan.slab.start < max(depth - 1, 1)
    assert plan.rows.tolist() == list(range(plan.slab.num_rows))
    assert sorted([*plan.centres, *plan.extras]) == plan.rows.tolist()
    assert plan.centres[0] == 0
    af2 = dataclasses.replace(recipe, name="af2")
    orders = ("rank", "permuted")
    one, other = (make_plan(af2, 3, address(sample), length, depth, order) for order in orders)
    assert one.slab is other.slab is None
    for field in ("rows", "centres", "extras"):
        assert np.array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("block_delete", [True, False])
def test_features_of_a_slab_equal_the_plain_reference(stores, block_delete):
    recipe = small("crop_first", block_delete=block_delete)
    loader = CropLoader(stores["permuted"], recipe, seed=5, global_batch=1)
    seen = set()
    for g in range(2 * len(SHAPES)):
        drawn = loader.plan(g)
        record = loader.store.at(drawn.address.record)
        slab = record.slab(start=drawn.slab.start, num_rows=drawn.slab.num_rows)
        ranks = slab.ranks
        # The same sample in terms of ranks, as a plain loop over the alignment understands it.
        in_ranks = dataclasses.replace(
            drawn, slab=None, rows=ranks, centres=ranks[drawn.centres], extras=ranks[drawn.extras]
        )
        want = reference_sample(record.msa(), record.deletions(), in_ranks, recipe)
        have = loader.sample(g)
        assert have.keys() == want.keys()
        for key, tensor in have.items():
            np.testing.assert_allclose(tensor.numpy(), want[key], rtol=1e-6, atol=0, err_msg=f"{key}, {g}")
        seen.add((record.depth, record.length))
    assert seen == set(SHAPES)


def test_af2_is_the_same_from_both_row_orders(stores):
    recipe = small("af2")
    loaders = [CropLoader(store, recipe, seed=2, global_batch=1) for store in stores.values()]
    for g in range(2 * len(SHAPES)):
        a, b = (loader.sample(g) for loader in loaders)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def batches(store, num_steps: int, **values) -> list[dict[str, torch.Tensor]]:
    recipe = small("crop_first")
    with CropLoader(store, recipe, **({"seed": 3, "global_batch": 6} | values)) as loader:
        return [shard.features for _ in range(num_steps) for shard in next(loader).shards]


@pytest.mark.parametrize(("num_threads", "prefetch_steps"), [(1, 1), (4, 3)])
def test_batches_do_not_depend_on_threads(stores, num_threads, prefetch_steps):
    with CropLoader(stores["permuted"], small("crop_first"), seed=3, global_batch=6) as loader:
        alone = {g: loader.sample(g) for g in reversed(range(24))}
    found = batches(stores["permuted"], 4, num_threads=num_threads, prefetch_steps=prefetch_steps)
    assert len(found) == 24
    for g, features in enumerate(found):
        assert all(torch.equal(features[key][0], alone[g][key]) for key in alone[g])


def test_ranks_share_a_step_and_a_resumed_run_goes_on(stores):
    store = stores["permuted"]
    whole = batches(store, 3)
    parts = [batches(store, 3, rank=rank, world=2, num_threads=1) for rank in range(2)]
    shared = [one for step in range(3) for part in parts for one in part[3 * step : 3 * step + 3]]
    for a, b in zip(whole, shared, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    recipe = small("crop_first")
    with CropLoader(store, recipe, seed=3, global_batch=6) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
    with CropLoader(store, recipe, seed=3, global_batch=6) as loader:
        loader.load_state_dict(state)
        again = [shard.features for shard in next(loader).shards]
    for a, b in zip(whole[6:12], again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_hit_is_as_often_in_a_slab_as_any_other():
    """Over samples, centres and extra rows are uniform over stored hits, and starts over all of them."""
    recipe = Recipe(name="crop_first", num_clusters=4, num_extra=5, block_delete=False)
    depth, trials = 21, 4000
    centre_counts, extra_counts, starts = np.zeros(depth), np.zeros(depth), np.zeros(depth - 1)
    for sample in range(trials):
        run, centres, extras = draw_slab(recipe, 0, sample, depth)
        stored = np.array([0, *((run.start + np.arange(8)) % (depth - 1) + 1)])
        assert run == StoredRun(run.start, 9)
        centre_counts[stored[centres]] += 1
        extra_counts[stored[extras]] += 1
        starts[run.start] += 1
    assert centre_counts[0] == trials
    assert extra_counts[0] == 0
    for counts in (centre_counts[1:], extra_counts[1:], starts):
        expected = counts.sum() / counts.size
        free = counts.size - 1
        # Hits of one slab come together, which makes the counts of 8 hits vary at most 8 times as much.
        chi = ((counts - expected) ** 2 / expected).sum() / (8 if counts is not starts else 1)
        assert (chi - free) / np.sqrt(2 * free) < 4.5


def test_a_slab_has_as_many_rows_as_block_deletion_leaves():
    recipe = Recipe(name="crop_first", num_clusters=20, num_extra=1000)
    for sample in range(200):
        survivors = draw_rows(recipe, 0, sample, 700)[0]
        assert draw_slab(recipe, 0, sample, 700)[0].num_rows == len(survivors)


def test_a_deep_slab_reads_few_tiles(tmp_path):
    """512 of 4,097 rows: a run touches at most six of 33 bands; ranks drawn evenly touch nearly all."""
    store = FeatureStore.create(tmp_path / "s", StoreSettings.with_row_order("permuted"))
    part = write_part(store.url, [make_record("r", 4097, 20)], store.settings)
    store.commit([part.part_id], job_id="1")
    record = store["r"]
    rng = np.random.default_rng(0)
    for _ in range(20):
        run = record.plan(None, StoredRun(int(rng.integers(4096)), 512))
        assert len(run.msa_tiles) <= 6
        ranks = record.plan(None, np.sort(rng.choice(4097, 512, replace=False)))
        assert len(ranks.msa_tiles) >= 32
        assert run.num_bytes < ranks.num_bytes / 4
