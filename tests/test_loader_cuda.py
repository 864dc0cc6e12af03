"""The loader on a GPU: the same numbers as on the CPU, one copy a step, no waiting. Needs a CUDA device."""

import contextlib
import time

import pytest
import torch
from loader_reference import assert_same_features
from records import make_record
from test_loader_host_features import RECIPES

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.features.device import StepFeatures
from foldfeed.loader.features.forms import FORMS, FULL
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.reading.reader import SampleReader
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


def test_memory_of_a_batch_stays_while_the_stream_that_took_it_reads(store):
    """Batches are dropped at once, before a stream that is not the usual one has come to read them."""
    own, sums = torch.cuda.Stream(), []
    with CropLoader(store, RECIPE, seed=1, global_batch=4, device="cuda", prefetch_steps=3) as loader:
        for _ in range(10):
            with torch.cuda.stream(own):
                batch = next(loader)
                torch.cuda._sleep(20_000_000)
                totals = [shard.features["msa_feat"].sum(dtype=torch.float64) for shard in batch.shards]
            sums.append(([shard.samples for shard in batch.shards], totals))
            del batch
    torch.cuda.synchronize()
    cpu = CropLoader(store, RECIPE, seed=1, global_batch=4)
    for samples, totals in sums:
        for numbers, total in zip(samples, totals, strict=True):
            want = sum(float(cpu.sample(g)["msa_feat"].sum(dtype=torch.float64)) for g in numbers)
            assert float(total) == pytest.approx(want, rel=1e-6)


class Steps:
    """Steps of two shards, put through the maker of features by hand, one after another."""

    def __init__(self, store, recipe, form=FULL, num_blocks=3):
        self.reader = SampleReader(store, recipe, None, seed=1, global_batch=1, virtual_shards=1)
        self.recipe, self.form = recipe, form
        self.maker = StepFeatures(recipe, torch.device("cuda", 0), form, num_blocks=num_blocks)

    def samples(self, step: int) -> list[int]:
        return [(5 * step + index) % 12 for index in range(5)]

    def started(self, step: int):
        arrays = [self.reader.read(g).arrays for g in self.samples(step)]
        prepared = [self.maker.prepare(step, index, 5, sample) for index, sample in enumerate(arrays)]
        layout = [(0, self.samples(step)[:3]), (1, self.samples(step)[3:])]
        return self.maker.assemble(step, layout, prepared)

    def check(self, batch) -> None:
        for shard in batch.shards:
            for slot, g in enumerate(shard.samples):
                want = host_features(RawSample.of(self.reader.read(g).arrays), self.recipe, self.form)
                have = {key: tensor[slot] for key, tensor in shard.features.items()}
                assert {tensor.device.type for tensor in have.values()} == {"cuda"}
                # The arc tangent of a GPU may differ in its last bit; so may its rounding to bfloat16.
                assert_same_features(have, want, rtol=2e-7 if self.form == FULL else 2**-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RECIPES)
def test_steps_of_every_recipe_equal_those_of_the_cpu(store, name, form):
    steps = Steps(store, RECIPES[name], form)
    for step in range(4):
        steps.check(steps.maker.hand_over(steps.started(step)))


def test_the_bits_of_a_sample_do_not_depend_on_the_step_it_is_in(store):
    loaders = [
        CropLoader(store, RECIPES["crop_first"], seed=1, global_batch=batch, device="cuda")
        for batch in (1, 2, 6)
    ]
    found: list[dict[int, dict[str, torch.Tensor]]] = []
    with contextlib.ExitStack() as stack:
        for loader in loaders:
            stack.enter_context(loader)
            batches = [next(loader) for _ in range(12 // loader.order.global_batch)]
            found.append(
                {
                    g: {key: tensor[slot] for key, tensor in shard.features.items()}
                    for batch in batches
                    for shard in batch.shards
                    for slot, g in enumerate(shard.samples)
                }
            )
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for g, features in other.items():
            assert_same_features(features, {key: t.cpu() for key, t in found[0][g].items()})


@pytest.mark.parametrize("name", ["crop_first", "af3", "masked_lm"])
def test_one_copy_a_step_crosses_the_bus(store, name):
    steps = Steps(store, RECIPES[name])
    # The first one gets its memory, and the tables of the labels.
    steps.maker.hand_over(steps.started(0))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        batches = [steps.maker.hand_over(steps.started(step)) for step in (1, 2, 3)]
        torch.cuda.synchronize()
    copies = [event.name for event in seen.events() if event.name.startswith("Memcpy")]
    assert sum("HtoD" in name for name in copies) == len(batches), copies
    assert not any("DtoH" in name for name in copies), copies


@pytest.mark.parametrize("name", ["af2", "crop_first", "af3", "masked_lm"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_operation_waits_for_the_device(store, name, deterministic, monkeypatch):
    # What torch asks of matrix products where algorithms must be deterministic.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    steps = Steps(store, RECIPES[name])
    steps.maker.hand_over(steps.started(0))
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
        batches = [steps.maker.hand_over(steps.started(step)) for step in (1, 2, 3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    for batch in batches:
        steps.check(batch)


def test_memory_of_a_step_is_written_again_only_after_its_copy(store):
    """The side stream is kept busy, so that copies are late; two pieces of memory serve six steps."""
    steps = Steps(store, RECIPES["crop_first"], num_blocks=2)
    steps.check(steps.maker.hand_over(steps.started(0)))
    torch.cuda.synchronize()
    kept, late = [], 0
    for step in range(1, 7):
        with torch.cuda.stream(steps.maker._stream):
            torch.cuda._sleep(50_000_000)
        kept.append(steps.maker.hand_over(steps.started(step)))
        pieces = steps.maker._blocks._free
        assert len(pieces) <= 2
        assert all(memory.is_pinned() for memory, _ in pieces)
        late += not pieces[-1][1].query()
    assert late > 0, "no copy was late: this test has tested nothing"
    for batch in kept:
        steps.check(batch)
