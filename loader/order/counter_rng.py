"""Random numbers that depend on (seed, sample, purpose) and on nothing else.

Every choice inside a sample (which rows, which window, which positions to mask) is drawn from a stream of its
own, keyed by the run's seed, the global sample number and a named purpose. No generator is shared or advanced
between samples, so a sample is the same on any rank, in any thread, in any order of calls and after a resume.

Numbers come from the raw words of Philox4x64-10 with arithmetic of our own on top. NumPy promises that the
words of a bit generator never change, but not the methods of ``numpy.random.Generator`` (NEP 19), and a run
that is resumed after an upgrade must draw the same samples. Where it was built, a compiled form makes these
words (`draw_kernel`).

Which record a weighted draw gives is one word a sample, for millions of samples at once: `words_at` makes
those from an array of sample numbers, in any order, by SplitMix64's finaliser twice over.

Thread safe: a stream belongs to the caller that made it; what the module keeps is each thread's own.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox); G. Steele et al.,
"Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64, its finaliser and golden gamma).
"""

from __future__ import annotations

import enum
import hashlib
import json
import operator
import threading

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldfeed.loader.order import draw_kernel

SCHEME = "foldfeed/counter_rng/1"
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
# Words that are made together: they and their scratch stay in a core's second-level cache.
BLOCK = 2**14
# From here on a quick sort with the look for ties that it needs is faster than a stable one (33,000: 2.5x).
QUICK_SORT = 4096


class Purpose(enum.StrEnum):
    """What a stream is for. A new choice gets a new name; names are never reused for another meaning."""

    BLOCK_DELETE = "block_delete"
    ROWS = "rows"
    CROP = "crop"
    MASKING = "masking"
    SLAB = "slab"
    RECORD = "record"
    DEPTH = "depth"
    DISTILLATION = "distillation"
    RECYCLES = "recycles"
    SUBSTITUTE = "substitute"


class Stream:
    """A sequence of random words, at its start when made.

    Attributes:
      key: the two words of Philox's key.
    """

    __slots__ = ("_num_taken", "key")

    def __init__(self, key: int) -> None:
        """Use `stream`."""
        self.key = (key & (2**64 - 1), key >> 64)
        self._num_taken = 0

    def words(self, count: int) -> NDArray[np.uint64]:
        """Returns the next ``count`` 64-bit words, uint64 (count,)."""
        first = self.skip(count)
        words = draw_kernel.words(self.key, first, count)
        return words_by_numpy(self.key, first, count) if words is None else words

    def few_words(self, count: int) -> list[int]:
        """Returns the next ``count`` words as integers: of few, in half the time of an array."""
        if count > draw_kernel.MOST_FEW:
            return self.words(count).tolist()
        first = self.skip(count)
        words = draw_kernel.few_words(self.key, first, count)
        return words_by_numpy(self.key, first, count).tolist() if words is None else words

    def skip(self, count: int) -> int:
        """Takes the next ``count`` words without making them; returns the number of the first."""
        first = self._num_taken
        self._num_taken += count
        return first

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

    def few_integers(self, bound: int, count: int) -> list[int]:
        """Returns what `integers` does, as a list of few, see `few_words`."""
        assert 1 <= bound <= 2**31, bound
        return [((word >> 32) * bound) >> 32 for word in self.few_words(count)]

    def order(self, count: int, limit: int | None = None, first_item: int = 0) -> NDArray[np.int64]:
        """Returns a uniformly random order of ``range(count)``, int64 (count,).

        Items are sorted by a random word each; a tie (2**-64 a pair) keeps the lower item first, so even then
        the result is defined.

        Args:
          count: of the items.
          limit: only so many of them, the first of the order; all when None.
          first_item: what is added to each.
        """
        words = self.words(count)
        order = draw_kernel.order(words, limit, first_item)
        return _order_by_numpy(words)[:limit] + first_item if order is None else order


class _Generator(threading.local):
    """A Philox generator of each thread, put where a stream is: making one takes six times as long."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)

    def at(self, key: tuple[int, int], block: int) -> np.random.Philox:
        """Returns it at a block of four words of a key."""
        self._philox.state = {
            "bit_generator": "Philox",
            "state": {
                "counter": np.array([block, 0, 0, 0], dtype=np.uint64),
                "key": np.array(key, dtype=np.uint64),
            },
            "buffer": _NO_BUFFER,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._philox


_NO_BUFFER = np.zeros(4, dtype=np.uint64)
_generator = _Generator()


def words_by_numpy(key: tuple[int, int], first: int, count: int) -> NDArray[np.uint64]:
    """Returns what `draw_kernel.words` does: words of a stream, made by NumPy's generator."""
    # A block of the generator is four words; those of it that were taken are made again and left out.
    block, inside = divmod(first, 4)
    words: NDArray[np.uint64] = _generator.at(key, block).random_raw(inside + count)
    return words[inside:]


def _order_by_numpy(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    if len(words) < QUICK_SORT:
        return np.argsort(words, kind="stable").astype(np.int64)
    order = np.argsort(words)
    ordered = words[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(words, kind="stable")
    return order.astype(np.int64)


def stream(seed: int, sample: int, purpose: Purpose, draw: int = 0) -> Stream:
    """Returns the stream of one choice of one sample.

    They are hashed as a tuple: ``(seed, sample + 1)`` and ``(seed + 1, sample)`` share nothing.

    Args:
      seed: of the run, any integer.
      sample: global sample number; or of a step, for what its samples share.
      purpose: what is drawn.
      draw: how often it was drawn for this sample before; 0 gives what there was before there were others.
    Raises:
      TypeError: seed, sample or draw is no integer.
    """
    again = f", {operator.index(draw)}" if draw else ""
    # What `json.dumps` makes of the tuple, in a fifth of the time: a sample has four streams and more.
    text = f'["{SCHEME}", {operator.index(seed)}, {operator.index(sample)}, "{purpose._value_}"{again}]'
    return Stream(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))


def words_at(seed: int, samples: ArrayLike, purpose: Purpose) -> NDArray[np.uint64]:
    """Returns one word for each sample number, whatever the others are.

    ``words_at(s, [7, 2], p)`` is ``[words_at(s, 7, p), words_at(s, 2, p)]``. The finaliser runs twice, each
    time with a key of its own, so that seeds do not share one sequence at different places.

    Args:
      seed: of the run, any integer.
      samples: global sample numbers, 0 to 2**63 - 1, any shape.
      purpose: what is drawn.
    Returns: uint64, the same shape, a fresh array.
    Raises:
      TypeError: samples are no integers.
    """
    numbers = np.asarray(samples)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"sample numbers must be integers, not {numbers.dtype}; use .astype(numpy.int64)")
    keys = np.frombuffer(_digest([operator.index(seed), purpose.value, "at"], 16), dtype="<u8").astype(
        np.uint64
    )
    words = numbers.astype(np.uint64).ravel()
    scratch = np.empty(min(BLOCK, words.size), dtype=np.uint64)
    for first in range(0, words.size, BLOCK):
        block = words[first : first + BLOCK]
        np.multiply(block, GOLDEN_GAMMA, out=block)
        for key in keys:
            np.add(block, key, out=block)
            _finalise(block, scratch[: block.size])
    return words.reshape(numbers.shape)


def _finalise(words: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> None:
    """Applies SplitMix64's finaliser (D. Stafford's variant 13) in place."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(words, np.uint64(shift), out=scratch)
        np.bitwise_xor(words, scratch, out=words)
        if multiplier is not None:
            np.multiply(words, np.uint64(multiplier), out=words)


def _digest(key: list[int | str], num_bytes: int) -> bytes:
    return hashlib.blake2b(json.dumps([SCHEME, *key]).encode(), digest_size=num_bytes).digest()
