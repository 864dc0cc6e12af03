"""The alignment from which a profile for the search of templates is built.

Owns the way from search results to one Stockholm text in the query's columns. Does not own the program that
reads it (`tools.hmmsearch`). Invariants: the rows are those of the record, by the same caps and
the same order, each once; residues that are inserted between the query's columns are kept, because a profile
counts them; the ``RF`` line marks the query's columns and no other, so ``hmmbuild --hand`` makes one match
state of each. No Python loop over residues.

Source: AlphaFold 3 ``data/templates.py`` (an alignment of all databases, its query's columns as reference);
AlphaFold 2 ``data/tools/hmmsearch.py`` (that of UniRef90).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.parsers.a3m import a3m_rows
from foldfeed.feature_store.parsers.stockholm import stockholm_as_a3m
from foldfeed.pipelines.tools.search_tool import QUERY_NAME, SearchResult

_LOWER = bytes(range(ord("a"), ord("z") + 1))
_UPPER = bytes(range(ord("A"), ord("Z") + 1))
_RAISE = bytes.maketrans(_LOWER, _UPPER)


def profile_rows(
    sequence: str, results: Sequence[SearchResult], max_hits: Sequence[int | None]
) -> list[bytes]:
    """Returns the rows of a merged alignment as A3M, the query first.

    Args:
      sequence: the query.
      results: of the databases, in merge order.
      max_hits: per database, most rows taken with the query counted; None for all.
    Raises:
      AlignmentParseError: a result's text breaks its format.
    """
    query = sequence.encode("ascii")
    seen = {query}
    rows = [query]
    for result, cap in zip(results, max_hits, strict=True):
        found = (
            [row for _, row in stockholm_as_a3m(result.alignment)]
            if result.format == "stockholm"
            else [row.replace(b".", b"") for _, row, _ in a3m_rows(result.alignment)]
        )
        for row in found[:cap]:
            key = row.translate(None, _LOWER)
            if key not in seen:
                seen.add(key)
                rows.append(row)
    return rows


def to_stockholm(rows: Sequence[bytes]) -> bytes:
    """Returns rows of A3M as Stockholm with an ``RF`` line; inserted residues stand left in their columns.

    ``ACD`` and ``A-kkD`` give ``AC..D`` and ``A-KKD`` with the reference ``xx..x``.

    Args:
      rows: of equally many columns (upper case and ``-``), the query first.
    """
    length = len(rows[0].translate(None, _LOWER))
    widths = np.zeros(length + 1, dtype=np.int64)
    places = [_insertions(row, length) for row in rows]
    for counts in places:
        np.maximum(widths, counts, out=widths)
    # Where each of the query's columns lies: behind all insertion columns up to its own left side.
    column = np.cumsum(widths[:-1]) + np.arange(length)
    # The insertions left of column i end where it lies; those behind the last column begin after it.
    first = np.concatenate([column - widths[:-1], [length + widths[:-1].sum()]])
    width = int(length + widths.sum())
    lines = [b"# STOCKHOLM 1.0", b"#=GF ID " + QUERY_NAME.encode("ascii"), b""]
    names = [f"{number if number else QUERY_NAME}".encode("ascii") for number in range(len(rows))]
    indent = max(max(map(len, names)), len(b"#=GC RF")) + 1
    for name, row, counts in zip(names, rows, places, strict=True):
        lines.append(name.ljust(indent) + _placed(row, counts, column, first, width))
    reference = np.full(width, ord("."), dtype=np.uint8)
    reference[column] = ord("x")
    return b"\n".join([*lines, b"#=GC RF".ljust(indent) + reference.tobytes(), b"//", b""])


def _insertions(row: bytes, length: int) -> NDArray[np.int64]:
    """Returns int64 (length + 1,): residues inserted left of each column, and behind the last."""
    letters = np.frombuffer(row, dtype=np.uint8)
    inserted = letters >= ord("a")
    if not inserted.any():
        return np.zeros(length + 1, dtype=np.int64)
    before = np.cumsum(~inserted)[inserted]
    return np.bincount(before, minlength=length + 1)


def _placed(
    row: bytes, counts: NDArray[np.int64], column: NDArray[np.int64], first: NDArray[np.int64], width: int
) -> bytes:
    letters = np.frombuffer(row.translate(_RAISE), dtype=np.uint8)
    inserted = np.frombuffer(row, dtype=np.uint8) >= ord("a")
    line = np.full(width, ord("."), dtype=np.uint8)
    line[column] = letters[~inserted]
    if inserted.any():
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        line[np.repeat(first, counts) + within] = letters[inserted]
    return line.tobytes()
