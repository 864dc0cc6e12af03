"""Stockholm text (JackHMMER's ``-A``, Pfam) as arrays in query coordinates.

Owns the rules of Stockholm: blocks, markup lines, gaps written ``-``, ``.``, ``_`` or ``~``. Does not own
A3M or merging. Invariant: the columns that come out are those where the first row has a residue; what
another row has in the columns between them is counted, not lost. AlphaFold 2 tests only for ``-``, which is
right for HMMER's ``-A`` and wrong for other tools' files; here all gap characters are equal.

Pure functions without state: safe from any thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.a3m import (
    BLOCK_CHARACTERS,
    MAX_ROW_CHARACTERS,
    refuse_long_query,
    shown,
)
from foldfeed.feature_store.parsers.alignment import AlignmentBuilder, ParsedAlignment
from foldfeed.feature_store.parsers.lines import Text, lines_of

_GAPS = np.zeros(256, dtype=np.bool_)
_GAPS[[ord(gap) for gap in "-._~"]] = True

# Upper case for every letter, '-' for every gap, 0 for what no alignment may hold.
_NORMAL = np.zeros(256, dtype=np.uint8)
for _letter in range(26):
    _NORMAL[[ord("A") + _letter, ord("a") + _letter]] = ord("A") + _letter
_NORMAL[_GAPS] = ord("-")


def parse_stockholm(
    text: Text, max_rows: int | None = None, *, keep_rows: int | None = None
) -> ParsedAlignment:
    """Returns the rows of the only alignment of a Stockholm text, the query (first row) first.

    With the query ``A-CD`` and a hit ``AkC-``, the columns are ``ACD`` and the hit is ``AC-`` with one
    deletion left of its second column. A name that comes again continues its row (blocks).

    Args:
      text: a whole text of one alignment, or its bytes in blocks.
      max_rows: most rows; any number when None.
      keep_rows: rows behind the first so many are counted (`ParsedAlignment.num_left_out`) and not kept, nor
        looked at further; None keeps all. Memory is then that of the rows that are kept.
    Raises:
      AlignmentParseError: no ``# STOCKHOLM`` line, no ``//`` (a file that was cut), another alignment behind
        it, no row, a line without a sequence, rows of unequal length, a character that is no residue, a
        query without residues, more rows than ``max_rows``, or a row of more than `MAX_ROW_CHARACTERS`.
    Source: Pfam/HMMER user guide, "Stockholm format"; AlphaFold 2 ``parsers.parse_stockholm``.
    """
    rows, lines, num_left_out = _split(text, max_rows, keep_rows)
    found = alignment_of_aligned(list(rows), list(rows.values()), [lines[name] for name in rows])
    return dataclasses.replace(found, num_left_out=num_left_out) if num_left_out else found


def stockholm_descriptions(text: Text) -> dict[str, str]:
    """Returns what a Stockholm text says of its rows (``#=GS NAME DE ...``), by name."""
    return dict(found for _, raw in lines_of(text) if (found := description_in(raw)) is not None)


def description_in(line: bytes) -> tuple[str, str] | None:
    """Returns name and description of a row where a line is ``#=GS NAME DE ...``, else None."""
    fields = line.decode("utf-8", errors="replace").split(maxsplit=3) if line.startswith(b"#=GS ") else []
    return (fields[1], fields[3]) if len(fields) == 4 and fields[2] == "DE" else None


def alignment_lines(text: Text, only_one: str, *, may_be_empty: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of the lines of one alignment, between its first line and its ``//``.

    Lines come without white space around them, empty ones not at all.

    Args:
      text: of one alignment.
      only_one: says to the user why a second one is refused.
      may_be_empty: whether a text without any line is no error, as of a search that found nothing.
    Raises:
      AlignmentParseError: no ``# STOCKHOLM`` line, no ``//`` (a file that was cut), another alignment behind.
    """
    headed = closed = False
    for number, raw in lines_of(text):
        line = raw.strip()
        if not line:
            continue
        if not headed:
            if not line.startswith(b"# STOCKHOLM"):
                raise AlignmentParseError("not Stockholm: expected '# STOCKHOLM 1.0' first", number)
            headed = True
        elif closed:
            raise AlignmentParseError(f"a second alignment begins here; {only_one}", number)
        elif line == b"//":
            closed = True
        else:
            yield number, line
    if not headed and not may_be_empty:
        raise AlignmentParseError("not Stockholm: the text is empty")
    if headed and not closed:
        raise AlignmentParseError("the alignment has no closing '//': the file was cut off")


def stockholm_as_a3m(text: Text) -> list[tuple[str, bytes]]:
    """Returns name and A3M row (upper case and ``-`` in the query's columns, lower case between) of all rows.

    Unlike `parse_stockholm` it keeps the letters of insertions, also of those behind the last column.

    Raises:
      AlignmentParseError: as `parse_stockholm`.
    """
    rows, lines, _ = _split(text, None, None)
    names = list(rows)
    query = np.frombuffer(rows[names[0]], dtype=np.uint8)
    is_query_column = ~_GAPS[query]
    found = []
    for name, row in rows.items():
        letters = np.frombuffer(row, dtype=np.uint8)
        if len(letters) != len(query):
            raise AlignmentParseError(
                f"row {shown(name)} has {len(letters)} columns, the first row has {len(query)}", lines[name]
            )
        normal = _NORMAL[letters]
        if not normal.all():
            raise AlignmentParseError(f"row {shown(name)} holds what is no residue and no gap", lines[name])
        kept = is_query_column | (normal != ord("-"))
        # Lower case is 32 above upper case.
        found.append(
            (name, (normal + 32 * ~is_query_column.astype(np.bool_)).astype(np.uint8)[kept].tobytes())
        )
    return found


def alignment_of_aligned(
    names: list[str], rows: Sequence[bytes | bytearray], lines: list[int]
) -> ParsedAlignment:
    """Returns the alignment of rows of equal width, in the columns where the first has a residue.

    Args:
      names: of the rows.
      rows: letters of either case and gaps; the query first, at least one.
      lines: of the rows, for messages.
    Raises:
      AlignmentParseError: rows of unequal width, a character that is no residue, a query without residues.
    """
    width = len(rows[0])
    for name, row, line in zip(names, rows, lines, strict=True):
        if len(row) != width:
            raise AlignmentParseError(
                f"row {shown(name)} has {len(row)} columns, the first row has {width}", line
            )
    is_query_column = ~_GAPS[np.frombuffer(rows[0], dtype=np.uint8)]
    if not is_query_column.any():
        raise AlignmentParseError(f"the first row {shown(names[0])} (the query) has no residue", lines[0])
    refuse_long_query(int(is_query_column.sum()), lines[0])
    builder = AlignmentBuilder(int(is_query_column.sum()))
    step = max(1, BLOCK_CHARACTERS // width)
    for first in range(0, len(rows), step):
        block = slice(first, first + step)
        table = np.frombuffer(b"".join(rows[block]), dtype=np.uint8).reshape(-1, width)
        builder.add(*_parse_block(table, is_query_column, names[block], lines[block]))
    return builder.finish(names)


def _split(
    text: Text, max_rows: int | None, keep_rows: int | None
) -> tuple[dict[str, bytearray], dict[str, int], int]:
    """Returns rows in order of first appearance, their first line numbers, and how many were left out."""
    rows: dict[str, bytearray] = {}
    left_out: set[str] = set()
    lines: dict[str, int] = {}
    for number, line in alignment_lines(text, "a record holds one, so split the file behind each '//'"):
        if line.startswith(b"#"):
            continue
        fields = line.split()
        if len(fields) != 2:
            raise AlignmentParseError("expected a name and aligned residues on this line", number)
        name = fields[0].decode("utf-8", errors="replace")
        if name not in rows:
            if keep_rows is not None and len(rows) >= keep_rows:
                left_out.add(name)
                continue
            if max_rows is not None and len(rows) >= max_rows:
                raise AlignmentParseError(f"the alignment has more than {max_rows} rows", number)
            rows[name], lines[name] = bytearray(), number
        row = rows[name]
        row += fields[1]
        if len(row) > MAX_ROW_CHARACTERS:
            raise AlignmentParseError(
                f"row {shown(name)} has more than {MAX_ROW_CHARACTERS} characters", number
            )
    if not rows:
        raise AlignmentParseError("the alignment holds no row")
    return rows, lines, len(left_out)


def _parse_block(
    table: NDArray[np.uint8], is_query_column: NDArray[np.bool_], names: list[str], lines: list[int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns letters (rows, length) and the cells right of inserted residues, for `AlignmentBuilder.add`."""
    normal = _NORMAL[table]
    if not normal.all():
        row, column = (int(index) for index in np.argwhere(normal == 0)[0])
        raise AlignmentParseError(
            f"{chr(table[row, column])!r} at column {column + 1} of row {shown(names[row])} is no residue "
            "and no gap",
            lines[row],
        )
    rows, columns = np.nonzero((normal != ord("-")) & ~is_query_column)
    length = int(is_query_column.sum())
    # Of each column of the text, how many columns of the query lie left of it.
    before = np.cumsum(is_query_column, dtype=np.int64)[columns]
    is_kept = before < length
    return normal[:, is_query_column], (rows * length + before)[is_kept]
