"""Features of whole steps from one block of bytes: equal to those of single samples, by fixed operations."""

import dataclasses
import itertools
import random
import threading

import numpy as np
import pytest
import torch
from loader_reference import assert_same_features
from test_loader_host_features import RECIPES, SHAPES, build_store
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from foldfeed.loader import CropLoader, LoaderConfigError, Recipe
from foldfeed.loader.features import step_block, step_features, structure_labels
from foldfeed.loader.features.block_ring import BlockRing
from foldfeed.loader.features.device import ALIGNMENT_BYTES, StepFeatures, split
from foldfeed.loader.features.featurise import featurise
from foldfeed.loader.features.forms import COMPACT, FULL, compact_features, expand_features
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.features.step_block import StepBlock
from foldfeed.loader.reading.packed import row_of
from foldfeed.loader.reading.reader import SampleReader

CPU = torch.device("cpu")
# What makes the host wait for a GPU, or gives tensors whose shape depends on data.
WAITING = (
    *("_local_scalar_dense", "item", "nonzero", "nonzero_static", "bincount", "masked_select", "unique"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave"),
    *("equal", "is_nonzero"),
)
# What only says anew how memory is looked at.
VIEWS = (
    *("view", "_unsafe_view", "detach", "slice", "select", "unsqueeze", "expand", "transpose", "split"),
    *("alias", "unbind", "permute", "as_strided", "squeeze", "lift_fresh"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("step") / "store")


def new_memory(size: int) -> torch.Tensor:
    # Old bytes, as a piece that was used before has them.
    return torch.full((size,), 0xA5, dtype=torch.uint8)


def arrays_of(store, recipe, samples):
    reader = SampleReader(store, recipe, None, seed=5, global_batch=1, virtual_shards=1)
    return [reader.read(g).arrays for g in samples]


def block_of(samples):
    block = StepBlock(new_memory(3000), len(samples))
    for index in random.Random(len(samples)).sample(range(len(samples)), len(samples)):
        block.put(index, samples[index])
    return block.whole(new_memory)


@pytest.mark.parametrize("name", RECIPES)
def test_features_of_a_step_are_those_of_its_samples(store, name):
    recipe = RECIPES[name]
    samples = arrays_of(store, recipe, range(9))
    usual = [featurise(RawSample.of(arrays), recipe) for arrays in samples]
    for form, first, stop in ((FULL, 0, 1), (FULL, 1, 9), (COMPACT, 0, 9)):
        step = samples[first:stop]
        features = step_features.step_features(*block_of(step), recipe, form)
        assert all(tensor.is_contiguous() for tensor in features.values())
        for index, want in enumerate(usual[first:stop]):
            have = {key: tensor[index] for key, tensor in features.items()}
            assert_same_features(have, compact_features(want) if form == COMPACT else want)


@pytest.mark.parametrize("name", ["all rows", "crop_first"])
def test_steps_in_blocks_and_in_half_precision_are_the_same(store, name, monkeypatch):
    recipe = RECIPES[name]
    block = block_of(arrays_of(store, recipe, range(5)))
    whole = step_features.step_features(*block, recipe)
    monkeypatch.setattr(step_features, "ONE_HOT_BLOCK_BYTES", 5 * 40 * 21 * 2 * 57)
    monkeypatch.setattr(step_features, "HALF_EXACT", 11)
    monkeypatch.setattr(step_features, "product_dtype", lambda device: torch.float16)
    assert_same_features(step_features.step_features(*block, recipe), whole)


def test_a_sample_that_is_put_again_takes_the_place_of_the_one_before(store):
    """Wherever there is room for either: the first may be kept aside and the second, a smaller one, fit."""
    recipe = RECIPES["crop_first"]
    samples = sorted(arrays_of(store, recipe, range(9)), key=lambda arrays: arrays.num_bytes)
    small, large = samples[2], samples[-1]
    header = StepBlock(new_memory(0), 1)._used
    rooms = [0, *(header + step_block._size(arrays) for arrays in (small, large)), 1 << 20]
    for room, (first, last) in itertools.product(rooms, [(large, small), (small, large)]):
        block = StepBlock(new_memory(room), 1)
        block.put(0, first)
        block.put(0, last)
        features = step_features.step_features(*block.whole(new_memory), recipe)
        want = featurise(RawSample.of(last), recipe)
        assert_same_features({name: tensor[0] for name, tensor in features.items()}, want)


def test_samples_of_a_step_may_be_read_without_labels(store):
    """At the block's end there is nothing behind them to read by mistake."""
    recipe = RECIPES["crop_first"]
    samples = arrays_of(store, recipe, range(4))
    without = ("atom_positions", "atom_mask", "resolution", "clamped")
    for index in (1, 3):
        empty = {name: getattr(samples[index], name)[:0] for name in without}
        samples[index] = dataclasses.replace(samples[index], **empty)
    block = StepBlock(new_memory(1 << 20), len(samples))
    for index, arrays in enumerate(samples):
        block.put(index, arrays)
    features = step_features.step_features(*block.whole(new_memory), recipe)
    for index, arrays in enumerate(samples):
        want = host_features(RawSample.of(arrays), recipe)
        assert ("resolution" in want) == (index % 2 == 0)
        assert_same_features({name: features[name][index] for name in want}, want)
        assert all(not tensor[index].any() for name, tensor in features.items() if name not in want)


def test_samples_that_lie_together_are_as_if_put_one_by_one(store):
    """Wherever there is room, in any order, some of them put again, with bytes of nobody between them."""
    recipe = RECIPES["crop_first"]
    samples = arrays_of(store, recipe, range(9))
    want = step_features.step_features(*block_of(samples), recipe)
    offset, starts = 128, []
    for arrays in samples:
        starts.append(offset)
        offset += step_block._size(arrays) + 64
    data = np.full(offset, 0x5A, dtype=np.uint8)
    for arrays, start in zip(samples, starts, strict=True):
        step_block._copy(arrays, data, start)
    rows = np.array([row_of(arrays, start) for arrays, start in zip(samples, starts, strict=True)])
    for room, seed in itertools.product((0, 5000, 60_000, 1 << 20), range(3)):
        block = StepBlock(new_memory(room), len(samples))
        order = random.Random(seed).sample(range(9), 9)
        # Four are other samples at first.
        block.put_packed(order[:4], rows[order[4:8]], data)
        block.put(order[0], samples[order[0]])
        for some in (order[1:3], order[3:8], order[8:]):
            block.put_packed(some, rows[some], data)
        assert_same_features(step_features.step_features(*block.whole(new_memory), recipe), want)


class Operators(TorchDispatchMode):
    """Writes down the operators that run, and refuses what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        assert name not in WAITING, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype == torch.int64 for index in indices), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def operators(block, recipe, form=FULL) -> list[str]:
    with Operators() as seen:
        step_features.step_features(*block, recipe, form)
    return seen.names


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_runs_the_same_operators_whatever_its_samples_are_and_waits_for_none(store, name):
    recipe = RECIPES[name]
    samples = arrays_of(store, recipe, range(2 * len(SHAPES)))
    # The first step with labels copies its tables to the device.
    step_features.step_features(*block_of(samples[:1]), recipe)
    one = operators(block_of(samples[:2]), recipe)
    assert operators(block_of(samples), recipe) == one
    assert operators(block_of(samples[3:10]), recipe) == one
    launches = [name for name in one if name not in VIEWS]
    # Slots for templates are a dozen tensors of zeros.
    most = (295 if recipe.labels else 175) + (12 if recipe.num_templates else 0)
    assert len(launches) < most, len(launches)


@pytest.mark.parametrize("call", ["nonzero", "item", "bincount", "mask"])
def test_the_watch_over_operators_sees(call):
    values = torch.arange(4)
    calls = {
        "nonzero": values.nonzero,
        "item": values[:1].item,
        "bincount": values.bincount,
        "mask": lambda: values[values > 2],
    }
    # torch looks for the places of a mask before it indexes, or asks for the mask itself.
    with Operators(), pytest.raises(AssertionError, match=r"nonzero|_local_scalar_dense|bincount|by a mask"):
        calls[call]()


def forget_tables() -> None:
    tables = (step_features._numbers, step_features._constant, step_features._one, step_features._upper)
    for table in (structure_labels._tables, *tables):
        table.cache_clear()


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_needs_no_values_to_know_its_shapes(store, name):
    """Traced on a GPU that is not there: shapes, dtypes and devices without a number being computed."""
    recipe = RECIPES[name]
    memory, sizes = block_of(arrays_of(store, recipe, range(5)))
    want = step_features.step_features(memory, sizes, recipe)
    forget_tables()
    with FakeTensorMode():
        fake = torch.empty(len(memory), dtype=torch.uint8, device="cuda")
        have = step_features.step_features(fake, sizes, recipe)
    # Tables of a GPU that is not there.
    forget_tables()
    assert {key: (tensor.shape, tensor.dtype, tensor.device.type) for key, tensor in have.items()} == {
        key: (tensor.shape, tensor.dtype, "cuda") for key, tensor in want.items()
    }


def test_threads_fill_a_block_whatever_room_it_has(store):
    recipe = RECIPES["crop_first"]
    samples = arrays_of(store, recipe, range(16))
    want = step_features.step_features(*block_of(samples), recipe)
    sizes = []
    for room in (0, 100, 5000, 50_000, 2_000_000):
        block = StepBlock(new_memory(room), len(samples))
        threads = [threading.Thread(target=block.put, args=item) for item in enumerate(samples)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        memory, step_sizes = block.whole(new_memory)
        assert memory.data_ptr() == block.memory.data_ptr()
        sizes.append(len(memory))
        assert_same_features(step_features.step_features(memory, step_sizes, recipe), want)
    assert len(set(sizes)) == 1


class Copy:
    """Stands for the event behind a copy; a test says when it has happened."""

    def __init__(self):
        self.happened = threading.Event()
        self.waits = 0

    def query(self) -> bool:
        return self.happened.is_set()

    def synchronize(self) -> None:
        self.waits += 1
        assert self.happened.wait(20)


def test_memory_of_a_step_is_used_again_only_after_its_event(store):
    (arrays,) = arrays_of(store, RECIPES["crop_first"], [3])
    ring = BlockRing(new_memory, 2)
    copies = [Copy() for _ in range(5)]

    def fill(step: int) -> int:
        ring.block(step, 1).put(0, arrays)
        memory, _ = ring.whole(step)
        ring.copied(step, copies[step])
        return memory.data_ptr()

    first, second = fill(0), fill(1)
    assert first != second
    # Both pieces are being copied: whoever wants one waits for the copy that began first.
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(fill(2)), daemon=True)
    thread.start()
    copies[1].happened.set()
    thread.join(0.2)
    assert not found
    copies[0].happened.set()
    thread.join(20)
    assert found == [first]
    assert copies[0].waits == 1
    assert fill(3) == second
    # A step that is given up gives its memory back.
    copies[2].happened.set()
    ring.block(4, 1).put(0, arrays)
    ring.drop()
    with pytest.raises(KeyError):
        ring.whole(4)
    copies[3].happened.set()
    assert {fill(4), ring.block(9, 1).memory.data_ptr()} == {first, second}


def test_shards_begin_where_tensors_of_their_own_would():
    layout = [(4, [10, 11]), (5, [12]), (7, [13, 14])]
    features = {"a": torch.arange(5 * 128.0).view(5, 128), "b": torch.arange(5), "c": torch.rand(5, 3, 7)}
    batch = split(3, layout, features)
    assert [(shard.v, shard.samples) for shard in batch.shards] == layout
    for name, tensor in features.items():
        assert torch.equal(torch.cat([shard.features[name] for shard in batch.shards]), tensor)
        for shard in batch.shards:
            part = shard.features[name]
            assert part.storage_offset() * part.element_size() % ALIGNMENT_BYTES == 0
    # Nothing is copied that need not be.
    assert batch.shards[2].features["a"].data_ptr() == features["a"][3:].data_ptr()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("form", "num_processes"), [(FULL, 1), (COMPACT, 0)])
def test_a_loader_of_whole_steps_gives_the_same_batches(store, form, num_processes):
    """The way of a GPU, on the CPU; 7 samples on three ranks, an epoch that ends with a short step."""
    recipe = RECIPES["crop_first"]
    values = {"seed": 5, "global_batch": 7, "virtual_shards": 7, "features": form}
    with CropLoader(store, recipe, **values) as alone:
        steps = [next(alone) for _ in range(5)]
    for rank in (0, 2):
        with CropLoader(
            store, recipe, **values, rank=rank, world=3, num_threads=3, num_processes=num_processes
        ) as loader:
            loader._maker = StepFeatures(recipe, CPU, form)
            for want in steps[:3]:
                check_step(next(loader), want, loader.shards)
            # Steps that were begun are dropped here; those that come are whole.
            loader.load_state_dict(loader.state_dict(step=2))
            for want in steps[2:]:
                check_step(next(loader), want, loader.shards)


def check_step(have, want, shards) -> None:
    expected = [shard for shard in want.shards if shard.v in shards]
    assert [(s.v, s.samples) for s in have.shards] == [(s.v, s.samples) for s in expected]
    for shard, other in zip(have.shards, expected, strict=True):
        assert_same_features(shard.features, other.features)


def test_a_rank_without_samples_gets_an_empty_step():
    maker = StepFeatures(RECIPES["crop_first"], CPU)
    ready = maker.assemble(4, [], [])
    assert (ready.batch.step, ready.batch.shards) == (4, [])
    assert maker.hand_over(ready).num_samples == 0


def test_a_loader_of_compact_features(store):
    recipe = Recipe.named("af2", crop_residues=16, num_clusters=6, num_extra=9)
    with (
        CropLoader(store, recipe, seed=1, global_batch=2) as usual,
        CropLoader(store, recipe, seed=1, global_batch=2, features="compact") as compact,
    ):
        assert compact.state_dict() == usual.state_dict()
        for shard, other in zip(next(compact).shards, next(usual).shards, strict=True):
            want = compact_features(other.features)
            assert_same_features(shard.features, want)
            assert_same_features(expand_features(shard.features), expand_features(want))
            sample = {name: tensor[0] for name, tensor in shard.features.items()}
            assert_same_features(compact.sample(shard.samples[0]), sample)
    with pytest.raises(LoaderConfigError, match=r"features.*'small'.*'full', 'compact'"):
        CropLoader(store, recipe, seed=1, global_batch=2, features="small")
