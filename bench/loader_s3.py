"""Samples from a real S3 server on loopback: requests of a sample, rounds, and the rate against raw requests.

    python bench/loader_s3.py [--copies N] [--samples N] [--latency-ms 20]

The server is versitygw (`make s3-server`). *Requests*: every read of a store's file is counted, first when no
index of a part is known, then warm; a round is what is in flight together, so with every read delayed by the
latency a sample takes as many latencies as it has rounds. *Rate*: the samples' own ranges, 64 in flight, read
raw and thrown away; then whole samples, planned, read, checked and decoded, by as many threads as keep 64
requests in flight, and by a reading process. Both in turns, medians of the rounds. Server, reading and
decoding share this machine's cores. A row is written to results/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import loader_store
import numpy as np
import pytest
from rows import emit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from s3_server import BUCKET, client_environment, running_server, server_binary
from slow_blobs import SlowBlobs

from foldfeed.feature_store import FeatureStore
from foldfeed.loader.meters.meters import Meters
from foldfeed.loader.reading.cached_reader import _ranges_of
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.reading.reading import ReadingProcesses
from foldfeed.loader.recipe import Recipe

NAME = "loader_s3"
RESULTS = Path(__file__).parent / "results"
IN_FLIGHT = 64
RECIPES = ("crop_first", "af2")


def reader_of(store: FeatureStore, recipe: str) -> SampleReader:
    return SampleReader(store, Recipe.named(recipe), None, seed=1, global_batch=8, virtual_shards=8)


def requests(url: str, recipe: str, num_samples: int, latency_s: float) -> dict[str, float]:
    """Returns how many requests samples take, of which kind, and in how many rounds."""
    store = FeatureStore.open(url)
    blobs = store._blobs = SlowBlobs(store._blobs, 0.0)  # type: ignore[assignment]
    reader = reader_of(store, recipe)
    counts: list[Counter[str]] = []
    for sample in range(num_samples):
        planned = reader.planned(sample)
        planned.record.part  # noqa: B018  its metadata belongs to no sample
        blobs.reads.clear()
        reader.fetch(planned)
        counts.append(Counter(path.split("/")[2] for path, *_ in blobs.reads))
    # By now every part was read.
    warm, rounds = [], []
    for sample in range(num_samples):
        planned = reader.planned(num_samples + sample)
        blobs.reads.clear()
        reader.fetch(planned)
        warm.append(Counter(path.split("/")[2] for path, *_ in blobs.reads))
    blobs._latency_s = latency_s
    for sample in range(min(num_samples, 40)):
        planned = reader.planned(num_samples + sample)
        started = time.perf_counter()
        reader.fetch(planned)
        rounds.append((time.perf_counter() - started) / latency_s)
    crops = [found["msa"] + found["deletion"] for found in warm]
    totals = [found.total() for found in warm]
    return {
        "cold_first_sample": counts[0].total(),
        "crop_p50": float(np.percentile(crops, 50)),
        "crop_p90": float(np.percentile(crops, 90)),
        "sample_p50": float(np.percentile(totals, 50)),
        "sample_p90": float(np.percentile(totals, 90)),
        "rounds_p50": statistics.median(rounds),
    }


def rates(url: str, recipe: str, num_samples: int, rounds: int) -> dict[str, float]:
    """Returns samples a second, raw and whole, and their ratio."""
    store = FeatureStore.open(url)
    reader = reader_of(store, recipe)
    planned = [reader.planned(sample) for sample in range(num_samples)]
    ranges = [found for one in planned for found in _ranges_of(one)]
    blobs, opened, lock = store._blobs, {}, threading.Lock()

    def raw(found: Any) -> None:
        with lock:
            source = opened.setdefault(found.path, None) or blobs.open_range(found.path)
            opened[found.path] = source
        source(found.start, found.size)

    per_sample = len(ranges) / num_samples
    threads = max(1, round(IN_FLIGHT / per_sample))
    found: dict[str, list[float]] = {"raw": [], "threads": [], "process": []}
    for _ in range(rounds):
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            started = time.perf_counter()
            list(pool.map(raw, ranges))
            found["raw"].append(num_samples / (time.perf_counter() - started))
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            list(pool.map(lambda number: reader.fetch(reader.planned(number)), range(num_samples)))
            found["threads"].append(num_samples / (time.perf_counter() - started))
        supply = ReadingProcesses(reader, 1, threads, 256 << 20, Meters())
        try:
            # The start of the process and the first reading of indices do not count.
            supply.ask([num_samples])
            supply.get(num_samples).release()
            started = time.perf_counter()
            supply.ask(range(num_samples))
            for sample in range(num_samples):
                supply.get(sample).release()
            found["process"].append(num_samples / (time.perf_counter() - started))
        finally:
            supply.close()
    medians = {f"{name}_samples_per_s": statistics.median(values) for name, values in found.items()}
    return medians | {
        "requests_per_sample": per_sample,
        "raw_mb_per_s": sum(one.size for one in ranges) / num_samples * medians["raw_samples_per_s"] / 1e6,
        "threads_over_raw": medians["threads_samples_per_s"] / medians["raw_samples_per_s"],
        "process_over_raw": medians["process_samples_per_s"] / medians["raw_samples_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=2, help="of every alignment, a part each")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    arguments = parser.parse_args()
    try:
        server_binary()
    except pytest.skip.Exception as missing:
        print(f"{NAME}: not measured: {missing}")
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as endpoint:
        os.environ |= client_environment(endpoint)
        for row_order in ("rank", "permuted"):
            url = f"s3://{BUCKET}/{row_order}"
            _, about = loader_store.build(url, 200, row_order, arguments.copies)
            for recipe in RECIPES:
                key = f"{row_order}, {recipe}"
                results[key] = requests(url, recipe, arguments.samples, arguments.latency_ms / 1e3)
                results[key] |= rates(url, recipe, arguments.samples, arguments.rounds)
                print(key, {name: round(value, 2) for name, value in results[key].items()}, flush=True)
    config = {"samples": arguments.samples, "rounds": arguments.rounds, "in_flight": IN_FLIGHT}
    emit(NAME, config | {"latency_ms": arguments.latency_ms} | about, results, arguments.output)


if __name__ == "__main__":
    main()
