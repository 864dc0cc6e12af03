"""Samples by number, without threads: what `CropLoader` makes in its workers, and `SampleSource` on demand.

`SampleReader` goes the way order -> plan -> fetch for one sample. `SampleSource` adds features and looks like
a sequence, which is all that a random-access data source of Grain or a map-style dataset of PyTorch has to
be: ``len(source)`` and ``source[i]``. It holds no thread and no position, so it may be pickled, forked and
used from any thread; samplers and resume belong to whoever asks (``source[i]`` is already in the run's random
order).

Invariant: sample g is a function of (stores, sampling, recipe, seed, g).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from foldfeed.feature_store import FoldfeedError
from foldfeed.loader.errors import LoaderConfigError, SampleError
from foldfeed.loader.featurise import featurise
from foldfeed.loader.fetch import RawSample, fetch
from foldfeed.loader.order import SampleOrder
from foldfeed.loader.plan import SamplePlan, make_plan
from foldfeed.loader.recipe import Recipe
from foldfeed.loader.sampling import Sampling
from foldfeed.loader.selection import Selection, Store


class SampleReader:
    """Plans and reads samples by their global numbers.

    Attributes:
      selection: the records to draw from.
      recipe: how samples are made.
      order: which record comes when.
    """

    def __init__(
        self,
        store: Store | Mapping[str, Store],
        recipe: Recipe,
        sampling: Sampling | None,
        *,
        seed: int,
        global_batch: int,
        virtual_shards: int,
    ) -> None:
        """Checks everything; reads indexes, no arrays.

        Raises:
          LoaderConfigError: a value that cannot work.
        """
        if isinstance(store, str | os.PathLike):
            raise LoaderConfigError("store", str(store), "is a place; pass FeatureStore.open(...) of it")
        if not isinstance(recipe, Recipe):
            raise LoaderConfigError("recipe", recipe, "is no recipe; pass e.g. Recipe.named('af2')")
        if sampling is not None and not isinstance(sampling, Sampling):
            raise LoaderConfigError(
                "sampling", sampling, "is no sampling; pass e.g. Sampling(kind='weighted')"
            )
        self.recipe = recipe
        self.selection = Selection(store, sampling or Sampling())
        self.order = SampleOrder(
            num_records=len(self.selection),
            seed=seed,
            global_batch=global_batch,
            virtual_shards=virtual_shards,
            table=self.selection.table,
            epoch_samples=self.selection.sampling.epoch_samples,
            epoch_end=self.selection.sampling.epoch_end,
        )

    def plan(self, sample: int) -> tuple[SamplePlan, Any]:
        """Returns what a sample reads and the record it reads it from, without reading it.

        Raises:
          LoaderConfigError: a negative number.
          SampleError: the store cannot find the record's part.
        """
        address = self.order.locate(sample)
        store, position = self.selection.place(address.record)
        try:
            record = store.at(position)
        except (FoldfeedError, OSError) as error:
            raise SampleError(sample, store.ids[position], str(error)) from error
        row_order = store.settings.row_order
        return make_plan(
            self.recipe, self.order.seed, address, record.length, record.depth, row_order
        ), record

    def read(self, sample: int) -> RawSample:
        """Returns a sample as read.

        Raises:
          LoaderConfigError: a negative number.
          SampleError: it could not be read.
        """
        plan, record = self.plan(sample)
        try:
            return fetch(record, plan)
        except (FoldfeedError, OSError) as error:
            raise SampleError(sample, record.record_id, str(error)) from error


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
        """Returns the features of a sample on the CPU, see `foldfeed.loader.featurise.featurise`.

        Raises:
          IndexError: outside 0..len-1.
          SampleError: it could not be read.
        """
        place = operator.index(index)
        if not 0 <= place < self._length:
            raise IndexError(f"index {place} is outside 0..{self._length - 1} of this source")
        return featurise(self._reader.read(self.first_sample + place), self._reader.recipe)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Returns several samples, as PyTorch's loader asks for a batch."""
        return [self[index] for index in indices]

    def __repr__(self) -> str:
        return f"SampleSource({self._length} samples from {self.first_sample} on, seed {self.order.seed})"
