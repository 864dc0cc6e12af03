"""A3M text (HHblits, ColabFold, MMseqs2) as arrays.

Owns the rules of A3M: an upper-case letter or ``-`` is a column of the query, a lower-case letter is a
residue inserted left of the next column, ``.`` only pads. Does not own Stockholm
(`foldfeed.feature_store.parsers.stockholm`), merging or de-duplication. Invariant: no Python loop over
residues; the work per row is one list append.

Pure functions without state: safe from any thread.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.parsers.bounded_files import without_mark

# Temporaries cost about ten bytes a character; blocks of rows bound them at roughly 160 MB.
BLOCK_CHARACTERS = 16 << 20

# HH-suite stores secondary structure and solvent accessibility as extra rows of an alignment.
ANNOTATION_ROWS = ("ss_dssp", "sa_dssp", "aa_dssp", "ss_pred", "ss_conf", "aa_pred")

_GAP = ord("-")
_PAD = ord(".")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParsedAlignment:
    """An alignment in query coordinates.

    The letters are kept next to the codes because AlphaFold 2 de-duplicates rows by their letters, where B
    and D differ, and not by the codes, where they do not.

    Attributes:
      names: the full header of every row, without ``>``.
      letters: uint8 (num_rows, length), ASCII ``A-Z`` and ``-``, the query first.
      deletions: int32 (num_rows, length): residues inserted immediately left of each column. Insertions right
        of the last column are dropped, as AlphaFold 2 drops them.
    """

    names: list[str]
    letters: NDArray[np.uint8]
    deletions: NDArray[np.int32]

    @property
    def msa(self) -> NDArray[np.uint8]:
        """uint8 (num_rows, length) codes of `foldfeed.feature_store.format.alphabet`; a fresh array."""
        return alphabet.ENCODE[self.letters]


def parse_a3m(text: str | bytes) -> ParsedAlignment:
    """Returns the rows of an A3M text, the query first.

    ``>q`` ``ACD`` ``>h`` ``A-kkD`` gives the letters ``ACD`` and ``A-D`` and the deletions ``000`` and
    ``002``. Rows may be wrapped over lines. Comment lines (``#``) before the first header and the
    annotation rows of HH-suite (``ss_pred`` and others) are skipped.

    Args:
      text: a whole file.
    Raises:
      AlignmentParseError: no row, text before the first header, a row without residues, a character that is
        no residue, or a row with another number of columns than the first; each with its line.
    Source: HH-suite user guide, "A3M format"; AlphaFold 2 ``parsers.parse_a3m``.
    """
    data = text.encode("utf-8") if isinstance(text, str) else text
    # MMseqs2 and ffindex end an entry with a NUL byte, and files cut from their databases keep it.
    names, rows, lines = _split(without_mark(data).rstrip(b"\x00\r\n \t"))
    if not rows:
        raise AlignmentParseError("A3M text holds no row; expected '>' and a name, then a sequence")
    length = int(_count_columns([rows[0]])[0])
    if length == 0:
        raise AlignmentParseError("the first row (the query) has no upper-case residue", lines[0])
    letters = np.empty((len(rows), length), dtype=np.uint8)
    deletions = np.empty((len(rows), length), dtype=np.int32)
    for first, last in _blocks([len(row) for row in rows]):
        block = slice(first, last)
        letters[block], deletions[block] = _parse_block(rows[block], lines[block], length)
    return ParsedAlignment(names=names, letters=letters, deletions=deletions)


def _split(data: bytes) -> tuple[list[str], list[bytes], list[int]]:
    """Returns header, joined residues and line number of the header, for every row that is no annotation."""
    names: list[str] = []
    rows: list[bytes] = []
    lines: list[int] = []
    pieces: list[bytes] = []
    header: tuple[str, int] | None = None

    def close() -> None:
        if header is None or header[0].partition(" ")[0] in ANNOTATION_ROWS:
            return
        row = b"".join(pieces)
        if not row:
            raise AlignmentParseError(f"row {shown(header[0])} has no residues", header[1])
        names.append(header[0])
        rows.append(row)
        lines.append(header[1])

    for number, raw in enumerate(data.split(b"\n"), start=1):
        line = raw.strip()
        if line.startswith(b">"):
            close()
            header, pieces = (line[1:].decode("utf-8", errors="replace").strip(), number), []
        elif line and header is not None:
            pieces.append(line)
        elif line and not line.startswith(b"#"):
            raise AlignmentParseError(
                f"text before the first '>' header: {shown(line.decode('utf-8', errors='backslashreplace'))}",
                number,
            )
    close()
    return names, rows, lines


def shown(text: str) -> str:
    """Returns a name or line for a message: quoted, and cut where a damaged file makes it endless."""
    return repr(text[:40])


def _blocks(sizes: list[int]) -> list[tuple[int, int]]:
    """Returns ranges of rows whose sizes sum to about `BLOCK_CHARACTERS` each."""
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    cuts = (
        np.searchsorted(ends, np.arange(BLOCK_CHARACTERS, int(ends[-1]), BLOCK_CHARACTERS), side="left") + 1
    )
    edges = [0, *np.unique(cuts[cuts < len(sizes)]).tolist(), len(sizes)]
    return list(itertools.pairwise(edges))


def _is_column(characters: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return ((characters >= ord("A")) & (characters <= ord("Z"))) | (characters == _GAP)


def _count_columns(rows: list[bytes]) -> NDArray[np.int64]:
    characters = np.frombuffer(b"".join(rows), dtype=np.uint8)
    starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    return np.add.reduceat(_is_column(characters), starts, dtype=np.int64)


def _parse_block(
    rows: list[bytes], lines: list[int], length: int
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    characters = np.frombuffer(b"".join(rows), dtype=np.uint8)
    starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    column = _is_column(characters)
    inserted = (characters >= ord("a")) & (characters <= ord("z"))
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
    shape = (len(rows), length)
    # Insertions seen so far, before each column; its step from column to column is the deletion count.
    seen = np.cumsum(inserted, dtype=np.int32)
    before_row = np.concatenate([np.zeros(1, dtype=np.int32), seen])[starts]
    deletions = np.diff(seen[column].reshape(shape), axis=1, prepend=before_row[:, None])
    return characters[column].reshape(shape), deletions
