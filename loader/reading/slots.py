"""How one sample lies in a stretch of memory: its arrays end to end. `packed` has several. Pure functions."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.loader.reading.fetch import DTYPES, num_bytes_of
from foldfeed.loader.reading.ring import ALIGNMENT

Shapes = Mapping[str, tuple[int, ...]]
_KINDS = tuple((name, dtype, dtype.itemsize) for name, dtype in DTYPES.items())
# Memory that a sample lies in.
Memory = mmap.mmap | NDArray[np.uint8]


def slot_bytes(shapes: Shapes) -> int:
    """Returns how much room a sample of such arrays takes; at least one byte."""
    return max(1, num_bytes_of(shapes, ALIGNMENT))


def place(memory: Memory, start: int, shapes: Shapes) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a sample whose slot begins at ``start``, as views of the memory."""
    # Views of this one: it keeps the memory from being closed under them, and is quickly cut.
    whole = np.frombuffer(memory, dtype=np.uint8)
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, item_bytes in _KINDS:
        shape = shapes[name]
        size = math.prod(shape) * item_bytes
        if size:
            arrays[name] = np.ndarray(shape, dtype, whole, start)
            start += -(-size // ALIGNMENT) * ALIGNMENT
        else:
            # It may lie behind the end of the memory; there are few such shapes, and nothing to write.
            arrays[name] = _empty(name, shape)
    return arrays


@functools.lru_cache(maxsize=256)
def _empty(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.empty(shape, dtype=DTYPES[name])
