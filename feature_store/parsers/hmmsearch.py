"""What hmmsearch wrote (``-A`` and ``--domtblout``) as alignments of a query with chains.

Owns the two formats. Does not own what becomes of a hit (`format.templates`). Invariant: the columns of the
query are those that ``#=GC RF`` names, so the profile must have been built with one match state for every
residue of the query (``hmmbuild --hand``); a row that does not hold the residues its name tells is refused.

Pure functions without state: safe from any thread.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format.templates import runs_of
from foldfeed.feature_store.parsers.a3m import MAX_ROW_CHARACTERS, shown
from foldfeed.feature_store.parsers.lines import Text, lines_of
from foldfeed.feature_store.parsers.stockholm import alignment_lines, description_in

_IS_GAP = np.zeros(256, dtype=np.bool_)
_IS_GAP[[ord(gap) for gap in "-._~ "]] = True
_NAME = re.compile(r"(?P<target>.+)/(?P<first>\d{1,9})-(?P<last>\d{1,9})")
_NUMBER_PREFIX = re.compile(r"^\d+\|")
_UNIQUE_WARNING = b"seq names have been made unique"
_DESCRIPTION = re.compile(r"^(\[subseq from\]\s*)")
MAX_ROWS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AlignedChain:
    """One row of ``-A``: a domain of a target, aligned with the query.

    Attributes:
      target: name of the target.
      description: of the target, as its FASTA header goes on.
      first: its first residue in the alignment, from 0.
      residues: upper-case letters of it from there on, without gaps.
      runs: int32 (num_runs, 3) as in `TemplateHit`, counted in the whole target.
    """

    target: str
    description: str
    first: int
    residues: str
    runs: NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """One line of ``--domtblout``.

    Attributes:
      target: name of the target.
      num_residues: of the whole target.
      e_value: independent E-value of the domain.
      score: bits of the domain.
      first: first aligned residue of the target, from 0.
      last: behind the last.
    """

    target: str
    num_residues: int
    e_value: float
    score: float
    first: int
    last: int


def parse_hmmsearch(text: Text, length: int) -> list[AlignedChain]:
    """Returns the rows of ``hmmsearch -A``, in the tool's order; none for an empty text.

    A row that aligns no residue with the query (insertions only) has no runs.

    Args:
      text: Stockholm.
      length: of the query.
    Raises:
      AlignmentParseError: the text is cut or breaks its format, its RF line does not have ``length`` columns,
        or a row does not hold what its name says.
    """
    rows, descriptions, reference, numbered = _read(text)
    if not rows:
        return []
    is_column = ~_IS_GAP[np.frombuffer(bytes(reference), dtype=np.uint8)]
    if int(is_column.sum()) != length:
        raise AlignmentParseError(
            f"its RF line has {int(is_column.sum())} columns and the query {length} residues; the profile "
            "was not built from an alignment in the query's columns (hmmbuild --hand)"
        )
    column = np.cumsum(is_column) - 1
    found = []
    for name, (row, line) in rows.items():
        if len(row) != len(reference):
            raise AlignmentParseError(
                f"row {shown(name)} has {len(row)} columns, the RF line {len(reference)}", line
            )
        plain = _NUMBER_PREFIX.sub("", name) if numbered else name
        found.append(_chain(plain, bytes(row), line, descriptions.get(name, ""), is_column, column))
    return found


def parse_domains(table: Text) -> list[DomainScore]:
    """Returns the lines of ``hmmsearch --domtblout`` that are no comments, in the tool's order.

    Raises:
      AlignmentParseError: a line is no domain.
    """
    found = []
    for number, raw in lines_of(table):
        line = raw.decode("utf-8", errors="replace")
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split(maxsplit=22)
        try:
            found.append(
                DomainScore(
                    target=fields[0],
                    num_residues=int(fields[2]),
                    e_value=float(fields[12]),
                    score=float(fields[13]),
                    first=int(fields[17]) - 1,
                    last=int(fields[18]),
                )
            )
        except (IndexError, ValueError) as error:
            raise AlignmentParseError(f"no line of a table of domains: {shown(line)}", number) from error
    return found


def is_of(chain: AlignedChain, domain: DomainScore) -> bool:
    """Returns whether a row and a line of the table speak of the same domain."""
    return (chain.target, chain.first, chain.first + len(chain.residues)) == (
        domain.target,
        domain.first,
        domain.last,
    )


def _chain(
    name: str,
    row: bytes,
    line: int,
    description: str,
    is_column: NDArray[np.bool_],
    column: NDArray[np.int64],
) -> AlignedChain:
    found = _NAME.fullmatch(name)
    if found is None:
        raise AlignmentParseError(f"the name {shown(name)} does not end in /first-last", line)
    letters = np.frombuffer(row, dtype=np.uint8)
    is_residue = ~_IS_GAP[letters]
    residues = letters[is_residue].tobytes().decode("latin-1").upper()
    first, last = int(found["first"]) - 1, int(found["last"])
    if first < 0 or last - first != len(residues):
        raise AlignmentParseError(f"row {shown(name)} holds {len(residues)} residues", line)
    aligned = is_residue & is_column
    place = np.cumsum(is_residue) - 1 + first
    return AlignedChain(
        target=found["target"],
        description=_DESCRIPTION.sub("", description),
        first=first,
        residues=residues,
        runs=runs_of(np.stack([column[aligned], place[aligned]], axis=1)),
    )


def _read(
    text: Text,
) -> tuple[dict[str, tuple[bytearray, int]], dict[str, str], bytearray, bool]:
    """Returns rows with their first lines, descriptions, the RF line, and whether names are numbered."""
    rows: dict[str, tuple[bytearray, int]] = {}
    descriptions: dict[str, str] = {}
    reference = bytearray()
    numbered = False
    for number, line in alignment_lines(text, "a search has one", may_be_empty=True):
        if line.startswith(b"#=GC RF"):
            reference += line.split()[-1]
        elif line.startswith(b"#"):
            if (described := description_in(line)) is not None:
                descriptions[described[0]] = described[1]
            numbered = numbered or _UNIQUE_WARNING in line
        else:
            _add_row(rows, line.split(), number)
    if len(reference) > MAX_ROW_CHARACTERS:
        raise AlignmentParseError(f"its RF line has more than {MAX_ROW_CHARACTERS} characters")
    return rows, descriptions, reference, numbered


def _add_row(rows: dict[str, tuple[bytearray, int]], fields: Sequence[bytes], number: int) -> None:
    if len(fields) != 2:
        raise AlignmentParseError("expected a name and aligned residues on this line", number)
    name = fields[0].decode("utf-8", errors="replace")
    if name not in rows:
        if len(rows) >= MAX_ROWS:
            raise AlignmentParseError(f"the alignment has more than {MAX_ROWS} rows", number)
        rows[name] = (bytearray(), number)
    row = rows[name][0]
    row += fields[1]
    if len(row) > MAX_ROW_CHARACTERS:
        raise AlignmentParseError(f"row {shown(name)} has more than {MAX_ROW_CHARACTERS} characters", number)
