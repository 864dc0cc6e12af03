"""`CachedReader`: a `SampleReader` whose stores are read through the cache, samples brought in ahead.

Ties the cache (`foldfeed.loader.cache`) to samples: which blocks a plan reads, what the order says about the
next use of a block, and past which caches a damaged sample is read again. Holds threads and connections, so
it lives in one process and ends with `close`; knows no torch. Thread safe.

Numbers are those of `SampleReader.planned`: where a recipe draws several alignments for a sample each of them
is brought and read by itself, and the cache counts time in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import cast

from foldfeed.feature_store.parts.shard_reader import FileRange
from foldfeed.feature_store.storage import Blobs
from foldfeed.loader.cache.ahead import Ahead
from foldfeed.loader.cache.blocks import Block
from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.cache.eviction import UNKNOWN, NextUses
from foldfeed.loader.cache.files import CachedFiles
from foldfeed.loader.cache.future import BlockUse, FutureUse, RecordUse, places_by_part
from foldfeed.loader.cache.tiers import FileOfPart, Tiers
from foldfeed.loader.errors import SampleError
from foldfeed.loader.reading.fetch import Fetched, Room, arrays_of
from foldfeed.loader.reading.reader import PlannedSample, SampleRead, SampleReader
from foldfeed.loader.recipe import Recipe


class CachedReader:
    """Plans and reads samples by their global numbers, through a cache."""

    def __init__(self, reader: SampleReader, config: CacheConfig, shards: Sequence[int]) -> None:
        """Opens the tiers; reads nothing of the stores.

        Args:
          reader: what reads without a cache.
          config: of the cache.
          shards: virtual shards of this process's rank.
        Raises:
          LoaderConfigError: the folder or the server cannot be used.
          MissingExtraError: the package for Redis is missing.
        """
        order = reader.order
        self._future = FutureUse(places_by_part(reader.selection.places()))
        mine, ours = (
            _by_number(
                BlockUse(self._future, RecordUse(order, counted), config.block_bytes), reader.recipe.num_draws
            )
            for counted in (shards, range(order.virtual_shards))
        )
        self.tiers = Tiers(config, reader.selection.urls, (mine, ours))
        self._files: dict[int, CachedFiles] = {}
        self._reader = reader.reading_through(self._wrap, self.tiers.distrusting)
        # Of samples that were brought and not yet read.
        self._plans: dict[int, PlannedSample] = {}
        self._ahead = Ahead(self.tiers, config.ahead_bytes, self._blocks_of)

    @property
    def recipe(self) -> Recipe:
        """How samples are made."""
        return self._reader.recipe

    def ask(self, numbers: Sequence[int]) -> None:
        """Says what will be read next, in that order."""
        self._ahead.ask(numbers)

    def planned(self, number: int, attempt: int = 0) -> PlannedSample:
        """See `SampleReader.planned`."""
        known = None if attempt else self._plans.get(number)
        if known is not None:
            return known
        try:
            return self._reader.planned(number, attempt)
        except SampleError:
            if not attempt:
                # Nobody will fetch it.
                self._ahead.forget(number)
                self._plans.pop(number, None)
            raise

    def fetch(self, planned: PlannedSample, room: Room | None = None) -> Fetched:
        """See `SampleReader.fetch`."""
        self._plans[planned.number] = planned
        try:
            with self._ahead.reading(planned.number):
                return self._reader.fetch(planned, room)
        finally:
            self._plans.pop(planned.number, None)

    def read(self, number: int) -> SampleRead:
        """See `SampleReader.read`."""
        try:
            planned = self.planned(number)
            return SampleRead(*self.fetch(planned), planned, None)
        except SampleError as error:
            if not self.may_replace(error, 0):
                raise
            return self.read_from(number, 1, error.reason)

    def read_from(self, number: int, attempt: int, reason: str) -> SampleRead:
        """See `SampleReader.read_from`; brings nothing ahead."""
        return self._reader.read_from(number, attempt, reason)

    def may_replace(self, error: SampleError, attempt: int) -> bool:
        """See `SampleReader.may_replace`."""
        return self._reader.may_replace(error, attempt)

    def counters(self) -> dict[str, float]:
        """See `Tiers.counters`."""
        return self.tiers.counters()

    def close(self) -> None:
        """Ends threads and connections. Idempotent."""
        self._ahead.stop()
        self.tiers.close()
        self._ahead.close()

    def _wrap(self, files: Blobs) -> Blobs:
        # Structurally a Blobs: what it does not cache it passes on.
        return cast(Blobs, CachedFiles(files, self.tiers))

    def _blocks_of(self, number: int) -> tuple[set[Block], Callable[[], list[Future[bytes]]]]:
        """Returns the blocks that are read for a number, and a function that lets them come."""
        planned = self._plans.get(number) or self._reader.planned(number)
        self._plans[number] = planned
        part = planned.record.part
        ranges = _ranges_of(planned)
        self._future.learn(part)
        files = cast(CachedFiles, part.blobs)
        numbers: dict[str, set[int]] = {}
        known: dict[str, FileOfPart] = {}
        for found in ranges:
            file = files.file_of(found.path)
            assert file is not None, found
            known[file.file] = file
            numbers.setdefault(file.file, set()).update(self.tiers.blocks_of(found.start, found.size))
        blocks = {known[name].block(number) for name, chosen in numbers.items() for number in chosen}

        def ask() -> list[Future[bytes]]:
            return [
                flight
                for name, chosen in numbers.items()
                for flight in self.tiers.bring(known[name], sorted(chosen))
            ]

        return blocks, ask


def _by_number(uses: NextUses, num_draws: int) -> NextUses:
    """Returns next uses in numbers of alignments, from those in samples; all of a sample count as one use."""

    def next_uses(blocks: Sequence[Block], now: int) -> list[int]:
        samples = uses(blocks, now // num_draws)
        return [use if use == UNKNOWN else max(now, use * num_draws) for use in samples]

    return next_uses


def _ranges_of(planned: PlannedSample) -> list[FileRange]:
    """Returns the stretches of files that `reading.fetch.fetch` reads for a plan."""
    plan = planned.plan
    return planned.record.ranges(slice(*plan.columns), plan.selection, arrays_of(plan))
