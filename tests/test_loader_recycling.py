"""Recycling: a number of iterations per step, an alignment for each, the same on any number of ranks."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from loader_reference import reference_sample
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import (
    Component,
    CropLoader,
    LoaderConfigError,
    Recipe,
    SampleError,
    SampleSource,
    Sampling,
)
from foldfeed.loader.reading.plan import draw_num_recycles
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import RESAMPLED

SIZES = {"crop_residues": 12, "num_clusters": 4, "num_extra": 6, "masked_fraction": 0.3}
RECYCLED = {"max_recycles": 3, "resample_msa_in_recycling": True}
RECIPES = [
    Recipe.named("af2_initial_recycled", **SIZES),
    Recipe.named("crop_first", **SIZES, **RECYCLED),
    Recipe.named("af3", crop_residues=12, num_clusters=9, **RECYCLED),
    Recipe.named("masked_lm", crop_residues=12, num_clusters=9, **RECYCLED),
]
# Part of what a step's samples are drawn from is cut as a self-distillation set is.
SAMPLING = Sampling(
    kind="weighted",
    components=(
        Component(where=("length < 18",), share=0.25),
        Component(where=("length >= 18",), share=0.75, max_msa_rows=11),
    ),
)
WORLDS = (1, 2, 3, 4, 7)


@pytest.fixture(scope="module", params=["rank", "permuted"])
def store(request, tmp_path_factory) -> FeatureStore:
    settings = StoreSettings(tile_rows=16, tile_cols=8, row_order=request.param)
    store = FeatureStore.create(tmp_path_factory.mktemp("recycling") / "store", settings)
    records = [make_record(f"r{n}", 1 + 13 * n, 5 + 6 * n, seed=n) for n in range(6)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


def even(counts: np.ndarray) -> bool:
    """Chi-square against even counts within 4.5 sigma."""
    expected, free = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free) < 4.5


def open_loader(store, recipe, **values) -> CropLoader:
    return CropLoader(store, recipe, **({"seed": 3, "global_batch": 7, "sampling": SAMPLING} | values))


def test_the_number_of_iterations_is_even_and_a_function_of_seed_and_step(store):
    recipe = RECIPES[0]
    drawn = [draw_num_recycles(recipe, 5, step) for step in range(4000)]
    assert even(np.bincount(drawn, minlength=4))
    assert set(drawn) == {0, 1, 2, 3}
    # Neighbouring steps and seeds have nothing to do with each other.
    pairs = np.bincount(4 * np.array(drawn[:-1]) + np.array(drawn[1:]), minlength=16)
    assert even(pairs)
    assert drawn[:50] != [draw_num_recycles(recipe, 6, step) for step in range(50)]
    assert {draw_num_recycles(Recipe(), 5, step) for step in range(50)} == {0}
    # Whatever else a recipe says, and before anything is read.
    other = Recipe.named("crop_first", max_recycles=3)
    with open_loader(store, other, seed=5) as loader:
        assert [loader.num_recycles(step) for step in range(60)] == drawn[:60]
        assert [next(loader).num_recycles for _ in range(3)] == drawn[:3]
        # Without alignments of their own the features are what they are without recycling.
        loader.load_state_dict(loader.state_dict() | {"step": 0})
        batch = next(loader)
    with open_loader(store, Recipe.named("crop_first"), seed=5) as loader:
        for ours, theirs in zip(batch.shards, next(loader).shards, strict=True):
            for name, tensor in theirs.features.items():
                assert torch.equal(ours.features[name], tensor), name


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=lambda recipe: recipe.name)
def test_every_iteration_equals_the_plain_reference_for_its_draws(store, recipe):
    plain = dataclasses.replace(recipe, labels=False, num_templates=0)
    loader = open_loader(store, recipe)
    differing = 0
    for g in range(12):
        features = loader.sample(g)
        plans = [loader.plan(g, draw) for draw in range(4)]
        assert {plan.crop for plan in plans} == {plans[0].crop}
        assert [plan.labels for plan in plans] == [recipe.labels, False, False, False]
        differing += len({plan.centres.tobytes() for plan in plans}) > 1
        record = store.at(loader._reader.selection.place(plans[0].address.record)[1])
        for draw, plan in enumerate(plans):
            if plan.slab is not None:
                ranks = record.slab(start=plan.slab.start, num_rows=plan.slab.num_rows).ranks
                in_ranks = {"centres": ranks[plan.centres], "extras": ranks[plan.extras]}
                plan = dataclasses.replace(plan, slab=None, rows=ranks, **in_ranks)
            want = reference_sample(record.msa(), record.deletions(), plan, plain)
            for name, array in want.items():
                have = features[name][draw] if name in RESAMPLED else features[name]
                np.testing.assert_allclose(have.numpy(), array, rtol=1e-6, atol=0, err_msg=f"{name} {draw}")
    assert differing > 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_first_iteration_is_the_sample_without_recycling(store, recipe):
    plain = dataclasses.replace(recipe, max_recycles=0, resample_msa_in_recycling=False)
    loader, alone = open_loader(store, recipe), open_loader(store, plain)
    source = SampleSource(store, recipe, seed=3, sampling=SAMPLING)
    for step in range(9):
        assert source.num_recycles(step) == loader.num_recycles(step)
    for g in range(6):
        have, want, other = loader.sample(g), alone.sample(g), source[g]
        assert have.keys() == want.keys() == other.keys()
        for name, tensor in want.items():
            assert torch.equal(have[name][0] if name in RESAMPLED else have[name], tensor), name
            assert torch.equal(have[name], other[name])
            if name in RESAMPLED:
                assert have[name].shape == (4, *tensor.shape)


def check_batch(batch, truth, num_recycles: int) -> list[int]:
    """Returns the samples of a batch, each of which must be the head of what `truth` has."""
    assert batch.num_recycles == num_recycles
    seen = []
    for shard in batch.shards:
        for slot, g in enumerate(shard.samples):
            assert shard.features.keys() == truth[g].keys()
            for name, tensor in shard.features.items():
                want = truth[g][name][: num_recycles + 1] if name in RESAMPLED else truth[g][name]
                assert torch.equal(tensor[slot], want), (g, name)
            seen.append(g)
    return seen


@pytest.fixture(scope="module")
def truth(store):
    """Samples of three steps, made alone, by recipe."""
    found = {}
    for recipe in RECIPES:
        with open_loader(store, recipe) as loader:
            found[recipe.name] = {g: loader.sample(g) for g in reversed(range(21))}
    return found


@pytest.mark.parametrize("recipe", RECIPES[::2], ids=lambda recipe: recipe.name)
def test_any_number_of_ranks_and_threads_gives_the_same_steps(store, truth, recipe):
    for world in WORLDS:
        seen: list[list[int]] = [[], [], []]
        for rank in range(world):
            with open_loader(store, recipe, rank=rank, world=world, num_threads=1 + rank % 3) as loader:
                for step in range(3):
                    drawn = draw_num_recycles(recipe, 3, step)
                    seen[step] += check_batch(next(loader), truth[recipe.name], drawn)
        assert seen == [list(range(7 * step, 7 * step + 7)) for step in range(3)]


def test_reading_processes_change_nothing_and_a_resumed_run_goes_on(store, truth):
    recipe = RECIPES[0]
    num_processes = 1 if store.settings.row_order == "rank" else 4
    with open_loader(store, recipe, num_processes=num_processes, rank=1, world=3) as loader:
        check_batch(next(loader), truth[recipe.name], draw_num_recycles(recipe, 3, 0))
        state = json.loads(json.dumps(loader.state_dict()))
        batches = [next(loader)]
        if num_processes == 1:
            loader.load_state_dict(state)
            batches.append(next(loader))
    for batch in batches:
        assert check_batch(batch, truth[recipe.name], draw_num_recycles(recipe, 3, 1)) == [9, 10]


def test_only_the_iterations_that_were_drawn_are_read(store, monkeypatch):
    recipe = RECIPES[1]
    read = SampleReader.fetch
    seen = []

    def counted(self, planned, room=None):
        seen.append((planned.sample, planned.plan.draw))
        return read(self, planned, room)

    monkeypatch.setattr(SampleReader, "fetch", counted)
    with open_loader(store, recipe, prefetch_steps=1) as loader:
        for _ in range(5):
            next(loader)
    # One step was made ahead.
    want = [(g, d) for g in range(7 * 6) for d in range(draw_num_recycles(recipe, 3, g // 7) + 1)]
    assert sorted(seen) == [pair for pair in want if pair in set(seen)]
    assert set(want[: len([1 for g, _ in want if g < 35])]) <= set(seen)


def test_an_error_names_the_sample_and_not_the_draw(tmp_path):
    store = FeatureStore.create(tmp_path / "store", StoreSettings(tile_rows=16, tile_cols=8))
    store.commit([write_part(store.url, [make_record("r", 40, 30)], store.settings).part_id], job_id="1")
    (shard,) = (tmp_path / "store" / "parts").glob("*/msa/c/0/0/0")
    data = shard.read_bytes()
    shard.write_bytes(bytes(len(data) // 2) + data[len(data) // 2 :])
    for values in ({}, {"num_processes": 1}):
        with open_loader(store, RECIPES[1], sampling=None, **values) as loader:
            with pytest.raises(SampleError, match=r"sample 5 \(record 'r'\)"):
                loader.sample(5)
            with pytest.raises(SampleError, match=r"sample 0 \(record 'r'\)"):
                next(loader)


def test_slots_of_templates_are_there_and_empty(store):
    features = open_loader(store, RECIPES[0]).sample(1)
    # Shapes of OpenFold's configuration, with 4 slots and 12 residues.
    shapes = {
        "template_aatype": (4, 12),
        "template_all_atom_mask": (4, 12, 37),
        "template_all_atom_positions": (4, 12, 37, 3),
        "template_alt_torsion_angles_sin_cos": (4, 12, 7, 2),
        "template_backbone_rigid_mask": (4, 12),
        "template_backbone_rigid_tensor": (4, 12, 4, 4),
        "template_mask": (4,),
        "template_pseudo_beta": (4, 12, 3),
        "template_pseudo_beta_mask": (4, 12),
        "template_sum_probs": (4, 1),
        "template_torsion_angles_mask": (4, 12, 7),
        "template_torsion_angles_sin_cos": (4, 12, 7, 2),
    }
    found = {name: tensor for name, tensor in features.items() if name.startswith("template_")}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    for name, tensor in found.items():
        assert tensor.dtype == (torch.int64 if name == "template_aatype" else torch.float32)
        assert not tensor.any()
        # Of its own memory: whoever fills a slot changes nothing else.
        assert tensor.is_contiguous()
    plain = open_loader(store, Recipe.named("af2_initial", **SIZES)).sample(1)
    assert features.keys() - plain.keys() == shapes.keys()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("af2", {"max_recycles": -1}, "max_recycles.*at least 0"),
        ("af2", {"max_recycles": True}, "max_recycles.*at least 0"),
        ("af2", {"resample_msa_in_recycling": True}, "no effect without recycling; give max_recycles"),
        ("af2", {"resample_msa_in_recycling": 1, "max_recycles": 1}, "must be True or False"),
        ("af3", {"num_templates": 4}, "num_templates.*must be 0"),
        ("af2", {"num_templates": 1.0}, "num_templates.*at least 0"),
    ],
)
def test_values_that_do_not_go_together(name, values, message):
    with pytest.raises(LoaderConfigError, match=message):
        Recipe.named(name, **values)


def test_presets_digests_and_draws_that_are_not_there(store):
    initial, recycled = Recipe.named("af2_initial"), Recipe.named("af2_initial_recycled")
    assert (
        dataclasses.replace(recycled, max_recycles=0, resample_msa_in_recycling=False, num_templates=0)
        == initial
    )
    assert (recycled.max_recycles, recycled.num_templates, recycled.num_draws) == (3, 4, 4)
    assert Recipe.named("af2_finetune_recycled").num_clusters == 512
    changed = [{"max_recycles": 2}, {"resample_msa_in_recycling": False}, {"num_templates": 0}]
    digests = {dataclasses.replace(recycled, **values).digest for values in [{}, *changed]}
    assert len({initial.digest, *digests}) == 5
    # Positions saved before there was recycling are bound to this.
    assert initial.digest == "ab2999d3cb8751fcaae8f110f4422a8d5db61531132908ccf71634077631366a"
    loader = open_loader(store, RECIPES[0])
    for draw in (-1, 4):
        with pytest.raises(LoaderConfigError, match=r"draw=.*0\.\.3"):
            loader.plan(0, draw)
    with pytest.raises(LoaderConfigError, match="draw"):
        open_loader(store, Recipe.named("af2", **SIZES)).plan(0, 1)
