"""The compiled form of what a plan draws most of, where it was built: random words, orders and masking.

Owns the binding to ``draw.c``. Does not own the arithmetic: `order.counter_rng` and
`reading.plan` explain it and compute it with NumPy where there is no compiled form; both give the
same numbers (a test). It is an optional part of an installation, see `foldfeed.feature_store.compiled`.

Safe from any thread; calls that may take long release the interpreter's lock.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.compiled import Functions, functions_of

_MODULE = "foldfeed.loader.order._draw"
_NAMES = ("few_2", "words_2", "order_2", "mask_2")
# So many words are given as integers at most.
MOST_FEW = 256
# action, profile_at and profile_u, see `reading.plan.MaskDraw`.
Masking: TypeAlias = "tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]"


def is_usable() -> bool:
    """Returns whether there is a compiled form, of this version."""
    return _functions() is not None


def few_words(key: tuple[int, int], first: int, count: int) -> list[int] | None:
    """Returns words ``[first, first + count)`` of a stream as integers; None without a compiled form.

    Args:
      key: the two words of Philox's key.
      first: 0 or more.
      count: 0 to `MOST_FEW`.
    """
    functions = _functions()
    if functions is None:
        return None
    found: list[int] = functions[0](*key, first, count)
    return found


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
    return np.ndarray(count, np.uint64, functions[1](*key, first, count))


def order(
    words: NDArray[np.uint64], limit: int | None = None, first_item: int = 0
) -> NDArray[np.int64] | None:
    """Returns the order of items by a word each; None without a compiled form.

    Args:
      words: uint64 (n,), contiguous, uniformly random: others are sorted as well, and slowly.
      limit: only so many items, the first of the order; all when None.
      first_item: number of the first item; the others follow it.
    Returns: int64 (min(n, limit),), the lower item first where two words are equal.
    """
    functions = _functions()
    if functions is None:
        return None
    count = words.size if limit is None else min(words.size, limit)
    return np.ndarray(count, np.int64, functions[2](words, count, first_item))


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
    action, at, u = functions[3](*key, first, *shape, *columns, high, *bounds)
    found = len(at) // 8
    return (
        np.ndarray((shape[0], columns[1] - columns[0]), np.uint8, action),
        np.ndarray(found, np.int64, at),
        np.ndarray(found, np.float64, u),
    )


@functools.cache
def _functions() -> Functions | None:
    return functions_of(_MODULE, _NAMES)
