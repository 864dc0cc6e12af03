"""What a loader costs the steps of an accelerator: beside it, against batches that are there already.

    python bench/loader_overlap.py [--device cuda] [--step-ms 33] [--batch 8] [--steps N] [--rounds R]

For each recipe. *alone*: samples/s until the features are in the device's memory and nothing else runs there.
*beside*: steps of matrix products that take about ``--step-ms``, over the loader's batches and over one that
is kept, in turns; medians, and by which share the first are slower. *a step*: what one thread does for the
features of a step: packing its samples (`pack_ms`), starting copy and operators (`start_ms`), the device's
own time for them (`device_ms`, by events; on the CPU all of it is `start_ms`), operators that wait for the
device (`waits`). One JSON row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loader_store
import torch
from rows import emit

from foldfeed.feature_store import FeatureStore
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.features.device import StepFeatures
from foldfeed.loader.reading.reader import SampleReader

NAME = "loader_overlap"
RESULTS = Path(__file__).parent / "results"
RECIPES = ("crop_first", "af2")
# Of a turn, which the loader's last steps from the turn before may still disturb.
SETTLING_STEPS = 3


def wait(device: torch.device) -> None:
    """Waits for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loader_of(store: FeatureStore, recipe: Recipe, arguments: argparse.Namespace) -> CropLoader:
    return CropLoader(
        store,
        recipe,
        seed=0,
        global_batch=arguments.batch,
        device=arguments.device,
        features=arguments.features,
        num_threads=arguments.threads,
        num_processes=arguments.processes,
        prefetch_steps=3,
    )


def alone(loader: CropLoader, seconds: float) -> float:
    """Returns samples/s of a consumer that does nothing."""
    for _ in range(10):
        next(loader)
    wait(loader.device)
    samples, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        samples += next(loader).num_samples
        wait(loader.device)
    return samples / (time.perf_counter() - started)


class Products:
    """Work of about so many milliseconds."""

    def __init__(self, device: torch.device, step_ms: float) -> None:
        size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
        self._device, self._times = device, 1
        self._weight = torch.randn(size, size, device=device, dtype=dtype)
        self.run()
        for _ in range(3):
            self._times = max(1, round(self._times * step_ms / max(1e-3, self.timed_ms(lambda: None))))

    def run(self) -> None:
        """Starts it."""
        x = self._weight
        for _ in range(self._times):
            x = (self._weight @ x) * 1e-3

    def timed_ms(self, take: Callable[[], object]) -> float:
        """Returns the time of a step that takes a batch first, until the device is done."""
        started = time.perf_counter()
        take()
        self.run()
        wait(self._device)
        return 1000 * (time.perf_counter() - started)


def beside(loader: CropLoader, arguments: argparse.Namespace) -> dict[str, float]:
    products = Products(loader.device, arguments.step_ms)
    kept = [next(loader)]
    steps: dict[str, list[float]] = {"cached": [], "loader": []}
    takes: dict[str, Callable[[], object]] = {"cached": lambda: kept[0], "loader": lambda: next(loader)}
    stalled_s, seconds = 0.0, 0.0
    for _ in range(arguments.rounds):
        for name, take in takes.items():
            before, began = loader.meters()["stall_s"], time.perf_counter()
            taken = [products.timed_ms(take) for _ in range(arguments.steps + SETTLING_STEPS)]
            steps[name] += taken[SETTLING_STEPS:]
            if name == "loader":
                stalled_s += loader.meters()["stall_s"] - before
                seconds += time.perf_counter() - began
    cached, streamed = (statistics.median(values) for values in steps.values())
    return {
        "cached_ms": cached,
        "loader_ms": streamed,
        "slower": streamed / cached - 1,
        "stalled_share": stalled_s / seconds,
    }


def of_a_step(store: FeatureStore, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, float]:
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    maker = StepFeatures(recipe, device, arguments.features)
    reader = SampleReader(store, recipe, None, seed=0, global_batch=1, virtual_shards=1)
    size = arguments.batch
    arrays = [reader.read(g).arrays for g in range(4 * size)]
    times: dict[str, list[float]] = {"pack_ms": [], "start_ms": [], "device_ms": []}
    waits = 0
    for step in range(4 * arguments.rounds + 3):
        mine = [(step * size + index) % len(arrays) for index in range(size)]
        began = time.perf_counter()
        prepared = [maker.prepare(step, index, size, arrays[g]) for index, g in enumerate(mine)]
        packed = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if events:
                events[0].record(maker._stream)
                torch.cuda.set_sync_debug_mode("warn")
            began_starting = time.perf_counter()
            ready = maker.assemble(step, [(0, mine)], prepared)
            started = time.perf_counter()
            if events:
                torch.cuda.set_sync_debug_mode("default")
                events[1].record(maker._stream)
        maker.hand_over(ready)
        wait(device)
        # The first get memory and tables.
        if step >= 3:
            times["pack_ms"].append(1000 * (packed - began))
            times["start_ms"].append(1000 * (started - began_starting))
            times["device_ms"].append(events[0].elapsed_time(events[1]) if events else 0.0)
            waits += len(seen) if events else 0
    return {name: statistics.median(values) for name, values in times.items()} | {"waits": float(waits)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--features", default="full", help="full or compact")
    parser.add_argument("--step-ms", type=float, default=33.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of the loader alone, per recipe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=128)
    parser.add_argument("--extra", type=int, default=1024)
    parser.add_argument("--min-depth", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    sizes: dict[str, Any] = {
        "crop_residues": arguments.crop,
        "num_clusters": arguments.clusters,
        "num_extra": arguments.extra,
    }
    with tempfile.TemporaryDirectory() as folder:
        store, about = loader_store.build(f"{folder}/store", arguments.min_depth)
        for name in RECIPES:
            recipe = Recipe.named(name, **sizes)
            found: dict[str, Any] = {"a step": of_a_step(store, recipe, arguments)}
            with loader_of(store, recipe, arguments) as loader:
                found["alone_samples_per_s"] = alone(loader, arguments.seconds)
                found["beside"] = beside(loader, arguments)
            results[name] = found
            print(name, found, flush=True)
    names = ("device", "features", "step_ms", "batch", "steps", "rounds", "threads", "processes")
    emit(NAME, {name: getattr(arguments, name) for name in names} | sizes | about, results, arguments.output)


if __name__ == "__main__":
    main()
