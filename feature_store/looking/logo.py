"""Sequence logos: the information in each column of an alignment, drawn as letters.

Owns the drawing; the numbers come from `measures.information`. Letters are outlines of matplotlib's own font,
so the picture needs no font on the machine that shows it.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter
from matplotlib.transforms import Affine2D

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.looking import measures
from foldfeed.feature_store.looking.plots import DPI, GRID, INK, style_axes
from foldfeed.feature_store.store.feature_store import Record

# WebLogo's chemistry classes (it calls Q and N "neutral").
COLOURS = {"GSTYC": "#2e8b3d", "QN": "#8e44ad", "KRH": "#1f5fbf", "DE": "#c8302b", "AVLIPWFM": "#22272e"}
NAMES = ("polar", "amide", "basic", "acidic", "hydrophobic")
COLUMNS_PER_LINE = 50
MAX_COLUMNS = 500
# A letter lower than this share of the axis is less than a pixel high.
MIN_HEIGHT = 0.004
# Between neighbouring stacks, in columns.
GAP = 0.06


def logo_figure(record: Record, window: slice) -> Figure:
    """Returns the sequence logo of a window of a record's alignment.

    The height of a stack is the information of its column in bits, corrected for the number of residues in it
    (`measures.information`); a letter's share of it is its share of the residues; the width of a stack is the
    share of rows that have a residue there, as in WebLogo 3. Below stands the query.

    Args:
      record: of a store.
      window: residues ``slice(a, b)``, 0-based; at most `MAX_COLUMNS`.
    Raises:
      ValueError: the window is wider.
    Source: T. D. Schneider and R. M. Stephens (1990); G. E. Crooks et al., "WebLogo", Genome Res. 14 (2004).
    """
    size = window.stop - window.start
    if size > MAX_COLUMNS:
        raise ValueError(f"a logo of {size} columns cannot be read; choose a window of at most {MAX_COLUMNS}")
    facts = measures.information(measures.window_counts(record, window))
    lines = math.ceil(size / COLUMNS_PER_LINE)
    across = min(size, COLUMNS_PER_LINE)
    figure = Figure(
        figsize=(max(4.5, 1.2 + 0.19 * across), 0.75 + 1.55 * lines), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(lines, 1, squeeze=False)[:, 0]
    for number, axes in enumerate(panels):
        columns = range(number * COLUMNS_PER_LINE, min(size, (number + 1) * COLUMNS_PER_LINE))
        _draw_line(axes, facts, columns, window.start, record.sequence)
        axes.set_xlim(columns.start - 0.7, columns.start + across - 0.3)
    panels[0].set_title(
        f"{record.record_id}: residues {window.start + 1:,} to {window.stop:,}, {record.depth:,} rows",
        fontsize=11,
    )
    _legend(figure)
    return figure


def _draw_line(axes: Axes, facts: measures.Information, columns: range, first: int, sequence: str) -> None:
    """Draws some columns; ``first`` is the residue of column 0."""
    style_axes(axes)
    top = math.log2(measures.NUM_RESIDUES)
    for letters, colour in COLOURS.items():
        outlines = [outline for column in columns for outline in _stack(facts, column, letters, top)]
        if outlines:
            axes.add_patch(PathPatch(Outline.make_compound_path(*outlines), facecolor=colour, linewidth=0))
    axes.set_ylim(0, top)
    axes.set_ylabel("bits")
    axes.yaxis.set_major_locator(FixedLocator([0, 1, 2, 3, 4]))
    axes.xaxis.set_major_locator(FixedLocator(list(columns)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda column, _: _label(first + round(column), sequence)))
    axes.tick_params(axis="x", length=0, pad=2, labelsize=7.5, labelcolor=INK)
    axes.spines["bottom"].set_color(GRID)


def _label(residue: int, sequence: str) -> str:
    """Returns the query's letter and, below every tenth, its number (from 1)."""
    number = residue + 1
    # Always two lines, so that all letters stand on one.
    return f"{sequence[residue]}\n{number if number % 10 == 0 or number == 1 else ' '}"


def _stack(facts: measures.Information, column: int, letters: str, top: float) -> list[Outline]:
    """Returns the outlines of some letters of one column, each at its height in the whole stack."""
    heights = facts.share[column] * facts.bits[column]
    # The most frequent letter on top; equal ones in the order of the alphabet.
    order = np.argsort(heights, kind="stable")
    floors = np.cumsum(heights[order]) - heights[order]
    width = (1 - GAP) * facts.occupancy[column]
    found = []
    for code, floor in zip(order.tolist(), floors.tolist(), strict=True):
        if alphabet.RESIDUES[code] in letters and heights[code] > MIN_HEIGHT * top:
            place = Affine2D().scale(width, heights[code]).translate(column - width / 2, floor)
            found.append(LETTERS[alphabet.RESIDUES[code]].transformed(place))
    return found


def _unit_letter(letter: str) -> Outline:
    """Returns the outline of a letter, stretched to the unit square."""
    outline = TextPath((0, 0), letter, size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = outline.get_extents()
    # An I would become a block as wide as the others; it keeps its slender shape in the middle.
    width = box.width if letter != "I" else 3 * box.width
    shift = 0.0 if letter != "I" else 1 / 3
    place = Affine2D().translate(-box.x0, -box.y0).scale(1 / width, 1 / box.height).translate(shift, 0)
    return place.transform_path(outline)


LETTERS = {letter: _unit_letter(letter) for letter in alphabet.RESIDUES}


def _legend(figure: Figure) -> None:
    handles = [
        PathPatch(Outline.unit_rectangle(), facecolor=colour, linewidth=0) for colour in COLOURS.values()
    ]
    figure.legend(
        handles,
        NAMES,
        title="width of a stack: share of rows with a residue; letters below: the query",
        title_fontsize=8,
        loc="outside lower center",
        ncols=len(NAMES),
        fontsize=8,
        frameon=False,
        handlelength=1,
    )
