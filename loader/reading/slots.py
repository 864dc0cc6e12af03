"""How one sample lies in a stretch of memory: its arrays end to end. `packed` has several. Pure functions."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.loader.reading.fetch import DTYPES, num_bytes_of
from foldfeed.loader.reading.ring import ALIGNMENT

Shapes = Mapping[str, tuple[int, ...]]
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
    for name, dtype in DTYPES.items():
        shape = shapes[name]
        size = math.prod(shape) * dtype.itemsize
        # One of no size may lie behind the end of the memory.
        arrays[name] = np.ndarray(shape, dtype, whole, start if size else 0)
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return arrays
