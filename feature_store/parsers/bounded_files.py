"""Bounded reading of other programs' files, plain or compressed.

Owns the limits on what may enter memory: a file is refused when its *decompressed* size passes the limit, or
when it unpacks to far more than alignments ever do, and no more than the limit plus one block (1 MiB; 16 MiB
for zstd) is ever held, so a small file that unpacks to a huge one does no harm. The codec is chosen by the
first bytes, not by the name. Only regular local files are read. Pure functions but for the reading; safe from
any thread.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from foldfeed.feature_store.exchange_errors import SourceFileError, SourceTooLargeError

# The largest alignment texts that tools write today are a few GB.
DEFAULT_MAX_BYTES = 2 << 30
BLOCK_BYTES = 1 << 20
# A row of titin that holds one short hit is 35,000 gaps and a name of its own: some 250 to 1. What passes
# this, and is large, was made to.
MAX_EXPANSION = 1000
EXPANSION_FREE_BYTES = 64 << 20
# xz -9 needs 65 MiB, zstd --ultra -22 a window of 128 MiB; what asks for more is not made for exchange.
XZ_MEMORY_BYTES = 256 << 20
ZSTD_WINDOW_BYTES = 128 << 20
# Four bytes of zstd can stand for 128 KiB, so a piece of this size gives at most 16 MiB at once.
ZSTD_PIECE_BYTES = 512

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
_MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}


def read_file(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """Returns the content of a file, decompressed.

    Args:
      path: a regular file; gzip, xz, zstd and bzip2 are recognised by their first bytes.
      max_bytes: most bytes of decompressed content.
    Raises:
      SourceTooLargeError: the content is larger.
      SourceFileError: not a regular file, or damaged compression.
      OSError: it cannot be opened or read.
    """
    return b"".join(read_blocks(path, max_bytes))


def read_blocks(path: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[bytes]:
    """Yields the content of a file, decompressed, as `read_file` returns it, a block at a time.

    Raises:
      SourceTooLargeError, SourceFileError, OSError: as `read_file`, when the place is reached.
    """
    with _open_regular(path) as file:
        yield from _bounded(str(path), file, max_bytes)


def without_mark(text: bytes) -> bytes:
    """Returns a text without the byte order mark that some editors put before UTF-8."""
    return text.removeprefix(codecs.BOM_UTF8)


def unpack(data: bytes, where: str, max_bytes: int) -> bytes:
    """Returns bytes decompressed as `read_file` would.

    Args:
      data: perhaps compressed.
      where: for messages.
      max_bytes: most bytes of the result.
    Raises:
      SourceTooLargeError, SourceFileError: as `read_file`.
    """
    return b"".join(_bounded(where, io.BytesIO(data), max_bytes))


def read_head(path: Path, num_bytes: int = 1 << 16) -> bytes:
    """Returns the first decompressed bytes of a file, fewer when it is shorter.

    Raises:
      SourceFileError: not a regular file, or damaged compression.
      OSError: it cannot be opened or read.
    """
    pieces: list[bytes] = []
    missing = num_bytes
    with _open_regular(path) as file:
        for block in _blocks(str(path), file):
            pieces.append(block[:missing])
            missing -= len(pieces[-1])
            if missing <= 0:
                break
    return b"".join(pieces)


def read_range(path: Path, start: int, size: int, max_bytes: int) -> bytes:
    """Returns a range of a plain file.

    Raises:
      SourceTooLargeError: the range is larger than the limit.
      SourceFileError: the range is not inside the file.
      OSError: it cannot be opened or read.
    """
    if size > max_bytes:
        raise _too_large(str(path), max_bytes)
    with _open_regular(path) as file:
        total = file.seek(0, io.SEEK_END)
        if start < 0 or size < 0 or start + size > total:
            raise SourceFileError(
                str(path), f"bytes {start} to {start + size} are not in a file of {total} bytes"
            )
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise SourceFileError(str(path), f"it ended {size - len(data)} bytes early")
    return data


def stem_of(path: Path) -> str:
    """Returns a file's name without its extension and without a compression's.

    ``uniref90_hits.sto.gz`` gives ``uniref90_hits``.
    """
    return kind_of(path)[0]


def kind_of(path: Path) -> tuple[str, str]:
    """Returns name and lower-case extension of a file, looking through a compression's extension.

    ``x.a3m.gz`` gives ``("x", ".a3m")``, ``x.a3m`` the same, ``x`` gives ``("x", "")``.
    """
    name = path.name
    for suffix in COMPRESSED_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            name = name[: -len(suffix)]
            break
    stem, dot, extension = name.rpartition(".")
    return (stem, "." + extension.lower()) if dot and stem else (name, "")


def _open_regular(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise SourceFileError(repr(str(path)), f"no file can have that name ({error})") from error
    # A pipe or a device would block or never end.
    if not stat.S_ISREG(mode):
        raise SourceFileError(str(path), "it is not a regular file")
    return path.open("rb")


def _bounded(where: str, file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Yields decompressed blocks up to the limits."""
    total = 0
    for block in _blocks(where, file):
        total += len(block)
        if total > max_bytes:
            raise _too_large(where, max_bytes)
        # What was taken from the file so far is a little more than what these blocks were unpacked from.
        if total > EXPANSION_FREE_BYTES and total > MAX_EXPANSION * file.tell():
            raise SourceTooLargeError(
                where,
                f"{file.tell()} bytes of it unpack to more than {MAX_EXPANSION} times as much, which no "
                "alignment does; if you know what it is, unpack it and import the plain file",
            )
        yield block


def _too_large(where: str, max_bytes: int) -> SourceTooLargeError:
    return SourceTooLargeError(
        where,
        f"it holds more than {max_bytes} bytes (decompressed); raise the limit if that is what you expect",
    )


def _blocks(where: str, file: BinaryIO) -> Iterator[bytes]:
    """Yields decompressed content in blocks of `BLOCK_BYTES` (zstd: 32,768 times its pieces at most)."""
    head = file.read(6)
    file.seek(0)
    codec = _codec_of(head)
    if codec is None:
        yield from iter(lambda: file.read(BLOCK_BYTES), b"")
        return
    try:
        first = True
        for block in _CODECS[codec](file):
            if first and (inner := _codec_of(block)) is not None:
                raise SourceFileError(
                    where,
                    f"it looks like {inner} data inside {codec}: it was compressed twice, unpack it once",
                )
            first = False
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError, _Damaged) as error:
        raise SourceFileError(where, f"its {codec} compression is damaged or cut off ({error})") from error


def _codec_of(head: bytes) -> str | None:
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class _Damaged(Exception):
    """bz2 reports damage as a bare OSError, which must not be mistaken for one of the disk."""


def _gzip_blocks(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        yield from iter(lambda: unpacked.read(BLOCK_BYTES), b"")


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Not zstandard's stream reader, which takes a stream that was cut inside a frame for a whole one."""
    pending = file.read(ZSTD_PIECE_BYTES)
    while pending:
        frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
        while not frame.eof:
            if not pending:
                raise EOFError("the stream has no end")
            block = frame.decompress(pending)
            pending = b"" if frame.eof else file.read(ZSTD_PIECE_BYTES)
            if block:
                yield block
        pending = frame.unused_data or file.read(ZSTD_PIECE_BYTES)


def _bz2_blocks(file: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(file) as unpacked:
        while True:
            try:
                block = unpacked.read(BLOCK_BYTES)
            except OSError as error:
                if error.errno is None:
                    raise _Damaged(str(error)) from error
                raise
            if not block:
                return
            yield block


def _xz_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Like lzma.LZMAFile, which has no limit on the memory that a dictionary may take."""
    pending = b""
    while True:
        decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
        while not decompressor.eof:
            if decompressor.needs_input:
                pending = pending or file.read(BLOCK_BYTES)
                if not pending:
                    raise EOFError("the stream has no end")
            block = decompressor.decompress(pending, BLOCK_BYTES)
            pending = b""
            if block:
                yield block
        # Streams may follow one another, with zero bytes between them.
        pending = (decompressor.unused_data or file.read(BLOCK_BYTES)).lstrip(b"\0")
        while not pending:
            more = file.read(BLOCK_BYTES)
            if not more:
                return
            pending = more.lstrip(b"\0")


_CODECS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    "gzip": _gzip_blocks,
    "xz": _xz_blocks,
    "zstd": _zstd_blocks,
    "bzip2": _bz2_blocks,
}
