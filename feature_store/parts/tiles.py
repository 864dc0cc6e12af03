"""Reads crops out of the tiles of one part: from a plan to filled arrays.

Owns what a crop is (`Crop`, `Slab`), the tasks that fill its arrays, and the exact deletion counts. Does not
own where a tile lies (`format.grid`), checksums and files (`parts.shard_reader`), or who runs the tasks
(`read_pool`).

A task reads one run of neighbouring tiles, decodes them and copies their cells to where they belong; tasks
may serve several crops at once and run in any order on any thread, because no two of them write the same
cell. Invariant: after all tasks of a crop and `TileReader.finish`, every cell of its arrays has been set.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.grid import (
    RecordGrid,
    RowIndex,
    Rows,
    StoredRun,
    TileBox,
    num_rows_of,
    plan_crop,
    plan_run,
    stored_rows_of,
)
from foldfeed.feature_store.format.row_order import RowOrder
from foldfeed.feature_store.format.schema import DELETION_OVERFLOW
from foldfeed.feature_store.parts.shard_reader import FileRange, ReadRun, ShardReader

Task: TypeAlias = Callable[[], object]
CropArrays: TypeAlias = "tuple[NDArray[np.uint8], NDArray[np.int32]]"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A piece of an alignment.

    Attributes:
      msa: uint8 (rows, residues), codes of `alphabet`.
      deletions: int32 (rows, residues).
    """

    msa: NDArray[np.uint8]
    deletions: NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slab(Crop):
    """A crop of rows that lie side by side in the store, the query first.

    Attributes:
      run: which rows.
    """

    run: StoredRun
    _order: RowOrder

    @property
    def ranks(self) -> NDArray[np.int64]:
        """The rank of each row, int64 (rows,), computed anew at every access (up to a millisecond)."""
        return self._order.ranks(stored_rows_of(self.run, self._order.depth))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CropPlan:
    """What a crop reads, known before any of it is read.

    Attributes:
      record_id: the record.
      part_id: the part that holds it.
      num_rows: rows of the crop.
      num_residues: residues of the crop.
      msa_tiles: int64, tiles of the part's array ``msa``, ascending.
      deletion_tiles: int64, tiles of ``deletion``, ascending.
      num_cells: cells that are decoded, those of both arrays together.
      num_bytes: bytes that these tiles take on disk, checksums included; tiles of nothing but the fill value
        take none.
      num_reads: reads they come in, when the crop is read alone.
    """

    record_id: str
    part_id: str
    num_rows: int
    num_residues: int
    msa_tiles: NDArray[np.int64]
    deletion_tiles: NDArray[np.int64]
    num_cells: int
    num_bytes: int
    num_reads: int


class TiledRecord(NamedTuple):
    """A record as its tiles see it.

    Attributes:
      record_id: its id.
      grid: its tiles.
      order: of its rows.
      first_residue: into ``aatype``.
      first_overflow: into ``deletion_overflow``.
      num_overflow: entries there.
    """

    record_id: str
    grid: RecordGrid
    order: RowOrder
    first_residue: int
    first_overflow: int
    num_overflow: int


class CropJob(NamedTuple):
    """One crop: what it reads and where it goes.

    Attributes:
      selection: rows as asked for, resolved.
      record: of which record.
      window: residues ``[start, stop)``.
      rows: stored rows, in the order of the output.
      query_apart: whether output row 0 of ``msa`` is the query and comes from ``aatype``, not from a tile.
      msa_boxes: tiles of ``msa``.
      deletion_boxes: tiles of ``deletion``.
      msa: uint8 (rows, residues), to be filled.
      deletions: int32 (rows, residues), to be filled.
    """

    record: TiledRecord
    window: tuple[int, int]
    selection: Rows
    rows: RowIndex
    query_apart: bool
    msa_boxes: list[TileBox]
    deletion_boxes: list[TileBox]
    msa: NDArray[np.uint8]
    deletions: NDArray[np.int32]


# A box of a tile, the array it goes to, and the crop it belongs to:
# ``out[box.out_rows, box.out_cols] = tile[box.tile_rows, box.tile_cols]``. A plain tuple: a crop has dozens.
_Target: TypeAlias = "tuple[TileBox, NDArray[np.uint8] | NDArray[np.int32], CropJob]"


def boxes_of(
    record: TiledRecord, window: tuple[int, int], rows: Rows
) -> tuple[RowIndex, list[TileBox], list[TileBox]]:
    """Returns the stored rows of a selection, and the tiles of ``msa`` and ``deletion`` that it reads.

    Args:
      record: the record.
      window: residues ``[start, stop)``.
      rows: ranks (see `grid.resolve_rows`) or a run of stored rows (see `grid.resolve_run`).
    """
    if isinstance(rows, StoredRun):
        stored = stored_rows_of(rows, record.grid.depth)
        return stored, *plan_run(record.grid, window, rows)
    selected = record.order.stored_rows(rows)
    boxes = plan_crop(record.grid, window, selected)
    return selected, boxes, boxes


class ArrayReads(NamedTuple):
    """What some crops read of one array.

    Attributes:
      array: the array.
      targets: where the cells of each tile go, in the order of the tiles.
      runs: reads; their entries name places in ``targets``.
      missing: places in ``targets`` of tiles that are not stored.
    """

    array: ShardReader
    targets: list[_Target]
    runs: list[ReadRun]
    missing: list[int]


def sizes_of(reads: Sequence[ArrayReads], grid: RecordGrid) -> tuple[int, int]:
    """Returns the bytes that the tiles of one crop take on disk and the cells they have, see `CropPlan`.

    What is to be read says it, so no index is looked at again.

    Args:
      reads: of one crop.
      grid: of its record.
    """
    num_bytes = num_tiles = 0
    for _, targets, runs, missing in reads:
        # Both ends of a run that wraps around may lie in one tile, one behind the other.
        sizes = {number: size for run in runs for _, number, _, size in run.entries}
        num_bytes += sum(sizes.values())
        num_tiles += len(sizes)
        if missing:
            num_tiles += len({targets[place][0].tile for place in missing})
    return num_bytes, num_tiles * grid.tile_rows * grid.tile_cols


class TileReader:
    """The tiles of one part. Thread safe, because shard readers are."""

    def __init__(self, part_id: str, path: str, arrays: Mapping[str, ShardReader]) -> None:
        """Reads nothing.

        Args:
          part_id: the part.
          path: of the part, for messages.
          arrays: of the part.
        """
        self.part_id = part_id
        self._path = path
        self._msa = arrays["msa"]
        self._deletion = arrays["deletion"]
        self._overflow = arrays["deletion_overflow"]
        self._aatype = arrays["aatype"]

    def openers(self, jobs: Sequence[CropJob]) -> list[Task]:
        """Returns tasks that read what crops need first and nobody read yet: the indices of shards."""
        arrays = [self._msa, self._deletion]
        if any(job.query_apart for job in jobs):
            arrays.append(self._aatype)
        return [array.open for array in arrays if not array.is_open]

    def plan(self, record: TiledRecord, window: tuple[int, int], rows: Rows, max_read_bytes: int) -> CropPlan:
        """Returns what a crop would read; see `boxes_of` and `tasks` for the arguments."""
        stored, *both = boxes_of(record, window, rows)
        tiles = [sorted({box.tile for box in boxes}) for boxes in both]
        arrays = (self._msa, self._deletion)
        runs = [array.runs(found, max_read_bytes)[0] for array, found in zip(arrays, tiles, strict=True)]
        return CropPlan(
            record_id=record.record_id,
            part_id=self.part_id,
            num_rows=num_rows_of(stored),
            num_residues=window[1] - window[0],
            msa_tiles=np.array(tiles[0], dtype=np.int64),
            deletion_tiles=np.array(tiles[1], dtype=np.int64),
            num_cells=record.grid.tile_rows * record.grid.tile_cols * sum(map(len, tiles)),
            num_bytes=sum(entry[3] for found in runs for run in found for entry in run.entries),
            num_reads=sum(map(len, runs)),
        )

    def ranges(
        self, record: TiledRecord, window: tuple[int, int], rows: Rows, max_read_bytes: int
    ) -> list[FileRange]:
        """Returns the stretches of files that a crop reads; see `plan` for the arguments."""
        _, msa_boxes, deletion_boxes = boxes_of(record, window, rows)
        found = []
        for array, boxes in ((self._msa, msa_boxes), (self._deletion, deletion_boxes)):
            runs, _ = array.runs(sorted({box.tile for box in boxes}), max_read_bytes)
            found += [FileRange(array.path, run.start, run.end - run.start) for run in runs]
        # The query comes from there, as in `job`.
        if msa_boxes is not deletion_boxes:
            found += self._aatype.ranges(record.first_residue + window[0], record.first_residue + window[1])
        first = record.first_overflow
        return found + self._overflow.ranges(first, first + record.num_overflow)

    def job(
        self,
        record: TiledRecord,
        window: tuple[int, int],
        rows: Rows,
        out: CropArrays | None = None,
    ) -> CropJob:
        """Returns a crop that is still to be read; see `boxes_of` for the arguments.

        Args:
          record: the record.
          window: residues ``[start, stop)``.
          rows: which rows.
          out: arrays of exactly the crop's shape; fresh ones when None.
        """
        stored, msa_boxes, deletion_boxes = boxes_of(record, window, rows)
        shape = (num_rows_of(stored), window[1] - window[0])
        if out is None:
            msa, deletions = np.empty(shape, dtype=np.uint8), np.zeros(shape, dtype=np.int32)
        else:
            msa, deletions = out
            deletions.fill(0)
        apart = msa_boxes is not deletion_boxes
        return CropJob(record, window, rows, stored, apart, msa_boxes, deletion_boxes, msa, deletions)

    def reads(self, jobs: Sequence[CropJob], max_read_bytes: int) -> list[ArrayReads]:
        """Returns what fills the arrays of crops; neighbouring tiles share a read, whosever they are.

        Args:
          jobs: crops of records of this part.
          max_read_bytes: of one read.
        """
        msa: list[_Target] = [(box, job.msa, job) for job in jobs for box in job.msa_boxes]
        deletion: list[_Target] = [(box, job.deletions, job) for job in jobs for box in job.deletion_boxes]
        if len(jobs) > 1:
            msa.sort(key=_tile_of)
            deletion.sort(key=_tile_of)
        return [
            ArrayReads(array, targets, *array.runs([box.tile for box, _, _ in targets], max_read_bytes))
            for array, targets in ((self._msa, msa), (self._deletion, deletion))
        ]

    def tasks(self, jobs: Sequence[CropJob], reads: Sequence[ArrayReads]) -> list[Task]:
        """Returns tasks that fill the arrays of crops.

        Args:
          jobs: crops.
          reads: of them, by `reads`.
        """
        found: list[Task] = []
        for array, targets, runs, missing in reads:
            found += [functools.partial(_fill, array, run, targets) for run in runs]
            if array is self._msa:
                # Every cell of a tile that is not stored is the fill value; `deletions` are zero already.
                for place in missing:
                    box, out, _ = targets[place]
                    out[box.out_rows, box.out_cols] = alphabet.PADDING
        return found + [functools.partial(self._fill_query, job) for job in jobs if job.query_apart]

    def finish(self, job: CropJob) -> None:
        """Completes a crop whose tasks are done: deletion counts above 254."""
        if job.record.num_overflow:
            self._restore_overflow(job)

    def finishers(self, jobs: Sequence[CropJob]) -> list[Task]:
        """Returns tasks that `finish` those of some crops that may need it."""
        return [functools.partial(self.finish, job) for job in jobs if job.record.num_overflow]

    def result(self, job: CropJob) -> Crop:
        """Returns a finished crop: a `Slab` for a run of stored rows."""
        if isinstance(job.selection, StoredRun):
            return Slab(msa=job.msa, deletions=job.deletions, run=job.selection, _order=job.record.order)
        return Crop(msa=job.msa, deletions=job.deletions)

    def _fill_query(self, job: CropJob) -> None:
        start, stop = (job.record.first_residue + edge for edge in job.window)
        job.msa[0] = self._aatype.read(start, stop)

    def _restore_overflow(self, job: CropJob) -> None:
        """Replaces cells that hold 255 by their exact counts, in place."""
        out_row, out_col = np.nonzero(job.deletions == DELETION_OVERFLOW)
        if out_row.size == 0:
            return
        record, grid = job.record, job.record.grid
        entries = self._overflow.read(record.first_overflow, record.first_overflow + record.num_overflow)
        row = job.rows.start + out_row if isinstance(job.rows, slice) else job.rows[out_row]
        col = job.window[0] + out_col
        tile = (row // grid.tile_rows) * grid.col_tiles + col // grid.tile_cols
        cell = (tile * grid.tile_rows + row % grid.tile_rows) * grid.tile_cols + col % grid.tile_cols
        order = np.argsort(entries[:, 0])
        found = order[np.searchsorted(entries[order, 0], cell).clip(max=len(order) - 1)]
        if not np.array_equal(entries[found, 0], cell):
            raise CorruptDataError(
                f"{self._path}, record {record.record_id}",
                "a deletion count above 254 has no entry in deletion_overflow",
            )
        job.deletions[out_row, out_col] = entries[found, 1]


def _tile_of(target: _Target) -> int:
    return target[0].tile


def _fill(array: ShardReader, run: ReadRun, targets: list[_Target]) -> None:
    """Reads a run of tiles and copies their cells to where they belong.

    Raises:
      CorruptDataError: it names the record besides the chunk.
    """
    shape = array.spec.chunk[1:]
    last = -1
    place = run.entries[0][0]
    try:
        data = array.fetch(run)
        for place, number, at, size in run.entries:
            # Two crops, or both ends of a run that wraps around, may want the same tile.
            if number != last:
                tile = np.ndarray(shape, np.uint8, array.decode(number, data, at, size))
                last = number
            (_, tile_rows, tile_cols, out_rows, out_cols), out, _ = targets[place]
            out[out_rows, out_cols] = tile[tile_rows, tile_cols]
    except CorruptDataError as error:
        record_id = targets[place][2].record.record_id
        raise CorruptDataError(f"{error.where} (record {record_id})", error.reason) from error
    except Exception as error:
        error.add_note(f"while reading record {targets[place][2].record.record_id}")
        raise


def pair_of(out: object) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the two arrays that a caller gave to be filled; dtypes and shapes are not checked here.

    Raises:
      ValueError: it is not a tuple or list of two arrays.
    """
    if not isinstance(out, tuple | list) or not all(isinstance(array, np.ndarray) for array in out):
        kind = f"{out.dtype} {out.shape} array" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"out is a {kind}; it must be a pair of arrays (msa, deletions)")
    if len(out) != 2:
        raise ValueError(f"out holds {len(out)} arrays; it must be a pair of arrays (msa, deletions)")
    return out[0], out[1]
