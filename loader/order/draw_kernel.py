"""The compiled form of what a plan draws most of, where it was built: random words and masking.

Owns the binding to ``draw.c``. Does not own the arithmetic: `order.counter_rng` and
`reading.plan` explain it and compute it with NumPy where there is no compiled form; both give the
same numbers (a test). It is an optional part of an installation: it is there where a C compiler was.

Safe from any thread; calls release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Their names count versions, so that one that was compiled from another C is not found.
_NAMES = ("foldfeed_words_1", "foldfeed_order_1", "foldfeed_mask_1")
# action, profile_at and profile_u, see `reading.plan.MaskDraw`.
Masking: TypeAlias = "tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]"


class _Scratch(threading.local):
    """Room of each thread for positions of which nobody knows beforehand how many there are."""

    def __init__(self) -> None:
        self.at = np.empty(0, dtype=np.int64)
        self.u = np.empty(0, dtype=np.float64)

    def of(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        if self.at.size < size:
            self.at, self.u = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.float64)
        return self.at, self.u


_scratch = _Scratch()


def is_usable() -> bool:
    """Returns whether there is a compiled form, of this version."""
    return _functions() is not None


def words(key: tuple[int, int], first: int, count: int) -> NDArray[np.uint64] | None:
    """Returns words ``[first, first + count)`` of a stream, uint64 (count,); None without a compiled form.

    Args:
      key: the two words of Philox's key.
      first: 0 or more.
      count: 0 or more.
    """
    functions = _functions()
    if functions is None:
        return None
    found = np.empty(count, dtype=np.uint64)
    functions[0](*key, first, count, found.ctypes.data)
    return found


def order(words: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    """Returns the order of items by a word each; None without a compiled form, or memory.

    Args:
      words: uint64 (n,), contiguous, uniformly random: others are sorted as well, and slowly.
    Returns: int64 (n,), the lower item first where two words are equal.
    """
    functions = _functions()
    if functions is None:
        return None
    assert words.flags.c_contiguous, words.strides
    found = np.empty(words.size, dtype=np.int64)
    return None if functions[1](words.ctypes.data, words.size, found.ctypes.data) else found


def mask(
    key: tuple[int, int],
    first: int,
    shape: tuple[int, int],
    columns: tuple[int, int],
    high: int,
    bounds: tuple[float, float, float, float, float],
) -> Masking | None:
    """Returns what is masked in some rows, for some columns; None without a compiled form.

    Args:
      key: of the stream.
      first: its word for the first position of the first row.
      shape: rows, and positions of a row.
      columns: positions ``[start, stop)`` of each row to return.
      high: a position is masked where the upper half of its word is below, 0 to 2**32.
      bounds: see ``draw.c``.
    """
    functions = _functions()
    if functions is None:
        return None
    rows, length = shape
    start, stop = columns
    assert 0 <= start <= stop <= length, (columns, shape)
    action = np.empty((rows, stop - start), dtype=np.uint8)
    at, u = _scratch.of(action.size)
    # Under a name, because a pointer keeps nothing alive.
    limits = np.array(bounds)
    pointers = (limits.ctypes.data, action.ctypes.data, at.ctypes.data, u.ctypes.data)
    found = functions[2](*key, first, rows, length, start, stop, high, *pointers)
    return action, at[:found].copy(), u[:found].copy()


@functools.cache
def _functions() -> tuple[Any, Any, Any] | None:
    spec = importlib.util.find_spec("foldfeed.loader.order._draw")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    words_, order_, mask_ = (getattr(library, name, None) for name in _NAMES)
    if words_ is None or order_ is None or mask_ is None:
        return None
    word, count, memory = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
    words_.argtypes, words_.restype = [word, word, word, count, memory], None
    order_.argtypes, order_.restype = [memory, count, memory], ctypes.c_int
    mask_.argtypes = [word, word, word, count, count, count, count, word, memory, memory, memory, memory]
    mask_.restype = count
    return words_, order_, mask_
