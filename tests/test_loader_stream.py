"""The stream of a loader: equal for any threads, ranks, restarts; records once an epoch; errors arrive."""

import json
import multiprocessing
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, StoreSettings, write_part
from foldfeed.loader import (
    CropLoader,
    LoaderConfigError,
    LoaderError,
    LoaderStateError,
    LoaderUseError,
    Recipe,
    SampleError,
    StateMismatchError,
)

NUM_RECORDS = 11
RECIPE = Recipe.named("af2", crop_residues=12, num_clusters=5, num_extra=7)


def build_store(url, num_records: int = NUM_RECORDS, seed: int = 0) -> FeatureStore:
    store = FeatureStore.create(url, StoreSettings(tile_rows=16, tile_cols=8))
    records = [make_record(f"r{n:02}", 1 + 7 * n, 5 + 3 * n, seed=seed + n) for n in range(num_records)]
    parts = [write_part(store.url, part, store.settings) for part in (records[:4], records[4:]) if part]
    store.commit([part.part_id for part in parts], job_id="1")
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("stream") / "store")


def make_loader(store, recipe=RECIPE, **values) -> CropLoader:
    return CropLoader(store, recipe, **({"seed": 3, "global_batch": 8} | values))


def take(loader: CropLoader, num_steps: int) -> list:
    return [next(loader) for _ in range(num_steps)]


def by_sample(batches) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for batch in batches:
        for shard in batch.shards:
            for slot, sample in enumerate(shard.samples):
                assert sample not in found
                found[sample] = {name: tensor[slot] for name, tensor in shard.features.items()}
    return found


def assert_equal(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_equal(a[key], b[key])
        else:
            assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def truth(store):
    """Four steps of eight samples, each sample made alone and in reverse order."""
    with make_loader(store) as loader:
        return {g: loader.sample(g) for g in reversed(range(32))}


@pytest.mark.parametrize(("num_threads", "prefetch_steps"), [(1, 1), (1, 4), (3, 1), (5, 3)])
def test_batches_do_not_depend_on_threads_or_prefetch(store, truth, num_threads, prefetch_steps):
    with make_loader(store, num_threads=num_threads, prefetch_steps=prefetch_steps) as loader:
        assert_equal(by_sample(take(loader, 4)), truth)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("virtual_shards", [4, 8])
def test_the_union_over_ranks_is_the_same_for_every_world(store, truth, world, virtual_shards):
    found, shards = {}, []
    for rank in range(world):
        with make_loader(store, rank=rank, world=world, virtual_shards=virtual_shards) as loader:
            batches = take(loader, 4)
        found |= by_sample(batches)
        assert [batch.step for batch in batches] == [0, 1, 2, 3]
        shards += [shard.v for shard in batches[0].shards]
        for batch in batches:
            for shard in batch.shards:
                size = 8 // virtual_shards
                first = batch.step * 8 + shard.v * size
                assert shard.samples == list(range(first, first + size))
                assert all(len(tensor) == size for tensor in shard.features.values())
    assert shards == list(range(virtual_shards))
    assert_equal(found, truth)


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe.named("crop_first", crop_residues=12, num_clusters=5, num_extra=7)]
)
def test_resume_in_the_middle_of_an_epoch_equals_going_on(store, recipe):
    with make_loader(store, recipe, prefetch_steps=3) as loader:
        take(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        want = by_sample(take(loader, 4))
    assert state["step"] == 3, "steps made ahead must not count"
    # Another world, other threads, and a loader that has been elsewhere before.
    found = {}
    for rank in range(3):
        with make_loader(store, recipe, rank=rank, world=3, num_threads=1) as loader:
            take(loader, 1)
            loader.load_state_dict(state)
            found |= by_sample(take(loader, 4))
    assert_equal(found, want)


def test_resume_from_an_equal_store_elsewhere(store, tmp_path):
    copy = build_store(tmp_path / "copy")
    with make_loader(store) as loader, make_loader(copy) as other:
        take(loader, 2)
        other.load_state_dict(loader.state_dict())
        assert_equal(by_sample(take(other, 2)), by_sample(take(loader, 2)))


def test_two_epochs_visit_every_record_once_each(store):
    """The batch of 4 does not divide the 11 records: steps run over the end of an epoch."""
    with make_loader(store, global_batch=4) as loader:
        visited = [
            loader.order.locate(g).record
            for batch in take(loader, 6)
            for s in batch.shards
            for g in s.samples
        ]
    first, second = visited[:NUM_RECORDS], visited[NUM_RECORDS : 2 * NUM_RECORDS]
    assert sorted(first) == sorted(second) == list(range(NUM_RECORDS))
    assert first != second
    with make_loader(store, Recipe.named("crop_first"), global_batch=6, virtual_shards=2) as other:
        assert [other.order.locate(g).record for g in range(24)] == visited


def test_samples_of_one_record_differ_between_epochs(store):
    with make_loader(store) as loader:
        last = {loader.order.locate(g).record: g for g in range(NUM_RECORDS)}
        later = {loader.order.locate(g).record: g for g in range(NUM_RECORDS, 2 * NUM_RECORDS)}
        deepest = NUM_RECORDS - 1
        a, b = loader.sample(last[deepest]), loader.sample(later[deepest])
    assert not torch.equal(a["bert_mask"], b["bert_mask"])


@pytest.mark.parametrize(
    ("values", "recipe", "field"),
    [
        ({"seed": 4}, RECIPE, "seed"),
        ({"global_batch": 16}, RECIPE, "global_batch"),
        ({}, Recipe.named("af2", crop_residues=12, num_clusters=5, num_extra=8), "recipe_digest"),
    ],
)
def test_a_state_of_another_stream_names_what_differs(store, values, recipe, field):
    with make_loader(store) as loader, make_loader(store, recipe, **values) as other:
        state = loader.state_dict()
        with pytest.raises(StateMismatchError, match=f"{field}=") as caught:
            other.load_state_dict(state)
    assert caught.value.field == field
    assert caught.value.found == state[field]
    assert pickle.loads(pickle.dumps(caught.value)).field == field


def test_a_state_of_another_store_is_refused(store, tmp_path):
    other_store = build_store(tmp_path / "other", seed=100)
    with make_loader(store) as loader:
        state = loader.state_dict()
    with make_loader(other_store) as other, pytest.raises(StateMismatchError, match="store_fingerprint"):
        other.load_state_dict(state)


def test_damaged_states_are_refused(store):
    with make_loader(store) as loader:
        good = loader.state_dict()
        for bad in (
            {},
            {"format": 2},
            good | {"step": -1},
            good | {"step": "3"},
            good | {"step": True},
            {k: v for k, v in good.items() if k != "seed"},
            [1],
        ):
            with pytest.raises(LoaderStateError):
                loader.load_state_dict(bad)
        assert loader.state_dict() == good


def test_a_corrupt_tile_reaches_the_consumer_as_a_typed_error(tmp_path):
    store = build_store(tmp_path / "store")
    shards = sorted(
        (tmp_path / "store" / "parts").glob("*/msa/c/0/0/0"), key=lambda path: path.stat().st_size
    )
    victim = shards[-1]
    original = victim.read_bytes()
    with make_loader(store, global_batch=2, num_threads=3) as loader:
        first = next(loader)
        # The first half is tiles, the shard's index is at the end.
        victim.write_bytes(
            bytes(byte ^ 0xFF for byte in original[: len(original) // 2]) + original[len(original) // 2 :]
        )
        with pytest.raises(SampleError, match="crc32c") as caught:
            take(loader, 30)
        assert isinstance(caught.value.__cause__, CorruptDataError)
        assert isinstance(caught.value, LoaderError)
        record = store.at(loader.order.locate(caught.value.sample).record)
        assert caught.value.record_id == record.record_id
        step = loader.state_dict()["step"]
        assert caught.value.sample // 2 == step, "every step before the bad one was delivered"
        # Repaired, the same loader goes on where it was, with nothing lost.
        victim.write_bytes(original)
        assert next(loader).step == step
    assert first.step == 0
    with pytest.raises(SampleError):
        raise pickle.loads(pickle.dumps(caught.value))


def test_a_missing_part_names_sample_and_record(tmp_path):
    store = build_store(tmp_path / "store")
    for path in (tmp_path / "store" / "parts").glob("*/zarr.json"):
        path.unlink()
    reopened = FeatureStore.open(store.url)
    with make_loader(reopened) as loader:
        with pytest.raises(SampleError) as caught:
            loader.sample(0)
        assert caught.value.sample == 0
        assert caught.value.record_id in reopened.ids
        with pytest.raises(SampleError):
            next(loader)


def test_close_leaves_no_threads_and_ends_use(store):
    loader = make_loader(store, num_threads=4, prefetch_steps=3)
    next(loader)
    loader.close()
    loader.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("foldfeed-")] == []
    for use in (lambda: next(loader), lambda: loader.sample(0), lambda: loader.load_state_dict({})):
        with pytest.raises(LoaderUseError, match="closed"):
            use()


def test_statistics_count_what_was_consumed(store):
    with make_loader(store, rank=1, world=3) as loader:
        take(loader, 5)
        stats = loader.stats
    assert stats["steps"] == 5
    assert stats["samples"] == 5 * 3
    assert stats["bytes"] > 0
    assert min(stats["wait_s"], stats["fetch_s"], stats["prepare_s"]) > 0


def test_a_loader_cannot_be_pickled_and_says_why(store):
    with make_loader(store) as loader, pytest.raises(LoaderUseError, match="cannot be pickled"):
        pickle.dumps(loader)


def use_in_child(loader, queue):
    try:
        next(loader)
    except LoaderUseError as error:
        queue.put(str(error))
    loader.close()


def test_a_fork_is_detected(store):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with make_loader(store) as loader:
        next(loader)
        child = context.Process(target=use_in_child, args=(loader, queue))
        with warnings.catch_warnings():
            # Python 3.12 and later warn about exactly the mistake that this test makes.
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        assert "over a fork" in queue.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        next(loader)
    queue.close()
    queue.join_thread()


def test_a_fresh_process_gives_the_same_samples(store, truth, tmp_path):
    """What `spawn` does: another interpreter opens the store by URL; hash seeds and memory differ."""
    script = (
        "import sys, torch\n"
        "from foldfeed.loader import CropLoader, FeatureStore, Recipe\n"
        "recipe = Recipe.named('af2', crop_residues=12, num_clusters=5, num_extra=7)\n"
        "with CropLoader(FeatureStore.open(sys.argv[1]), recipe, seed=3, global_batch=8) as loader:\n"
        "    torch.save([loader.sample(g) for g in (5, 31)], sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, store.url, str(tmp_path / "out.pt")], check=True, timeout=120
    )
    five, thirty_one = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_equal(five, truth[5])
    assert_equal(thirty_one, truth[31])


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_threads": 0}, "num_threads"),
        ({"prefetch_steps": 0}, "prefetch_steps"),
        ({"virtual_shards": 3}, "virtual_shards"),
        ({"world": 9}, "world"),
        ({"rank": 1}, "rank"),
        ({"device": "abacus"}, "device"),
        ({"device": "meta"}, "device"),
    ],
)
def test_arguments_that_cannot_work_are_named(store, values, field):
    with pytest.raises(LoaderConfigError, match=field) as caught:
        make_loader(store, **values)
    assert caught.value.field == field


def test_an_empty_store_is_refused(tmp_path):
    empty = FeatureStore.create(tmp_path / "empty")
    with pytest.raises(LoaderConfigError, match="empty store"):
        make_loader(empty)


def test_cuda_without_a_device_is_refused(store):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(LoaderConfigError, match="0 CUDA devices"):
        make_loader(store, device="cuda")


def test_a_place_or_a_name_instead_of_a_store_or_a_recipe(store):
    with pytest.raises(LoaderConfigError, match=r"FeatureStore\.open"):
        CropLoader(store.url, RECIPE, seed=0, global_batch=1)
    with pytest.raises(LoaderConfigError, match=r"Recipe\.named"):
        CropLoader(store, "af2", seed=0, global_batch=1)
