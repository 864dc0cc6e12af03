"""Where features are made: in the worker thread on the CPU, or on a GPU on a stream of its own.

On a GPU only compact data crosses the bus, in one copy a step: samples are written into the step's block of
page-locked memory (`block_ring`), one by one by the threads that read them, or by the assembling thread, many
in one copy, as reading processes packed them (`pieces`). The assembling thread starts one asynchronous copy
and the kernels of the whole step (`step_features`) on a side stream and records two events, behind the copy
and at the end. The block's memory is written again after the first; the consumer's stream waits for the
second, on the device. The host waits for nothing: no operation reads a value back.

Rules that keep it correct: memory of a block is taken again only after its event; device tensors made on the
side stream are marked with ``record_stream`` for the consumer's stream, so that their memory is not handed
out again while it is in use; a shard's tensors begin at a multiple of `ALIGNMENT_BYTES` as tensors of their
own would, because libraries choose kernels by alignment, and which ranks share a step must not change a bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from foldfeed.loader.batch import ShardBatch, StepBatch
from foldfeed.loader.errors import LoaderConfigError
from foldfeed.loader.features.block_ring import BlockRing
from foldfeed.loader.features.draws import split_draws, stacked_draws
from foldfeed.loader.features.forms import FULL, Features
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.features.step_features import step_features
from foldfeed.loader.reading.fetch import SampleArrays
from foldfeed.loader.reading.pieces import Piece
from foldfeed.loader.recipe import Recipe

# What torch's allocator on a GPU aligns to.
ALIGNMENT_BYTES = 512
# (shard, its sample numbers), in the order of the step's samples.
Layout = Sequence[tuple[int, Sequence[int]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadyStep:
    """A step and what must have happened before a stream may use it.

    Attributes:
      batch: the step.
      event: on the side stream, behind the step's last operation; None when there is nothing to wait for.
    """

    batch: StepBatch
    event: torch.cuda.Event | None = None


class FeatureMaker(Protocol):
    """The moments of a step's life in which devices differ.

    Attributes:
      takes_packed: whether `put` takes samples as reading processes pack them, in place of `prepare`.
    """

    takes_packed: bool

    def prepare(self, step: int, index: int, num_samples: int, arrays: SampleArrays) -> Any:
        """Returns what the worker thread of a sample can do for it; `assemble` takes these.

        Args:
          step: whose sample it is.
          index: which of this rank's samples of the step.
          num_samples: of this rank in the step.
          arrays: the sample; not valid afterwards.
        """
        ...

    def put(self, step: int, indices: Sequence[int], num_samples: int, piece: Piece) -> None:
        """Copies the samples of a piece.

        Args:
          step: whose samples they are.
          indices: which of this rank's samples of the step.
          num_samples: of this rank in the step.
          piece: not needed afterwards.
        """
        ...

    def assemble(self, step: int, layout: Layout, prepared: list[Any]) -> ReadyStep:
        """Returns a step; runs on the assembling thread, steps in order.

        Args:
          step: its number.
          layout: of its samples.
          prepared: of its samples, in that order; of all or, where they were `put`, of none.
        """
        ...

    def hand_over(self, ready: ReadyStep) -> StepBatch:
        """Returns the step, safe to use on the consumer's current stream."""
        ...

    def drop(self) -> None:
        """Forgets steps that were begun; called when no thread works on one."""
        ...


class HostFeatures:
    """Makes features in the worker threads, sample by sample, on the CPU."""

    takes_packed = False

    def __init__(self, recipe: Recipe, form: str = FULL) -> None:
        self._recipe = recipe
        self._form = form

    def prepare(self, step: int, index: int, num_samples: int, arrays: SampleArrays) -> Features:
        """Returns the features."""
        return host_features(RawSample.of(arrays), self._recipe, self._form)

    def put(self, step: int, indices: Sequence[int], num_samples: int, piece: Piece) -> None:
        """Is not called."""
        raise AssertionError("features on the CPU are made sample by sample")

    def assemble(self, step: int, layout: Layout, prepared: list[Features]) -> ReadyStep:
        """Stacks the samples of each shard."""
        return ReadyStep(batch=stack(step, layout, prepared, self._recipe))

    def hand_over(self, ready: ReadyStep) -> StepBatch:
        """Returns the step."""
        return ready.batch

    def drop(self) -> None:
        """Does nothing: there is nothing but the features."""


class StepFeatures:
    """Makes the features of whole steps, on a GPU on a side stream.

    Works on the CPU as well, more slowly than `HostFeatures`: for tests.
    """

    takes_packed = True

    def __init__(
        self, recipe: Recipe, device: torch.device, form: str = FULL, *, num_blocks: int = 3
    ) -> None:
        """Gets no memory yet.

        Args:
          recipe: how samples are made.
          device: where.
          form: of the features.
          num_blocks: pieces of page-locked memory, at least; one more than steps are under way at a time.
        """
        self._recipe = recipe
        self._device = device
        self._form = form
        # Before the consumer's kernels: of some hundred small ones each would wait for a large one to be
        # given out.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._blocks = BlockRing(self._new_memory, num_blocks)

    def prepare(self, step: int, index: int, num_samples: int, arrays: SampleArrays) -> None:
        """Copies the sample into the step's block."""
        self._blocks.block(step, num_samples).put(index, arrays)

    def put(self, step: int, indices: Sequence[int], num_samples: int, piece: Piece) -> None:
        """Copies the samples into the step's block, all at once."""
        self._blocks.block(step, num_samples).put_packed(indices, *piece.packed())

    def assemble(self, step: int, layout: Layout, prepared: list[None]) -> ReadyStep:
        """Returns a step that will be there when its event has happened."""
        if not layout:
            return ReadyStep(batch=StepBatch(step=step, shards=[]))
        memory, sizes = self._blocks.whole(step)
        with self._on_side_stream():
            block = memory.to(self._device, non_blocking=True, copy=True)
            self._blocks.copied(step, self._event())
            features = step_features(block, sizes, self._recipe, self._form)
            features = split_draws(self._recipe, features, sum(len(samples) for _, samples in layout))
            return ReadyStep(batch=split(step, layout, features), event=self._event())

    def hand_over(self, ready: ReadyStep) -> StepBatch:
        """Makes the consumer's stream wait, on the device, and keeps the memory for it."""
        if ready.event is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(ready.event)
            for shard in ready.batch.shards:
                for tensor in shard.features.values():
                    tensor.record_stream(consumer)
        return ready.batch

    def drop(self) -> None:
        """Takes back the blocks of steps that were begun."""
        self._blocks.drop()

    def _new_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)

    @contextlib.contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def _event(self) -> torch.cuda.Event | None:
        """Returns an event behind what was started so far; None where that is finished."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def resolve_device(name: str | torch.device) -> torch.device:
    """Returns a device that this machine has.

    Raises:
      LoaderConfigError: an unknown device, or CUDA where there is none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LoaderConfigError("device", name, "is no device; use 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise LoaderConfigError("device", name, "is not supported; use 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise LoaderConfigError("device", name, f"this machine shows {count} CUDA devices; use 'cpu'")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device


def feature_maker(recipe: Recipe, device: torch.device, form: str, num_steps: int) -> FeatureMaker:
    """Returns what makes features for a device.

    Args:
      recipe: how samples are made.
      device: where their features are to be.
      form: of the features.
      num_steps: under way at a time.
    """
    if device.type == "cpu":
        return HostFeatures(recipe, form)
    return StepFeatures(recipe, device, form, num_blocks=num_steps + 1)


def split(step: int, layout: Layout, features: Features) -> StepBatch:
    """Returns a step whose samples lie on one leading axis as its shards, without copies where it can.

    Args:
      step: its number.
      layout: which samples each shard holds.
      features: with a leading axis for all samples, in the order of the layout.
    """
    shards = []
    first = 0
    for shard, samples in layout:
        mine = slice(first, first + len(samples))
        first += len(samples)
        parts = {name: _aligned(tensor[mine]) for name, tensor in features.items()}
        shards.append(ShardBatch(v=shard, samples=list(samples), features=parts))
    return StepBatch(step=step, shards=shards)


def _aligned(part: torch.Tensor) -> torch.Tensor:
    offset_bytes = part.storage_offset() * part.element_size()
    return part if offset_bytes % ALIGNMENT_BYTES == 0 else part.clone()


def stack(step: int, layout: Layout, features: list[Features], recipe: Recipe) -> StepBatch:
    """Returns a step of shards, each with its samples stacked on a leading axis.

    Args:
      step: its number.
      layout: which samples each shard holds.
      features: one entry per sample, in the order of the layout; or equally many for each, see
        `stacked_draws`.
      recipe: that made them.
    """
    num_draws = len(features) // max(1, sum(len(samples) for _, samples in layout))
    shards = []
    first = 0
    for shard, samples in layout:
        mine = features[first : first + num_draws * len(samples)]
        first += len(mine)
        stacked = stacked_draws(recipe, mine, len(samples))
        shards.append(ShardBatch(v=shard, samples=list(samples), features=stacked))
    assert first == len(features), (first, len(features))
    return StepBatch(step=step, shards=shards)
