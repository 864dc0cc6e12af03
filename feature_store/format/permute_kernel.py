"""The compiled form of the keyed permutation, where it was built: `permute`.

Owns the binding to ``permute.c``. Does not own the arithmetic: `foldfeed.feature_store.format.permutation`
explains it and computes it with NumPy where there is no compiled form; both give the same numbers (a test).
It is an optional part of an installation: it is there where a C compiler was.

Safe from any thread; the call releases the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Its name counts versions, so that one that was compiled from another C is not found.
_FUNCTION = "foldfeed_permute_1"


def is_usable() -> bool:
    """Returns whether there is a compiled form, of this version."""
    return _function() is not None


def permute(
    values: NDArray[np.uint64], size: int, bits: int, keys: NDArray[np.uint64], *, inverse: bool
) -> bool:
    """Replaces values by what the permutation makes of them, in place, walks included.

    Args:
      values: uint64 (n,), contiguous, each below ``size``.
      size: of the permuted range.
      bits: of the network, 4 to 62, with ``size <= 2**bits``.
      keys: uint64 (2, 12), contiguous: of the hashes and of the additions.
      inverse: whether to undo it instead.
    Returns: False where there is no compiled form; then nothing has happened.
    """
    function = _function()
    if function is None:
        return False
    assert values.flags.c_contiguous, values.strides
    assert keys.shape == (2, 12), keys.shape
    assert keys.flags.c_contiguous, keys.strides
    function(values.ctypes.data, values.size, size, bits, keys.ctypes.data, inverse)
    return True


@functools.cache
def _function() -> Any:
    spec = importlib.util.find_spec("foldfeed.feature_store.format._permute")
    if spec is None or spec.origin is None:
        return None
    function = getattr(ctypes.CDLL(spec.origin), _FUNCTION, None)
    if function is not None:
        function.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        ]
        function.restype = None
    return function
