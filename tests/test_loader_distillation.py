"""Components of self-distillation: fewer rows to start from, labels only where the prediction was sure."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import Component, CropLoader, LoaderConfigError, Recipe, Sampling
from foldfeed.loader.order.counter_rng import Purpose, stream
from foldfeed.loader.order.order import SampleAddress
from foldfeed.loader.reading.plan import delete_blocks, draw_crop, draw_rows, make_plan

SIZES = {"crop_residues": 16, "num_clusters": 5, "num_extra": 7}


def even(counts: np.ndarray, expected: np.ndarray | None = None, variance: float = 1.0) -> bool:
    """Chi-square within 4.5 sigma; ``variance`` in units of what independent draws have."""
    expected = np.full(counts.size, counts.sum() / counts.size) if expected is None else expected
    free = counts.size - 1
    return ((((counts - expected) ** 2 / expected).sum() / variance) - free) / np.sqrt(2 * free) < 4.5


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, FeatureStore]:
    """Two stores of records of odd lengths, which have a structure."""
    found = {}
    for number, name in enumerate(("pdb", "distilled")):
        store = FeatureStore.create(
            tmp_path_factory.mktemp("distillation") / name, StoreSettings(tile_rows=16, tile_cols=8)
        )
        records = [make_record(f"{name}{n}", 20 + 30 * n, 21 + 6 * n, seed=n + 9 * number) for n in range(4)]
        store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
        found[name] = store
    return found


def address(sample: int) -> SampleAddress:
    return SampleAddress(sample=sample, epoch=0, position=sample, record=0)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["af2", "crop_first"]),
    order=st.sampled_from(["rank", "permuted"]),
    depth=st.integers(1, 300),
    sample=st.integers(0, 2**40),
    max_msa_rows=st.integers(1, 60),
    block_delete=st.booleans(),
)
def test_no_sample_starts_from_more_rows(name, order, depth, sample, max_msa_rows, block_delete):
    recipe = Recipe.named(name, **SIZES, block_delete=block_delete)
    whole = make_plan(recipe, 3, address(sample), 40, depth, order)
    cut = make_plan(recipe, 3, address(sample), 40, depth, order, max_msa_rows=max_msa_rows)
    assert (cut.crop, cut.centres[0]) == (whole.crop, 0)
    survivors = (
        delete_blocks(recipe, stream(3, sample, Purpose.BLOCK_DELETE), depth)
        if block_delete
        else np.arange(depth)
    )
    available = min(len(survivors), max_msa_rows)
    taken = available if name == "af2" else min(available, recipe.num_clusters + recipe.num_extra)
    assert len(cut.rows) == taken
    assert len(cut.centres) == min(available, recipe.num_clusters)
    assert len(cut.extras) == min(available - len(cut.centres), recipe.num_extra)
    if cut.slab is None:
        assert np.isin(cut.rows, survivors).all()
    if len(survivors) <= max_msa_rows:
        assert np.array_equal(cut.rows, whole.rows)
        assert np.array_equal(cut.centres, whole.centres)


def test_the_rows_that_stay_are_an_even_sample_of_those_that_survive():
    """As OpenFold's `sample_msa_distillation`: the query, and a random order of the rest cut off."""
    recipe = Recipe.named("af2", **SIZES, block_delete=False)
    rows, centres = np.zeros(41), np.zeros(41)
    for sample in range(3000):
        survivors, found, _ = draw_rows(recipe, 0, sample, 41, 0, 17)
        assert np.all(np.diff(survivors) > 0)
        rows[survivors] += 1
        centres[found] += 1
    assert rows[0] == centres[0] == 3000
    # Without replacement: the variance of a count is that of independent draws times the share left out.
    assert even(rows[1:], variance=1 - 16 / 40)
    assert even(centres[1:], variance=1 - 4 / 40)
    # Two rows are together as often as any other two.
    together = np.zeros((41, 41))
    for sample in range(1500):
        survivors = draw_rows(recipe, 1, sample, 41, 0, 17)[0][1:]
        together[np.ix_(survivors, survivors)] += 1
    pairs = together[np.triu_indices(41, 1)].reshape(-1)
    pairs = pairs[pairs > 0]
    assert pairs.size == 40 * 39 // 2
    assert abs(pairs.mean() / 1500 - 16 * 15 / (40 * 39)) < 1e-12
    assert pairs.std() < 1.15 * math.sqrt(1500 * 0.1538 * (1 - 0.1538))


def test_a_mixture_treats_each_component_by_its_own_rules(stores):
    recipe = Recipe.named("af2_initial", **SIZES, block_delete=False)
    sampling = Sampling(
        kind="weighted",
        components=(
            Component(store="pdb", share=0.25),
            Component.af2_distillation(store="distilled", share=0.75, max_msa_rows=12),
        ),
    )
    loader = CropLoader(stores, recipe, seed=4, global_batch=4, sampling=sampling)
    plain = dataclasses.replace(sampling.components[1], max_msa_rows=0, min_plddt=0.0)
    whole = CropLoader(
        stores,
        recipe,
        seed=4,
        global_batch=4,
        sampling=dataclasses.replace(sampling, components=(sampling.components[0], plain)),
    )
    seen = {"pdb": 0, "distilled": 0}
    masked = kept = 0
    for g in range(60):
        plan = loader.plan(g)
        store, position = loader._reader.selection.place(plan.address.record)
        record = store.at(position)
        name = record.record_id.rstrip("0123456789")
        seen[name] += 1
        features, without = loader.sample(g), whole.sample(g)
        if name == "pdb":
            assert len(plan.rows) == record.depth
            assert all(torch.equal(features[key], without[key]) for key in without)
            continue
        assert len(plan.rows) == min(12, record.depth)
        size = plan.crop[1] - plan.crop[0]
        structure = record.structure(slice(*plan.crop))
        sure = (structure.b_factor > 50).any(axis=1)
        mask = features["all_atom_mask"][:size].numpy()
        np.testing.assert_array_equal(mask, structure.atom_mask * sure[:, None])
        positions = features["all_atom_positions"][:size].numpy()
        np.testing.assert_array_equal(positions, structure.atom_positions * sure[:, None, None])
        # What follows from the atoms is gone with them, also of the residue behind (phi, pre-omega).
        for derived in ("backbone_rigid_mask", "pseudo_beta_mask"):
            have = features[derived][:size].numpy()
            np.testing.assert_array_equal(have, without[derived][:size].numpy() * sure)
        before = record.structure(slice(*plan.atoms)).b_factor > 50
        before = np.concatenate([np.zeros(size + 1 - len(before), bool), before.any(axis=1)])[:-1]
        torsions = without["torsion_angles_mask"][:size].numpy() * sure[:, None]
        torsions[:, :2] *= before[:, None]
        np.testing.assert_array_equal(features["torsion_angles_mask"][:size].numpy(), torsions)
        masked += (~sure & structure.observed).sum()
        kept += sure.sum()
    assert min(seen.values()) > 5
    assert masked > 20
    assert kept > 20


def test_rules_are_part_of_the_digest_and_old_samplings_keep_theirs():
    old = Sampling(kind="weighted", components=(Component(share=0.5), Component(store="b", share=1)))
    assert old.digest == "5d3fd97381d0fa7a9997a2419e122e2e22eee9c959df2cf45765ad433a8fadfd"
    cut = Component.af2_distillation(store="b", share=1)
    assert (cut.max_msa_rows, cut.min_plddt) == (1000, 50.0)
    new = dataclasses.replace(old, components=(old.components[0], cut))
    assert Sampling.from_dict(new.to_dict()) == new
    digests = {old.digest, new.digest}
    for values in ({"max_msa_rows": 999}, {"min_plddt": 70}, {"min_plddt": 0.0}):
        digests.add(
            dataclasses.replace(
                old, components=(old.components[0], dataclasses.replace(cut, **values))
            ).digest
        )
    assert len(digests) == 5
    assert (
        Sampling(components=(Component(min_plddt=50),)).digest
        == Sampling(components=(Component(min_plddt=50.0),)).digest
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_msa_rows": -1}, "max_msa_rows=-1: must be an integer of at least 1"),
        ({"max_msa_rows": 1.5}, "max_msa_rows"),
        ({"min_plddt": 100}, "min_plddt=100: must be at least 0 and below 100"),
        ({"min_plddt": math.nan}, "min_plddt"),
        ({"min_plddt": -1}, "min_plddt"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(LoaderConfigError, match=message):
        Component(**values)


def test_a_rule_for_labels_needs_labels(stores):
    sampling = Sampling(components=(Component(min_plddt=50),))
    with pytest.raises(LoaderConfigError, match=r"min_plddt=50.*Recipe\(labels=True\)"):
        CropLoader(stores["pdb"], Recipe.named("af2"), seed=0, global_batch=1, sampling=sampling)


@pytest.mark.parametrize("unclamped_fraction", [0.0, 0.1, 1.0])
def test_crops_start_as_often_as_both_rules_of_alphafold_say(unclamped_fraction):
    """Clamped: even over 0..n. Unclamped: x even over 0..n, then even over 0..n-x (supplement 1.2.8)."""
    recipe = Recipe(crop_residues=10, unclamped_fraction=unclamped_fraction)
    n, trials = 13, 20_000
    clamped_chance = np.full(n + 1, 1 / (n + 1))
    unclamped_chance = np.array(
        [sum(1 / (n + 1) / (n - x + 1) for x in range(n - start + 1)) for start in range(n + 1)]
    )
    assert math.isclose(unclamped_chance.sum(), 1)
    counts = {True: np.zeros(n + 1), False: np.zeros(n + 1)}
    for g in range(trials):
        (start, stop), clamped = draw_crop(recipe, stream(2, g, Purpose.CROP), 10 + n)
        assert stop - start == 10
        counts[clamped][start] += 1
    unclamped = counts[False].sum()
    spread = math.sqrt(trials * unclamped_fraction * (1 - unclamped_fraction))
    assert abs(unclamped - trials * unclamped_fraction) <= 4.5 * spread
    for clamped, chance in ((True, clamped_chance), (False, unclamped_chance)):
        if counts[clamped].sum():
            assert even(counts[clamped], chance * counts[clamped].sum())


def test_the_crop_s_rule_reaches_the_loss(stores):
    recipe = Recipe.named("af2_initial", **SIZES, unclamped_fraction=0.5)
    loader = CropLoader(stores["pdb"], recipe, seed=0, global_batch=1)
    flags = [float(loader.sample(g)["use_clamped_fape"]) for g in range(20)]
    assert flags == [float(loader.plan(g).clamped) for g in range(20)]
    assert set(flags) == {0.0, 1.0}
