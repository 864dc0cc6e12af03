"""Samples in slots, no features: what they cost beside the store's own reader, and what a second core adds.

    python bench/loader_slots.py [--samples N] [--passes P] [--seconds S] [--device cuda]

The same windows for every way. *Per core*: thread CPU microseconds a sample of `Record.crop` into given
arrays, of planning, and of reading into a slot of shared memory; each sample's least of some passes, the
three ways in turns. *Processes*: samples/s that one and two threads here, and one and two reading processes,
bring into slots when nobody waits, in turns, the best of some rounds, with CPU microseconds of all processes
a sample. With a CUDA device also what its bus gives (*bus*): GB/s of one copy of eight samples, from
page-locked memory and from memory that is not, by events. On a quiet machine the whole takes under three
minutes. One JSON row.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loader_store
import numpy as np
import torch
from loader_reading import READ_AHEAD_BYTES, Stream
from rows import emit

from foldfeed.feature_store import FeatureStore
from foldfeed.loader.meters.meters import Meters
from foldfeed.loader.reading.fetch import shapes_of
from foldfeed.loader.reading.process import PLANNED_TOGETHER
from foldfeed.loader.reading.reader import PlannedSample, SampleReader
from foldfeed.loader.reading.reading import OwnThreads, ReadingProcesses
from foldfeed.loader.reading.slots import place, slot_bytes
from foldfeed.loader.reading.supply import SampleSupply
from foldfeed.loader.recipe import Recipe

NAME = "loader_slots"
RESULTS = Path(__file__).parent / "results"
RECIPES = ("crop_first", "af2")
ROW_ORDERS = ("rank", "permuted")
# (processes, threads of each): no process means threads of this one.
WAYS = ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1))


def reader_of(store: FeatureStore, recipe: str) -> SampleReader:
    return SampleReader(store, Recipe.named(recipe), None, seed=0, global_batch=8, virtual_shards=8)


def per_core(store: FeatureStore, recipe: str, num_samples: int, passes: int) -> dict[str, float]:
    """Returns CPU us of one sample, by what it is spent on."""
    reader = reader_of(store, recipe)
    memory = mmap.mmap(-1, 64 << 20)
    msa, deletions = np.empty(16 << 20, np.uint8), np.empty(16 << 20, np.int32)
    least = {name: np.full(num_samples, np.inf) for name in ("crop", "plan", "fetch")}

    def timed(name: str, number: int, turn: int, task: Callable[[Any], Any], argument: object) -> Any:
        begun = time.thread_time_ns()
        found = task(argument)
        if turn:  # the first pass opens files
            least[name][number] = min(least[name][number], (time.thread_time_ns() - begun) / 1000)
        return found

    def fetch(planned: PlannedSample) -> None:
        shapes = shapes_of(planned.plan)
        assert slot_bytes(shapes) <= len(memory), shapes
        reader.fetch(planned, place(memory, 0, shapes))

    def crop(planned: PlannedSample) -> None:
        plan = planned.plan
        rows, columns = len(plan.rows), plan.columns[1] - plan.columns[0]
        out = msa[: rows * columns].reshape(rows, columns), deletions[: rows * columns].reshape(rows, columns)
        planned.record.crop(slice(*plan.columns), plan.selection, out=out)

    for turn in range(passes + 1):
        for first in range(0, num_samples, PLANNED_TOGETHER):
            numbers = range(first, min(first + PLANNED_TOGETHER, num_samples))
            # As a reading process does it: some plans, then their reads.
            planned = [timed("plan", number, turn, reader.planned, number) for number in numbers]
            for number, one in zip(numbers, planned, strict=True):
                timed("fetch", number, turn, fetch, one)
            for number, one in zip(numbers, planned, strict=True):
                timed("crop", number, turn, crop, one)
    found = {f"{name}_us": float(values.mean()) for name, values in least.items()}
    crop, plan, fetch = found.values()
    return found | {"crop_over_sample": crop / (plan + fetch), "crop_over_fetch": crop / fetch}


def cpu_s(pids: list[int]) -> float:
    """Returns CPU seconds of this process and of some others that run."""
    ticks = 0
    for pid in (os.getpid(), *pids):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def rate(reader: SampleReader, processes: int, threads: int, seconds: float) -> tuple[float, float]:
    """Returns samples/s, and CPU us of a sample over all processes."""
    supply: SampleSupply
    if processes:
        supply = ReadingProcesses(reader, processes, threads, READ_AHEAD_BYTES, Meters())
    else:
        supply = OwnThreads(reader, Meters())
    # Whoever takes samples from processes only waits: one thread for each is enough.
    stream = Stream(supply, processes or threads)
    while not stream.count():
        time.sleep(0.001)
    time.sleep(0.5)
    pids = supply.pids if isinstance(supply, ReadingProcesses) else []
    before, began, used = stream.count(), time.perf_counter(), cpu_s(pids)
    time.sleep(seconds)
    # On a busy machine there may be none in so short a time.
    while stream.count() == before:
        time.sleep(0.001)
    count, took, used = stream.count() - before, time.perf_counter() - began, cpu_s(pids) - used
    stream.close()
    supply.close()
    return count / took, 1e6 * used / count


def in_turns(reader: SampleReader, seconds: float, rounds: int) -> dict[str, Any]:
    """Returns the best rate of every way and its CPU, and what a second thread or process adds."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for processes, threads in WAYS:
            name = f"{processes} processes x {threads}" if processes else f"{threads} threads here"
            best[name] = max(best.get(name, (0.0, 0.0)), rate(reader, processes, threads, seconds))
    found: dict[str, Any] = {
        name: {"samples_per_s": value, "cpu_us": cpu} for name, (value, cpu) in best.items()
    }
    for name, more, one in (
        ("threads", "2 threads here", "1 threads here"),
        ("threads_of_a_process", "1 processes x 2", "1 processes x 1"),
        ("processes", "2 processes x 1", "1 processes x 1"),
    ):
        found[f"two_over_one_{name}"] = best[more][0] / best[one][0]
    return found


def bus(reader: SampleReader, device: torch.device) -> dict[str, float]:
    """Returns GB/s of copies of eight samples to a device, the best of some."""
    size = sum(slot_bytes(shapes_of(reader.planned(number).plan)) for number in range(8))
    found = {"mb": size / 1e6}
    target = torch.empty(size, dtype=torch.uint8, device=device)
    for name, locked in (("page_locked", True), ("pageable", False)):
        memory = torch.ones(size, dtype=torch.uint8, pin_memory=locked)
        best = float("inf")
        for _ in range(20):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            target.copy_(memory, non_blocking=True)
            events[1].record()
            torch.cuda.synchronize(device)
            best = min(best, events[0].elapsed_time(events[1]))
        found[f"{name}_gb_per_s"] = size / best / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.2, help="of each way; 0 leaves processes out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--min-depth", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row_order in ROW_ORDERS:
            store, about = loader_store.build(f"{folder}/{row_order}", arguments.min_depth, row_order)
            for recipe in RECIPES:
                found: dict[str, Any] = per_core(store, recipe, arguments.samples, arguments.passes)
                print(row_order, recipe, {key: round(value, 2) for key, value in found.items()}, flush=True)
                if arguments.seconds:
                    found |= in_turns(reader_of(store, recipe), arguments.seconds, arguments.rounds)
                    print({key: value for key, value in found.items() if "two_over" in key}, flush=True)
                if arguments.device != "cpu":
                    found["bus"] = bus(reader_of(store, recipe), torch.device(arguments.device))
                    print(row_order, recipe, found["bus"], flush=True)
                results[f"{row_order}, {recipe}"] = found
    config: dict[str, Any] = {
        "samples": arguments.samples,
        "passes": arguments.passes,
        "seconds": arguments.seconds,
    }
    config |= {"rounds": arguments.rounds, "device": arguments.device}
    emit(NAME, config | about, results, arguments.output)


if __name__ == "__main__":
    main()
