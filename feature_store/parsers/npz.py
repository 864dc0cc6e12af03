"""Reads ``.npz`` files of unknown origin: sizes are checked before anything is unpacked.

`numpy.load` allocates what an array's header claims before it looks for the data, and unpacks members of any
size. Here a member is unpacked only when asked for, only up to the limit, and must hold exactly the bytes
that its header announces. Object arrays (pickles) are refused. Owns no meaning of the arrays.

Source: NumPy ``lib/format.py`` (header layout); PKWARE APPNOTE 4.3 (zip).
"""

from __future__ import annotations

import ast
import io
import math
import re
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.exchange_errors import SourceFileError, SourceTooLargeError

MAX_MEMBERS = 10_000
MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 10_000
MAX_FIELDS = 100
MAX_EMPTY_TEXTS = 1 << 20

_MAGIC = b"\x93NUMPY"
_LENGTHS = {b"\x01": struct.Struct("<H"), b"\x02": struct.Struct("<I"), b"\x03": struct.Struct("<I")}
_SIMPLE = re.compile(r"[<>|=]?(?:b1|\?|[iu][1248]|f[248]|c(?:8|16)|O8?|[SU]\d{1,9})")
_ENTRY = b"PK\x01\x02"


class NpzFile:
    """The arrays of one ``.npz``, unpacked one at a time."""

    def __init__(self, data: bytes, where: str, max_bytes: int) -> None:
        """Opens the bytes of a file.

        Args:
          data: the whole file.
          where: its name, for messages.
          max_bytes: most bytes of all its arrays together, unpacked.
        Raises:
          SourceFileError: not a zip file, or one of absurdly many members.
          SourceTooLargeError: its directory announces more than the limit.
        """
        self._where = where
        self._max_bytes = max_bytes
        # A directory of a million entries costs far more memory than it has bytes.
        if data.count(_ENTRY) > MAX_MEMBERS:
            raise SourceFileError(where, f"a zip file of more than {MAX_MEMBERS} members is no set of arrays")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise SourceFileError(where, f"it is no npz file ({error})") from error
        announced = sum(info.file_size for info in self._zip.infolist())
        if announced > max_bytes:
            raise SourceTooLargeError(
                where,
                f"its arrays have {announced} bytes unpacked, more than {max_bytes}; raise the limit if that "
                "is what you expect",
            )
        self.names = tuple(info.filename.removesuffix(".npy") for info in self._zip.infolist())

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Returns one array, read-only.

        Raises:
          SourceFileError: it is not there, damaged, or holds objects.
          SourceTooLargeError: it is larger than the limit.
        """
        if name not in self.names:
            raise SourceFileError(
                self._where,
                f"it has no array {name!r}; it has {', '.join(repr(one[:40]) for one in self.names[:20])}",
            )
        try:
            return self._parse(name, self._unpack(name))
        except SourceFileError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise SourceFileError(self._where, f"array {name!r} is damaged ({error})") from error
        except (ValueError, TypeError, KeyError, SyntaxError, OverflowError, OSError, struct.error) as error:
            raise SourceFileError(self._where, f"array {name!r} has a bad header ({error})") from error

    def _unpack(self, name: str) -> bytes:
        member = name if name in self._zip.NameToInfo else name + ".npy"
        # Its size was checked when the file was opened; what comes may still be more than was announced.
        with self._zip.open(member) as packed:
            content = packed.read(self._max_bytes + 1)
        if len(content) > self._max_bytes:
            raise SourceTooLargeError(
                self._where,
                f"array {name!r} holds more than {self._max_bytes} bytes; raise the limit if you trust it",
            )
        return content

    def _parse(self, name: str, content: bytes) -> NDArray[Any]:
        shape, fortran, dtype, start = _read_header(content)
        count = math.prod(shape)
        if dtype is None:
            raise SourceFileError(self._where, f"array {name!r} holds pickled objects, which are never read")
        size = len(content) - start
        if len(shape) > MAX_DIMENSIONS or any(side < 0 for side in shape) or count * dtype.itemsize != size:
            raise SourceFileError(
                self._where,
                f"array {name!r} of shape {str(shape)[:80]} and {str(dtype)[:80]} needs "
                f"{count * dtype.itemsize} bytes and has "
                f"{size}",
            )
        if not size:
            # NumPy makes room for empty texts, and for one element of an array that has none.
            if count > MAX_EMPTY_TEXTS or dtype.itemsize > MAX_EMPTY_TEXTS:
                raise SourceFileError(self._where, f"array {name!r} claims {count} elements without a byte")
            return np.zeros(shape, dtype=dtype)
        flat = np.frombuffer(content, dtype=dtype, offset=start)
        return flat.reshape(shape, order="F" if fortran else "C")


def _read_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any] | None, int]:
    """Returns shape, order, dtype (None for objects) and where the data begins.

    NumPy's own reader warns, repairs and tokenises texts of old Python versions; this one takes what NumPy
    has written since 2010 and nothing else.
    """
    if content[:6] != _MAGIC or content[6:7] not in _LENGTHS:
        raise ValueError("no npy header of version 1, 2 or 3")
    length = _LENGTHS[content[6:7]]
    (size,) = length.unpack_from(content, 8)
    start = 8 + length.size + size
    if size > MAX_HEADER_BYTES or start > len(content):
        raise ValueError(f"a header of {size} bytes")
    try:
        header = ast.literal_eval(content[8 + length.size : start].decode("utf-8"))
    except (MemoryError, RecursionError) as error:
        # Python's parser says so of a text with too many brackets; nothing was allocated.
        raise ValueError("nested too deeply") from error
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("not descr, fortran_order and shape")
    shape = header["shape"]
    if not isinstance(shape, tuple) or not all(type(side) is int for side in shape):
        raise ValueError("a shape that is no tuple of sizes")
    return shape, header["fortran_order"] is True, _dtype(header["descr"]), start


def _dtype(descr: Any) -> np.dtype[Any] | None:
    """Returns the dtype of numbers, texts or records of them; None for objects."""
    fields: list[Any] = descr if isinstance(descr, list) else [("", descr)]
    if (
        not fields
        or len(fields) > MAX_FIELDS
        or not all(isinstance(f, tuple) and len(f) in (2, 3) for f in fields)
    ):
        raise ValueError("an unusual dtype")
    for field in fields:
        if not isinstance(field[0], str) or not isinstance(field[1], str) or not _SIMPLE.fullmatch(field[1]):
            raise ValueError(f"dtype {str(field[1])[:40]!r}")
        if len(field) == 3 and not (
            isinstance(field[2], tuple) and all(type(n) is int and 0 < n < 1000 for n in field[2])
        ):
            raise ValueError("a field with an unusual shape")
    if any(field[1].strip("<>|=").startswith("O") for field in fields):
        return None
    return np.dtype(descr)
