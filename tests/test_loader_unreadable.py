"""Records that cannot be read: the run stops, or a substitute comes that is the same everywhere."""

import os
import re
from pathlib import Path

import pytest
from range_server import range_server
from test_loader_stream import assert_equal, build_store, by_sample, make_loader, take

from foldfeed.feature_store import FeatureStore, StorageError
from foldfeed.loader import (
    CacheConfig,
    LoaderConfigError,
    Recipe,
    SampleError,
    SampleSource,
    Sampling,
    StateMismatchError,
    Substitution,
)

pytestmark = pytest.mark.timeout(200)
RECIPE = Recipe.named("crop_first", crop_residues=12, num_clusters=5, num_extra=7)
STEPS = 4


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A store in which the tiles of one record are damaged, and the metadata of a part is gone."""
    store = build_store(tmp_path_factory.mktemp("damaged") / "store", num_records=11)
    record = store["r09"]
    with (Path(store.url) / record.part.arrays["msa"].path).open("r+b") as file:
        for tile in range(record.tiled.grid.num_tiles):
            found = record.part.arrays["msa"].ranges(
                record.tiled.grid.first_tile + tile, record.tiled.grid.first_tile + tile + 1
            )
            for piece in found:
                file.seek(piece.start + piece.size // 2)
                byte = file.read(1)
                file.seek(piece.start + piece.size // 2)
                file.write(bytes([byte[0] ^ 0x55]))
    (Path(store.url) / store["r00"].part.path / "zarr.json").unlink()
    return FeatureStore.open(store.url)


UNREADABLE = {"r00", "r01", "r02", "r03", "r09"}


def collect(store, **values):
    """Returns samples, substitutions by sample, and what was counted; over all ranks."""
    samples, replaced, counted = {}, {}, 0.0
    world = values.pop("world", 1)
    for rank in range(world):
        with make_loader(
            store, RECIPE, on_unreadable="substitute", rank=rank, world=world, **values
        ) as loader:
            batches = take(loader, STEPS)
            counted += loader.stats["substituted"]
        samples |= by_sample(batches)
        for batch in batches:
            for shard in batch.shards:
                assert {one.sample for one in shard.substitutions} <= set(shard.samples)
                replaced |= {one.sample: one for one in shard.substitutions}
    return samples, replaced, counted


@pytest.fixture(scope="module")
def truth(damaged):
    return collect(damaged)


def test_a_substitute_is_recorded_counted_and_told_once_each(damaged, truth, caplog):
    samples, replaced, counted = collect(damaged)
    assert_equal(samples, truth[0])
    assert len(replaced) == counted > 5
    with make_loader(damaged, RECIPE) as loader:
        order, ids = loader.order, damaged.ids
    for sample in range(8 * STEPS):
        own = ids[order.locate(sample).record]
        assert (sample in replaced) == (own in UNREADABLE)
        if sample in replaced:
            found = replaced[sample]
            assert isinstance(found, Substitution)
            assert found.record_id == own
            assert found.substitute_id == ids[order.substitute(sample, found.attempt).record]
            assert found.substitute_id not in UNREADABLE
            tried = [ids[order.substitute(sample, attempt).record] for attempt in range(found.attempt)]
            assert set(tried) <= UNREADABLE
            assert "parts/" in found.reason
    told = re.findall(r"sample (\d+) is made from record", caplog.text)
    assert sorted(set(map(int, told)) & set(range(8 * STEPS))) == sorted(replaced)
    assert len(told) == len(set(told))


@pytest.mark.parametrize(
    "values",
    [
        {"world": 3, "num_threads": 1},
        pytest.param(
            {"num_processes": 2, "read_ahead_bytes": 30_000},
            marks=pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux's"),
        ),
    ],
    ids=str,
)
def test_substitutes_do_not_depend_on_ranks_or_processes(damaged, truth, values):
    samples, replaced, _ = collect(damaged, **values)
    assert_equal(samples, truth[0])
    assert {g: one.substitute_id for g, one in replaced.items()} == {
        g: one.substitute_id for g, one in truth[1].items()
    }


def test_substitutes_do_not_depend_on_caches(damaged, truth, tmp_path):
    cache = CacheConfig(folder=tmp_path / "cache", block_bytes=1024, memory_bytes=16 * 1024)
    with range_server(Path(damaged.url)) as (url, _):
        store = FeatureStore.open(url)
        for values in ({"cache": cache}, {"cache": cache}, {}):
            samples, replaced, _ = collect(store, **values)
            assert_equal(samples, truth[0])
            assert {g: one[:4] if isinstance(one, tuple) else one.attempt for g, one in replaced.items()} == {
                g: one.attempt for g, one in truth[1].items()
            }


def test_without_a_policy_the_run_stops_and_says_where(damaged):
    for values in ({}, {"num_processes": 1}):
        with make_loader(damaged, RECIPE, **values) as loader, pytest.raises(SampleError) as caught:
            take(loader, STEPS)
        assert caught.value.record_id in UNREADABLE
    with pytest.raises(LoaderConfigError, match="must be one of stop, substitute"):
        make_loader(damaged, RECIPE, on_unreadable="skip")


def test_the_policy_is_part_of_the_stream(damaged):
    with make_loader(damaged, RECIPE, on_unreadable="substitute") as loader:
        state = loader.state_dict()
        loader.load_state_dict(state)
        with make_loader(damaged, RECIPE) as other:
            assert other.state_dict()["format"] == 1, "a stream without a policy is what it was"
            with pytest.raises(StateMismatchError, match="on_unreadable='substitute'"):
                other.load_state_dict(state)
            with pytest.raises(StateMismatchError, match="on_unreadable='stop'"):
                loader.load_state_dict(other.state_dict())


def test_a_store_that_cannot_be_reached_is_never_replaced(damaged, monkeypatch):
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "2")
    monkeypatch.setenv("FOLDFEED_STORAGE_PAUSE_S", "0.001")
    with range_server(Path(damaged.url)) as (url, _):
        store = FeatureStore.open(url)
        # Everything that opening needs is here now; the network goes.
        store.places()
    with (
        make_loader(store, RECIPE, on_unreadable="substitute") as loader,
        pytest.raises(SampleError) as caught,
    ):
        take(loader, 1)
    assert isinstance(caught.value.__cause__, StorageError)


def test_weighted_draws_replace_by_weight_and_damage_everywhere_is_an_error(damaged):
    bad = ["r00", "r01", "r02", "r03"]
    with make_loader(
        damaged, RECIPE, on_unreadable="substitute", sampling=Sampling(kind="weighted", epoch_samples=32)
    ) as loader:
        for batch in take(loader, 2):
            for shard in batch.shards:
                assert all(one.substitute_id not in UNREADABLE for one in shard.substitutions)
    only = damaged.view(where=f"record_id in {tuple(bad)}")
    with make_loader(only, RECIPE, on_unreadable="substitute") as loader, pytest.raises(SampleError):
        take(loader, 1)
    source = SampleSource(damaged, RECIPE, seed=3)
    with pytest.raises(SampleError):
        [source[place] for place in range(len(source))]
