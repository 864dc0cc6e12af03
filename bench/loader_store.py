"""A store for the loader's benchmarks: every alignment of some depth, real where there is test data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import alignments
import numpy as np

from foldfeed.feature_store import FeatureStore, MsaRecord, StoreSettings, write_part


def build(
    url: str, min_depth: int, row_order: str = "rank", copies: int = 1
) -> tuple[FeatureStore, dict[str, Any]]:
    """Returns a new store and what a reader should know of it.

    Args:
      url: an absent folder.
      min_depth: leave out alignments with fewer rows; shallow ones cost nothing and would hide the rest.
      row_order: of the store.
      copies: of every alignment, each in a part with one copy of all.
    """
    store = FeatureStore.create(url, StoreSettings.with_row_order(row_order))
    parts = []
    for copy in range(copies):
        wanted = (record for record in alignments.records() if record.depth >= min_depth)
        parts.append(write_part(store.url, _renamed(wanted, copy), store.settings).part_id)
    store.commit(parts, job_id="bench")
    # Not by a question: those need DuckDB, which `gpu/pack.sh` leaves out.
    table = store.index_rows()
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


def _renamed(records: Iterator[MsaRecord], copy: int) -> Iterator[MsaRecord]:
    for record in records:
        if copy:
            names = [name for name in record.__slots__ if not name.startswith("_")]
            values = {name: getattr(record, name) for name in names}
            record = MsaRecord(**values | {"record_id": f"{record.record_id}c{copy}"})
        yield record
