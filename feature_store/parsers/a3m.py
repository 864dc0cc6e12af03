"""A3M text (HHblits, ColabFold, MMseqs2) as arrays.

Owns the rules of A3M: an upper-case letter or ``-`` is a column of the query, a lower-case letter is a
residue inserted left of the next column, ``.`` only pads. Does not own Stockholm
(`foldfeed.feature_store.parsers.stockholm`), merging or de-duplication. Invariants: no Python loop over
residues; the work per row is a few list operations; a text that comes in blocks is never held as a whole.

Pure functions without state: safe from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format.record import MAX_RESIDUES
from foldfeed.feature_store.parsers.alignment import AlignmentBuilder, ParsedAlignment
from foldfeed.feature_store.parsers.lines import Text, lines_of

# Temporaries cost about ten bytes a character; blocks of rows bound them at roughly 10 MB.
BLOCK_CHARACTERS = 1 << 20
# Columns and insertions of one row. A record has at most 100,000 columns; more insertions than a hundred
# times that are no alignment.
MAX_ROW_CHARACTERS = 10_000_000

# HH-suite stores secondary structure and solvent accessibility as extra rows of an alignment.
ANNOTATION_ROWS = ("ss_dssp", "sa_dssp", "aa_dssp", "ss_pred", "ss_conf", "aa_pred")

_GAP = ord("-")
_PAD = ord(".")
_END = b"\0"

# Header, residues and line of the header.
Row = tuple[str, bytes, int]


def parse_a3m(text: Text, max_rows: int | None = None) -> ParsedAlignment:
    """Returns the rows of an A3M text, the query first.

    ``>q`` ``ACD`` ``>h`` ``A-kkD`` gives the letters ``ACD`` and ``A-D`` and the deletions ``000`` and
    ``002``. Rows may be wrapped over lines. Comment lines (``#``) before the first header and the
    annotation rows of HH-suite (``ss_pred`` and others) are skipped.

    Args:
      text: a whole text, or its bytes in blocks.
      max_rows: most rows; any number when None.
    Raises:
      AlignmentParseError: no row, text before the first header, a row without residues, a character that is
        no residue, a row with another number of columns than the first, more rows than ``max_rows``, a row of
        more than `MAX_ROW_CHARACTERS`, or text behind a NUL byte; each with its line.
    Source: HH-suite user guide, "A3M format"; AlphaFold 2 ``parsers.parse_a3m``.
    """
    return alignment_of(a3m_rows(text), max_rows)


def alignment_of(rows: Iterable[Row], max_rows: int | None = None) -> ParsedAlignment:
    """Returns the alignment of rows of A3M, the query first, each with its header and its line.

    Raises:
      AlignmentParseError: as `parse_a3m`.
    """
    names: list[str] = []
    builder: AlignmentBuilder | None = None
    length = query_insertions = pending_size = 0
    pending: list[bytes] = []
    lines: list[int] = []
    for name, row, line in rows:
        if builder is None:
            length, query_insertions = _measure_query(row, line)
            builder = AlignmentBuilder(length)
        if max_rows is not None and len(names) >= max_rows:
            raise AlignmentParseError(f"the alignment has more than {max_rows} rows", line)
        names.append(name)
        pending.append(row)
        lines.append(line)
        pending_size += len(row)
        if pending_size >= BLOCK_CHARACTERS:
            builder.add(*_parse_block(pending, lines, length))
            pending, lines, pending_size = [], [], 0
    if builder is None:
        raise AlignmentParseError("A3M text holds no row; expected '>' and a name, then a sequence")
    if pending:
        builder.add(*_parse_block(pending, lines, length))
    return builder.finish(names, query_insertions)


def a3m_rows(text: Text) -> Iterator[Row]:
    """Yields header, joined residues and line of the header of every row that is no annotation.

    Raises:
      AlignmentParseError: text before the first header, a row without residues or of more than
        `MAX_ROW_CHARACTERS`, or text behind a NUL byte.
    """
    header: tuple[str, int] | None = None
    pieces: list[bytes] = []
    size = 0
    ended = False
    for number, raw in lines_of(text):
        line = raw.strip()
        if not line:
            continue
        if ended and line.strip(b"\0 \r\t"):
            raise _goes_on(number)
        if _END in line and header is not None:
            # MMseqs2 and ffindex end an entry with a NUL byte, and files cut from their databases keep it.
            head, _, tail = line.partition(_END)
            if tail.strip(b"\0 \r\t"):
                raise _goes_on(number)
            ended, line = True, head.strip()
            if not line:
                continue
        if line.startswith(b">"):
            if header is not None and not _is_annotation(header[0]):
                yield header[0], _joined(header, pieces), header[1]
            header, pieces, size = (line[1:].decode("utf-8", errors="replace").strip(), number), [], 0
        elif header is not None:
            pieces.append(line)
            size += len(line)
            if size > MAX_ROW_CHARACTERS:
                raise AlignmentParseError(
                    f"row {shown(header[0])} has more than {MAX_ROW_CHARACTERS} characters", header[1]
                )
        elif not line.startswith(b"#"):
            raise AlignmentParseError(
                f"text before the first '>' header: {shown(line.decode('utf-8', errors='backslashreplace'))}",
                number,
            )
    if header is not None and not _is_annotation(header[0]):
        yield header[0], _joined(header, pieces), header[1]


def _goes_on(line: int) -> AlignmentParseError:
    return AlignmentParseError(
        "the text goes on behind a NUL byte, as files of an MSA server do that hold one section per chain; "
        "import their folder as layout msa-server",
        line,
    )


def _is_annotation(header: str) -> bool:
    return header.partition(" ")[0] in ANNOTATION_ROWS


def _joined(header: tuple[str, int], pieces: list[bytes]) -> bytes:
    if not pieces:
        raise AlignmentParseError(f"row {shown(header[0])} has no residues", header[1])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def shown(text: str) -> str:
    """Returns a name or line for a message: quoted, and cut where a damaged file makes it endless."""
    return repr(text[:40])


def _measure_query(row: bytes, line: int) -> tuple[int, int]:
    """Returns columns and inserted residues of the query."""
    characters = np.frombuffer(row, dtype=np.uint8)
    length = int(_is_column(characters).sum())
    if length == 0:
        raise AlignmentParseError("the first row (the query) has no upper-case residue", line)
    refuse_long_query(length, line)
    return length, int(_is_inserted(characters).sum())


def refuse_long_query(length: int, line: int) -> None:
    """Raises where a query has more residues than a record can have, before its rows are read.

    Raises:
      AlignmentParseError: more than `MAX_RESIDUES`.
    """
    if length > MAX_RESIDUES:
        raise AlignmentParseError(
            f"the query has {length} residues; a record holds at most {MAX_RESIDUES}", line
        )


def _is_column(characters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return ((characters >= ord("A")) & (characters <= ord("Z"))) | (characters == _GAP)


def _is_inserted(characters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (characters >= ord("a")) & (characters <= ord("z"))


def _parse_block(
    rows: list[bytes], lines: list[int], length: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns letters (rows, length) and the cells right of inserted residues, for `AlignmentBuilder.add`."""
    characters = np.frombuffer(b"".join(rows), dtype=np.uint8)
    starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    column, inserted = _is_column(characters), _is_inserted(characters)
    illegal = ~(column | inserted | (characters == _PAD))
    if illegal.any():
        at = int(np.argmax(illegal))
        row = int(np.searchsorted(starts, at, side="right")) - 1
        raise AlignmentParseError(
            f"{chr(characters[at])!r} at position {at - int(starts[row]) + 1} of the row is no residue "
            "and no '-' or '.'",
            lines[row],
        )
    counts = np.add.reduceat(column, starts, dtype=np.int64)
    if (counts != length).any():
        row = int(np.argmax(counts != length))
        raise AlignmentParseError(
            f"the row has {int(counts[row])} columns (upper case and '-'), the query has {length}", lines[row]
        )
    places = np.flatnonzero(inserted)
    if len(places):
        # The next column's number in the block; a row's last insertions would point into the row below.
        cells = np.cumsum(column, dtype=np.int64)[places]
        of_row = np.searchsorted(starts, places, side="right") - 1
        places = cells[cells < (of_row + 1) * length]
    return characters[column].reshape(len(rows), length), places
