"""Any world, changed at any step: every sample exactly once an epoch, the same ones in the same shards."""

import itertools
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.loader import Component, CropLoader, LoaderConfigError, Recipe, SampleSource, Sampling
from foldfeed.loader.order.alias_table import AliasTable
from foldfeed.loader.order.order import SampleOrder, rank_shards

NUM_RECORDS = 23
RECIPE = Recipe.named("crop_first", crop_residues=6, num_clusters=2, num_extra=3)
WORLDS = (1, 2, 3, 4, 7)
SAMPLINGS = {
    "once, join": Sampling(),
    "once, short": Sampling(epoch_end="short"),
    "weighted, join": Sampling(kind="weighted", components=(Component(length_term=True),)),
    "weighted, short": Sampling(kind="weighted", epoch_samples=17, epoch_end="short"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    store = FeatureStore.create(
        tmp_path_factory.mktemp("elastic") / "store", StoreSettings(tile_rows=16, tile_cols=8)
    )
    records = [make_record(f"r{n:02}", 1 + n % 5, 4 + n, seed=n) for n in range(NUM_RECORDS)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


@st.composite
def orders(draw) -> SampleOrder:
    num_records, per_shard = draw(st.integers(1, 90)), draw(st.integers(1, 4))
    shards = draw(st.integers(7, 12))
    weighted = draw(st.booleans())
    return SampleOrder(
        num_records=num_records,
        seed=draw(st.integers(0, 2**40)),
        global_batch=shards * per_shard,
        virtual_shards=shards,
        table=AliasTable(np.arange(1, num_records + 1)) if weighted else None,
        epoch_samples=draw(st.none() | st.integers(1, 90)) if weighted else None,
        epoch_end=draw(st.sampled_from(["join", "short"])),
    )


@settings(max_examples=60, deadline=None)
@given(order=orders(), epochs=st.integers(1, 4))
def test_steps_cut_the_stream_without_gap_or_repeat(order, epochs):
    """Both rules: steps hold consecutive samples, shards consecutive parts of a step."""
    steps = range(order.epoch_steps(0).start, order.epoch_steps(epochs - 1).stop)
    seen = []
    for step in steps:
        shards = [order.shard_samples(step, v) for v in range(order.virtual_shards)]
        assert [g for shard in shards for g in shard] == list(order.step_samples(step))
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        if order.epoch_end == "join":
            assert sum(sizes) == order.global_batch
        assert 1 <= sum(sizes) <= order.global_batch
        seen += [g for shard in shards for g in shard]
    assert seen == list(range(len(seen)))
    assert len(seen) >= epochs * order.epoch_size
    if order.epoch_end == "short":
        assert len(seen) == epochs * order.epoch_size
    whole = [len(order.step_samples(step)) == order.global_batch for step in steps]
    assert whole.count(False) == (epochs * (order.epoch_size % order.global_batch > 0)) * (
        order.epoch_end == "short"
    )
    if order.table is None:
        for epoch in range(epochs):
            inside = [g for g in seen if g // order.epoch_size == epoch]
            assert sorted(order.records(inside).tolist()) == list(range(order.num_records))


@settings(max_examples=60, deadline=None)
@given(order=orders(), step=st.integers(0, 400))
def test_every_step_begins_in_one_epoch(order, step):
    epoch = order.epoch_of_step(step)
    assert step in order.epoch_steps(epoch)
    assert order.locate(order.step_samples(step).start).epoch == epoch
    if order.epoch_end == "short":
        assert {g // order.epoch_size for g in order.step_samples(step)} == {epoch}


@settings(max_examples=60, deadline=None)
@given(order=orders(), data=st.data())
def test_any_change_of_the_world_leaves_every_shard_as_it_was(order, data):
    """Ranks come and go at any step: together they still hold each shard of each step once."""
    worlds = data.draw(st.lists(st.sampled_from(WORLDS), min_size=6, max_size=6))
    for step, world in enumerate(worlds):
        owned = [
            (v, tuple(order.shard_samples(step, v)))
            for rank in range(world)
            for v in rank_shards(order.virtual_shards, rank, world)
        ]
        assert owned == [(v, tuple(order.shard_samples(step, v))) for v in range(order.virtual_shards)]


def steps_of(store, sampling, rank, world, state=None, count=0, **values):
    """One rank's next steps and its state after them."""
    values = {"seed": 5, "global_batch": 14, "virtual_shards": 7, "num_threads": 1} | values
    with CropLoader(store, RECIPE, sampling=sampling, rank=rank, world=world, **values) as loader:
        if state is not None:
            loader.load_state_dict(state)
        batches = list(itertools.islice(loader, count))
        return batches, json.loads(json.dumps(loader.state_dict()))


def shards_of(batches) -> dict:
    return {(batch.step, shard.v): shard for batch in batches for shard in batch.shards}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_run_whose_world_changes_in_the_middle_equals_one_rank(store, name):
    whole, _ = steps_of(store, SAMPLINGS[name], 0, 1, count=8)
    want = shards_of(whole)
    found, state = {}, None
    for world, count in zip((3, 7, 2, 4, 1), (1, 2, 1, 3, 1), strict=True):
        for rank in range(world):
            batches, after = steps_of(store, SAMPLINGS[name], rank, world, state, count)
            mine = shards_of(batches)
            assert not mine.keys() & found.keys()
            found |= mine
        state = after
    assert found.keys() == want.keys()
    for key, shard in want.items():
        assert found[key].samples == shard.samples
        for feature, tensor in shard.features.items():
            assert torch.equal(found[key].features[feature], tensor), (key, feature)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_epochs_of_a_loader_hold_their_samples(store, name, prefetch_steps):
    sampling = SAMPLINGS[name]
    with CropLoader(
        store,
        RECIPE,
        seed=1,
        global_batch=6,
        virtual_shards=3,
        sampling=sampling,
        prefetch_steps=prefetch_steps,
    ) as loader:
        size = loader.order.epoch_size
        epochs = [[g for b in loader.epoch() for s in b.shards for g in s.samples] for _ in range(3)]
        assert [g for epoch in epochs for g in epoch] == list(range(sum(map(len, epochs))))
        if sampling.epoch_end == "short":
            assert [len(epoch) for epoch in epochs] == [size] * 3
        assert all(epoch[0] // size == number for number, epoch in enumerate(epochs))
        # An epoch that was left early goes on where it was, and so does one that was resumed.
        taken = list(itertools.islice(loader.epoch(), 2))
        state = loader.state_dict()
        rest = [b.step for b in loader.epoch()]
        loader.load_state_dict(state)
        assert [b.step for b in loader.epoch()] == rest
        assert rest[0] == taken[-1].step + 1


def test_a_short_step_leaves_out_shards_without_samples(store):
    """23 records in steps of 7 shards x 3: the last step has 2 samples for 7 shards."""
    values = {"global_batch": 21, "virtual_shards": 7}
    for world in WORLDS:
        held = []
        for rank in range(world):
            batches, _ = steps_of(store, SAMPLINGS["once, short"], rank, world, count=3, **values)
            assert [batch.step for batch in batches] == [0, 1, 2]
            held += [(shard.v, shard.samples) for shard in batches[1].shards]
            for shard in batches[1].shards:
                assert {len(tensor) for tensor in shard.features.values()} == {1}
        assert held == [(3, [21]), (6, [22])]


def test_a_state_of_another_step_can_be_asked_for(store):
    with CropLoader(store, RECIPE, seed=5, global_batch=4) as loader:
        batches = list(itertools.islice(loader, 3))
        state = loader.state_dict(step=batches[1].step + 1)
        assert loader.state_dict()["step"] == 3
        loader.load_state_dict(state)
        again = next(loader)
        assert again.shards[0].samples == batches[2].shards[0].samples
        for bad in (-1, 1.0, True):
            with pytest.raises(LoaderConfigError, match="step"):
                loader.state_dict(step=bad)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_source_gives_the_samples_of_the_loader(store, name):
    with CropLoader(store, RECIPE, seed=5, global_batch=4, sampling=SAMPLINGS[name]) as loader:
        source = SampleSource(store, RECIPE, seed=5, sampling=SAMPLINGS[name])
        assert len(source) == loader.order.epoch_size
        copy = pickle.loads(pickle.dumps(source))
        for g in (0, len(source) - 1):
            want = loader.sample(g)
            for found in (source[g], copy[np.int64(g)], source.__getitems__([g])[0]):
                assert found.keys() == want.keys()
                assert all(torch.equal(found[key], want[key]) for key in want)
        late = SampleSource(store, RECIPE, seed=5, sampling=SAMPLINGS[name], first_sample=40, num_samples=3)
        assert len(list(late)) == 3, "as a sequence, it ends by IndexError"
        assert torch.equal(late[2]["msa_feat"], loader.sample(42)["msa_feat"])
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="outside"):
            source[index]
    for values in ({"first_sample": -1}, {"num_samples": 0}, {"num_samples": 1.5}):
        with pytest.raises(LoaderConfigError):
            SampleSource(store, RECIPE, seed=5, **values)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_works_in_pytorch_s_loader_over_any_number_of_workers(store, num_workers):
    source = SampleSource(store, RECIPE, seed=5)
    with warnings.catch_warnings():
        # Python 3.12 and later warn of a fork beside the threads of others; PyTorch forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = list(torch.utils.data.DataLoader(source, batch_size=5, num_workers=num_workers))
    assert [len(batch["aatype"]) for batch in batches] == [5, 5, 5, 5, 3]
    stacked = torch.cat([batch["msa_feat"] for batch in batches])
    assert torch.equal(stacked, torch.stack([source[g]["msa_feat"] for g in range(NUM_RECORDS)]))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_loader_that_is_redivided_goes_on_as_one_made_anew(store, name):
    with CropLoader(store, RECIPE, seed=3, global_batch=8, sampling=SAMPLINGS[name]) as loader:
        first = shards_of(itertools.islice(loader, 4))
        for step, rank, world in ((2, 1, 3), (3, 0, 2), (0, 3, 4)):
            loader.redivide(step, rank, world)
            with pytest.raises(LoaderConfigError):
                loader.redivide(1, world, world)
            with pytest.raises(LoaderConfigError, match=r"must be virtual shards, 0\.\.7"):
                loader.redivide(step, rank, world, [8])
            again = shards_of(itertools.islice(loader, 4 - step))
            owned = rank_shards(8, rank, world)
            assert again
            assert set(again) == {key for key in first if key[0] >= step and key[1] in owned}
            # For the first step, others' shards.
            loader.redivide(step, rank, world, [7, 1])
            odd = shards_of(itertools.islice(loader, 4 - step))
            # The last step of a short epoch has not samples for all of them.
            wanted = {key for key in first if key in ((step, 1), (step, 7))}
            assert set(odd) == {*wanted, *(key for key in again if key[0] > step)}
            again |= odd
            for key, shard in again.items():
                assert shard.samples == first[key].samples
                for feature, values in shard.features.items():
                    assert torch.equal(values, first[key].features[feature])
