"""Alignments as text: A3M, A2M, Stockholm.

    query  ACDE      A3M     A2M      Stockholm
    hit    A-DE      ACDE    AC..DE   AC--DE       2 residues inserted left of D in the hit
                     A-xxDE  A-xxDE   A-xxDE

Inserted residues are ``x``: a store keeps their number, not their names. Reading the text again gives equal
alignment and deletions. The first row is named by the record, the others by their hits; Stockholm needs
unique names, so a name that comes again gets its rank. Pure functions.

Source: HH-suite user guide (A3M); ColabFold ``colabfold/batch.py`` unserialize_msa; SAM documentation (A2M);
Pfam/HMMER user guide (Stockholm).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.exporters.rows import INSERTED, MAX_TEXT_BYTES, ExportRows, one_line, one_word
from foldfeed.feature_store.parsers.a3m import ANNOTATION_ROWS

# Temporaries cost about 30 bytes a character.
BLOCK_CHARACTERS = 4 << 20

# ColabFold numbers the chains of a query from here.
COLABFOLD_QUERY = "101"

_NEWLINE = ord("\n")


def to_a3m(rows: ExportRows) -> bytes:
    """Returns A3M text.

    Raises:
      ExportError: it would be larger than `MAX_TEXT_BYTES`.
    """
    size = int(rows.deletions.sum(dtype=np.int64)) + rows.msa.size
    if size > MAX_TEXT_BYTES:
        raise rows.refuse(f"its text would have {size} characters, most of them insertions; use npz")
    letters = rows.letters()
    names = _headers(rows)
    pieces: list[bytes] = []
    start = 0
    for stop in _block_ends(rows.deletions):
        lines = _a3m_lines(letters[start:stop], rows.deletions[start:stop])
        pieces.extend(b">%s\n%s" % pair for pair in zip(names[start:stop], lines, strict=True))
        start = stop
    return b"".join(pieces)


def to_colabfold(rows: ExportRows) -> bytes:
    """Returns ColabFold's A3M of a single chain: a line of length and copies, and a query called 101.

    Raises:
      ExportError: see `to_a3m`.
    """
    named = dataclasses.replace(rows, record_id=COLABFOLD_QUERY, description="")
    return b"#%d\t1\n%s" % (rows.length, to_a3m(named))


def to_a2m(rows: ExportRows) -> bytes:
    """Returns A2M text with ``.`` padding: every row has the same number of characters.

    Raises:
      ExportError: it would be larger than `MAX_TEXT_BYTES`.
    """
    table = _rectangle(rows, ord("."))
    return b"".join(
        b">%s\n%s\n" % (name, row.tobytes()) for name, row in zip(_headers(rows), table, strict=True)
    )


def to_stockholm(rows: ExportRows) -> bytes:
    """Returns Stockholm text; ``#=GC RF`` marks the columns of the query with ``x``.

    Gaps are ``-`` everywhere, because AlphaFold 2 takes every other character for a residue.

    Raises:
      ExportError: it would be larger than `MAX_TEXT_BYTES`, or the query itself has insertions, for which
        Stockholm has no place.
    """
    if rows.deletions[0].any():
        raise rows.refuse(
            "its query has inserted residues, and Stockholm would make columns of them; use a3m or a2m"
        )
    table = _rectangle(rows, ord("-"))
    names = _unique_names(rows)
    width = max(map(len, [*names, b"#=GC RF"])) + 1
    widths = rows.deletions.max(axis=0).astype(np.int64)
    marks = np.full(table.shape[1], ord("."), dtype=np.uint8)
    marks[np.cumsum(widths) + np.arange(rows.length)] = ord("x")
    lines = [b"# STOCKHOLM 1.0", b"#=GF ID " + rows.record_id.encode()]
    if one_line(rows.description):
        lines.append(b"#=GF DE " + one_line(rows.description).encode("utf-8", errors="replace"))
    lines.append(b"")
    lines.extend(name.ljust(width) + row.tobytes() for name, row in zip(names, table, strict=True))
    lines += [b"#=GC RF".ljust(width) + marks.tobytes(), b"//", b""]
    return b"\n".join(lines)


def _headers(rows: ExportRows) -> list[bytes]:
    """Returns one header per row; none that a reader takes for an annotation."""
    first = f"{rows.record_id} {one_line(rows.description)}".strip()
    names = [first]
    for rank, hit_id in enumerate(rows.hit_ids[1:], start=1):
        name = one_word(hit_id, f"row_{rank}")
        names.append("_" + name if name in ANNOTATION_ROWS else name)
    return [name.encode("utf-8", errors="replace") for name in names]


def _unique_names(rows: ExportRows) -> list[bytes]:
    seen: set[str] = set()
    names = []
    for rank, hit_id in enumerate([rows.record_id, *rows.hit_ids[1:]]):
        name = one_word(hit_id, f"row_{rank}")
        # A line that begins with # is markup, and // ends the alignment.
        name = "_" + name if name.startswith(("#", "//")) else name
        while name in seen:
            name = f"{name}_{rank}"
        seen.add(name)
        names.append(name.encode("utf-8", errors="replace"))
    return names


def _block_ends(deletions: NDArray[np.int32]) -> list[int]:
    """Returns where blocks of rows of about `BLOCK_CHARACTERS` end."""
    sizes = np.cumsum(deletions.sum(axis=1, dtype=np.int64) + deletions.shape[1])
    cuts = np.searchsorted(sizes, np.arange(BLOCK_CHARACTERS, int(sizes[-1]), BLOCK_CHARACTERS)) + 1
    return [*np.unique(cuts[cuts < len(sizes)]).tolist(), len(sizes)]


def _a3m_lines(letters: NDArray[np.uint8], deletions: NDArray[np.int32]) -> list[bytes]:
    """Returns one line per row, line break included: each letter after as many ``x`` as were inserted."""
    depth, length = letters.shape
    ends = np.full((depth, 1), _NEWLINE, dtype=np.uint8)
    sizes = np.concatenate([deletions.astype(np.int64) + 1, np.ones((depth, 1), dtype=np.int64)], axis=1)
    places = np.cumsum(sizes.ravel()) - 1
    text = np.full(int(places[-1]) + 1, INSERTED, dtype=np.uint8)
    text[places] = np.concatenate([letters, ends], axis=1).ravel()
    stops = (places[length :: length + 1] + 1).tolist()
    return [text[start:stop].tobytes() for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _rectangle(rows: ExportRows, pad: int) -> NDArray[np.uint8]:
    """Returns uint8 (depth, characters): before each column as many places as its longest insertion needs."""
    widths = rows.deletions.max(axis=0).astype(np.int64)
    width = int(widths.sum()) + rows.length
    if width * rows.depth > MAX_TEXT_BYTES:
        raise rows.refuse(
            f"its rows would have {width} characters each ({rows.depth} rows), because every row is padded "
            "to the "
            "longest insertion; use a3m"
        )
    columns = np.cumsum(widths) + np.arange(rows.length)
    table = np.full((rows.depth, width), pad, dtype=np.uint8)
    table[:, columns] = rows.letters()
    row, column = np.nonzero(rows.deletions)
    counts = rows.deletions[row, column].astype(np.int64)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    table[np.repeat(row, counts), np.repeat(columns[column] - counts, counts) + within] = INSERTED
    return table
