"""Samples by number, without threads: `SampleSource`.

It adds features to what `reading.reader.SampleReader` reads and looks like a sequence, which is all
that a random-access data source of Grain or a map-style dataset of PyTorch has to
be: ``len(source)`` and ``source[i]``. It holds no thread and no position, so it may be pickled, forked and
used from any thread; samplers and resume belong to whoever asks (``source[i]`` is already in the run's random
order).

Invariant: sample g is a function of (stores, sampling, recipe, seed, g).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch

from foldfeed.loader.errors import LoaderConfigError
from foldfeed.loader.features.draws import whole_sample
from foldfeed.loader.order.sampling import Sampling
from foldfeed.loader.order.selection import Store
from foldfeed.loader.reading.plan import draw_num_recycles
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import Recipe


class SampleSource:
    """Samples of a run as a sequence: ``source[i]`` is the features of sample ``first_sample + i``.

    Example:
      >>> source = SampleSource(store, Recipe.named("crop_first", crop_residues=64), seed=1)
      >>> torch.utils.data.DataLoader(source, batch_size=8, num_workers=4)

    Attributes:
      order: which record comes when.
      first_sample: global number of item 0.
    """

    def __init__(
        self,
        store: Store | Mapping[str, Store],
        recipe: Recipe,
        *,
        seed: int,
        sampling: Sampling | None = None,
        first_sample: int = 0,
        num_samples: int | None = None,
    ) -> None:
        """Checks everything and reads no arrays.

        Args:
          store: as for `CropLoader`.
          recipe: how samples are made.
          seed: of the run.
          sampling: which records, how often; every record once an epoch when None.
          first_sample: global number of item 0; ``epoch * source.order.epoch_size`` begins another epoch.
          num_samples: length of the sequence; one epoch when None.
        Raises:
          LoaderConfigError: a value that cannot work.
        """
        self._reader = SampleReader(store, recipe, sampling, seed=seed, global_batch=1, virtual_shards=1)
        self.order = self._reader.order
        for field, value, least in (("first_sample", first_sample, 0), ("num_samples", num_samples, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise LoaderConfigError(field, value, f"must be an integer of at least {least}")
        self.first_sample = first_sample
        self._length = self.order.epoch_size if num_samples is None else num_samples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns the features of a sample on the CPU, see `features.featurise.featurise`.

        Where the recipe draws an alignment for every recycling iteration, it holds those of all iterations
        that a step may have; `num_recycles` says how many a step takes.

        Raises:
          IndexError: outside 0..len-1.
          SampleError: it could not be read.
        """
        place = operator.index(index)
        if not 0 <= place < self._length:
            raise IndexError(f"index {place} is outside 0..{self._length - 1} of this source")
        return whole_sample(self._reader, self.first_sample + place, torch.device("cpu"))

    def num_recycles(self, step: int) -> int:
        """Returns the recycling iterations of a step of whatever batches are made of these samples.

        The number that a `CropLoader` of this recipe and seed gives its step.
        """
        return draw_num_recycles(self._reader.recipe, self.order.seed, step)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Returns several samples, as PyTorch's loader asks for a batch."""
        return [self[index] for index in indices]

    def __repr__(self) -> str:
        return f"SampleSource({self._length} samples from {self.first_sample} on, seed {self.order.seed})"
