"""Samples and bytes per second of a loader, for both recipes, with a consumer that does nothing.

    python bench/loader_throughput.py [--seconds S] [--threads N] [--crop R] [--device cuda] [--features F]

The page cache is warm (the store was just written): what is measured is decompression and arithmetic. One
JSON row; the time of the worker threads is split into reading (`fetch`) and features (`prepare`).
"""

import argparse
import tempfile
import time
from pathlib import Path

import loader_store
import numpy as np
import torch
from rows import emit

from foldfeed.feature_store import FeatureStore
from foldfeed.loader import CropLoader, Recipe

NAME = "loader_throughput"
RESULTS = Path(__file__).parent / "results"


def measure(store: FeatureStore, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, float]:
    with CropLoader(
        store,
        recipe,
        seed=0,
        global_batch=arguments.batch,
        num_threads=arguments.threads,
        device=arguments.device,
        features=arguments.features,
    ) as loader:
        for _ in range(2):
            next(loader)
        before, started, cpu_started = loader.stats, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < arguments.seconds:
            batch = next(loader)
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        after = loader.stats
        stored = [
            store.at(plan.address.record).crop_bytes(slice(*plan.columns), plan.selection)
            for plan in map(loader.plan, range(64))
        ]
    delta = {name: after[name] - before[name] for name in after}
    samples = delta["samples"]
    feature_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in batch.shards[0].features.values()
    ) / len(batch.shards[0].samples)
    return {
        "samples_per_s": samples / seconds,
        "stored_mb_per_s": samples / seconds * float(np.mean(stored)) / 1e6,
        "raw_mb_per_s": delta["bytes"] / seconds / 1e6,
        "feature_mb_per_s": samples / seconds * feature_bytes / 1e6,
        "stored_bytes_per_sample": float(np.mean(stored)),
        # On a shared machine this is the number to trust; samples made ahead are counted with those received.
        "cpu_ms_per_sample": 1000 * cpu_seconds / samples,
        "fetch_ms_per_sample": 1000 * delta["fetch_s"] / samples,
        "prepare_ms_per_sample": 1000 * delta["prepare_s"] / samples,
        "consumer_waits_share": delta["wait_s"] / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--min-depth", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--seconds", type=float, default=10.0, help="per recipe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=128)
    parser.add_argument("--extra", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--features", default="full", help="full or compact")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.torch_threads)
    with tempfile.TemporaryDirectory() as folder:
        store, about = loader_store.build(f"{folder}/store", arguments.min_depth)
        values = {
            "crop_residues": arguments.crop,
            "num_clusters": arguments.clusters,
            "num_extra": arguments.extra,
        }
        config = values | {
            "global_batch": arguments.batch,
            "threads": arguments.threads,
            "torch_threads": arguments.torch_threads,
            "device": arguments.device,
            "features": arguments.features,
            "seconds": arguments.seconds,
        }
        results = {
            name: measure(store, Recipe.named(name, **values), arguments) for name in ("af2", "crop_first")
        }
        permuted, _ = loader_store.build(f"{folder}/permuted", arguments.min_depth, "permuted")
        recipe = Recipe.named("crop_first", **values)
        results["crop_first, permuted store"] = measure(permuted, recipe, arguments)
        emit(NAME, config | about, results, arguments.output)


if __name__ == "__main__":
    main()
