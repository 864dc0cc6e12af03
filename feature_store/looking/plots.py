"""Pictures of what a store holds, as PNG or SVG.

Owns drawing, not numbers: those come from `measures` and `coverage_image`, so tests look at the numbers. Uses
matplotlib without pyplot: no display, and no global state but the salt of SVG ids, set while one is written.
The same numbers give the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import re
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.looking import measures
from foldfeed.feature_store.store.feature_store import Record

CANVASES = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}
# An image has no more rows than pixels: a deeper alignment is drawn from evenly spaced rows of the sorted
# one.
MAX_IMAGE_ROWS = 1200
DPI = 150
INK = "#1f2933"
GRID = "#d9dee4"
BAR = "#2f6f9f"
ACCENT = "#c8502b"
MAX_BINS = 60
MAX_NAME = 60
_SALT_LOCK = threading.Lock()


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


def coverage_figure(record: Record) -> Figure:
    """Returns coverage and identity of a record's alignment, as ColabFold users know it."""
    picture = coverage_image(measures.read_msa(record))
    figure, axes = new_figure(8, 4.6)
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
    edges = np.arange(record.length + 1) + 0.5
    # Not clipped: where every row has a residue the line runs along the upper edge.
    axes.stairs(
        picture.coverage,
        edges,
        baseline=None,
        color="black",
        linewidth=1.4,
        label="rows with a residue",
        clip_on=False,
    )
    axes.set_xlabel("residue")
    axes.set_ylabel("rows, sorted by identity to the query")
    _title(axes, record.record_id, f"{_count(record.depth, 'row')}, {_count(record.length, 'residue')}")
    axes.set_xlim(0.5, record.length + 0.5)
    axes.set_ylim(0, picture.depth)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), fontsize="small", frameon=False)
    figure.colorbar(image, ax=axes, label="identity to the query", format=FuncFormatter(_percent))
    return figure


def lengths_figure(table: pa.Table, name: str) -> Figure:
    """Returns a histogram of record lengths.

    Args:
      table: has ``length``.
      name: of the store, for the title.
    """
    lengths = table["length"].to_numpy()
    figure, axes = new_figure(7, 3.6)
    if len(lengths):
        edges = _integer_edges(int(lengths.min()), int(lengths.max()))
        axes.hist(lengths, bins=edges.tolist(), color=BAR, edgecolor="white", linewidth=0.5)
        _mark_median(axes, lengths, "residues")
    axes.set_xlabel("length (residues)")
    _count_axis(axes)
    _title(axes, name, f"lengths of {_count(len(lengths), 'record')}")
    return figure


def depths_figure(table: pa.Table, name: str) -> Figure:
    """Returns a histogram of alignment depths, in steps of equal ratio.

    Args:
      table: has ``depth``.
      name: of the store, for the title.
    """
    depths = table["depth"].to_numpy()
    figure, axes = new_figure(7, 3.6)
    if len(depths):
        # Five bins per factor of ten; the first one begins at depth 1, an alignment of the query alone.
        stop = int(np.ceil(np.log10(depths.max() + 1) * 5))
        axes.hist(
            depths,
            bins=(10 ** (np.arange(stop + 1) / 5)).tolist(),
            color=BAR,
            edgecolor="white",
            linewidth=0.5,
        )
        _log_axis(axes, "x", 1, int(depths.max()))
        _mark_median(axes, depths, "rows")
    axes.set_xlabel("depth (rows of the alignment, the query included)")
    _count_axis(axes)
    _title(axes, name, f"depths of {_count(len(depths), 'record')}")
    return figure


def neff_figure(table: pa.Table, name: str, num_records: int, identity: float) -> Figure:
    """Returns N_eff against length, coloured by depth.

    Args:
      table: of `measures.store_effective_rows`.
      name: of the store, for the title.
      num_records: of the store, of which the table may be a sample.
      identity: from which rows count as one.
    """
    lengths, depths, neff = (table[column].to_numpy() for column in ("length", "depth", "neff"))
    figure, axes = new_figure(7, 4.4)
    if len(neff):
        colour = matplotlib.colors.LogNorm(vmin=1, vmax=max(10, int(depths.max())))
        points = axes.scatter(
            lengths, neff, c=depths, norm=colour, cmap="viridis_r", s=26, edgecolor=INK, linewidth=0.4
        )
        bar = figure.colorbar(points, ax=axes, label="depth (rows)", format=FuncFormatter(_number))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        _log_axis(axes, "x", float(lengths.min()), float(lengths.max()))
        _log_axis(axes, "y", float(neff.min()), float(neff.max()))
    axes.set_xlabel("length (residues)")
    axes.set_ylabel(f"effective rows (N_eff at {identity:.0%} identity)")
    shown = _count(len(neff), "record")
    sample = shown if len(neff) == num_records else f"{len(neff):,} of {_count(num_records, 'record')}"
    _title(axes, name, f"effective rows of {sample}")
    return figure


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a figure with one pair of axes in the house style; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Gives axes the house style: light grid behind, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.7)
    axes.tick_params(labelsize="small")


def render(figure: Figure, suffix: str) -> bytes:
    """Returns a figure as a file.

    Args:
      figure: of this module.
      suffix: ``.png`` or ``.svg``.
    Raises:
      ValueError: another ending.
    """
    canvas = CANVASES.get(suffix.lower())
    if canvas is None:
        raise ValueError(f"{suffix!r} is no picture this can write; use {' or '.join(CANVASES)}")
    out = io.BytesIO()
    if canvas is FigureCanvasAgg:
        FigureCanvasAgg(figure).print_png(out)
        return out.getvalue()
    with _SALT_LOCK:
        # Without a salt matplotlib draws random ids, and the same picture would be other bytes every time.
        before = matplotlib.rcParams["svg.hashsalt"]
        matplotlib.rcParams["svg.hashsalt"] = "foldfeed"
        try:
            FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
        finally:
            matplotlib.rcParams["svg.hashsalt"] = before
    return out.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure to a file whose name ends in ``.png`` or ``.svg``."""
    path.write_bytes(render(figure, path.suffix))


def _integer_edges(low: int, high: int) -> NDArray[np.float64]:
    """Returns edges between integers, so that every bin holds the same number of possible values."""
    step = max(1, -(-(high - low + 1) // MAX_BINS))
    nice = next(size for size in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000) if size >= step)
    first = low // nice * nice
    return np.arange(first, high + nice + 1, nice).astype(np.float64) - 0.5


def _mark_median(axes: Axes, values: NDArray[np.integer], unit: str) -> None:
    low, middle, high = np.percentile(values, (5, 50, 95))
    axes.axvline(middle, color=ACCENT, linewidth=1.4)
    text = f"median {middle:,.0f} {unit}, 90 % within {low:,.0f} to {high:,.0f}"
    axes.set_title(text, loc="right", fontsize="small", color=ACCENT, pad=8)


def _title(axes: Axes, name: str, what: str) -> None:
    """Sets the title; a store's name is any text, and no font has all letters."""
    plain = re.sub(r"[^ -~]", "?", name)
    short = plain if len(plain) <= MAX_NAME else plain[: MAX_NAME - 3] + "..."
    axes.set_title(f"{short}: {what}", loc="left", fontsize=11, pad=8, parse_math=False)


def _count_axis(axes: Axes) -> None:
    axes.set_ylabel("records")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """Makes an axis logarithmic, with plain numbers instead of powers and as many as fit side by side."""
    span = np.log10(high / low)
    steps = (1,) if span > 2.3 else (1, 2, 5) if span > 1.2 else (1, 1.5, 2, 3, 4, 5, 7)
    # Room on both sides; a single value gets a factor of two.
    room = max(0.04 * span, 0.0 if span else 0.3)
    limits = (low / 10**room, high * 10**room)
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float, _position: object = None) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"


def _percent(value: float, _position: object = None) -> str:
    return f"{value:.0%}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
