"""Reading samples in threads of the trainer against processes of their own: rates, and the cost to the
trainer's interpreter.

    python bench/loader_reading.py [--seconds S] [--recipe crop_first] [--rate R]

Samples are read and given back, no features are made. Two questions, each asked of every way in turn,
several rounds, medians: how many samples a second come when nobody waits; and how much of a pure Python
loop's speed is left in the main thread while samples come at a fixed rate (1: all of it). A row is written
to results/.
"""

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import loader_store
from rows import emit

from foldfeed.loader.meters.meters import Meters
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.reading.reading import GROUP_SAMPLES, OwnThreads, ReadingProcesses
from foldfeed.loader.reading.supply import PackedSupply, SampleSupply
from foldfeed.loader.recipe import Recipe

NAME = "loader_reading"
RESULTS = Path(__file__).parent / "results"
# (processes, threads): no process means threads of this one.
WAYS = ((0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (2, 1))
AHEAD = 64
READ_AHEAD_BYTES = 256 << 20


class Stream:
    """Takes samples in order on some threads, at most at a rate; as they lie together, where they do."""

    def __init__(self, supply: SampleSupply, num_threads: int) -> None:
        self._supply = supply
        self._threads = ThreadPoolExecutor(num_threads)
        self._packed = supply if isinstance(supply, PackedSupply) else None
        self._together = 1 if self._packed is None else GROUP_SAMPLES
        self._firsts = itertools.count(0, self._together)
        self._asked = self._taken = 0
        self._stop = threading.Event()
        self._due = time.perf_counter()
        self._interval = 0.0
        self._lock = threading.Lock()
        self._tasks = [self._threads.submit(self._take) for _ in range(num_threads)]

    def count(self) -> int:
        return self._taken

    def at_rate(self, rate: float) -> None:
        with self._lock:
            self._interval, self._due = (1 / rate if rate else 0.0), time.perf_counter()

    def close(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.result()
        self._threads.shutdown()

    def _take(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                sample = next(self._firsts)
                if sample + AHEAD > self._asked:
                    self._supply.ask(range(self._asked, sample + 2 * AHEAD))
                    self._asked = sample + 2 * AHEAD
                self._due += self._interval * self._together
                wait = self._due - time.perf_counter()
            if self._interval and wait > 0:
                time.sleep(wait)
            if self._packed is None:
                self._supply.get(sample).release()
            else:
                for piece in self._packed.take(sample)[1]:
                    piece.give_back(len(piece.numbers))
            with self._lock:
                self._taken += self._together


def turns(seconds: float) -> float:
    """Turns a second of a loop that needs the interpreter all the time."""
    count, stop = 0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for _ in range(1000):
            count += 1
    return count / seconds


def measure(
    supply_of: Callable[[], SampleSupply], num_threads: int, seconds: float, rate: float
) -> dict[str, float]:
    supply = supply_of()
    started = time.perf_counter()
    stream = Stream(supply, num_threads)
    while not stream.count():
        time.sleep(0.001)
    first_s = time.perf_counter() - started
    time.sleep(1.0)
    before = stream.count()
    time.sleep(seconds)
    samples_per_s = (stream.count() - before) / seconds
    stream.at_rate(rate)
    time.sleep(0.5)
    before = stream.count()
    busy = turns(seconds)
    came = (stream.count() - before) / seconds
    stream.close()
    supply.close()
    idle = turns(seconds)
    return {
        "first_sample_s": first_s,
        "samples_per_s": samples_per_s,
        "loop_speed_left": busy / idle,
        "rate_that_came": came,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--recipe", default="crop_first")
    parser.add_argument("--min-depth", type=int, default=200)
    arguments = parser.parse_args()
    recipe = Recipe.named(arguments.recipe)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, about = loader_store.build(f"{folder}/store", arguments.min_depth)
        reader = SampleReader(store, recipe, None, seed=0, global_batch=8, virtual_shards=8)
        for _ in range(arguments.rounds):
            for processes, threads in WAYS:
                name = f"{processes} processes, {threads} threads" if processes else f"{threads} threads here"

                def supply_of(processes: int = processes, threads: int = threads) -> SampleSupply:
                    if not processes:
                        return OwnThreads(reader, Meters())
                    return ReadingProcesses(reader, processes, threads, READ_AHEAD_BYTES, Meters())

                one = measure(supply_of, max(1, processes) * threads, arguments.seconds, arguments.rate)
                found.setdefault(name, []).append(one)
                print(name, {key: round(value, 3) for key, value in one.items()}, flush=True)
    results = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    config = {"recipe": arguments.recipe, "rate": arguments.rate, "seconds": arguments.seconds} | about
    emit(NAME, config | {"rounds": arguments.rounds}, results, arguments.output)


if __name__ == "__main__":
    main()
