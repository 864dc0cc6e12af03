"""Reads one alignment text (A3M, A2M, Stockholm, ColabFold's A3M) as the rows of one database.

Owns what these formats say besides the rows: which tool wrote them, numbered names, ColabFold's first line,
A2M's two kinds of columns. Does not own the row syntax (`foldfeed.feature_store.parsers.a3m`,
``parsers.stockholm``) or merging. Pure functions.

Source: HH-suite user guide; HMMER user guide, "Stockholm format"; UCSC SAM documentation of A2M; ColabFold
``colabfold/batch.py`` unserialize_msa.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.exchange_errors import UnsupportedSourceError
from foldfeed.feature_store.importers.rows import MAX_IMPORT_ROWS, TOOL, DatabaseRows, rows_of
from foldfeed.feature_store.parsers.a3m import ANNOTATION_ROWS, a3m_rows, parse_a3m, shown
from foldfeed.feature_store.parsers.alignment import ParsedAlignment
from foldfeed.feature_store.parsers.bounded_files import without_mark
from foldfeed.feature_store.parsers.lines import Text, blocks_of
from foldfeed.feature_store.parsers.stockholm import alignment_of_aligned, parse_stockholm

_COLABFOLD_LINE = re.compile(rb"#([0-9]+(?:,[0-9]+)*)[ \t]+([0-9]+(?:,[0-9]+)*)[ \t]*")
_AUTHOR = re.compile(rb"^#=GF\s+AU\s+(\S+)(?:\s+\((\S+)\s+([^)\s]+)\))?", re.MULTILINE)
# HMMER writes it when two rows share a name, and then puts a number before every name.
_NUMBERED_NAMES = b"seq names have been made unique"
_NUMBER_PREFIX = re.compile(r"^\d+\|")
_HEAD_BYTES = 4096
_HEADER = re.compile(rb"^[ \t\r\f\v]*>([^\n]*)", re.MULTILINE)
_DESCRIPTION = re.compile(rb"^#=GF\s+DE\s+([^\n]*)", re.MULTILINE)
_MAX_DIGITS = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadAlignment:
    """One alignment file, read.

    Attributes:
      rows: of it, the query first.
      extra: further facts the file states.
      description: of the query, where the file states it apart from the rows.
    """

    rows: DatabaseRows
    extra: dict[str, str]
    description: str = ""


def read_alignment(text: Text, kind: str, name: str, a2m_columns: str = "match") -> ReadAlignment:
    """Returns the rows of an alignment text.

    Args:
      text: decompressed, whole or in blocks; blocks are not held.
      kind: ``a3m``, ``a2m``, ``sto`` or ``colabfold``.
      name: what the database is called.
      a2m_columns: see `foldfeed.feature_store.importers.rows.ImportOptions`.
    Raises:
      AlignmentParseError: the text breaks its format, or has more than `MAX_IMPORT_ROWS` rows.
      UnsupportedSourceError: a complex.
    """
    if kind == "sto":
        return _read_stockholm(text, name)
    if kind == "colabfold":
        return _read_colabfold(text, name)
    if kind == "a2m" and a2m_columns == "query":
        return ReadAlignment(rows=rows_of(name, _query_columns(text)), extra={})
    return ReadAlignment(rows=rows_of(name, parse_a3m(text, MAX_IMPORT_ROWS)), extra={})


def is_blank(blocks: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Returns whether a text holds nothing but white space and NUL bytes, and the same blocks again."""
    seen = []
    for block in blocks:
        seen.append(block)
        if block.strip(b"\0 \r\t\n"):
            return False, itertools.chain(seen, blocks)
    return True, iter(seen)


def _query_row(text: bytes) -> tuple[str, bytes]:
    """Returns header and residues of the first row that is no annotation, as `parse_a3m` chooses it."""
    headers = _HEADER.finditer(text)
    for header in headers:
        name = header[1].decode("utf-8", errors="replace").strip()
        if name.partition(" ")[0] not in ANNOTATION_ROWS:
            following = next(headers, None)
            return name, text[header.end() : following.start() if following else len(text)]
    return "", b""


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


def _read_stockholm(text: Text, name: str) -> ReadAlignment:
    head, blocks = head_of(blocks_of(text))
    alignment = parse_stockholm(blocks, MAX_IMPORT_ROWS)
    hit_ids = [one.split(maxsplit=1)[0] if one.split() else "" for one in alignment.names]
    if _NUMBERED_NAMES in head:
        hit_ids = [_NUMBER_PREFIX.sub("", hit_id) for hit_id in hit_ids]
    author, description = _AUTHOR.search(head), _DESCRIPTION.search(head)
    tool, version = TOOL, ""
    if author is not None:
        tool = author[1].decode("utf-8", errors="replace")
        version = (author[3] or b"").decode("utf-8", errors="replace")
    return ReadAlignment(
        rows=rows_of(name, alignment, hit_ids=hit_ids, tool=tool, tool_version=version),
        extra={},
        description=description[1].decode("utf-8", errors="replace").strip() if description else "",
    )


def head_of(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Returns the first bytes of a text, and all of it again."""
    seen: list[bytes] = []
    for block in blocks:
        seen.append(block)
        if sum(map(len, seen)) >= _HEAD_BYTES:
            break
    return b"".join(seen)[:_HEAD_BYTES], itertools.chain(seen, blocks)


def _read_colabfold(text: Text, name: str) -> ReadAlignment:
    # The parts of a search end with NUL bytes, also in the middle of the file.
    clean = (block.replace(b"\0", b"") for block in blocks_of(text))
    head, blocks = head_of(clean)
    lengths, copies = lengths_and_copies(head)
    if len(lengths) > 1:
        raise UnsupportedSourceError(
            f"it is the alignment of a complex of {len(lengths)} different chains; layout colabfold makes "
            "a record of each"
        )
    alignment = parse_a3m(blocks, MAX_IMPORT_ROWS)
    if lengths and alignment.letters.shape[1] != lengths[0]:
        raise AlignmentParseError(
            f"its first line announces {lengths[0]} residues, the query has {alignment.letters.shape[1]}"
        )
    extra = {"colabfold_copies": str(copies[0])} if copies else {}
    return ReadAlignment(rows=rows_of(name, alignment), extra=extra)


def lengths_and_copies(head: bytes) -> tuple[list[int], list[int]]:
    """Returns what ColabFold's first line says of the different chains; two empty lists without one.

    Raises:
      AlignmentParseError: the two lists differ in length, or hold numbers that no protein has.
    """
    first = without_mark(head).replace(b"\0", b"").partition(b"\n")[0].rstrip(b"\r")
    line = _COLABFOLD_LINE.fullmatch(first)
    if line is None:
        return [], []
    texts = [line[group].split(b",") for group in (1, 2)]
    if len(texts[0]) != len(texts[1]) or any(len(one) > _MAX_DIGITS for one in (*texts[0], *texts[1])):
        raise AlignmentParseError(
            f"its first line {shown(first.decode('ascii', errors='replace'))} must have as many lengths as "
            f"copies, of at most {_MAX_DIGITS} digits",
            1,
        )
    lengths, copies = ([int(one) for one in numbers] for numbers in texts)
    return lengths, copies


def _query_columns(text: Text) -> ParsedAlignment:
    """Returns an A2M alignment in the columns where the query has a residue of either case.

    As in Stockholm: what other rows have in the remaining columns is counted as inserted.
    """
    names: list[str] = []
    rows: list[bytes] = []
    lines: list[int] = []
    for name, row, line in a3m_rows(text):
        if rows and len(row) != len(rows[0]):
            raise AlignmentParseError(
                f"row {shown(name)} has {len(row)} characters, the first row {len(rows[0])}; only A2M whose "
                "insertions are padded with '.' has columns for every residue of the query",
                line,
            )
        if len(rows) >= MAX_IMPORT_ROWS:
            raise AlignmentParseError(f"the alignment has more than {MAX_IMPORT_ROWS} rows", line)
        names.append(name)
        rows.append(row)
        lines.append(line)
    if not rows:
        raise AlignmentParseError("the text holds no row; expected '>' and a name, then a sequence")
    return alignment_of_aligned(names, rows, lines)
