"""Fast features on the CPU and the compact form against the general path, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from loader_reference import assert_same_features
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import Recipe
from foldfeed.loader.features import host_features
from foldfeed.loader.features.featurise import featurise
from foldfeed.loader.features.forms import COMPACT, FULL, compact_features, expand_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.reading.reader import SampleReader

# One row, one residue, fewer rows than clusters, shorter and longer than the crop, more than a word of rows.
SHAPES = [(1, 1), (1, 23), (2, 5), (5, 40), (23, 17), (61, 37), (97, 12), (300, 31)]
SMALL = {"crop_residues": 16, "num_clusters": 6}
RECIPES = {
    "af2": Recipe.named("af2", **SMALL, num_extra=9, masked_fraction=0.4),
    "all rows": Recipe.named("af2", **SMALL, num_extra=50, block_delete=False, labels=True),
    "no extra rows": Recipe.named("af2", **SMALL, num_extra=0, masked_fraction=0.0),
    "one cluster": Recipe.named("af2", crop_residues=40, num_clusters=1, num_extra=9, block_delete=False),
    "crop_first": Recipe.named("crop_first", **SMALL, num_extra=9, labels=True, unclamped_fraction=0.5),
    "af3": Recipe.named("af3", **SMALL, labels=True),
    "masked_lm": Recipe.named("masked_lm", **SMALL, profile_prob=0.1),
    "slots": Recipe.named("crop_first", **SMALL, num_extra=9, labels=True, num_templates=2),
}


def build_store(url, shapes=SHAPES) -> FeatureStore:
    store = FeatureStore.create(url, StoreSettings(tile_rows=16, tile_cols=8))
    records = [make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(shapes)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("host") / "store")


def raw_samples(store, recipe, count=16) -> list[RawSample]:
    reader = SampleReader(store, recipe, None, seed=5, global_batch=1, virtual_shards=1)
    return [RawSample.of(reader.read(g).arrays) for g in range(count)]


@pytest.mark.parametrize("name", RECIPES)
def test_fast_features_are_those_of_the_general_path(store, name):
    recipe = RECIPES[name]
    for raw in raw_samples(store, recipe):
        want = featurise(raw, recipe)
        assert_same_features(host_features.host_features(raw, recipe, FULL), want)
        assert_same_features(host_features.host_features(raw, recipe, COMPACT), compact_features(want))


def test_clusters_counted_in_blocks_are_those_counted_at_once(store, monkeypatch):
    recipe = RECIPES["all rows"]
    raws = raw_samples(store, recipe, 8)
    whole = [host_features.host_features(raw, recipe) for raw in raws]
    monkeypatch.setattr(host_features, "COUNT_BLOCK_ROWS", 7)
    monkeypatch.setattr(host_features, "COUNTERS_BLOCK_BYTES", 8 * 16 * 23 * 4)
    for raw, want in zip(raws, whole, strict=True):
        assert_same_features(host_features.host_features(raw, recipe), want)


def test_features_share_no_memory_with_what_was_read(store):
    for recipe in (RECIPES["crop_first"], RECIPES["af3"]):
        raw = raw_samples(store, recipe, 1)[0]
        features = host_features.host_features(raw, recipe)
        before = {name: tensor.clone() for name, tensor in features.items()}
        for field in dataclasses.fields(raw):
            value = getattr(raw, field.name)
            if isinstance(value, torch.Tensor):
                value.fill_(1)
        assert_same_features(features, before)


def test_large_counts_of_deletions_do_not_overflow(store):
    recipe = RECIPES["all rows"]
    raw = raw_samples(store, recipe, 1)[0]
    raw = dataclasses.replace(raw, deletions=torch.full_like(raw.deletions, 2**30))
    assert_same_features(host_features.host_features(raw, recipe), featurise(raw, recipe))


@pytest.mark.parametrize("name", RECIPES)
def test_expanded_features_are_the_usual_ones_but_for_rounding_to_bfloat16(store, name):
    recipe = RECIPES[name]
    for raw in raw_samples(store, recipe, 6):
        usual = featurise(raw, recipe)
        compact = compact_features(usual)
        have = expand_features(compact)
        size = sum(tensor.nbytes for tensor in compact.values())
        assert size < 0.7 * sum(tensor.nbytes for tensor in usual.values())
        exact = {*usual} - {"msa_feat", "deletion_value", "extra_deletion_value", "profile", "deletion_mean"}
        want = {
            name: tensor if name in exact else tensor.to(torch.bfloat16).to(torch.float32)
            for name, tensor in usual.items()
        }
        assert_same_features(have, want)
        # With leading axes, as in a batch.
        batch = {name: torch.stack([tensor, tensor]) for name, tensor in compact.items()}
        assert_same_features({name: tensor[1] for name, tensor in expand_features(batch).items()}, want)


def test_what_is_compact_has_the_documented_dtypes(store):
    recipe = RECIPES["crop_first"]
    compact = host_features.host_features(raw_samples(store, recipe, 1)[0], recipe, COMPACT)
    by_dtype = {str(tensor.dtype).removeprefix("torch."): set() for tensor in compact.values()}
    for name, tensor in compact.items():
        by_dtype[str(tensor.dtype).removeprefix("torch.")].add(name)
    assert by_dtype["bfloat16"] == {
        *("deletion_value", "cluster_profile", "cluster_deletion_value", "extra_deletion_value"),
    }
    assert by_dtype["int32"] == {"residue_index"}
    assert {"msa", "true_msa", "extra_msa", "aatype", "msa_mask", "all_atom_mask"} <= by_dtype["uint8"]
    assert {"all_atom_positions", "backbone_rigid_tensor", "torsion_angles_sin_cos"} <= by_dtype["float32"]
    assert "int64" not in by_dtype
    assert np.isfinite(compact["cluster_profile"].float().numpy()).all()
