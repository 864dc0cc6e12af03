"""FASTA files, plain or compressed, local or remote, as a stream of queries and dead letters.

Owns decompression, the FASTA grammar and the rules for residues. Does not own duplicates across files (the
graph resolves them) or limits of single tools. Invariants: every entry yields exactly one value; a fault in
one entry never hides the next one; memory is bounded by one entry; a stream that ends too early turns the
entry it cut into a dead letter, never into a shorter protein.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import fsspec
import zstandard

from foldfeed.feature_store.format.record import MAX_RESIDUES, RECORD_ID
from foldfeed.pipelines.errors import QueryFileError
from foldfeed.pipelines.sequences import DeadLetter, QuerySequence

CHUNK_BYTES = 1 << 20
# Longer than any protein on one line; a file without line ends is no FASTA file.
MAX_LINE_BYTES = 16 << 20

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
# What some editors on Windows put before the text.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_RESIDUE = re.compile(r"[^A-Z]")


class BadStreamError(Exception):
    """The bytes of a file stop making sense here; carries a sentence for a person."""


def open_query_file(url: str) -> IO[bytes]:
    """Returns the raw bytes of a file behind a path or URL.

    Raises:
      QueryFileError: it does not exist or cannot be opened.
    """
    try:
        return fsspec.open(url, "rb").open()
    except (OSError, ValueError, ImportError) as error:
        # fsspec raises ValueError for an unknown protocol and ImportError for one whose client is missing.
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise QueryFileError(url, reason) from error


def read_fasta(
    url: str,
    *,
    file_index: int = 0,
    max_residues: int = MAX_RESIDUES,
    folder: str = "",
    digest: hashlib._Hash | None = None,
) -> Iterator[QuerySequence | DeadLetter]:
    """Yields one value per entry of a FASTA file, in file order.

    Lower case becomes upper case and a ``*`` at the end is dropped. B, Z, J, O, U and X stay as they are. A
    ``*`` inside, a digit, a gap or any other character makes the entry a dead letter that names the
    position.

    Args:
      url: path or fsspec URL; gzip and Zstandard are known by their first bytes.
      file_index: position of this file among the files of a build.
      max_residues: longer sequences become dead letters.
      folder: where a relative path begins; "" for the current folder.
      digest: is fed with the bytes of the file as they are read; not all, where a fault ends the reading.
    Raises:
      QueryFileError: the file cannot be opened. Faults inside it are dead letters.
    """
    # fsspec itself knows '~' and 'file:'.
    is_plain = "://" not in url and not url.startswith(("~", "file:"))
    with open_query_file(os.path.join(folder, url) if is_plain else url) as raw:
        source = raw if digest is None else cast(IO[bytes], _Digesting(raw, digest))
        yield from _Reader(url, file_index, max_residues).read(source)


class _Digesting:
    """A file that feeds a hash with what is read from it."""

    def __init__(self, raw: IO[bytes], digest: hashlib._Hash) -> None:
        self._raw = raw
        self._digest = digest

    def read(self, size: int) -> bytes:
        data = self._raw.read(size)
        self._digest.update(data)
        return data


class _Reader:
    """The state of one pass over one file."""

    def __init__(self, url: str, file_index: int, max_residues: int) -> None:
        self._url = url
        self._file_index = file_index
        self._max_residues = max_residues
        self._num_items = 0
        self._header: str | None = None
        self._header_line = 0
        self._pieces: list[bytes] = []
        self._num_residues = 0

    def read(self, raw: IO[bytes]) -> Iterator[QuerySequence | DeadLetter]:
        number = 0
        stray = False
        try:
            for number, line in enumerate(_lines(decompressed(raw, self._url)), start=1):
                if line.startswith(b">"):
                    yield from self._close()
                    self._open(line, number)
                elif self._header is not None:
                    self._append(line)
                elif line and not stray:
                    stray = True
                    shown = line[:30].decode("utf-8", errors="replace")
                    yield self._reject(number, None, f"text before the first '>' header: {shown!r}")
        except (BadStreamError, OSError, zlib.error, zstandard.ZstdError, EOFError) as error:
            line_number = self._header_line or number + 1
            reason = f"the file cannot be read on after line {number}: {error}"
            yield self._reject(line_number, self._header, reason)
            return
        yield from self._close()
        if self._num_items == 0:
            yield self._reject(1, None, "the file holds no FASTA entry")

    def _open(self, line: bytes, number: int) -> None:
        self._header = line[1:].decode("utf-8", errors="replace").strip()
        self._header_line = number
        self._pieces = []
        self._num_residues = 0

    def _append(self, line: bytes) -> None:
        self._num_residues += len(line)
        # Past the limit (and a little slack for white space and '*') only the count matters.
        if self._num_residues <= 2 * self._max_residues + MAX_LINE_BYTES:
            self._pieces.append(line)

    def _close(self) -> Iterator[QuerySequence | DeadLetter]:
        if self._header is None:
            return
        # In bytes, where upper() knows A to Z only: as text it would turn a sharp s into two serines.
        residues = b"".join(b"".join(self._pieces).split()).upper()
        sequence = residues.decode("utf-8", errors="replace").rstrip("*")
        reason = self._problem(self._header, sequence)
        if reason is not None:
            yield self._reject(self._header_line, self._header, reason)
            return
        record_id, description = _split_header(self._header)
        yield QuerySequence(
            file_index=self._file_index,
            item_index=self._next_item(),
            source=self._url,
            line=self._header_line,
            record_id=record_id,
            description=description,
            sequence=sequence,
        )

    def _problem(self, header: str, sequence: str) -> str | None:
        if not RECORD_ID.fullmatch(_split_header(header)[0]):
            return (
                "the first word of the header is no usable id: 1 to 255 of A-Z a-z 0-9 _ . | : + = @ - "
                "that start with a letter, digit or _"
            )
        if not sequence:
            return "the header has no sequence"
        if self._num_residues > self._max_residues and len(sequence) > self._max_residues:
            return (
                f"{self._num_residues} residues; this build takes at most {self._max_residues} "
                "(--max-residues)"
            )
        fault = _NOT_RESIDUE.search(sequence)
        if fault is not None:
            return f"{fault.group()!r} at residue {fault.start() + 1} is no amino acid letter"
        return None

    def _next_item(self) -> int:
        self._num_items += 1
        return self._num_items - 1

    def _reject(self, line: int, header: str | None, reason: str) -> DeadLetter:
        item_index = self._next_item()
        record_id = _split_header(header or "")[0]
        if not RECORD_ID.fullmatch(record_id):
            record_id = f"{self._url.rsplit('/', 1)[-1]}#{item_index}"
        return DeadLetter(
            file_index=self._file_index,
            item_index=item_index,
            source=self._url,
            line=line,
            record_id=record_id,
            stage="read",
            reason=reason,
            kind="BadEntry",
        )


def _split_header(header: str) -> tuple[str, str]:
    """Returns the id and the description; headers separate them by spaces or tabs."""
    record_id, description, *_ = [*header.split(maxsplit=1), "", ""]
    return record_id, description


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields lines without white space at their ends; a line is never longer than `MAX_LINE_BYTES`.

    Lines end with LF, CR LF, or (old Macintosh programs) CR.
    """
    rest = b""
    for chunk in _with_line_feeds(chunks):
        if b"\x00" in chunk:
            raise BadStreamError("it holds NUL bytes, so it is a binary file and not FASTA text")
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.strip()
        if len(rest) > MAX_LINE_BYTES:
            raise BadStreamError(f"a line is longer than {MAX_LINE_BYTES} bytes")
    if rest:
        yield rest.strip()


def _with_line_feeds(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the text with LF for every line end and without a byte order mark before it."""
    held = b""
    first = True
    for chunk in chunks:
        text = held + chunk
        if first and len(text) < len(_BYTE_ORDER_MARK):
            held = text
            continue
        if first:
            text, first = text.removeprefix(_BYTE_ORDER_MARK), False
        # The other half of a CR LF may be in the next chunk.
        held = b"\r" if text.endswith(b"\r") else b""
        yield text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    yield held.replace(b"\r", b"\n")


def decompressed(raw: IO[bytes], url: str) -> Iterator[bytes]:
    """Yields the text of a file; gzip and Zstandard are known by their first bytes.

    Raises:
      BadStreamError: its name promises another kind, or it ends too early.
      zlib.error, zstandard.ZstdError: it is damaged.
    """
    first = raw.read(CHUNK_BYTES)
    if first.startswith(_GZIP):
        return _inflate(raw, first, lambda: zlib.decompressobj(wbits=31), "gzip")
    if first.startswith(_ZSTD):
        return _inflate(raw, first, lambda: zstandard.ZstdDecompressor().decompressobj(), "zstd")
    for suffix, name in ((".gz", "gzip"), (".zst", "zstd")):
        if url.endswith(suffix):
            raise BadStreamError(f"its name ends in {suffix}, but it is no {name} file")
    return _plain(raw, first)


def _plain(raw: IO[bytes], first: bytes) -> Iterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        chunk = raw.read(CHUNK_BYTES)


def _inflate(raw: IO[bytes], first: bytes, new_stream: Any, name: str) -> Iterator[bytes]:
    """Yields decompressed bytes of concatenated members; a stream cut inside a member is an error.

    The convenience readers of both libraries end silently on some cut files, so the end-of-member flag is
    checked here.
    """
    stream = None
    chunk = first
    while chunk:
        while chunk:
            if stream is None:
                stream = new_stream()
            yield stream.decompress(chunk)
            if not stream.eof:
                break
            # gzip allows zero padding between and after members.
            chunk = stream.unused_data.lstrip(b"\x00") if name == "gzip" else stream.unused_data
            stream = None
        chunk = raw.read(CHUNK_BYTES)
    if stream is not None:
        raise BadStreamError(f"the {name} stream ends in the middle")
