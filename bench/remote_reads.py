"""How long crops of many records take from storage that answers late.

Run: python bench/remote_reads.py [--latency-ms 30] [--crops 64]

The real alignments (or synthetic ones) go into a local store of one part per record; every read of its files
is then delayed by a fixed time, as by a network. The same random crops (256 residues x up to 512 rows, and
slabs of a permuted store) are read one by one and together with 1, 4, 16, 64 in flight. A round is one
latency; the least number of rounds is the number of reads divided by what is in flight, rounded up, one more
round for each thing that must be known before the next can be asked for (metadata, indices, tiles, exact
deletion counts). Time beyond the rounds is decoding. One JSON row.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import alignments
import numpy as np
import rows

from foldfeed.feature_store import CropRequest, FeatureStore, StoredRun, StoreSettings, write_part

IN_FLIGHT = (1, 4, 16, 64)


class Late:
    """A store's files behind a latency; counts reads by the phase they belong to."""

    def __init__(self, blobs: Any, latency_s: float) -> None:
        self._blobs = blobs
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self.num_reads = 0
        self.num_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def read(self, path: str) -> bytes:
        return self._count(self._blobs.read(path))

    def open_range(self, path: str) -> Any:
        source = self._blobs.open_range(path)
        return lambda start, size: self._count(source(start, size))

    def _count(self, data: bytes) -> bytes:
        time.sleep(self._latency_s)
        with self._lock:
            self.num_reads += 1
            self.num_bytes += len(data)
        return data


def build(folder: str, settings: StoreSettings, copies: int) -> FeatureStore:
    store = FeatureStore.create(folder, settings)
    parts = []
    for copy in range(copies):
        for record in alignments.records():
            renamed = type(record)(
                **{
                    name: getattr(record, name)
                    for name in record.__slots__
                    if name != "record_id" and not name.startswith("_")
                },
                record_id=f"{record.record_id}c{copy}",
            )
            parts.append(write_part(store.url, [renamed], settings).part_id)
    store.commit(parts, job_id="bench")
    return store


def draw(store: FeatureStore, count: int) -> list[CropRequest]:
    rng = np.random.default_rng(4)
    found = []
    for name in rng.permutation(store.ids)[:count]:
        record = store[str(name)]
        cols, depth = min(256, record.length), min(512, record.depth)
        left = int(rng.integers(record.length - cols + 1))
        if store.settings.row_order == "permuted":
            chosen: Any = StoredRun(int(rng.integers(max(record.depth - 1, 1))), depth)
        else:
            top = int(rng.integers(record.depth - depth + 1))
            chosen = slice(top, top + depth)
        found.append(CropRequest(str(name), slice(left, left + cols), chosen))
    return found


def measure(
    url: str, requests: list[CropRequest], latency_s: float, in_flight: int | None
) -> dict[str, float]:
    """Returns times of a store that was opened just now; None in flight: crop by crop."""
    store = FeatureStore.open(url)
    late = store._blobs = Late(store._blobs, latency_s)
    started = time.perf_counter()
    if in_flight is None:
        for request in requests:
            store[request.record_id].crop(request.residues, request.rows)
    else:
        store.crops(requests, in_flight=in_flight)
    seconds = time.perf_counter() - started
    cold_reads = late.num_reads
    started = time.perf_counter()
    if in_flight is not None:
        store.crops(requests, in_flight=in_flight)
    warm_s, warm_reads = time.perf_counter() - started, late.num_reads - cold_reads
    result = {
        "seconds": seconds,
        "reads": cold_reads,
        "rounds": seconds / latency_s,
        "least_rounds": math.ceil(cold_reads / (in_flight or 1)),
    }
    if in_flight is not None:
        # Metadata and indices are known by now.
        result |= {
            "again_seconds": warm_s,
            "again_reads": warm_reads,
            "again_rounds": warm_s / latency_s,
            "again_least_rounds": math.ceil(warm_reads / in_flight),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "remote_reads.jsonl"
    )
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for order in ("rank", "permuted"):
        with tempfile.TemporaryDirectory() as folder:
            store = build(f"{folder}/s", StoreSettings.with_row_order(order), options.copies)
            requests = draw(store, options.crops)
            latency_s = options.latency_ms / 1000
            results[order] = {"one by one": measure(store.url, requests, latency_s, None)}
            for in_flight in IN_FLIGHT:
                results[order][f"{in_flight} in flight"] = measure(store.url, requests, latency_s, in_flight)
        for name, row in results[order].items():
            print(order, name, {key: round(value, 2) for key, value in row.items()})
    config = {
        "latency_ms": options.latency_ms,
        "crops": len(requests),
        "real": bool(alignments.a3m_files()),
    }
    rows.emit("remote_reads", config, results, options.output)


if __name__ == "__main__":
    main()
