"""Stockholm text (JackHMMER's ``-A``, Pfam) as arrays in query coordinates.

Owns the rules of Stockholm: blocks, markup lines, gaps written ``-``, ``.``, ``_`` or ``~``. Does not own
A3M or merging. Invariant: the columns that come out are those where the first row has a residue; what
another row has in the columns between them is counted, not lost. AlphaFold 2 tests only for ``-``, which is
right for HMMER's ``-A`` and wrong for other tools' files; here all gap characters are equal.

Pure functions without state: safe from any thread.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.a3m import BLOCK_CHARACTERS, ParsedAlignment, shown
from foldfeed.feature_store.parsers.bounded_files import without_mark

_GAPS = np.zeros(256, dtype=np.bool_)
_GAPS[[ord(gap) for gap in "-._~"]] = True

# Upper case for every letter, '-' for every gap, 0 for what no alignment may hold.
_NORMAL = np.zeros(256, dtype=np.uint8)
for _letter in range(26):
    _NORMAL[[ord("A") + _letter, ord("a") + _letter]] = ord("A") + _letter
_NORMAL[_GAPS] = ord("-")


def parse_stockholm(text: str | bytes) -> ParsedAlignment:
    """Returns the rows of the first alignment of a Stockholm text, the query (first row) first.

    With the query ``A-CD`` and a hit ``AkC-``, the columns are ``ACD`` and the hit is ``AC-`` with one
    deletion left of its second column. A name that comes again continues its row (blocks).

    Args:
      text: a whole file of one alignment.
    Raises:
      AlignmentParseError: no ``# STOCKHOLM`` line, no ``//`` (a file that was cut), another alignment behind
        it, no row, a line without a sequence, rows of unequal length, a character that is no residue, or a
        query without residues.
    Source: Pfam/HMMER user guide, "Stockholm format"; AlphaFold 2 ``parsers.parse_stockholm``.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    rows, lines = _split(without_mark(data))
    width = len(next(iter(rows.values())))
    for name, row in rows.items():
        if len(row) != width:
            raise AlignmentParseError(
                f"row {shown(name)} has {len(row)} columns, the first row has {width}", lines[name]
            )
    table = np.frombuffer(b"".join(rows.values()), dtype=np.uint8).reshape(len(rows), width)
    names = list(rows)
    is_query_column = ~_GAPS[table[0]]
    if not is_query_column.any():
        raise AlignmentParseError(
            f"the first row {shown(names[0])} (the query) has no residue", lines[names[0]]
        )
    length = int(is_query_column.sum())
    letters = np.empty((len(rows), length), dtype=np.uint8)
    deletions = np.empty((len(rows), length), dtype=np.int32)
    step = max(1, BLOCK_CHARACTERS // width)
    for first in range(0, len(rows), step):
        block = slice(first, min(first + step, len(rows)))
        letters[block], deletions[block] = _parse_block(
            table[block], is_query_column, names[block], [lines[name] for name in names[block]]
        )
    return ParsedAlignment(names=names, letters=letters, deletions=deletions)


def _split(data: bytes) -> tuple[dict[str, bytes], dict[str, int]]:
    """Returns the joined residues of every row in order of first appearance, and its first line number."""
    pieces: dict[str, list[bytes]] = {}
    lines: dict[str, int] = {}
    headed = closed = False
    for number, raw in enumerate(data.split(b"\n"), start=1):
        line = raw.strip()
        if not line:
            continue
        if not headed:
            if not line.startswith(b"# STOCKHOLM"):
                raise AlignmentParseError("not Stockholm: expected '# STOCKHOLM 1.0' first", number)
            headed = True
        elif closed:
            raise AlignmentParseError(
                "a second alignment begins here; a record holds one, so split the file behind each '//'",
                number,
            )
        elif line == b"//":
            closed = True
        elif not line.startswith(b"#"):
            fields = line.split()
            if len(fields) != 2:
                raise AlignmentParseError("expected a name and aligned residues on this line", number)
            name = fields[0].decode("utf-8", errors="replace")
            pieces.setdefault(name, []).append(fields[1])
            lines.setdefault(name, number)
    if not headed:
        raise AlignmentParseError("not Stockholm: the text is empty")
    if not closed:
        raise AlignmentParseError("the alignment has no closing '//': the file was cut off")
    if not pieces:
        raise AlignmentParseError("the alignment holds no row")
    return {name: b"".join(parts) for name, parts in pieces.items()}, lines


def _parse_block(
    table: NDArray[np.uint8], is_query_column: NDArray[np.bool_], names: list[str], lines: list[int]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    normal = _NORMAL[table]
    if not normal.all():
        row, column = (int(index) for index in np.argwhere(normal == 0)[0])
        raise AlignmentParseError(
            f"{chr(table[row, column])!r} at column {column + 1} of row {shown(names[row])} is no residue "
            "and no gap",
            lines[row],
        )
    inserted = (normal != ord("-")) & ~is_query_column
    seen = np.cumsum(inserted, axis=1, dtype=np.int32)[:, is_query_column]
    deletions = np.diff(seen, axis=1, prepend=np.int32(0))
    return normal[:, is_query_column], deletions
