"""Reads one alignment text (A3M, A2M, Stockholm, ColabFold's A3M) as the rows of one database.

Owns what these formats say besides the rows: which tool wrote them, numbered names, ColabFold's first line,
A2M's two kinds of columns. Does not own the row syntax (`foldfeed.feature_store.parsers.a3m`,
``parsers.stockholm``) or merging. Pure functions.

Source: HH-suite user guide; HMMER user guide, "Stockholm format"; UCSC SAM documentation of A2M; ColabFold
``colabfold/batch.py`` unserialize_msa.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.exchange_errors import SourceTooLargeError, UnsupportedSourceError
from foldfeed.feature_store.importers.rows import MAX_IMPORT_ROWS, TOOL, DatabaseRows, check_depth, rows_of
from foldfeed.feature_store.parsers.a3m import ANNOTATION_ROWS, ParsedAlignment, parse_a3m
from foldfeed.feature_store.parsers.bounded_files import without_mark
from foldfeed.feature_store.parsers.stockholm import parse_stockholm

_COLABFOLD_LINE = re.compile(rb"#([0-9]+(?:,[0-9]+)*)[ \t]+([0-9]+(?:,[0-9]+)*)[ \t]*")
_AUTHOR = re.compile(rb"^#=GF\s+AU\s+(\S+)(?:\s+\((\S+)\s+([^)\s]+)\))?", re.MULTILINE)
# HMMER writes it when two rows share a name, and then puts a number before every name.
_NUMBERED_NAMES = b"seq names have been made unique"
_NUMBER_PREFIX = re.compile(r"^\d+\|")
_HEAD_BYTES = 4096
_HEADER = re.compile(rb"^[ \t\r\f\v]*>([^\n]*)", re.MULTILINE)
_LOWER = [bytes([letter]) for letter in range(ord("a"), ord("z") + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadAlignment:
    """One alignment file, read.

    Attributes:
      rows: of it, the query first.
      extra: further facts the file states.
    """

    rows: DatabaseRows
    extra: dict[str, str]


def read_alignment(text: bytes, kind: str, name: str, a2m_columns: str = "match") -> ReadAlignment:
    """Returns the rows of an alignment text.

    Args:
      text: decompressed.
      kind: ``a3m``, ``a2m``, ``sto`` or ``colabfold``.
      name: what the database is called.
      a2m_columns: see `foldfeed.feature_store.importers.rows.ImportOptions`.
    Raises:
      AlignmentParseError: the text breaks its format.
      UnsupportedSourceError: a complex.
      SourceTooLargeError: more than `MAX_IMPORT_ROWS` rows.
    """
    text = without_mark(text)
    _refuse_too_many(text, kind, name)
    if kind == "sto":
        return _read_stockholm(text, name)
    if kind == "colabfold":
        return _read_colabfold(text, name)
    if kind == "a2m" and a2m_columns == "query":
        return ReadAlignment(rows=rows_of(name, _query_columns(parse_rows(text))), extra={})
    return ReadAlignment(rows=rows_of(name, parse_a3m(text)), extra=_insertions_of_query(text))


def _insertions_of_query(text: bytes) -> dict[str, str]:
    """Returns how many residues of the query are in lower case and so are no columns, if there are any.

    AlphaFold 2 passes over them in silence; here the record says that its sequence lacks them.
    """
    row = _query_row(text)[1]
    num_lower = sum(row.count(letter) for letter in _LOWER)
    return {"query_insertions": str(num_lower)} if num_lower else {}


def _query_row(text: bytes) -> tuple[str, bytes]:
    """Returns header and residues of the first row that is no annotation, as `parse_a3m` chooses it."""
    headers = _HEADER.finditer(text)
    for header in headers:
        name = header[1].decode("utf-8", errors="replace").strip()
        if name.partition(" ")[0] not in ANNOTATION_ROWS:
            following = next(headers, None)
            return name, text[header.end() : following.start() if following else len(text)]
    return "", b""


def _refuse_too_many(text: bytes, kind: str, name: str) -> None:
    """Raises when a text has so many rows that their names alone would fill the memory: 4 bytes make one."""
    check_depth(text.count(b"\n>"), name)
    # Stockholm has up to four lines of markup per row; A3M may be wrapped.
    most = MAX_IMPORT_ROWS * (5 if kind == "sto" else 15)
    if text.count(b"\n") > most:
        raise SourceTooLargeError(name, f"it has more than {most} lines")


def is_colabfold(head: bytes) -> bool:
    """Returns whether a text begins with ColabFold's line of lengths and copies."""
    return (
        _COLABFOLD_LINE.fullmatch(without_mark(head).replace(b"\0", b"").partition(b"\n")[0].rstrip(b"\r"))
        is not None
    )


def first_header(head: bytes, kind: str) -> str:
    """Returns the header of the query, from the beginning of a text; "" when it is not there.

    Args:
      head: the first bytes.
      kind: as in `read_alignment`.
    """
    text = without_mark(head).replace(b"\0", b"")
    if kind != "sto":
        return _query_row(text)[0]
    lines = (line.strip() for line in text.split(b"\n"))
    row = next((line for line in lines if line and not line.startswith((b"#", b"//"))), b" ")
    return b"".join(row.split()[:1]).decode("utf-8", errors="replace")


def _read_stockholm(text: bytes, name: str) -> ReadAlignment:
    alignment = parse_stockholm(text)
    head = text[:_HEAD_BYTES]
    hit_ids = [one.split(maxsplit=1)[0] if one.split() else "" for one in alignment.names]
    if _NUMBERED_NAMES in head:
        hit_ids = [_NUMBER_PREFIX.sub("", hit_id) for hit_id in hit_ids]
    author = _AUTHOR.search(head)
    tool, version = TOOL, ""
    if author is not None:
        tool = author[1].decode("utf-8", errors="replace")
        version = (author[3] or b"").decode("utf-8", errors="replace")
    return ReadAlignment(
        rows=rows_of(name, alignment, hit_ids=hit_ids, tool=tool, tool_version=version), extra={}
    )


def _read_colabfold(text: bytes, name: str) -> ReadAlignment:
    # The parts of a search end with NUL bytes, also in the middle of the file.
    clean = text.replace(b"\0", b"")
    first, _, rest = clean.partition(b"\n")
    extra: dict[str, str] = {}
    line = _COLABFOLD_LINE.fullmatch(first.rstrip(b"\r"))
    if line is not None:
        lengths, copies = line[1].split(b","), line[2].split(b",")
        if len(lengths) != 1 or len(copies) != 1:
            raise UnsupportedSourceError(
                f"it is the alignment of a complex of {len(lengths)} different chains (first line "
                f"{first[:60].decode('ascii', errors='replace')!r}); records hold one chain each, so split "
                "it by chain"
            )
        clean = rest
        extra["colabfold_copies"] = copies[0].decode("ascii")
    alignment = parse_a3m(clean)
    if line is not None and alignment.letters.shape[1] != _small_int(line[1]):
        raise AlignmentParseError(
            f"its first line announces {line[1][:20].decode('ascii')} residues, the query has "
            f"{alignment.letters.shape[1]}"
        )
    return ReadAlignment(rows=rows_of(name, alignment), extra=extra | _insertions_of_query(clean))


def _small_int(digits: bytes) -> int:
    return int(digits) if len(digits) < 12 else -1


def parse_rows(text: bytes) -> list[tuple[str, bytes]]:
    """Returns headers and residues of a FASTA-like text, joined over lines.

    Raises:
      AlignmentParseError: no row, or text before the first.
    """
    rows: list[tuple[str, list[bytes]]] = []
    for number, raw in enumerate(text.rstrip(b"\0").split(b"\n"), start=1):
        line = raw.strip()
        if line.startswith(b">"):
            rows.append((line[1:].decode("utf-8", errors="replace").strip(), []))
        elif line and rows:
            rows[-1][1].append(line)
        elif line and not line.startswith(b"#"):
            raise AlignmentParseError("text before the first '>' header", number)
    if not rows:
        raise AlignmentParseError("the text holds no row; expected '>' and a name, then a sequence")
    return [(name, b"".join(pieces)) for name, pieces in rows]


def _query_columns(rows: list[tuple[str, bytes]]) -> ParsedAlignment:
    """Returns an A2M alignment in the columns where the query has a residue of either case.

    As in Stockholm: what other rows have in the remaining columns is counted as inserted.
    """
    width = len(rows[0][1])
    for name, row in rows:
        if len(row) != width:
            raise AlignmentParseError(
                f"row {name!r} has {len(row)} characters, the first row {width}; only A2M whose insertions "
                "are "
                "padded with '.' has columns for every residue of the query"
            )
    # Names may hold what Stockholm cannot, so the rows go by number and get their names back.
    lines = [
        b"# STOCKHOLM 1.0",
        *(b"%d %s" % (number, row) for number, (_, row) in enumerate(rows)),
        b"//",
        b"",
    ]
    if width == 0:
        raise AlignmentParseError("the first row (the query) has no residue")
    parsed = parse_stockholm(b"\n".join(lines))
    return ParsedAlignment(
        names=[name for name, _ in rows],
        letters=np.ascontiguousarray(parsed.letters),
        deletions=np.ascontiguousarray(parsed.deletions),
    )
