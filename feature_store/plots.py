"""Pictures of what a store holds, as PNG or SVG.

Owns drawing, not numbers: `coverage_image` returns the arrays that the picture shows, so tests look at those.
Uses matplotlib without pyplot: no display, no global state, safe in threads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from foldfeed.feature_store import alphabet
from foldfeed.feature_store.store import Record

CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}
# An image has no more rows than pixels: a deeper alignment is drawn from evenly spaced rows of the sorted
# one.
MAX_IMAGE_ROWS = 1200


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CoverageImage:
    """What the coverage picture shows.

    Attributes:
      identity: float32 (drawn rows, length): a row's identity to the query where it has a residue, NaN where
        it has a gap; rows ascend in identity, as in ColabFold's picture.
      row_numbers: int64 (drawn rows,): position of each drawn row among all sorted rows.
      coverage: int64 (length,): rows with a residue in each column, over the whole alignment.
      depth: rows of the whole alignment.
    """

    identity: NDArray[np.float32]
    row_numbers: NDArray[np.int64]
    coverage: NDArray[np.int64]
    depth: int


def coverage_image(msa: NDArray[np.uint8]) -> CoverageImage:
    """Returns coverage and identity of an alignment.

    Identity of a row is the share of all columns in which it has the query's residue.

    Args:
      msa: uint8 (depth, length), the query first.
    Source: ColabFold ``plot_msa_v2``.
    """
    depth = len(msa)
    residues = msa != alphabet.GAP
    identity = (msa == msa[0]).mean(axis=1, dtype=np.float32)
    order = np.argsort(identity, kind="stable")
    row_numbers = np.unique(np.linspace(0, depth - 1, min(depth, MAX_IMAGE_ROWS)).astype(np.int64))
    drawn = order[row_numbers]
    return CoverageImage(
        identity=np.where(residues[drawn], identity[drawn, None], np.float32(np.nan)),
        row_numbers=row_numbers,
        coverage=residues.sum(axis=0, dtype=np.int64),
        depth=depth,
    )


def plot_coverage(record: Record, path: Path) -> None:
    """Draws coverage and identity of a record's alignment.

    Args:
      record: of a store.
      path: ends in ``.png`` or ``.svg``; its folder exists.
    Raises:
      ValueError: another ending.
    """
    canvas = CANVASES.get(path.suffix.lower())
    if canvas is None:
        raise ValueError(
            f"{path.name!r} is no picture this can write; end the name in {' or '.join(CANVASES)}"
        )
    picture = coverage_image(record.msa())
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        picture.identity,
        extent=(0.5, record.length + 0.5, 0.0, float(picture.depth)),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="rainbow_r",
        vmin=0,
        vmax=1,
    )
    columns = np.arange(1, record.length + 1)
    axes.plot(columns, picture.coverage, color="black", linewidth=1.2, label="rows with a residue")
    axes.set_xlabel("residue")
    axes.set_ylabel("rows, sorted by identity to the query")
    axes.set_title(f"{record.record_id}: {record.depth} rows x {record.length} residues")
    axes.set_xlim(0.5, record.length + 0.5)
    axes.set_ylim(0, max(picture.depth, 1))
    axes.legend(loc="lower right", fontsize="small", framealpha=0.8)
    figure.colorbar(image, ax=axes, label="identity to the query")
    canvas(figure).print_figure(str(path))
