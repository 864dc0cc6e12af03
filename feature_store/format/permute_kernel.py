"""The compiled form of the keyed permutation, where it was built: `permute`, `permute_one`.

Owns the binding to ``permute.c``. Does not own the arithmetic: `foldfeed.feature_store.format.permutation`
explains it and computes it in Python where there is no compiled form; both give the same numbers (a test).
It is an optional part of an installation, see `foldfeed.feature_store.compiled`.

Safe from any thread; where there are many values, the interpreter's lock is released.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.compiled import Functions, functions_of

_MODULE = "foldfeed.feature_store.format._permute"
_NAMES = ("permute_2", "permute_one_2")


def is_usable() -> bool:
    """Returns whether there is a compiled form, of this version."""
    return _functions() is not None


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
    functions = _functions()
    if functions is None:
        return False
    functions[0](values, size, bits, keys, inverse)
    return True


def permute_one(value: int, size: int, bits: int, keys: NDArray[np.uint64]) -> int | None:
    """Returns what the permutation makes of a value, walk included; None where there is no compiled form.

    Args:
      value: 0 to ``size - 1``.
      size: as for `permute`.
      bits: as for `permute`.
      keys: as for `permute`.
    """
    functions = _functions()
    if functions is None:
        return None
    found: int = functions[1](value, size, bits, keys)
    return found


@functools.cache
def _functions() -> Functions | None:
    return functions_of(_MODULE, _NAMES)
