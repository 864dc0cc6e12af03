"""The loader's cache before a store behind a network: cold, warm from disk, memory or Redis, late answers.

    python bench/loader_cache.py [--latency-ms 20] [--seconds 6] [--copies 8]

A web server in a process of its own answers every request after a fixed time. Samples are read and given back
(two threads, no features), each way for some seconds from the same position; `share_of_local` compares with
the same store on the local disk without a cache, in the same run, and `rounds_hidden` is the share of samples
that did not wait a whole latency. `raw` reads blocks of the store's files with as many requests in flight as
the cache has, and nothing else; `fill` brings each block of the store into an empty cache, once. `eviction`
counts blocks read of the store for three epochs with memory for a share of it, by the order's future and by
what was used longest ago (no times: the counts do not depend on the machine). For late answers every fiftieth
request takes ten times as long, and blocks are read one by one with and without second requests.

One JSON row.
"""

import argparse
import concurrent.futures
import contextlib
import http.server
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import loader_store
from rows import emit

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.storage import open_blobs
from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.cache.eviction import unknown_uses
from foldfeed.loader.cache.files import CachedFiles
from foldfeed.loader.cache.tiers import Tiers
from foldfeed.loader.reading import cached_reader
from foldfeed.loader.reading.cached_reader import CachedReader
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import Recipe

NAME = "loader_cache"
RESULTS = Path(__file__).parent / "results"
NUM_THREADS, AHEAD = 2, 128
IN_FLIGHT = 64


class Late(http.server.BaseHTTPRequestHandler):
    """Answers byte ranges after a while; every ``one_in``-th answer takes ten times as long."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    latency_s = 0.0
    one_in = 0
    choice = random.Random(1)

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        late = self.one_in and self.choice.randrange(self.one_in) == 0
        time.sleep(self.latency_s * (10 if late else 1))
        path = self.folder / urllib.parse.unquote(self.path).lstrip("/")
        if not path.is_file():
            self.send_response_only(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert asked is not None
        start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
        if start >= size:
            self.send_response_only(416)
            data = b""
            self.send_header("Content-Range", f"bytes */{size}")
        else:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
            self.send_response_only(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(data) if self.command == "GET" else size))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    do_HEAD = do_GET


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(folder: str, latency_s: float, one_in: int) -> None:
    Late.folder, Late.latency_s, Late.one_in = Path(folder), latency_s, one_in
    server = Server(("127.0.0.1", 0), Late)
    print(server.server_address[1], flush=True)
    server.serve_forever()


class Far:
    """The server, in a process of its own."""

    def __init__(self, folder: str, latency_s: float, one_in: int = 0) -> None:
        command = [sys.executable, __file__, "--serve", folder, str(latency_s), str(one_in)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def measure(
    reader: SampleReader | CachedReader, first: int, seconds: float, latency_s: float
) -> dict[str, float]:
    """Reads samples from ``first`` on; returns rates, and what the tiers served."""
    counters = reader.counters() if isinstance(reader, CachedReader) else {}
    asked = first
    latencies: list[float] = []

    def read(sample: int) -> int:
        started = time.perf_counter()
        reader.read(sample)
        latencies.append(time.perf_counter() - started)
        return sample

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        waiting: list[Any] = []
        sample = first
        while time.perf_counter() - started < seconds:
            if isinstance(reader, CachedReader) and sample + AHEAD > asked:
                reader.ask(range(asked, sample + 2 * AHEAD))
                asked = sample + 2 * AHEAD
            waiting.append(threads.submit(read, sample))
            sample += 1
            if len(waiting) > 2 * NUM_THREADS:
                waiting.pop(0).result()
    spent = time.perf_counter() - started
    found = {
        "samples_per_s": len(latencies) / spent,
        "p50_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * sorted(latencies)[int(0.99 * (len(latencies) - 1))],
        "rounds_hidden": sum(took < latency_s for took in latencies) / len(latencies),
    }
    if isinstance(reader, CachedReader):
        now = reader.counters()
        found["store_mb_per_s"] = (now["cache_store_bytes"] - counters["cache_store_bytes"]) / 1e6 / spent
        for tier in ("memory", "folder", "redis", "store"):
            found[f"{tier}_hits"] = now[f"cache_{tier}_hits"] - counters[f"cache_{tier}_hits"]
    return found


def raw(url: str, store: FeatureStore, block_bytes: int, seconds: float) -> float:
    """Returns MB/s of plain reads of blocks, as many in flight as the cache has."""
    files = open_blobs(url)
    blocks = [
        (path.relative_to(store.url).as_posix(), start)
        for path in Path(store.url).glob("parts/*/*/c/**/*")
        if path.is_file()
        for start in range(0, path.stat().st_size, block_bytes)
    ]
    stop = time.perf_counter() + seconds
    total = 0

    def work(number: int) -> int:
        found, turn = 0, number
        while time.perf_counter() < stop:
            path, start = blocks[turn % len(blocks)]
            found += len(files.read_range(path, start, block_bytes))
            turn += IN_FLIGHT
        return found

    started = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        total = sum(threads.map(work, range(IN_FLIGHT)))
    return total / 1e6 / (time.perf_counter() - started)


def fill(url: str, store: FeatureStore, folder: str) -> float:
    """Returns MB/s of bringing every block of the store into an empty cache; no folder for memory alone."""
    config = CacheConfig(memory_bytes=1 << 30, folder=folder, in_flight=IN_FLIGHT, hedge=False)
    tiers = Tiers(config, [])
    files = CachedFiles(open_blobs(url), tiers)
    started = time.perf_counter()
    flights = []
    for path in Path(store.url).glob("parts/*/*/c/**/*"):
        if path.is_file():
            file = files.file_of(path.relative_to(store.url).as_posix())
            assert file is not None
            # One by one, as samples ask for them; neighbours in one request would be faster.
            for number in tiers.blocks_of(0, path.stat().st_size):
                flights += tiers.bring(file, [number])
    concurrent.futures.wait(flights)
    spent = time.perf_counter() - started
    counted = tiers.counters()["cache_store_bytes"]
    tiers.close()
    return counted / 1e6 / spent


def late(folder: str, latency_s: float, hedge: bool, num_reads: int) -> dict[str, float]:
    """Reads blocks one by one where one answer in fifty is late."""
    path = max(Path(folder).glob("parts/*/msa/c/0/0/0"), key=lambda file: file.stat().st_size)
    block_bytes = max(1024, path.stat().st_size // num_reads)
    config = CacheConfig(block_bytes=block_bytes, memory_bytes=4 * block_bytes, hedge=hedge, in_flight=8)
    with Far(folder, latency_s, 50) as url:
        tiers = Tiers(config, [url])
        read = CachedFiles(open_blobs(url), tiers).open_range(path.relative_to(folder).as_posix())
        took = []
        for number in range(num_reads):
            started = time.perf_counter()
            read(number * block_bytes, block_bytes)
            took.append(time.perf_counter() - started)
        counters = tiers.counters()
        tiers.close()
    took.sort()
    return {
        "p50_ms": 1000 * took[len(took) // 2],
        "p99_ms": 1000 * took[int(0.99 * (len(took) - 1))],
        "second_requests_share": counters["cache_hedges"] / num_reads,
        "second_requests_won": counters["cache_hedges_won"],
    }


def eviction(reader: SampleReader, store_bytes: int, share: float) -> dict[str, float]:
    """Reads three epochs, one sample after the other and nothing ahead."""
    order = reader.order
    config = CacheConfig(memory_bytes=max(1 << 20, int(share * store_bytes)), prefetch_bytes=0, hedge=False)
    found = {}
    for name, uses in (("future", cached_reader.BlockUse), ("lru", lambda *arguments: unknown_uses)):
        before, cached_reader.BlockUse = cached_reader.BlockUse, uses  # type: ignore[misc]
        try:
            through = CachedReader(reader, config, range(order.virtual_shards))
            for sample in range(3 * order.epoch_size):
                through.read(sample)
            found[f"{name}_store_reads"] = through.counters()["cache_store_hits"]
            through.close()
        finally:
            cached_reader.BlockUse = before  # type: ignore[misc]
    return found


@contextlib.contextmanager
def redis_server(folder: str) -> Iterator[str | None]:
    """Yields the URL of a Redis server of our own; None where there is no such program."""
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--min-depth", type=int, default=200)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--recipe", default="crop_first")
    arguments = parser.parse_args()
    latency_s = arguments.latency_ms / 1000
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        local, about = loader_store.build(f"{folder}/store", arguments.min_depth, copies=arguments.copies)
        recipe = Recipe.named(arguments.recipe)
        settings = {"seed": 0, "global_batch": 8, "virtual_shards": 8}
        with Far(local.url, latency_s) as url:
            store = FeatureStore.open(url)
            far = SampleReader(store, recipe, None, **settings)
            results["local, no cache"] = measure(
                SampleReader(local, recipe, None, **settings), 0, arguments.seconds, latency_s
            )
            results["far, no cache"] = measure(far, 0, arguments.seconds, latency_s)

            def through(name: str, rounds: int = 1, **values: Any) -> None:
                config = CacheConfig(in_flight=IN_FLIGHT, hedge=False, **values)
                reader = CachedReader(far, config, range(8))
                for _ in range(rounds):
                    results[name] = measure(reader, 0, arguments.seconds, latency_s)
                reader.close()
                print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)

            small = {"memory_bytes": 16 << 20}
            through("cold", **small, folder=f"{folder}/cache")
            through("warm from the folder", folder=f"{folder}/cache", **small)
            through("warm from memory", rounds=2)
            with redis_server(folder) as redis_url:
                if redis_url is not None:
                    through("redis, filled by this run", redis_url=redis_url, **small)
                    through("warm from redis", redis_url=redis_url, **small)
            rates: dict[str, list[float]] = {"raw": [], "fill memory": [], "fill a folder": []}
            for number in range(3):
                rates["raw"].append(raw(url, local, 256 << 10, 2.0))
                rates["fill memory"].append(fill(url, local, ""))
                rates["fill a folder"].append(fill(url, local, f"{folder}/filled-{number}"))
            for name, found in rates.items():
                rate = statistics.median(found)
                results[name] = {
                    "mb_per_s": rate,
                    "share_of_raw": statistics.median(
                        a / b for a, b in zip(found, rates["raw"], strict=True)
                    ),
                }
        stored = sum(
            file.stat().st_size for file in Path(local.url).rglob("parts/*/*/c/**/*") if file.is_file()
        )
        near = SampleReader(local, recipe, None, **settings)
        for share in (0.2, 0.5):
            results[f"eviction, memory for {share:.0%}"] = eviction(near, stored, share)
        results["late, one request"] = late(local.url, latency_s, False, 400)
        results["late, second requests"] = late(local.url, latency_s, True, 400)
    for row in results.values():
        if "samples_per_s" in row:
            row["share_of_local"] = row["samples_per_s"] / results["local, no cache"]["samples_per_s"]
    about["store_mb"] = round(stored / 1e6, 1)
    config = {"latency_ms": arguments.latency_ms, "recipe": arguments.recipe, "in_flight": IN_FLIGHT} | about
    emit(NAME, config | {"seconds": arguments.seconds, "threads": NUM_THREADS}, results, arguments.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
