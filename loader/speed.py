"""How fast a loader is, alone and beside a consumer: who waits for whom?

Owns the measurement; `foldfeed.loader.speed_cli` owns its words. A consumer is a pause of so many seconds per
step: that is what an accelerator is to the host while it computes. Two loops run beside it: one over batches
that are there already, one over the loader's; what the second loses is what the loader costs a training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import torch

from foldfeed.loader.batch import StepBatch
from foldfeed.loader.loader import CropLoader

# The first steps start threads and processes and fill the read-ahead; they are the batches in memory, too.
WARM_UP_STEPS = 3
# Below this nobody would look for the loss: noise of two short loops is as large.
TOLERATED_LOSS = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoaderSpeed:
    """What was measured.

    Attributes:
      num_samples: of a step.
      alone_s: seconds per step of a consumer that takes no time, as fast as the loader can.
      fetch_s: seconds that reading one sample takes a thread.
      prepare_s: seconds that making its features takes a thread, or copying it to a device.
      sample_bytes: of a sample as read.
      step_s: pause of the consumer.
      cached_s: seconds per step beside that consumer, batches that are there already.
      streamed_s: the same from the loader.
      waits_s: seconds that the consumer waited for each batch of the loader, sorted.
    """

    num_samples: int
    alone_s: float
    fetch_s: float
    prepare_s: float
    sample_bytes: float
    step_s: float
    cached_s: float
    streamed_s: float
    waits_s: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Share by which a step takes longer than with batches that are there already; not below 0."""
        return max(0.0, self.streamed_s / self.cached_s - 1.0)

    @property
    def bottleneck(self) -> str:
        """``loader`` or ``accelerator``: who of the two the other one waits for."""
        return "loader" if self.loss > TOLERATED_LOSS else "accelerator"

    def wait_s(self, share: float) -> float:
        """Returns the wait that so large a share of the steps did not exceed."""
        return self.waits_s[min(len(self.waits_s) - 1, int(share * len(self.waits_s)))]


def measure_speed(loader: CropLoader, *, step_s: float, seconds: float) -> LoaderSpeed:
    """Runs a loader for about so many seconds.

    Args:
      loader: at any position; it moves on.
      step_s: pause of the consumer, the time of a training step.
      seconds: of all loops together.
    Raises:
      SampleError: a sample could not be read.
    """
    kept = [next(loader) for _ in range(WARM_UP_STEPS)]
    before = loader.stats
    alone_s, _ = _loop(iter(loader), 0.0, seconds / 3)
    delta = {name: value - before[name] for name, value in loader.stats.items()}
    streamed_s, waits = _loop(iter(loader), step_s, seconds / 3)
    cached_s, _ = _loop(_again(kept), step_s, seconds / 3)
    samples = max(1.0, delta["samples"])
    return LoaderSpeed(
        num_samples=kept[0].num_samples,
        alone_s=alone_s,
        fetch_s=delta["fetch_s"] / samples,
        prepare_s=delta["prepare_s"] / samples,
        sample_bytes=delta["bytes"] / samples,
        step_s=step_s,
        cached_s=cached_s,
        streamed_s=streamed_s,
        waits_s=tuple(sorted(waits)),
    )


def _again(batches: list[StepBatch]) -> Iterator[StepBatch]:
    while True:
        yield from batches


def _loop(batches: Iterator[StepBatch], step_s: float, seconds: float) -> tuple[float, list[float]]:
    """Returns seconds per step, and the wait for each batch; at least one step."""
    waits: list[float] = []
    started = now = time.perf_counter()
    while now - started < seconds or not waits:
        asked = time.perf_counter()
        batch = next(batches)
        _arrived(batch)
        waits.append(time.perf_counter() - asked)
        if step_s > 0:
            time.sleep(step_s)
        now = time.perf_counter()
    return (now - started) / len(waits), waits


def _arrived(batch: StepBatch) -> None:
    """Waits until a batch is really there: on a GPU it is handed over before its kernels have run."""
    tensor = next(iter(batch.shards[0].features.values()))
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
