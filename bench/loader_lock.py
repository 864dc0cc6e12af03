"""How much of the interpreter's lock a loader takes in the trainer's process while another process reads.

    python bench/loader_lock.py [--step-ms 33] [--batch 8] [--steps N] [--rounds R] [--processes P]

A real `CropLoader` whose steps end where their bytes would be copied to a GPU: samples are taken from the
reading process, packed into one block a step and given back; with `--device cuda` the features are made
there as well. Numbers, over rounds in turns. *cpu_share*: CPU of all threads of the trainer's process but
the main one, which sleeps (its own is said apart), for each step's milliseconds; they hold the lock for less
than that, because copies and messages go without it. *lock_wait_share*: a main thread that counts in plain
Python never sleeps by itself, so the part of its time in which it neither ran nor waited for a core (Linux's
schedstat) it waited for the lock; the same without the loader is said apart. *loop_speed*: turns of that
loop a second beside the loader, over turns beside a process that takes as much CPU and no lock. One JSON row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import loader_store
import torch
from loader_start import readers_cpu_s
from rows import emit

from foldfeed.feature_store import FeatureStore
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.batch import ShardBatch, StepBatch
from foldfeed.loader.features.device import Layout, ReadyStep, StepFeatures

NAME = "loader_lock"
RESULTS = Path(__file__).parent / "results"
RECIPES = ("crop_first", "af2")
CONTROL_TURN_S = 0.01


class Blocks(StepFeatures):
    """Packs steps into blocks and makes nothing of them."""

    def assemble(self, step: int, layout: Layout, prepared: list[None]) -> ReadyStep:
        self._blocks.whole(step)
        self._blocks.copied(step, None)
        shards = [ShardBatch(v=shard, samples=list(samples), features={}) for shard, samples in layout]
        return ReadyStep(batch=StepBatch(step=step, shards=shards))


def loader_of(store: FeatureStore, recipe: str, arguments: argparse.Namespace) -> CropLoader:
    loader = CropLoader(
        store,
        Recipe.named(recipe),
        seed=0,
        global_batch=arguments.batch,
        num_processes=arguments.processes,
        device=arguments.device,
    )
    if arguments.device == "cpu":
        loader._maker = Blocks(loader.recipe, loader.device)
    for _ in range(arguments.warm):
        next(loader)
    return loader


def sleeping_steps(loader: CropLoader, step_s: float, num_steps: int) -> tuple[float, float, float]:
    """Returns CPU seconds of a step by threads that are not this one, by this one, by reading processes."""
    own = time.thread_time()
    others, readers = time.process_time() - time.thread_time(), readers_cpu_s(loader)
    due = time.perf_counter()
    for _ in range(num_steps):
        next(loader)
        due = max(due + step_s, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
    others = time.process_time() - time.thread_time() - others
    own = time.thread_time() - own
    return others / num_steps, own / num_steps, (readers_cpu_s(loader) - readers) / num_steps


def counting_steps(take: Callable[[], object], step_s: float, num_steps: int) -> tuple[float, float]:
    """Returns turns a second, and the share of time in which this thread waited for the lock."""
    turns, spent, waited = 0, 0.0, 0.0
    for _ in range(num_steps):
        take()
        began, ran = time.perf_counter(), on_a_core_or_in_line_s()
        stop = began + step_s
        while time.perf_counter() < stop:
            for _ in range(100):
                turns += 1
        took = time.perf_counter() - began
        spent += took
        waited += max(0.0, took - (on_a_core_or_in_line_s() - ran))
    return turns / spent, waited / spent


def on_a_core_or_in_line_s() -> float:
    """Returns seconds in which the calling thread ran or could have run, since it was made."""
    ran, in_line, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return (int(ran) + int(in_line)) / 1e9


def burn(share: float) -> None:
    """Takes that share of a core, for ever."""
    while True:
        began = time.perf_counter()
        while time.perf_counter() - began < share * CONTROL_TURN_S:
            pass
        time.sleep(max(0.0, (1 - share) * CONTROL_TURN_S))


def measure(store: FeatureStore, recipe: str, arguments: argparse.Namespace) -> dict[str, float]:
    step_s, num_steps = arguments.step_ms / 1000, arguments.steps
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        with loader_of(store, recipe, arguments) as loader:
            others_s, own_s, readers_s = sleeping_steps(loader, step_s, num_steps)
            beside, waited = counting_steps(lambda loader=loader: next(loader), step_s, num_steps)  # type: ignore[misc]
        control = multiprocessing.get_context("spawn").Process(
            target=burn, args=(min(1.0, (others_s + readers_s) / step_s),), daemon=True
        )
        control.start()
        time.sleep(1.0)
        alone, waited_alone = counting_steps(lambda: None, step_s, num_steps)
        control.kill()
        control.join()
        rounds.append(
            {
                "cpu_share": others_s / step_s,
                "cpu_ms_of_a_step": 1000 * others_s,
                "main_cpu_ms_of_a_step": 1000 * own_s,
                "readers_cpu_ms_of_a_step": 1000 * readers_s,
                "lock_wait_share": waited,
                "lock_wait_share_without": waited_alone,
                "loop_speed": beside / alone,
            }
        )
        print(recipe, {name: round(value, 3) for name, value in rounds[-1].items()}, flush=True)
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--step-ms", type=float, default=33.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm", type=int, default=40, help="steps before, in which reading gets ahead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--min-depth", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, about = loader_store.build(f"{folder}/store", arguments.min_depth)
        results = {recipe: measure(store, recipe, arguments) for recipe in RECIPES}
    names = ("step_ms", "batch", "steps", "rounds", "processes", "device")
    emit(NAME, {name: getattr(arguments, name) for name in names} | about, results, arguments.output)


if __name__ == "__main__":
    main()
