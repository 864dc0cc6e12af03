"""The loader on a GPU: the same numbers as on the CPU, delivered by a side stream. Needs a CUDA device."""

import time

import pytest
import torch
from loader_reference import assert_same_features
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.reader import SampleReader
from foldfeed.loader.recipe import RESAMPLED

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
RECIPE = Recipe.named("af2", crop_residues=64, num_clusters=16, num_extra=48)


@pytest.fixture
def store(tmp_path):
    store = FeatureStore.create(tmp_path / "store")
    records = [make_record(f"r{n}", 1 + 60 * n, 9 + 31 * n, seed=n) for n in range(6)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


def test_features_on_a_gpu_equal_those_on_the_cpu(store):
    cpu = CropLoader(store, RECIPE, seed=1, global_batch=3)
    gpu = CropLoader(store, RECIPE, seed=1, global_batch=3, device="cuda")
    for g in range(12):
        want, have = cpu.sample(g), gpu.sample(g)
        assert {tensor.device.type for tensor in have.values()} == {"cuda"}
        assert_same_features(have, want, rtol=2e-7)


def test_iterations_of_a_step_on_a_gpu_equal_those_on_the_cpu(store):
    recipe = Recipe.named("af2_initial_recycled", crop_residues=64, num_clusters=16, num_extra=48)
    cpu = CropLoader(store, recipe, seed=1, global_batch=3)
    with CropLoader(store, recipe, seed=1, global_batch=3, device="cuda") as gpu:
        for _ in range(4):
            batch = next(gpu)
            for shard in batch.shards:
                for slot, g in enumerate(shard.samples):
                    want = {
                        name: tensor[: batch.num_recycles + 1] if name in RESAMPLED else tensor
                        for name, tensor in cpu.sample(g).items()
                    }
                    have = {name: tensor[slot] for name, tensor in shard.features.items()}
                    assert_same_features(have, want, rtol=2e-7)


def test_the_stall_is_what_the_device_was_without_work(store, monkeypatch):
    read = SampleReader.fetch

    def slow(self, planned, room=None):
        time.sleep(0.05)
        return read(self, planned, room)

    monkeypatch.setattr(SampleReader, "fetch", slow)
    with CropLoader(store, RECIPE, seed=1, global_batch=2, device="cuda", num_threads=1) as loader:
        for _ in range(6):
            next(loader)
        torch.cuda.synchronize()
        starved = loader.meters()
    # Two samples of 50 ms each on one thread, and nothing else for the device to do.
    assert starved["stall_s"] > 0.4
    assert starved["stall_s"] <= starved["stages"]["train"]["lifetime_s"]
    monkeypatch.undo()
    with CropLoader(store, RECIPE, seed=1, global_batch=2, device="cuda", prefetch_steps=4) as loader:
        next(loader)
        time.sleep(1.0)
        before = loader.meters()["stall_s"]
        # Steps are ready and the device has work: the program runs ahead of it and nothing stands still.
        weight = torch.randn(4096, 4096, device="cuda")
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(3):
            for _ in range(20):
                weight = torch.tanh(weight @ weight)
            next(loader)
        ended.record()
        torch.cuda.synchronize()
        assert loader.meters()["stall_s"] - before < 0.5 * began.elapsed_time(ended) / 1000


def test_batches_arrive_whole_while_the_consumer_keeps_the_device_busy(store):
    """The consumer's stream works on old batches while new ones are made; none may be overwritten."""
    kept = []
    weight = torch.randn(2048, 2048, device="cuda")
    with CropLoader(store, RECIPE, seed=1, global_batch=4, device="cuda", prefetch_steps=3) as loader:
        for _ in range(12):
            batch = next(loader)
            weight = torch.tanh(weight @ weight)
            kept.append((batch, [s.features["msa_feat"].sum(dtype=torch.float64) for s in batch.shards]))
    cpu = CropLoader(store, RECIPE, seed=1, global_batch=4)
    torch.cuda.synchronize()
    for batch, sums in kept:
        for shard, total in zip(batch.shards, sums, strict=True):
            for slot, g in enumerate(shard.samples):
                sample = {key: tensor[slot] for key, tensor in shard.features.items()}
                assert_same_features(sample, cpu.sample(g), rtol=2e-7)
            assert float(total) == float(shard.features["msa_feat"].sum(dtype=torch.float64))
