"""When is a block read next? By the order of the samples, which is known.

A block holds pieces of some records; the first sample to come of any of these is the first that may read it
(a crop may leave it out: then it is asked for again). A permutation says for a record where it comes in an
epoch, however many there are. Of weighted draws only the next `HORIZON` samples are looked at.

Which records lie in which bytes is known from the index and the shard's own index, which a reader of the part
has in memory; of a part that nobody here has read yet, the first sample of any of its records counts. Never
reads anything itself.

Thread safe.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store.format.structure import ARRAYS as STRUCTURE_ARRAYS
from foldfeed.feature_store.parts.reader import TILED, PartReader
from foldfeed.loader.cache.blocks import Block
from foldfeed.loader.cache.eviction import UNKNOWN
from foldfeed.loader.order.order import SampleOrder

# Samples of a weighted order that are looked ahead at; one look takes some milliseconds.
HORIZON = 1 << 16
# Epochs in which a sample of ours is looked for.
_EPOCHS = 4
# What a crop and its labels read, besides the metadata of a part.
_ARRAYS = (*TILED, "deletion_overflow", "aatype", "profile", "deletion_mean", *STRUCTURE_ARRAYS)

# Of the index, what says where these lie: with the number, 64 bytes a record.
_COLUMNS = (
    *("depth", "length", "first_tile", "first_residue"),
    *("first_overflow", "num_overflow", "first_structure_residue"),
)
_NOTHING = np.empty(0, np.int64)


class _Extents(NamedTuple):
    """Where records lie in a file: first bytes, ends and numbers, by first byte."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    records: NDArray[np.int64]


class _Look(NamedTuple):
    """Samples from ``start`` on and their records, sorted by record and number."""

    start: int
    records: NDArray[np.int64]
    samples: NDArray[np.int64]


class RecordUse:
    """The next sample of a record."""

    def __init__(self, order: SampleOrder, shards: Sequence[int]) -> None:
        """Looks at nothing yet.

        Args:
          order: of the samples.
          shards: the virtual shards whose samples count.
        """
        self._order = order
        self._ours = np.zeros(order.virtual_shards, dtype=bool)
        self._ours[list(shards)] = True
        self._all = bool(self._ours.all())
        self._lock = threading.Lock()
        self._look: _Look | None = None

    def firsts(self, groups: Sequence[NDArray[np.int64]], now: int) -> list[int]:
        """Returns for groups of records the first sample from ``now`` on of any in a group, or `UNKNOWN`."""
        if self._order.table is not None:
            return [self._first_draw(records, now) for records in groups]
        found = [UNKNOWN] * len(groups)
        left = [place for place, records in enumerate(groups) if records.size]
        epoch = now // self._order.epoch_size
        for later in range(epoch, epoch + _EPOCHS):
            if not left:
                break
            samples = self._order.samples_of(np.concatenate([groups[place] for place in left]), later)
            samples[(samples < now) | ~self._counts(samples)] = UNKNOWN
            starts = np.cumsum([0, *(groups[place].size for place in left[:-1])])
            best = np.minimum.reduceat(samples, starts).tolist()
            for place, sample in zip(left, best, strict=True):
                found[place] = sample
            left = [place for place in left if found[place] == UNKNOWN]
        return found

    def _first_draw(self, records: NDArray[np.int64], now: int) -> int:
        with self._lock:
            look = self._look
            if look is None or not look.start <= now < look.start + HORIZON // 2:
                look = self._look = self._look_ahead(now)
        low = np.searchsorted(look.records, records, "left")
        high = np.searchsorted(look.records, records, "right")
        best = UNKNOWN
        for start, stop in zip(low.tolist(), high.tolist(), strict=True):
            place = start + int(np.searchsorted(look.samples[start:stop], now))
            if place < stop:
                best = min(best, int(look.samples[place]))
        return best

    def _look_ahead(self, now: int) -> _Look:
        samples = np.arange(now, now + HORIZON)
        samples = samples[self._counts(samples)]
        records = self._order.records(samples)
        by_record = np.lexsort((samples, records))
        return _Look(now, records[by_record], samples[by_record])

    def _counts(self, samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.ones(samples.shape, dtype=bool) if self._all else self._ours[self._order.shards_of(samples)]


class FutureUse:
    """The next sample that may read a block."""

    def __init__(self, places: dict[str, dict[str, NDArray[np.int64]]]) -> None:
        """Takes the records of each part.

        Args:
          places: see `places_by_part`.
        """
        self._places = places
        self._extents: dict[tuple[str, str], _Extents] = {}
        self._learned: set[str] = set()

    def learn(self, part: PartReader) -> None:
        """Takes where records lie in the files of a part; of arrays whose shard index was read."""
        places = self._places.get(part.part_id)
        if places is None:
            return
        for name in _ARRAYS:
            array = part.arrays.get(name)
            if array is None or not array.is_open:
                continue
            key = part.part_id, array.spec.shard_path
            if key in self._extents:
                continue
            first, count = _entries(name, places, part)
            starts, ends = array.extents(first, first + count)
            there = np.flatnonzero(ends > starts)
            there = there[np.argsort(starts[there], kind="stable")]
            self._extents[key] = _Extents(starts[there], ends[there], places["number"][there])
        self._learned.add(part.part_id)

    def records_of(self, part_id: str) -> NDArray[np.int64]:
        """Returns the numbers of the records of a part; none for one of another store."""
        places = self._places.get(part_id)
        return _NOTHING if places is None else places["number"]

    def records_in(self, block: Block, block_bytes: int) -> NDArray[np.int64] | None:
        """Returns the numbers of the records that may read a block; None while that is not known."""
        extents = self._extents.get((block.part_id, block.file))
        if extents is None:
            # Of a part that is being read the rest is in use no more: metadata, which its reader keeps.
            return _NOTHING if block.part_id in self._learned else None
        # Records of a part lie side by side: both ends ascend.
        stop = int(np.searchsorted(extents.starts, (block.number + 1) * block_bytes, "left"))
        start = int(np.searchsorted(extents.ends, block.number * block_bytes, "right"))
        return extents.records[start:stop]


class BlockUse:
    """The next sample that may read a block, by some shards: `FutureUse` and `RecordUse` together."""

    def __init__(self, future: FutureUse, use: RecordUse, block_bytes: int) -> None:
        self._future = future
        self._use = use
        self._block_bytes = block_bytes
        # Of parts as a whole: a folder may hold many thousand blocks of parts that nobody has read yet.
        self._of_parts: dict[str, int] = {}

    def __call__(self, blocks: Sequence[Block], now: int) -> list[int]:
        """Returns the sample for each block, or `UNKNOWN`."""
        records = [self._future.records_in(block, self._block_bytes) for block in blocks]
        whole = {block.part_id for block, known in zip(blocks, records, strict=True) if known is None}
        stale = [part_id for part_id in whole if self._of_parts.get(part_id, -1) < now]
        of_stale = self._use.firsts([self._future.records_of(part_id) for part_id in stale], now)
        self._of_parts.update(zip(stale, of_stale, strict=True))
        of_known = iter(self._use.firsts([known for known in records if known is not None], now))
        return [
            self._of_parts[block.part_id] if known is None else next(of_known)
            for block, known in zip(blocks, records, strict=True)
        ]


def _entries(
    name: str, places: dict[str, NDArray[np.int64]], part: PartReader
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the first entry and the number of entries of each record in an array."""
    if name in TILED:
        settings = part.settings
        rows, cols = -(-places["depth"] // settings.tile_rows), -(-places["length"] // settings.tile_cols)
        return places["first_tile"], rows * cols
    if name == "deletion_overflow":
        return places["first_overflow"], places["num_overflow"]
    if name in STRUCTURE_ARRAYS:
        first = places["first_structure_residue"]
        return np.maximum(first, 0), np.where(first < 0, 0, places["length"])
    return places["first_residue"], places["length"]


def places_by_part(
    chosen: Sequence[tuple[pa.Table, NDArray[np.int64] | None]],
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Returns what `FutureUse` needs of records: where they lie and their numbers, by part.

    Args:
      chosen: `RecordSource.places` of each component and the positions in it that are drawn from, None for
        all; the numbers of records run through them.
    """
    found: dict[str, list[dict[str, NDArray[np.int64]]]] = {}
    number = 0
    for table, positions in chosen:
        rows = table if positions is None else table.take(pa.array(positions))
        numbers = np.arange(number, number + len(rows))
        number += len(rows)
        for part_id, columns in _split(rows, numbers):
            found.setdefault(part_id, []).append(columns)
    return {
        part_id: {name: np.concatenate([one[name] for one in pieces]) for name in pieces[0]}
        for part_id, pieces in found.items()
    }


def _split(rows: pa.Table, numbers: NDArray[np.int64]) -> Iterator[tuple[str, dict[str, NDArray[np.int64]]]]:
    """Yields each part of some records and their columns."""
    values = {name: rows[name].fill_null(-1).to_numpy().astype(np.int64) for name in _COLUMNS}
    parts = rows["part_id"].combine_chunks()
    if not pa.types.is_dictionary(parts.type):
        parts = parts.dictionary_encode()
    codes = parts.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    cuts = np.searchsorted(codes[order], np.arange(len(parts.dictionary) + 1))
    for code, part_id in enumerate(parts.dictionary.to_pylist()):
        here = order[cuts[code] : cuts[code + 1]]
        if here.size:
            yield part_id, {name: column[here] for name, column in (*values.items(), ("number", numbers))}
