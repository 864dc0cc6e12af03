"""Samples from a real S3 server on loopback: requests of a sample, rounds, and the rate against raw requests.

    python bench/loader_s3.py [--copies N] [--samples N] [--latency-ms 20,200] [--mbit 20,100,1000]

The server is versitygw (`make s3-server`). *Requests*: every read of a store's file is counted, first when no
index of a part is known, then warm; a round is what is in flight together, so with every read delayed by the
latency a sample takes as many latencies as it has rounds. *Rate*: the samples' own ranges, 64 in flight, read
raw and thrown away; then whole samples, planned, read, checked and decoded, by as many threads as keep 64
requests in flight, and by a reading process. All in turns, medians of the rounds; with CPU milliseconds of a
sample, here and at the server, because server, reading and decoding share this machine's cores: first with no
other limit than these, then behind a link of some width (`s3_network`, as root), then behind a latency. A row
is written to results/.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import loader_store
import numpy as np
import pytest
from rows import NOTHING_TO_MEASURE, emit
from s3_network import cpu_s, network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from s3_server import BUCKET, client_environment, server_binary
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


class Cpu:
    """CPU seconds of this process, of a server (and what lies before it), and of reading processes."""

    def __init__(self, there: Sequence[int]) -> None:
        self._there = there
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        return time.process_time(), sum(map(cpu_s, self._there))

    def ms_per(self, number: int) -> tuple[float, float]:
        """Returns milliseconds since the beginning, here and there, of each of so many."""
        here, there = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return here / number * 1e3, there / number * 1e3


def rates(url: str, recipe: str, num_samples: int, rounds: int, there: Sequence[int]) -> dict[str, float]:
    """Returns samples a second, raw and whole, their ratios, and CPU milliseconds of a sample.

    Args:
      url: of the store.
      recipe: by name.
      num_samples: of a round.
      rounds: of all ways in turns.
      there: ids of the processes at the other end.
    """
    store = FeatureStore.open(url)
    reader = reader_of(store, recipe)
    planned = [reader.planned(sample) for sample in range(num_samples)]
    ranges = [found for one in planned for found in _ranges_of(one)]
    blobs = store._blobs
    opened = {path: blobs.open_range(path) for path in {found.path for found in ranges}}
    per_sample = len(ranges) / num_samples
    threads = max(1, round(IN_FLIGHT / per_sample))
    found: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    cpu = Cpu(())
    for sample in range(num_samples):
        reader.planned(sample)
    plan_ms = cpu.ms_per(num_samples)[0]
    for _ in range(rounds):
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            cpu, started = Cpu(there), time.perf_counter()
            for _ in pool.map(lambda one: len(opened[one.path](one.start, one.size)), ranges):
                pass
            add(raw_samples_per_s=num_samples / (time.perf_counter() - started))
            here_ms, there_ms = cpu.ms_per(num_samples)
            add(raw_client_cpu_ms=here_ms, raw_server_cpu_ms=there_ms)
        with ThreadPoolExecutor(threads) as pool:
            cpu, started = Cpu(there), time.perf_counter()
            for _ in pool.map(lambda number: len(reader.fetch(reader.planned(number))), range(num_samples)):
                pass
            add(threads_samples_per_s=num_samples / (time.perf_counter() - started))
            here_ms, there_ms = cpu.ms_per(num_samples)
            add(threads_client_cpu_ms=here_ms, threads_server_cpu_ms=there_ms)
        supply = ReadingProcesses(reader, 1, threads, 256 << 20, Meters())
        try:
            # The start of the process and the first reading of indices do not count.
            warm = range(num_samples, num_samples + threads)
            supply.ask(warm)
            for sample in warm:
                supply.get(sample).release()
            cpu, started = Cpu((*there, *supply.pids)), time.perf_counter()
            supply.ask(range(num_samples))
            for sample in range(num_samples):
                supply.get(sample).release()
            add(process_samples_per_s=num_samples / (time.perf_counter() - started))
            add(process_cpu_ms=sum(cpu.ms_per(num_samples)))
        finally:
            supply.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    raw = medians["raw_samples_per_s"]
    ours_ms = medians["raw_client_cpu_ms"] + medians["raw_server_cpu_ms"]
    all_ms = medians["threads_client_cpu_ms"] + medians["threads_server_cpu_ms"]
    return medians | {
        "requests_per_sample": per_sample,
        "raw_mb_per_s": sum(one.size for one in ranges) / num_samples * raw / 1e6,
        "plan_cpu_ms": plan_ms,
        "threads_over_raw": medians["threads_samples_per_s"] / raw,
        "process_over_raw": medians["process_samples_per_s"] / raw,
        # Where nothing but CPU limits both, ours cannot be faster.
        "cpu_bound_of_ratio": ours_ms / all_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=2, help="of every alignment, a part each")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency-ms", default="20,200", help="added to each request, one after the other")
    parser.add_argument("--mbit", default="20,100,1000", help="widths of the link to the server")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    arguments = parser.parse_args()
    # So that a run that is ended takes its network along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        server_binary()
    except pytest.skip.Exception as missing:
        print(f"{NAME}: not measured: {missing}")
        raise SystemExit(NOTHING_TO_MEASURE) from None
    latencies_ms = [float(text) for text in arguments.latency_ms.split(",")]
    results: dict[str, Any] = {}
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, network(Path(folder)) as way:
        os.environ |= client_environment(way.endpoint)
        urls = {order: f"s3://{BUCKET}/{order}" for order in ("rank", "permuted")}
        for row_order, url in urls.items():
            about |= loader_store.build(url, 200, row_order, arguments.copies)[1]

        def measure(name: str, there: Sequence[int]) -> None:
            for (row_order, url), recipe in itertools.product(urls.items(), RECIPES):
                key = f"{name}, {row_order}, {recipe}"
                results[key] = rates(url, recipe, arguments.samples, arguments.rounds, there)
                print(key, {what: round(value, 2) for what, value in results[key].items()}, flush=True)

        for (row_order, url), recipe in itertools.product(urls.items(), RECIPES):
            key = f"requests, {row_order}, {recipe}"
            results[key] = requests(url, recipe, arguments.samples, latencies_ms[0] / 1e3)
            print(key, {what: round(value, 2) for what, value in results[key].items()}, flush=True)
        measure("no limit", [way.server_pid])
        if way.can_shape:
            for mbit in map(int, arguments.mbit.split(",")):
                with way.narrow(mbit):
                    measure(f"{mbit} Mbit/s", [way.server_pid])
        for latency_ms in latencies_ms:
            with way.far(latency_ms) as (endpoint, relay_pid):
                os.environ |= client_environment(endpoint)
                measure(f"{latency_ms:g} ms", [way.server_pid, relay_pid])
    config = {"samples": arguments.samples, "rounds": arguments.rounds, "in_flight": IN_FLIGHT}
    emit(NAME, config | {"latencies_ms": latencies_ms} | about, results, arguments.output)


if __name__ == "__main__":
    main()
