"""The loader on alignments like those of search tools: families of many depths and lengths, read from A3M."""

import numpy as np
import pytest
import torch
from families import as_a3m, family
from loader_reference import reference_sample

from foldfeed.feature_store import FeatureStore, MsaRecord, RowProvenance, write_part
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.loader import CropLoader, Recipe

SHAPES = ((1300, 145), (8, 60), (500, 86), (40, 410), (2000, 206))


def record_of(name: str, depth: int, length: int) -> MsaRecord:
    parsed = parse_a3m(as_a3m(family(depth, length, max_insertion=130)))
    return MsaRecord(
        record_id=name,
        description=parsed.names[0],
        sequence=alphabet.decode(parsed.msa[0]),
        msa=parsed.msa,
        deletions=parsed.deletions,
        rows=RowProvenance(
            database=np.full(depth, -1, np.int16),
            e_value=np.full(depth, np.nan),
            bit_score=np.full(depth, np.nan, np.float32),
            hit_id=[""] * depth,
            species=[""] * depth,
        ),
        databases=(),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    records = [record_of(f"r{number}", *shape) for number, shape in enumerate(SHAPES)]
    store = FeatureStore.create(tmp_path_factory.mktemp("families") / "store")
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


@pytest.mark.parametrize("name", ["af2", "crop_first"])
def test_features_of_families_equal_the_plain_reference(store, name):
    """Small numbers of centres and columns, because the reference is slow; all surviving rows in af2."""
    recipe = Recipe.named(name, crop_residues=24, num_clusters=4, num_extra=20)
    loader = CropLoader(store, recipe, seed=1, global_batch=1)
    for g in range(len(store)):
        plan = loader.plan(g)
        record = store.at(plan.address.record)
        want = reference_sample(record.msa(), record.deletions(), plan, recipe)
        for key, tensor in loader.sample(g).items():
            np.testing.assert_allclose(tensor.numpy(), want[key], rtol=1e-6, atol=0, err_msg=key)


def test_batches_of_families_hold_what_the_names_say(store):
    recipe = Recipe.named("af2", crop_residues=128, num_clusters=64, num_extra=256)
    with CropLoader(store, recipe, seed=0, global_batch=5, virtual_shards=1) as loader:
        batch = next(loader)
    features = batch.shards[0].features
    present = features["msa_mask"] > 0
    masked = features["bert_mask"][present].mean()
    assert abs(float(masked) - 0.15) < 0.01
    token = features["msa_feat"][..., :23].argmax(dim=-1)
    changed = (token != features["true_msa"]) & present
    assert torch.all(features["bert_mask"][changed] == 1)
    # A profile sums to one, a little less for the 1e-6 in the count of rows.
    sums = features["msa_feat"][..., 25:48].sum(dim=-1)[present]
    assert float((sums - 1).abs().max()) < 2e-6
    assert torch.equal(features["true_msa"][:, 0], features["aatype"])
    for name in ("msa_feat", "true_msa", "bert_mask"):
        assert not features[name][~present].any()
    assert all(tensor.isfinite().all() for tensor in features.values())
