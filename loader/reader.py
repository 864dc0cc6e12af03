"""`SampleReader`: the way order -> plan -> fetch for one sample, by its global number.

Holds no thread and no position, so it may be pickled, forked and used from any thread. Knows no torch: a
process that only reads samples (`foldfeed.loader.reading_process`) starts quickly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from foldfeed.feature_store import FoldfeedError, Record
from foldfeed.loader.errors import LoaderConfigError, SampleError
from foldfeed.loader.fetch import Room, SampleArrays, fetch
from foldfeed.loader.order import SampleOrder
from foldfeed.loader.plan import SamplePlan, make_plan
from foldfeed.loader.recipe import Recipe
from foldfeed.loader.sampling import Sampling
from foldfeed.loader.selection import Selection, Store


class PlannedSample(NamedTuple):
    """A sample before it is read.

    Attributes:
      sample: its global number.
      plan: what to read.
      record: and from where.
      number: under which it is read, see `SampleReader.planned`.
    """

    sample: int
    plan: SamplePlan
    record: Record
    number: int


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
        for component in self.selection.sampling.components:
            if component.min_plddt and not recipe.labels:
                raise LoaderConfigError(
                    "min_plddt",
                    component.min_plddt,
                    "is a rule for labels and the recipe has none; use Recipe(labels=True) or min_plddt=0",
                )
        self.order = SampleOrder(
            num_records=len(self.selection),
            seed=seed,
            global_batch=global_batch,
            virtual_shards=virtual_shards,
            table=self.selection.table,
            epoch_samples=self.selection.sampling.epoch_samples,
            epoch_end=self.selection.sampling.epoch_end,
        )

    def planned(self, number: int) -> PlannedSample:
        """Returns what a sample reads and the record it reads it from, without reading it.

        Args:
          number: of the sample; where a recipe draws several alignments for a sample, ``sample * num_draws +
            draw``, so that each of them is read by itself.
        Raises:
          LoaderConfigError: a negative number.
          SampleError: the store cannot find the record's part.
        """
        sample, draw = divmod(number, self.recipe.num_draws)
        address = self.order.locate(sample)
        store, position = self.selection.place(address.record)
        try:
            record = store.at(position)
        except (FoldfeedError, OSError) as error:
            raise SampleError(sample, store.ids[position], str(error)) from error
        component = self.selection.sampling.components[self.selection.component(address.record)]
        plan = make_plan(
            self.recipe,
            self.order.seed,
            address,
            record.length,
            record.depth,
            store.settings.row_order,
            draw=draw,
            max_msa_rows=component.max_msa_rows,
            min_plddt=component.min_plddt,
        )
        return PlannedSample(sample, plan, record, number)

    def fetch(self, planned: PlannedSample, room: Room | None = None) -> SampleArrays:
        """Returns a planned sample as read, into ``room`` if given, see `foldfeed.loader.fetch.fetch`.

        Raises:
          SampleError: it could not be read.
        """
        try:
            return fetch(planned.record, planned.plan, room)
        except (FoldfeedError, OSError) as error:
            raise SampleError(planned.sample, planned.record.record_id, str(error)) from error

    def sizes(self, planned: PlannedSample) -> dict[str, int]:
        """Returns how much a planned sample reads of its alignment, by name.

        ``stored_bytes`` that the tiles of its crop take in the store; ``decoded_bytes`` of all their cells (a
        byte for each token and each deletion count); ``used_bytes`` of the cells among them that the sample
        is made of. Costs about 0.1 ms: which tiles, and the shards' indices, which are kept.

        Raises:
          SampleError: a shard index is damaged.
        """
        plan = planned.plan
        try:
            tiles = planned.record.plan(slice(*plan.columns), plan.selection)
        except (FoldfeedError, OSError) as error:
            raise SampleError(planned.sample, planned.record.record_id, str(error)) from error
        width = plan.columns[1] - plan.columns[0] + plan.crop[1] - plan.crop[0]
        used = len(plan.rows) * width
        return {"stored_bytes": tiles.num_bytes, "decoded_bytes": tiles.num_cells, "used_bytes": used}

    def read(self, number: int) -> SampleArrays:
        """Returns a sample as read.

        Args:
          number: as for `planned`.
        Raises:
          LoaderConfigError: a negative number.
          SampleError: it could not be read.
        """
        return self.fetch(self.planned(number))
