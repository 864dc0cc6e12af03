"""`SampleReader`: the way order -> plan -> fetch for one sample, by its global number.

Holds no thread and no position, so it may be pickled, forked and used from any thread. Knows no torch: a
process that only reads samples (`reading.process`) starts quickly.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from foldfeed.feature_store import CorruptDataError, FoldfeedError, Record
from foldfeed.feature_store.storage import Blobs
from foldfeed.loader.errors import LoaderConfigError, SampleError
from foldfeed.loader.order.order import SampleOrder
from foldfeed.loader.order.sampling import Sampling
from foldfeed.loader.order.selection import Selection, Store
from foldfeed.loader.reading.fetch import Fetched, Room, SampleArrays, fetch
from foldfeed.loader.reading.plan import SamplePlan, make_plan
from foldfeed.loader.recipe import AF2, Recipe
from foldfeed.loader.unreadable import MAX_SUBSTITUTES, POLICIES, STOP, SUBSTITUTE, Substitution, is_damage


class PlannedSample(NamedTuple):
    """A sample before it is read.

    Attributes:
      sample: its global number.
      plan: what to read.
      record: and from where.
      number: under which it is read, see `SampleReader.planned`.
      attempt: 0, or which substitute of a record that cannot be read it is.
    """

    sample: int
    plan: SamplePlan
    record: Record
    number: int
    attempt: int = 0


class SampleRead(NamedTuple):
    """A sample that was read.

    Attributes:
      arrays: what was read.
      sizes: how much that was, see `reading.fetch.Fetched`.
      planned: by which plan.
      substitution: which record took the place of which, None where none did.
    """

    arrays: SampleArrays
    sizes: dict[str, int]
    planned: PlannedSample
    substitution: Substitution | None


class SampleReader:
    """Plans and reads samples by their global numbers.

    Attributes:
      selection: the records to draw from.
      recipe: how samples are made.
      order: which record comes when.
      on_unreadable: ``stop`` or ``substitute``, see `foldfeed.loader.unreadable`.
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
        on_unreadable: str = STOP,
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
        if on_unreadable not in POLICIES:
            raise LoaderConfigError("on_unreadable", on_unreadable, f"must be one of {', '.join(POLICIES)}")
        self.on_unreadable = on_unreadable
        self._past_caches: Callable[[str], contextlib.AbstractContextManager[None]] | None = None
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

    def reading_through(
        self,
        wrap: Callable[[Blobs], Blobs],
        past_caches: Callable[[str], contextlib.AbstractContextManager[None]],
    ) -> SampleReader:
        """Returns the same samples, read through other access to the stores' files.

        Args:
          wrap: see `foldfeed.feature_store.RecordSource.reading_through`.
          past_caches: makes reads of a part ask the store itself, for another attempt after damage.
        """
        other = copy.copy(self)
        other.selection = self.selection.reading_through(wrap)
        other._past_caches = past_caches
        return other

    def planned(self, number: int, attempt: int = 0) -> PlannedSample:
        """Returns what a sample reads and the record it reads it from, without reading it.

        Args:
          number: of the sample; where a recipe draws several alignments for a sample, ``sample * num_draws +
            draw``, so that each of them is read by itself.
          attempt: 0, or which substitute to take for a record that cannot be read.
        Raises:
          LoaderConfigError: a negative number.
          SampleError: the store cannot find the record's part.
        """
        sample, draw = divmod(number, self.recipe.num_draws)
        address = self.order.substitute(sample, attempt)
        store, position = self.selection.place(address.record)
        try:
            record = self._record(store, position)
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
        return PlannedSample(sample, plan, record, number, attempt)

    def fetch(self, planned: PlannedSample, room: Room | None = None) -> Fetched:
        """Returns a planned sample as read, into ``room`` if given, see `reading.fetch.fetch`.

        Damage that may lie on the way (in a cache, or in transit) is read once more from the store itself.

        Raises:
          SampleError: it could not be read.
        """
        try:
            try:
                return fetch(planned.record, planned.plan, room)
            except (FoldfeedError, OSError) as error:
                part = planned.record.part
                if not is_damage(error) or (part.is_local and self._past_caches is None):
                    raise
                with self._asking_the_store(part.part_id):
                    return fetch(planned.record, planned.plan, room)
        except (FoldfeedError, OSError) as error:
            raise SampleError(planned.sample, planned.record.record_id, str(error)) from error

    def costs(self, samples: Sequence[int]) -> list[int]:
        """Returns what samples are expected to cost, from the index alone: cells of the alignment, about.

        Args:
          samples: global numbers.
        """
        found = []
        for number in self.order.records(samples).tolist():
            store, position = self.selection.place(number)
            length, depth = store.size_at(position)
            if self.recipe.name != AF2:
                length = min(length, self.recipe.crop_residues)
                depth = min(depth, self.recipe.num_clusters + self.recipe.num_extra)
            found.append(length * depth)
        return found

    def may_replace(self, error: SampleError, attempt: int) -> bool:
        """Returns whether another record takes the place of one that could not be read."""
        return self.on_unreadable == SUBSTITUTE and attempt < MAX_SUBSTITUTES and is_damage(error.__cause__)

    def substitution(self, planned: PlannedSample, reason: str) -> Substitution | None:
        """Returns what to say about a sample that was read: None for one of its own record."""
        if not planned.attempt:
            return None
        store, position = self.selection.place(self.order.locate(planned.sample).record)
        return Substitution(
            sample=planned.sample,
            record_id=store.ids[position],
            substitute_id=planned.record.record_id,
            attempt=planned.attempt,
            reason=reason,
        )

    def read(self, number: int) -> SampleRead:
        """Returns a sample as read, of a substitute where the reader may.

        Args:
          number: as for `planned`.
        Raises:
          LoaderConfigError: a negative number.
          SampleError: it could not be read.
        """
        return self.read_from(number, 0, "")

    def read_from(self, number: int, attempt: int, reason: str) -> SampleRead:
        """Returns a sample as read, from an attempt on.

        Args:
          number: as for `planned`.
          attempt: the first one to make, see `planned`.
          reason: why the one before failed, if there was one.
        Raises:
          SampleError: it could not be read.
        """
        while True:
            try:
                planned = self.planned(number, attempt)
                return SampleRead(*self.fetch(planned), planned, self.substitution(planned, reason))
            except SampleError as error:
                if not self.may_replace(error, attempt):
                    raise
                attempt, reason = attempt + 1, reason or error.reason

    def read_together(self, numbers: Sequence[int], attempt: int = 0, reason: str = "") -> list[SampleRead]:
        """Returns alignments of one sample, all of the same record: the first of which all can be read.

        Args:
          numbers: as for `planned`, at least one.
          attempt: as for `read_from`.
          reason: as for `read_from`.
        Raises:
          LoaderConfigError: a negative number.
          SampleError: one could not be read.
        """
        while True:
            found = [self.read_from(number, attempt, reason) for number in numbers]
            attempts = {read.planned.attempt for read in found}
            if len(attempts) == 1:
                return found
            attempt = max(attempts)
            reason = next(read.substitution.reason for read in found if read.substitution is not None)

    def _record(self, store: Store, position: int) -> Record:
        try:
            return store.at(position)
        except CorruptDataError:
            if self._past_caches is None:
                raise
        with self._asking_the_store(store.places()["part_id"][position].as_py()):
            return store.at(position)

    def _asking_the_store(self, part_id: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._past_caches is None else self._past_caches(part_id)
