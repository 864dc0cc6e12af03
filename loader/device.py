"""Where features are made: in the worker thread on the CPU, or on a GPU on a stream of its own.

On a GPU only compact data crosses the bus: a worker thread copies one raw sample to page-locked memory, the
assembling thread starts asynchronous copies and all feature arithmetic on a side stream and records one event
per step. The consumer's stream waits for that event on the device. The host is made to wait for nothing here:
no operation reads a value back (whether one of torch's own does so inside is not measured yet).

Rules that keep it correct: page-locked memory comes from torch's caching allocator, which reuses a block only
after the copies that read it have finished; device tensors made on the side stream are marked with
``record_stream`` for the consumer's stream, so that their memory is not handed out again while it is in use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from foldfeed.loader.batch import ShardBatch, StepBatch
from foldfeed.loader.errors import LoaderConfigError
from foldfeed.loader.featurise import featurise
from foldfeed.loader.host_features import host_features
from foldfeed.loader.raw import RawSample
from foldfeed.loader.recipe import Recipe

Features = dict[str, torch.Tensor]
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
    """The three moments of a step's life in which devices differ."""

    def prepare(self, raw: RawSample) -> Any:
        """Returns what the worker thread of a sample can do for it; `assemble` takes these."""
        ...

    def assemble(self, step: int, layout: Layout, prepared: list[Any]) -> ReadyStep:
        """Returns a step; runs on the assembling thread, steps in order."""
        ...

    def hand_over(self, ready: ReadyStep) -> StepBatch:
        """Returns the step, safe to use on the consumer's current stream."""
        ...


class CpuFeatures:
    """Makes features in the worker threads."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def prepare(self, raw: RawSample) -> Features:
        """Returns the features."""
        return host_features(raw, self._recipe)

    def assemble(self, step: int, layout: Layout, prepared: list[Features]) -> ReadyStep:
        """Stacks the samples of each shard."""
        return ReadyStep(batch=stack(step, layout, prepared))

    def hand_over(self, ready: ReadyStep) -> StepBatch:
        """Returns the step."""
        return ready.batch


class CudaFeatures:
    """Makes features on a GPU, on a side stream."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe = recipe
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def prepare(self, raw: RawSample) -> RawSample:
        """Returns the sample in page-locked memory."""
        return raw.pin_memory()

    def assemble(self, step: int, layout: Layout, prepared: list[RawSample]) -> ReadyStep:
        """Returns a step that will be there when its event has happened."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            features = [featurise(raw.to(self._device), self._recipe) for raw in prepared]
            batch = stack(step, layout, features)
            event = torch.cuda.Event()
            event.record(self._stream)
        return ReadyStep(batch=batch, event=event)

    def hand_over(self, ready: ReadyStep) -> StepBatch:
        """Makes the consumer's stream wait, on the device, and keeps the memory for it."""
        assert ready.event is not None
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(ready.event)
        for shard in ready.batch.shards:
            for tensor in shard.features.values():
                tensor.record_stream(consumer)
        return ready.batch


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


def feature_maker(recipe: Recipe, device: torch.device) -> FeatureMaker:
    """Returns what makes features for a device."""
    return CudaFeatures(recipe, device) if device.type == "cuda" else CpuFeatures(recipe)


def stack(step: int, layout: Layout, features: list[Features]) -> StepBatch:
    """Returns a step of shards, each with its samples stacked on a leading axis.

    Args:
      step: its number.
      layout: which samples each shard holds.
      features: one entry per sample, in the order of the layout.
    """
    shards = []
    first = 0
    for shard, samples in layout:
        mine = features[first : first + len(samples)]
        first += len(samples)
        stacked = {name: torch.stack([sample[name] for sample in mine]) for name in mine[0]}
        shards.append(ShardBatch(v=shard, samples=list(samples), features=stacked))
    assert first == len(features), (first, len(features))
    return StepBatch(step=step, shards=shards)
