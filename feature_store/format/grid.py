"""Layout arithmetic: which tile holds which cell, and what a crop must read. Pure; no I/O.

An alignment of ``depth`` rows and ``length`` columns is cut into ``ceil(depth / tile_rows)`` row tiles times
``ceil(length / tile_cols)`` column tiles. A record's tiles lie side by side in its part, row tiles outermost:

    tile = first_tile + row_tile * col_tiles + col_tile

so the tiles of one band of rows are contiguous on disk. Both kinds of crop profit: the first 512 rows of any
window are one run of tiles, and AlphaFold 2's block deletion keeps contiguous runs of rows over all columns.

Rows are stored rows here; `row_order` says which rank each of them has.

Invariant: for any crop the boxes of a plan cover each output cell exactly once (tested as a property).
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format.settings import StoreSettings

# What may stand for a window: a slice, cut as NumPy cuts it, or an integer for one.
Window: TypeAlias = "slice | int"
RowIndex: TypeAlias = "slice | NDArray[np.int64]"


class StoredRun(NamedTuple):
    """The query and a cyclic run of the hits in stored order: in a permuted store, a random sample of rows.

    Hits are stored rows 1..depth-1; the run begins with hit ``start`` of these, counted from 0, and goes on
    with the first after the last. ``StoredRun(3, 4)`` of a record of 6 rows is stored rows 0, 4, 5, 1.

    Attributes:
      start: 0 to depth - 2 (0 when there is no hit).
      num_rows: 1 to depth, the query counted.
    """

    start: int
    num_rows: int


Rows: TypeAlias = "RowIndex | StoredRun"


class TileBox(NamedTuple):
    """One tile's share of a crop: ``out[out_rows, out_cols] = tile[tile_rows, tile_cols]``.

    Attributes:
      tile: position of the tile in its part.
      tile_rows: rows inside the tile, a slice or int64 indices.
      tile_cols: columns inside the tile.
      out_rows: rows of the output, a slice or int64 indices, as many as ``tile_rows``.
      out_cols: columns of the output.
    A named tuple, because a crop makes dozens and a frozen dataclass costs five times as much to make.
    """

    tile: int
    tile_rows: RowIndex
    tile_cols: slice
    out_rows: RowIndex
    out_cols: slice


class RecordGrid(NamedTuple):
    """The tiles of one record; a named tuple for the reason of `TileBox`."""

    first_tile: int
    depth: int
    length: int
    tile_rows: int
    tile_cols: int

    @property
    def row_tiles(self) -> int:
        """Number of bands of rows."""
        return -(-self.depth // self.tile_rows)

    @property
    def col_tiles(self) -> int:
        """Number of tiles across a band."""
        return -(-self.length // self.tile_cols)

    @property
    def num_tiles(self) -> int:
        """Number of tiles of the record."""
        return self.row_tiles * self.col_tiles


def grid_of(first_tile: int, depth: int, length: int, settings: StoreSettings) -> RecordGrid:
    """Returns the tiles of a record of that depth and length."""
    return RecordGrid(first_tile, depth, length, settings.tile_rows, settings.tile_cols)


def resolve_window(name: str, asked: Window | None, size: int) -> tuple[int, int]:
    """Returns the window ``[start, stop)`` that a slice or an integer means, as NumPy would read it.

    Slices are cut to what there is and negative numbers count from the end: of 263, ``slice(0, 512)`` is
    ``0, 263``, ``slice(-3, None)`` is ``260, 263`` and ``5`` is ``5, 6``.

    Args:
      name: of what is counted, for messages.
      asked: what was given; everything when None.
      size: how many there are.
    Raises:
      IndexError: what cannot be meant: a step, an empty window, an integer outside, anything else.
    """
    if asked is None:
        return 0, size
    if not isinstance(asked, slice):
        number = _integer(name, asked)
        if not -size <= number < size:
            raise IndexError(f"{name} {number} is outside 0..{size - 1}")
        return number % size, number % size + 1
    if asked.step is not None and _integer(name, asked.step) != 1:
        raise IndexError(
            f"{name} {_shown(asked)} has a step; only whole windows a:b inside 0:{size} are read"
        )
    ends = [None if end is None else _integer(name, end) for end in (asked.start, asked.stop)]
    start, stop, _ = slice(*ends).indices(size)
    if start >= stop:
        raise IndexError(f"{name} {_shown(asked)} is an empty window of 0:{size}; give a:b with a < b")
    return start, stop


def _shown(window: slice) -> str:
    ends = ["" if end is None else str(end) for end in (window.start, window.stop)]
    return ":".join([*ends, *([] if window.step is None else [str(window.step)])])


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise IndexError(
            f"{name} {value!r} is no integer and no slice of integers; nothing is rounded here"
        ) from error


def resolve_rows(rows: Window | RowIndex | None, depth: int) -> RowIndex:
    """Returns rows as a checked slice without open ends, or as int64 indices in the order asked for.

    Args:
      rows: a window as for `resolve_window`, or a list or array of ranks, where negative ones count from
        the end; everything when None.
      depth: how many rows there are.
    Raises:
      IndexError: a row outside ``0..depth``, an empty selection, or a slice with a step.
    """
    if rows is None or isinstance(rows, slice | int) or np.ndim(rows) == 0:
        return slice(*resolve_window("rows", cast("Window | None", rows), depth))
    index = np.asarray(rows)
    if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
        raise IndexError(f"rows must be one or more integers, not {index.dtype} {index.shape}")
    if int(index.min()) < -depth or int(index.max()) >= depth:
        wrong = int(index.min()) if int(index.min()) < -depth else int(index.max())
        raise IndexError(f"row {wrong} is outside 0..{depth - 1}")
    ranks = index.astype(np.int64)
    return np.where(ranks < 0, ranks + depth, ranks)


def plan_crop(grid: RecordGrid, window: tuple[int, int], rows: RowIndex) -> list[TileBox]:
    """Returns the tiles a crop must read and where their cells go, in the order they lie on disk.

    With tiles of 2 x 4 and a record of 3 x 6, rows 1:3 and residues 3:5 touch all four tiles.

    Args:
      grid: the record's tiles.
      window: residues ``[start, stop)``, see `resolve_window`.
      rows: see `resolve_rows`.
    """
    return _boxes_of(grid, window, _row_pieces(grid, rows))


def _boxes_of(
    grid: RecordGrid, window: tuple[int, int], pieces: list[tuple[int, RowIndex, RowIndex]]
) -> list[TileBox]:
    """Returns a box for every tile of the window in every piece of rows."""
    start, stop = window
    size = grid.tile_cols
    columns = []
    for col_tile in range(start // size, -(-stop // size)):
        left = col_tile * size
        low, high = max(start, left), min(stop, left + size)
        columns.append((col_tile, slice(low - left, high - left), slice(low - start, high - start)))
    first, across = grid.first_tile, grid.col_tiles
    return [
        TileBox(first + row_tile * across + col_tile, tile_rows, tile_cols, out_rows, out_cols)
        for row_tile, tile_rows, out_rows in pieces
        for col_tile, tile_cols, out_cols in columns
    ]


def resolve_run(run: StoredRun, depth: int) -> StoredRun:
    """Returns a run of stored rows as plain integers, checked against the depth.

    Raises:
      IndexError: it starts behind the last hit, or has no row or more rows than the record.
    """
    start, num_rows = _integer("start", run.start), _integer("num_rows", run.num_rows)
    if not 0 <= start < max(depth - 1, 1) or not 1 <= num_rows <= depth:
        raise IndexError(
            f"a run of {num_rows} rows from hit {start} is not possible in a record of {depth} rows; start "
            f"is 0 to {max(depth - 2, 0)} and num_rows, the query counted, 1 to {depth}"
        )
    return StoredRun(start, num_rows)


def stored_rows_of(run: StoredRun, depth: int) -> NDArray[np.int64]:
    """Returns the stored rows of a resolved run, int64 (num_rows,), the query first."""
    rows = run.start + np.arange(run.num_rows, dtype=np.int64)
    rows[1:] = 1 + (rows[1:] - 1) % max(depth - 1, 1)
    rows[0] = 0
    return rows


def plan_run(
    grid: RecordGrid, window: tuple[int, int], run: StoredRun
) -> tuple[list[TileBox], list[TileBox]]:
    """Returns the tiles of ``msa`` and of ``deletion`` that a run must read, in the order they lie on disk.

    They differ where the run does not touch the first band of rows: the query's tokens are then left to
    whoever has them without reading a tile of a hundred other rows (they are in ``aatype``), and ``msa`` has
    no box for output row 0. A tile that the run enters at both of its ends comes twice, one box after the
    other.

    Args:
      grid: the record's tiles.
      window: residues ``[start, stop)``, see `resolve_window`.
      run: see `resolve_run`.
    """
    first, stop = 1 + run.start, run.start + run.num_rows
    # (first stored row, last + 1, row of the output)
    spans = [(1, 1 + max(0, stop - grid.depth), 1 + grid.depth - first), (first, min(stop, grid.depth), 1)]
    hits = [span for span in spans if span[0] < span[1]]
    deletion = _span_boxes(grid, window, [(0, 1, 0), *hits])
    has_query = any(span[0] < grid.tile_rows for span in hits)
    return deletion if has_query else _span_boxes(grid, window, hits), deletion


def _span_boxes(
    grid: RecordGrid, window: tuple[int, int], spans: list[tuple[int, int, int]]
) -> list[TileBox]:
    pieces: list[tuple[int, RowIndex, RowIndex]] = []
    for low, high, out in spans:
        pieces += _slice_pieces(grid, low, high, out)
    boxes = _boxes_of(grid, window, pieces)
    boxes.sort(key=lambda box: box.tile)
    return boxes


def num_rows_of(rows: Rows) -> int:
    """Returns how many rows a resolved row selection holds."""
    if isinstance(rows, StoredRun):
        return rows.num_rows
    return rows.stop - rows.start if isinstance(rows, slice) else int(rows.size)


def _slice_pieces(
    grid: RecordGrid, start: int, stop: int, first_out: int
) -> list[tuple[int, RowIndex, RowIndex]]:
    """Returns `_row_pieces` of rows ``start:stop``, which go to rows from ``first_out`` on."""
    size = grid.tile_rows
    pieces: list[tuple[int, RowIndex, RowIndex]] = []
    for row_tile in range(start // size, -(-stop // size)):
        top = row_tile * size
        low, high = max(start, top), min(stop, top + size)
        shift = first_out - start
        pieces.append((row_tile, slice(low - top, high - top), slice(low + shift, high + shift)))
    return pieces


def _row_pieces(grid: RecordGrid, rows: RowIndex) -> list[tuple[int, RowIndex, RowIndex]]:
    """Returns (row tile, rows inside it, rows of the output) for every band of rows that is touched."""
    if isinstance(rows, slice):
        return _slice_pieces(grid, rows.start, rows.stop, 0)
    # A stable sort brings the rows of a tile together and keeps equal rows apart in the output.
    size = grid.tile_rows
    order = np.argsort(rows, kind="stable")
    tiles = rows[order] // size
    bounds = np.flatnonzero(np.diff(tiles)) + 1
    return [(int(rows[part[0]] // size), rows[part] % size, part) for part in np.split(order, bounds)]
