"""A store for the loader's benchmarks: every alignment of some depth, real where there is test data."""

from __future__ import annotations

from typing import Any

import alignments
import numpy as np

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part


def build(url: str, min_depth: int, row_order: str = "rank") -> tuple[FeatureStore, dict[str, Any]]:
    """Returns a new store and what a reader should know of it.

    Args:
      url: an absent folder.
      min_depth: leave out alignments with fewer rows; shallow ones cost nothing and would hide the rest.
      row_order: of the store.
    """
    store = FeatureStore.create(url, StoreSettings.with_row_order(row_order))
    wanted = (record for record in alignments.records() if record.depth >= min_depth)
    store.commit([write_part(store.url, wanted, store.settings).part_id], job_id="bench")
    table = store.table(["depth", "length"])
    depth, length = table["depth"].to_numpy(), table["length"].to_numpy()
    return store, {
        "real": bool(alignments.a3m_files()),
        "records": len(store),
        "min_depth": int(depth.min()),
        "median_depth": float(np.median(depth)),
        "max_depth": int(depth.max()),
        "median_length": float(np.median(length)),
        "max_length": int(length.max()),
        "tile": f"{store.settings.tile_rows}x{store.settings.tile_cols}",
    }
