"""Layout arithmetic: which tile holds which cell, and what a crop must read. Pure; no I/O.

An alignment of ``depth`` rows and ``length`` columns is cut into ``ceil(depth / tile_rows)`` row tiles times
``ceil(length / tile_cols)`` column tiles. A record's tiles lie side by side in its part, row tiles outermost:

    tile = first_tile + row_tile * col_tiles + col_tile

so the tiles of one band of rows are contiguous on disk. Both kinds of crop profit: the first 512 rows of any
window are one run of tiles, and AlphaFold 2's block deletion keeps contiguous runs of rows over all columns.

Invariant: for any crop the boxes of a plan cover each output cell exactly once (tested as a property).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.settings import StoreSettings

RowIndex: TypeAlias = "slice | NDArray[np.int64]"


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordGrid:
    """The tiles of one record."""

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
    return RecordGrid(
        first_tile=first_tile,
        depth=depth,
        length=length,
        tile_rows=settings.tile_rows,
        tile_cols=settings.tile_cols,
    )


def resolve_residues(residues: slice | None, length: int) -> tuple[int, int]:
    """Returns the window ``[start, stop)`` that a slice of residues means, checked against the length.

    Raises:
      IndexError: the window is empty, has a step, or reaches outside ``0..length``. Python's own slices would
        shrink silently, and a loader would train on crops that are shorter than it believes.
    """
    if residues is None:
        return 0, length
    start = 0 if residues.start is None else int(residues.start)
    stop = length if residues.stop is None else int(residues.stop)
    if residues.step not in (None, 1) or not 0 <= start < stop <= length:
        raise IndexError(
            f"residues {start}:{stop} (step {residues.step}) is not a window inside 0:{length}; "
            "give slice(a, b) with 0 <= a < b <= length"
        )
    return start, stop


def resolve_rows(rows: RowIndex | None, depth: int) -> RowIndex:
    """Returns rows as a checked slice without open ends, or as int64 indices in the order asked for.

    Raises:
      IndexError: a row outside ``0..depth``, an empty selection, or a slice with a step.
    """
    if rows is None:
        return slice(0, depth)
    if isinstance(rows, slice):
        start = 0 if rows.start is None else int(rows.start)
        stop = depth if rows.stop is None else int(rows.stop)
        if rows.step not in (None, 1) or not 0 <= start < stop <= depth:
            raise IndexError(
                f"rows {start}:{stop} (step {rows.step}) is not a range inside 0:{depth}; "
                "give slice(a, b) with 0 <= a < b <= depth, or an array of row numbers"
            )
        return slice(start, stop)
    index = np.asarray(rows)
    if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
        raise IndexError(f"rows must be one or more integers, not {index.dtype} {index.shape}")
    if int(index.min()) < 0 or int(index.max()) >= depth:
        wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise IndexError(f"row {wrong} is outside 0..{depth - 1}")
    return index.astype(np.int64)


def plan_crop(grid: RecordGrid, window: tuple[int, int], rows: RowIndex) -> list[TileBox]:
    """Returns the tiles a crop must read and where their cells go, in the order they lie on disk.

    With tiles of 2 x 4 and a record of 3 x 6, rows 1:3 and residues 3:5 touch all four tiles.

    Args:
      grid: the record's tiles.
      window: residues ``[start, stop)``, see `resolve_residues`.
      rows: see `resolve_rows`.
    """
    start, stop = window
    boxes = []
    for row_tile, tile_rows, out_rows in _row_pieces(grid, rows):
        for col_tile in range(start // grid.tile_cols, -(-stop // grid.tile_cols)):
            left = col_tile * grid.tile_cols
            low, high = max(start, left), min(stop, left + grid.tile_cols)
            boxes.append(
                TileBox(
                    tile=grid.first_tile + row_tile * grid.col_tiles + col_tile,
                    tile_rows=tile_rows,
                    tile_cols=slice(low - left, high - left),
                    out_rows=out_rows,
                    out_cols=slice(low - start, high - start),
                )
            )
    return boxes


def num_rows_of(rows: RowIndex) -> int:
    """Returns how many rows a resolved row selection holds."""
    return rows.stop - rows.start if isinstance(rows, slice) else int(rows.size)


def _row_pieces(grid: RecordGrid, rows: RowIndex) -> list[tuple[int, RowIndex, RowIndex]]:
    """Returns (row tile, rows inside it, rows of the output) for every band of rows that is touched."""
    size = grid.tile_rows
    if isinstance(rows, slice):
        pieces: list[tuple[int, RowIndex, RowIndex]] = []
        for row_tile in range(rows.start // size, -(-rows.stop // size)):
            top = row_tile * size
            low, high = max(rows.start, top), min(rows.stop, top + size)
            pieces.append(
                (row_tile, slice(low - top, high - top), slice(low - rows.start, high - rows.start))
            )
        return pieces
    # A stable sort brings the rows of a tile together and keeps equal rows apart in the output.
    order = np.argsort(rows, kind="stable")
    tiles = rows[order] // size
    bounds = np.flatnonzero(np.diff(tiles)) + 1
    return [(int(rows[part[0]] // size), rows[part] % size, part) for part in np.split(order, bounds)]
