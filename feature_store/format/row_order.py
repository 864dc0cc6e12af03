"""Which rank each stored row of an alignment has, and where each rank is stored.

Readers and writers speak of ranks (0 is the query); tiles hold stored rows. In a store of row order ``rank``
the two are the same. In one of ``permuted`` the hits of every record lie in a keyed random order of their
own, so that any contiguous run of stored rows is a uniform sample of them, and the query stays stored row 0.

Owns that mapping and the key it depends on, frozen in FORMAT.md ("Row order"); does not own tiles. Pure and
immutable, O(1) memory whatever the depth, thread safe.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format.grid import RowIndex
from foldfeed.feature_store.format.permutation import KeyedPermutation
from foldfeed.feature_store.format.settings import PERMUTED, StoreSettings


class RowOrder:
    """The order of one record's rows.

    With ``permuted``, seed 0, record ``"P1"`` and 6 rows, stored row 0 is the query (rank 0) and stored rows
    1..5 hold ranks 1..5 in some order; ``stored(ranks(rows)) == rows`` always.

    Attributes:
      depth: rows of the record, the query included.
      is_rank: whether stored rows are ranks.
    """

    __slots__ = ("_key", "depth", "is_rank")

    def __init__(self, settings: StoreSettings, record_id: str, depth: int) -> None:
        """Computes nothing yet.

        Args:
          settings: of the store.
          record_id: of the record; what makes its order its own.
          depth: rows, at least 1.
        """
        self.depth = depth
        # Two rows have one order: the query and its only hit.
        self.is_rank = settings.row_order != PERMUTED or depth <= 2
        self._key = (settings.row_order_seed or 0, record_id, depth)

    def ranks(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the rank of each stored row, int64, a fresh array of the same shape.

        Args:
          stored: int64, each in ``range(depth)``.
        """
        if self.is_rank:
            return stored.copy()
        found = np.zeros_like(stored)
        hits = stored > 0
        found[hits] = 1 + _permutation(*self._key).forward(stored[hits] - 1)
        return found

    def stored_rows(self, ranks: RowIndex) -> RowIndex:
        """Returns the stored rows of a selection of ranks, see `grid.resolve_rows`, in its order."""
        if self.is_rank:
            return ranks
        return self.stored(np.arange(ranks.start, ranks.stop) if isinstance(ranks, slice) else ranks)

    def stored(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the stored row of each rank, int64, a fresh array of the same shape.

        Args:
          ranks: int64, each in ``range(depth)``.
        """
        if self.is_rank:
            return ranks.copy()
        found = np.zeros_like(ranks)
        hits = ranks > 0
        found[hits] = 1 + _permutation(*self._key).inverse(ranks[hits] - 1)
        return found


@functools.lru_cache(maxsize=1024)
def _permutation(seed: int, record_id: str, depth: int) -> KeyedPermutation:
    """Returns the order of the hits of a record: hit ``forward(i)`` of rank order is stored at ``i``."""
    word = int.from_bytes(hashlib.sha256(record_id.encode()).digest()[:8], "big")
    return KeyedPermutation(depth - 1, (seed, word, depth))
