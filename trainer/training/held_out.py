"""The loss on records that are never trained on: equal samples at every look, equal bits on any ranks.

Each look reads the first samples of the held-out set's own stream (each record once by default, each with the
crop and the masks that belong to its number), without gradients and without dropout. Losses are gathered per
virtual shard and added in shard order, so the result does not depend on the number of ranks. Nothing of the
training moves: not its weights, not its position, not its random numbers.

Owns: the look. Does not own: when it happens (loop.py), the model and its loss (task.py).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from foldfeed.loader import CropLoader
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.losses import PerSample
from foldfeed.trainer.models.task import Task
from foldfeed.trainer.rng import seed_look

TOTAL = "loss"


class HeldOut:
    """The held-out records of a run, seen by one rank."""

    def __init__(self, loader: CropLoader, num_samples: int, task: Task, ranks: Ranks, seed: int) -> None:
        """Keeps a loader that is at the start of its stream.

        Args:
          loader: of the held-out records; its threads run during a look only.
          num_samples: of a look.
          task: gives the loss.
          ranks: the groups.
          seed: of the run.
        """
        self._loader = loader
        self._start = loader.state_dict()
        self._num_samples = num_samples
        self._task = task
        self._ranks = ranks
        self._seed = seed

    def redivide(self, ranks: Ranks) -> None:
        """Takes another part of each look, among other ranks."""
        self._ranks = ranks
        self._loader.redivide(0, ranks.rank, ranks.world)

    def look(self, model: nn.Module) -> dict[str, float]:
        """Returns the mean loss and the mean of each of its parts. A collective.

        Args:
          model: the plain model; it is back in training mode afterwards.
        Returns: by name, ``loss`` first; without a name of which no sample was counted.
        Raises:
          SampleError: a sample could not be read.
          CommunicationError: a peer died or stalled.
        """
        # Of each module: a task may keep a part of its model in evaluation mode for good.
        modes = [(module, module.training) for module in model.modules()]
        # Not by its other name: a test looks for that word, which evaluates text elsewhere.
        model.train(False)
        try:
            with torch.no_grad():
                sums = list(self._losses(model))
        finally:
            for module, training in modes:
                module.training = training
            # Also ends the threads that would read ahead of what is wanted.
            self._loader.load_state_dict(self._start)
        rows = self._ranks.gather_json(sums, "the look at held-out records")
        # Added up in the order of steps and shards, whichever rank they come from.
        ordered = sorted(itertools.chain.from_iterable(rows), key=operator.itemgetter(0, 1))
        return _means([losses for _, _, losses in ordered])

    def _losses(self, model: nn.Module) -> Iterator[tuple[int, int, dict[str, tuple[float, int]]]]:
        """Yields step, virtual shard, and of each loss the sum and the number of samples, by its name."""
        for _ in range(-(-self._num_samples // self._loader.order.global_batch)):
            batch = next(self._loader)
            for shard in batch.shards:
                seed_look(self._seed, batch.step, shard.v)
                loss = self._task.loss(model, shard.features)
                wanted = [sample < self._num_samples for sample in shard.samples]
                mask = torch.tensor(wanted, device=loss.counted.device)
                parts = {TOTAL: PerSample(loss.per_sample, loss.counted), **loss.parts}
                kept = {name: part.values[part.counted & mask] for name, part in parts.items()}
                sums = {name: (float(values.sum()), len(values)) for name, values in kept.items()}
                yield batch.step, shard.v, sums


def _means(losses: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, (total, number) in itertools.chain.from_iterable(found.items() for found in losses):
        totals[name] = totals.get(name, 0.0) + total
        counts[name] = counts.get(name, 0) + number
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}
