"""Random numbers that depend on (seed, sample, purpose) and on nothing else.

Every choice inside a sample (which rows, which window, which positions to mask) is drawn from a stream of its
own, keyed by the run's seed, the global sample number and a named purpose. No generator is shared or advanced
between samples, so a sample is the same on any rank, in any thread, in any order of calls and after a resume.

Numbers come from the raw words of Philox4x64-10 with arithmetic of our own on top. NumPy promises that the
words of a bit generator never change, but not the methods of ``numpy.random.Generator`` (NEP 19), and a run
that is resumed after an upgrade must draw the same samples.

Thread safe: a stream belongs to the caller that made it; the module has no state.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox).
"""

from __future__ import annotations

import enum
import hashlib
import json
import operator

import numpy as np
from numpy.typing import NDArray

SCHEME = "foldfeed/counter_rng/1"


class Purpose(enum.StrEnum):
    """What a stream is for. A new choice gets a new name; names are never reused for another meaning."""

    BLOCK_DELETE = "block_delete"
    ROWS = "rows"
    CROP = "crop"
    MASKING = "masking"
    SLAB = "slab"


class Stream:
    """A sequence of random words, at its start when made."""

    __slots__ = ("_philox",)

    def __init__(self, key: int) -> None:
        """Use `stream`."""
        self._philox = np.random.Philox(key=key)

    def words(self, count: int) -> NDArray[np.uint64]:
        """Returns the next ``count`` 64-bit words, uint64 (count,)."""
        return self._philox.random_raw(count)

    def integers(self, bound: int, count: int) -> NDArray[np.int64]:
        """Returns ``count`` integers, each uniform in ``range(bound)``.

        The top 32 bits of a word are scaled to the range, so a value is off its fair share by at most
        bound / 2**32 of it (1e-5 for 50,000 rows).

        Args:
          bound: 1 to 2**31.
          count: how many.
        Returns: int64 (count,).
        """
        assert 1 <= bound <= 2**31, bound
        return (((self.words(count) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)

    def order(self, count: int) -> NDArray[np.int64]:
        """Returns a uniformly random order of ``range(count)``, int64 (count,).

        Items are sorted by a random word each; a tie (2**-64 a pair) keeps the lower item first, so even then
        the result is defined.
        """
        return np.argsort(self.words(count), kind="stable").astype(np.int64)


def stream(seed: int, sample: int, purpose: Purpose) -> Stream:
    """Returns the stream of one choice of one sample.

    The three are hashed as a tuple: ``(seed, sample + 1)`` and ``(seed + 1, sample)`` share nothing.

    Args:
      seed: of the run, any integer.
      sample: global sample number.
      purpose: what is drawn.
    Raises:
      TypeError: seed or sample is no integer.
    """
    message = json.dumps([SCHEME, operator.index(seed), operator.index(sample), purpose.value])
    return Stream(int.from_bytes(hashlib.blake2b(message.encode(), digest_size=16).digest(), "little"))
