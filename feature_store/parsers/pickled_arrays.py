"""The half of `foldfeed.feature_store.parsers.pickle` that knows NumPy: arrays built from checked parts.

Owns what NumPy writes around an array (`NAMES`) and how an array is made from dtype, shape and bytes, without
NumPy's own unpickling. Does not own opcodes. Nothing is allocated beyond the bytes that are there. Pure
functions.

Source: NumPy ``core/src/multiarray/methods.c`` array_reduce, ``_core/numeric.py`` _frombuffer.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DIMENSIONS = 16
# NumPy makes room for empty texts, and for one element of an array that has none.
MAX_EMPTY_TEXTS = 1 << 20


_DTYPE_NAME = re.compile(r"b1|\?|[iu][1248]|f[248]|c(?:8|16)|O8?|[SU]\d{1,9}")
SCALARS = (str, bytes, int, float, bool, type(None))


class Name(enum.Enum):
    """What a name in the file stands for."""

    RECONSTRUCT = enum.auto()
    FROM_BUFFER = enum.auto()
    SCALAR = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()
    BYTES = enum.auto()


NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Name.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): Name.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): Name.FROM_BUFFER,
    ("numpy.core.multiarray", "scalar"): Name.SCALAR,
    ("numpy._core.multiarray", "scalar"): Name.SCALAR,
    ("numpy", "ndarray"): Name.NDARRAY,
    ("numpy", "dtype"): Name.DTYPE,
    # Bytes in pickles of protocol 0 to 2.
    ("_codecs", "encode"): Name.ENCODE,
    ("builtins", "bytes"): Name.BYTES,
    ("__builtin__", "bytes"): Name.BYTES,
}


class PickledDType:
    """A dtype under construction."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = "="

    def build(self) -> np.dtype[Any]:
        """Returns the dtype."""
        return np.dtype(self.name) if self.name in ("?", "O", "O8") else np.dtype(self.order + self.name)


class PickledArray:
    """An array under construction; `value` is None until its state was read."""

    value: NDArray[Any] | None = None


def set_dtype(target: PickledDType, version: int, order: str, *rest: Any) -> None:
    """Takes the state of a dtype: its byte order; fields and sub-dtypes must be None.

    Raises:
      ValueError: anything else.
    """
    if version not in (3, 4) or order not in ("<", ">", "|", "=") or any(rest[:3]):
        raise ValueError("a dtype with fields or of an unknown version")
    target.order = "=" if order == "|" else order


def _make_dtype(name: object, *_: Any) -> PickledDType:
    text = name.decode("ascii") if isinstance(name, bytes) else name
    if not isinstance(text, str) or not _DTYPE_NAME.fullmatch(text):
        raise ValueError(f"dtype {str(name)[:40]!r}")
    return PickledDType(text)


def _reconstruct(kind: object, *_: Any) -> PickledArray:
    if kind is not Name.NDARRAY:
        raise ValueError("a subclass of ndarray")
    return PickledArray()


def set_array(
    target: PickledArray, version: int, shape: Any, dtype: PickledDType, fortran: object, raw: Any
) -> None:
    """Takes the state of an array as NumPy writes it.

    Raises:
      ValueError: shape, dtype and bytes do not agree.
    """
    if version != 1 or target.value is not None:
        raise ValueError("an array state of an unknown version, or a second one")
    target.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: Any, dtype: PickledDType, shape: Any, order: object, *_: Any) -> PickledArray:
    made = PickledArray()
    made.value = _array(raw, dtype, shape, "F" if order == "F" else "C")
    return made


def _scalar(dtype: PickledDType, raw: Any) -> Any:
    return _array(raw, dtype, (1,), "C")[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unusual encoding")
    return text.encode("latin-1")


def _bytes(*arguments: Any) -> bytes:
    if arguments:
        raise ValueError("a call of bytes()")
    return b""


def _array(raw: Any, dtype: PickledDType, shape: Any, order: str) -> NDArray[Any]:
    """Returns an array from checked parts; nothing is allocated beyond the bytes that are there."""
    if not isinstance(dtype, PickledDType) or not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("an array of an unusual shape or dtype")
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ValueError("an array whose sides are no sizes")
    kind = dtype.build()
    count = math.prod(shape)
    if kind.hasobject:
        return _object_array(raw, count).reshape(shape, order="F" if order == "F" else "C")
    # Protocol 0 to 2 of Python 2 wrote raw bytes as latin-1 text.
    content = raw.encode("latin-1") if isinstance(raw, str) else raw
    if not isinstance(content, bytes | bytearray) or len(content) != count * kind.itemsize:
        raise ValueError(f"an array of shape {shape} and {kind} whose bytes are not {count * kind.itemsize}")
    if not content:
        return _without_bytes(shape, kind)
    flat = np.frombuffer(content, dtype=kind)
    if kind.kind == "U" and int(flat.view(kind.byteorder.replace("=", "<") + "u4").max()) > 0x10FFFF:
        raise ValueError("text with characters that do not exist")
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _without_bytes(shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
    """Returns an array of no elements, or of empty texts, whose dtype has no bytes either."""
    if math.prod(shape) > MAX_EMPTY_TEXTS or kind.itemsize > MAX_EMPTY_TEXTS:
        raise ValueError(f"an array of shape {shape} and {kind} without bytes")
    return np.zeros(shape, dtype=kind)


def _object_array(raw: Any, count: int) -> NDArray[Any]:
    if not isinstance(raw, list) or len(raw) != count or not all(type(item) in SCALARS for item in raw):
        raise ValueError("an array of objects that are not strings, bytes or numbers, one for each cell")
    flat = np.empty(count, dtype=object)
    flat[:] = raw
    return flat


REDUCERS: dict[Name, Callable[..., Any]] = {
    Name.RECONSTRUCT: _reconstruct,
    Name.FROM_BUFFER: _from_buffer,
    Name.SCALAR: _scalar,
    Name.DTYPE: _make_dtype,
    Name.ENCODE: _encode,
    Name.BYTES: _bytes,
}
