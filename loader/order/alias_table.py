"""`AliasTable`: weighted draws with replacement, one word and two look-ups each, however many the items.

Item i has ``shares[i]`` of ``size << bits`` equal parts, in proportion to its weight, and the parts lie in
``size`` columns of ``1 << bits``: column c holds ``kept[c]`` parts of item c, and the rest is of item
``alias[c]``. A word picks a column and a part in it. All of it is integer arithmetic, so a table, and with it
every draw of a run, is the same on any machine. The only rounding is that of weights to shares: to the
precision of float64 and to 2**-62 of the whole; what that leaves over or lacks is the largest one's.

Memory: 12 bytes an item. Immutable and therefore thread safe. Knows nothing of records or seeds.

Source: A. Walker, "An efficient method for generating discrete random variables with general distributions",
ACM TOMS 3 (1977); the table is made by prefix sums as in L. Hübschle-Schneider and P. Sanders, "Parallel
weighted random sampling", ACM TOMS 48 (2022), section 3 (sweep), which needs no loop over items.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldfeed.loader.errors import LoaderConfigError

# Two 32-bit halves of a word are multiplied by the number of items without overflow.
MAX_ITEMS = 2**31
WHOLE_BITS = 62
BLOCK = 2**14


class AliasTable:
    """Draws from ``range(size)`` with given weights.

    Example:
      >>> table = AliasTable([1, 0, 3])
      >>> table.draw(np.array([0, 2**62, 2**63], np.uint64))
      array([0, 2, 2])

    Attributes:
      bits: log2 of the parts of a column.
    """

    __slots__ = ("_alias", "_kept", "bits")

    def __init__(self, weights: ArrayLike) -> None:
        """Makes the table.

        Args:
          weights: float (n,), at least 0 and not all 0; only their ratios count.
        Raises:
          LoaderConfigError: not such numbers, or more than 2**31.
        """
        values = np.asarray(weights, dtype=np.float64)
        if values.ndim != 1 or not 1 <= values.size <= MAX_ITEMS:
            raise LoaderConfigError("weights", values.shape, f"must be one axis of 1 to {MAX_ITEMS} numbers")
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            raise LoaderConfigError(
                "weights", float(values[bad[0]]), f"(item {bad[0]}) must be a finite number of at least 0"
            )
        if not values.any():
            raise LoaderConfigError("weights", 0.0, "are all 0, so nothing can be drawn; give one item more")
        self.bits = WHOLE_BITS - (values.size - 1).bit_length()
        self._kept, self._alias = _columns(_whole_shares(values, self.bits), self.bits)

    def __len__(self) -> int:
        return self._kept.size

    def draw(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns the item of each word: item i for ``shares[i]`` of the words in every ``size << bits``.

        Args:
          words: uint64, evenly distributed, any shape.
        Returns: int64, the same shape, a fresh array.
        """
        flat = words.ravel()
        items = np.empty(flat.size, dtype=np.int64)
        size, low = np.uint64(len(self)), np.uint64(2**32 - 1)
        high_bits, part_bits = np.uint64(32), np.uint64(64 - self.bits)
        for first in range(0, flat.size, BLOCK):
            block = flat[first : first + BLOCK]
            # words * size in 128 bits: the upper 64 are the column, the lower 64 the place in it.
            column = (block & low) * size
            column >>= high_bits
            upper = block >> high_bits
            upper *= size
            column += upper
            column >>= high_bits
            part = block * size
            part >>= part_bits
            at = column.view(np.int64)
            other = part >= np.take(self._kept, at, mode="clip")
            items[first : first + BLOCK] = np.where(other, np.take(self._alias, at, mode="clip"), at)
        return items.reshape(words.shape)

    @property
    def shares(self) -> NDArray[np.int64]:
        """Parts of each item, int64 (n,), read back from the columns; they add up to ``size << bits``."""
        shares = self._kept.astype(np.int64)
        np.add.at(shares, self._alias, (1 << self.bits) - self._kept.astype(np.int64))
        return shares

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Chance of each item, float64 (n,)."""
        return self.shares / (len(self) << self.bits)

    @property
    def data(self) -> tuple[bytes, bytes]:
        """All that decides a draw, the same bytes on any machine."""
        return self._kept.astype("<u8").tobytes(), self._alias.astype("<i8").tobytes()


def _whole_shares(weights: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
    """Returns shares in proportion to weights, int64 (n,), that add up to ``n << bits``."""
    relative = weights / weights.max()
    # fsum rounds once, whatever the order; the rest is one operation an item.
    scale = (weights.size << bits) / math.fsum(relative)
    shares = np.rint(relative * scale).astype(np.int64)
    shares[np.argmax(shares)] += (weights.size << bits) - int(shares.sum())
    return shares


def _columns(shares: NDArray[np.int64], bits: int) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Returns (kept, alias) of the columns of a table.

    Heavy items, in their order, give what they have above a column to the light ones, in theirs. A heavy item
    that has come below a column that way is filled up by the next heavy one.
    """
    column = 1 << bits
    kept, alias = shares.copy(), np.arange(shares.size)
    light, heavy = np.flatnonzero(shares < column), np.flatnonzero(shares > column)
    if heavy.size:
        wanted = np.cumsum(column - shares[light])
        given = np.cumsum(shares[heavy] - column)
        # A light item is filled by the first heavy one that the light ones before it have not used up.
        alias[light] = heavy[np.searchsorted(given, wanted - (column - shares[light]), side="right")]
        # A heavy item keeps what is left when the light item that used it up is full.
        used_up = wanted[np.searchsorted(wanted, given, side="left")]
        kept[heavy] = column + given - used_up
        alias[heavy[:-1]] = heavy[1:]
    return kept.astype(np.uint64), alias.astype(np.int32)
