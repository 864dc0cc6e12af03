"""Which virtual shard of a step holds which of its samples: in their order, or by where records are stored.

With ``storage`` the samples of a step are sorted by the place of their records (part, then tiles) before they
are cut into virtual shards. Ranks own runs of shards, so the n-th of N machines reads mostly the n-th part of
the stores, and its cache need hold little else. Which samples a step has does not change, and neither do
they; which shard holds them does, and so the order in which a trainer sums. It depends on no number of
machines or ranks, so these may change at any step, as without.

How often a sample lies outside of its machine's own part is chance: the larger the step, the less (the bound
of a machine's part at the share q of the store moves by about sqrt(q (1 - q) / samples of a step) of it).

Thread safe.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from foldfeed.loader.order.order import SampleOrder

ORDER, STORAGE = "order", "storage"
PLACEMENTS = (ORDER, STORAGE)


class StoragePlacement:
    """The samples of virtual shards, by where their records are stored."""

    def __init__(
        self, order: SampleOrder, chosen: Sequence[tuple[pa.Table, NDArray[np.int64] | None]]
    ) -> None:
        """Sorts the records: 8 bytes each.

        Args:
          order: of the samples.
          chosen: `order.selection.Selection.places`.
        """
        self._order = order
        self._places = _ranks(chosen)
        self._sorted = functools.lru_cache(maxsize=64)(self._sort)

    def shard_samples(self, step: int, shard: int) -> list[int]:
        """Returns the global numbers of the samples of a virtual shard, see `SampleOrder.shard_samples`."""
        samples = self._sorted(step)
        first, last = (len(samples) * end // self._order.virtual_shards for end in (shard, shard + 1))
        return samples[first:last]

    def _sort(self, step: int) -> list[int]:
        samples = np.array(self._order.step_samples(step), dtype=np.int64)
        places = self._places[self._order.records(samples)]
        return samples[np.lexsort((samples, places))].tolist()


def _ranks(chosen: Sequence[tuple[pa.Table, NDArray[np.int64] | None]]) -> NDArray[np.int64]:
    """Returns the place of each record among those drawn from, by part and tile."""
    pieces = []
    for table, positions in chosen:
        rows = table.select(["part_id", "first_tile"])
        rows = rows if positions is None else rows.take(pa.array(positions))
        pieces.append(pa.table({"part": pc.cast(rows["part_id"], pa.string()), "tile": rows["first_tile"]}))
    together = pa.concat_tables(pieces)
    by_place = pc.sort_indices(together, sort_keys=[("part", "ascending"), ("tile", "ascending")]).to_numpy()
    ranks = np.empty(len(together), dtype=np.int64)
    ranks[by_place] = np.arange(len(together))
    return ranks
