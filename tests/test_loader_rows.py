"""Recipes that give rows as they are: `af3` (sub-sampled MSA, full profile) and `masked_lm` (masked rows)."""

import dataclasses

import numpy as np
import pytest
import torch
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import CropLoader, LoaderConfigError, Recipe
from foldfeed.loader.reading.plan import NOT_MASKED, draw_num_hits

AF3 = Recipe.named("af3", crop_residues=12, num_clusters=20)
MASKED_LM = Recipe.named("masked_lm", crop_residues=12, num_clusters=20)


@pytest.fixture(scope="module", params=["rank", "permuted"])
def store(request, tmp_path_factory) -> FeatureStore:
    """Records with fewer and with more rows and residues than a sample takes, in both orders of rows."""
    store = FeatureStore.create(
        tmp_path_factory.mktemp("rows") / "store",
        StoreSettings(tile_rows=16, tile_cols=8, row_order=request.param),
    )
    records = [make_record(f"r{n}", 1 + 11 * n, 3 + 4 * n, seed=n) for n in range(7)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


def samples(store, recipe, count=60):
    loader = CropLoader(store, recipe, seed=2, global_batch=4)
    ids = list(store)
    for sample in range(count):
        plan = loader.plan(sample)
        yield plan, store[ids[plan.address.record]], loader.sample(sample)


def whole(record) -> tuple[np.ndarray, np.ndarray]:
    crop = record.crop(slice(None), slice(None))
    return crop.msa, crop.deletions


def test_af3_gives_rows_of_the_record_and_its_full_profile(store):
    depths = set()
    for plan, record, features in samples(store, AF3):
        rows, size = len(plan.centres), plan.crop[1] - plan.crop[0]
        window = slice(*plan.crop)
        msa, deletions = whole(record)
        have = {name: tensor.numpy() for name, tensor in features.items()}
        assert have["msa"].shape == (20, 12)
        assert have["msa_mask"].sum() == rows * size
        # Every row of the sample is a row of the record, the query first and none of them twice.
        np.testing.assert_array_equal(have["msa"][0, :size], msa[0, window])
        of_record = {row.tobytes(): at for at, row in enumerate(msa.astype(np.int64)[:, window])}
        if size == 12:
            found = [of_record[np.ascontiguousarray(row).tobytes()] for row in have["msa"][:rows]]
            assert len(set(found)) == rows
            counts = deletions[found][:, window]
            np.testing.assert_array_equal(have["has_deletion"][:rows], np.minimum(counts, 1))
            value = (2 / np.pi * np.arctan(counts / 3)).astype(np.float32)
            np.testing.assert_allclose(have["deletion_value"][:rows], value, rtol=2e-7)
        np.testing.assert_array_equal(have["profile"][:size], record.profile(window))
        np.testing.assert_array_equal(have["deletion_mean"][:size], record.deletion_mean(window))
        np.testing.assert_allclose(have["deletion_mean"][:size], deletions[:, window].mean(0), rtol=1e-6)
        for name in ("msa", "msa_mask", "has_deletion", "deletion_value"):
            assert not have[name][rows:].any()
            assert not have[name][:, size:].any()
        assert "msa_feat" not in have
        assert "bert_mask" not in have
        depths.add((record.depth, rows))
    # The number of rows varies for one record, and is what fits at most.
    assert len(depths) > 12
    assert max(rows for _, rows in depths) == 20


def test_the_number_of_rows_is_uniform_before_it_is_cut():
    recipe = dataclasses.replace(AF3, num_clusters=30)
    counts = np.bincount([draw_num_hits(recipe, 1, g, 39) for g in range(8000)], minlength=40)
    # 40 equally likely numbers of hits, of which those from 29 on become 29.
    assert counts[30:].sum() == 0
    expected = np.array([1 / 40] * 29 + [11 / 40]) * 8000
    chi_square = ((counts[:30] - expected) ** 2 / expected).sum()
    assert chi_square < 29 + 5 * np.sqrt(2 * 29)
    everything = dataclasses.replace(recipe, subsample_rows=False)
    assert {draw_num_hits(everything, 1, g, 39) for g in range(50)} == {29}
    assert {draw_num_hits(everything, 1, g, 5) for g in range(50)} == {5}


def test_every_hit_is_as_likely_as_any_other(store):
    recipe = dataclasses.replace(AF3, subsample_rows=False)
    counts: dict[str, np.ndarray] = {}
    for plan, record, _ in ((p, r, f) for p, r, f in samples(store, recipe, 700) if r.record_id == "r6"):
        if plan.slab is None:
            taken = plan.centres[1:]
        else:
            hits = record.depth - 1
            taken = 1 + (plan.slab.start + plan.centres[1:] - 1) % hits
        counts.setdefault(record.record_id, np.zeros(record.depth))[taken] += 1
    (found,) = counts.values()
    expected = found[1:].sum() / (len(found) - 1)
    assert found[0] == 0
    # Rows of a sample are drawn without replacement, so the spread is a little below the binomial's.
    assert np.abs(found[1:] - expected).max() < 5 * np.sqrt(expected)


def test_masked_lm_gives_rows_of_which_some_are_masked(store):
    masked = replaced = kept = 0
    for plan, record, features in samples(store, MASKED_LM):
        rows, size = len(plan.centres), plan.crop[1] - plan.crop[0]
        msa, _ = whole(record)
        have = {name: tensor.numpy() for name, tensor in features.items()}
        assert set(have) == {
            "aatype",
            "residue_index",
            "seq_mask",
            "target_feat",
            "msa",
            "msa_mask",
            "true_msa",
            "bert_mask",
        }
        assert rows == min(record.depth, 20)
        np.testing.assert_array_equal(have["true_msa"][0, :size], msa[0, slice(*plan.crop)])
        target = have["bert_mask"] == 1
        np.testing.assert_array_equal(target[:rows, :size], plan.masking.action != NOT_MASKED)
        np.testing.assert_array_equal(have["msa"][~target], have["true_msa"][~target])
        masked += (have["msa"][target] == 22).sum()
        changed = have["msa"][target] != have["true_msa"][target]
        replaced += (changed & (have["msa"][target] < 20)).sum()
        kept += (~changed).sum()
    total = masked + replaced + kept
    assert abs(masked / total - 0.8) < 0.05
    # A random residue is the true one now and then.
    assert abs(replaced / total - 0.1) < 0.05
    assert abs(kept / total - 0.1) < 0.05


@pytest.mark.parametrize("recipe", [AF3, MASKED_LM], ids=lambda recipe: recipe.name)
def test_processes_threads_and_ranks_change_nothing(store, recipe):
    alone = CropLoader(store, recipe, seed=2, global_batch=6)
    truth = {sample: alone.sample(sample) for sample in range(18)}
    for values in ({"num_processes": 1}, {"num_threads": 3}, {"rank": 1, "world": 3}):
        with CropLoader(store, recipe, seed=2, global_batch=6, **values) as loader:
            for _ in range(3):
                for shard in next(loader).shards:
                    for slot, sample in enumerate(shard.samples):
                        assert set(shard.features) == set(truth[sample])
                        for name, tensor in shard.features.items():
                            assert torch.equal(tensor[slot], truth[sample][name]), name


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("af3", {"num_extra": 5}, "num_extra.*must be 0"),
        ("masked_lm", {"num_extra": 1}, "num_extra.*raise num_clusters"),
        ("af3", {"masked_fraction": 0.1}, "masked_fraction.*af3 masks nothing"),
        ("af2", {"subsample_rows": True}, "subsample_rows.*not of af2"),
        ("af2_initial", {"labels": 1}, "labels.*True or False"),
        ("af2_final", {}, "is no recipe.*af2_finetune"),
    ],
)
def test_values_that_do_not_go_together(name, values, message):
    with pytest.raises(LoaderConfigError, match=message):
        Recipe.named(name, **values)


def test_a_preset_is_no_name_of_a_recipe():
    with pytest.raises(LoaderConfigError, match=r"is a preset; use Recipe.named\('af2_initial'\)"):
        Recipe(name="af2_initial")


def test_names_and_digests():
    initial, finetune = Recipe.named("af2_initial"), Recipe.named("af2_finetune", crop_residues=256)
    assert (initial.name, initial.crop_residues, initial.num_clusters, initial.num_extra) == (
        "af2",
        256,
        128,
        1024,
    )
    assert (finetune.crop_residues, finetune.num_clusters, finetune.num_extra) == (256, 512, 5120)
    assert initial.labels
    assert initial.digest != dataclasses.replace(initial, labels=False).digest
    # Positions saved before there were labels are bound to these.
    assert Recipe.named("af2").digest == "48a32083330913df2d3c08fc6f07c9e49a6a7d70f205245447d924135345389c"
    old = Recipe.named("crop_first", crop_residues=64, unclamped_fraction=0.1)
    assert old.digest == "ff3e3704ad8be2e7334481d256a31aa26441580ad5a758584374082264032502"
