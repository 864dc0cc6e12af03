"""What features cost: the fast ways against the general one.

    python bench/loader_featurise.py [--rounds N] [--openfold-s 0.39,0.80,2.0]

First, on one core: milliseconds to plan, read and featurise a sample of ``af2`` from synthetic families of
three sizes, without block deletion (all rows are read and clustered) and with it. The least of some rounds is
taken, in time of the thread. ``--openfold-s`` are seconds that OpenFold's pipeline (parsing and transforms,
all rows, one thread) took for MSAs of these sizes, measured elsewhere; the row says how many times faster a
sample is, as a guide only. Then, for a step of eight samples: operators that reach the device and the time
that the host takes to start them, as one set for all samples and sample by sample. The samples of that are so
small that arithmetic takes no time. One JSON row.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alignments
import torch
from rows import emit
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import as_a3m, family

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.feature_store.parsers.a3m import parse_a3m
from foldfeed.loader import Recipe
from foldfeed.loader.features.featurise import featurise
from foldfeed.loader.features.forms import COMPACT
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.features.step_block import StepBlock
from foldfeed.loader.features.step_features import step_features
from foldfeed.loader.reading.fetch import SampleArrays
from foldfeed.loader.reading.reader import SampleReader

NAME = "loader_featurise"
RESULTS = Path(__file__).parent / "results"
# Rows x residues.
SIZES = ((2100, 189), (3300, 327), (4700, 524))
STEP = 8
# What only looks at memory anew reaches no device.
VIEWS = frozenset(
    (
        *("view", "_unsafe_view", "detach", "slice", "select", "unsqueeze", "expand", "transpose", "split"),
        *("alias", "unbind", "permute", "as_strided", "squeeze", "lift_fresh"),
    )
)


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Returns the least time of this thread that a call takes."""
    taken = []
    for _ in range(rounds):
        started = time.thread_time()
        call()
        taken.append(time.thread_time() - started)
    return 1000 * min(taken)


def build(url: str, sizes: tuple[tuple[int, int], ...]) -> FeatureStore:
    store = FeatureStore.create(url, StoreSettings())
    parsed = [parse_a3m(as_a3m(family(*size)).encode()) for size in sizes]
    records = [
        alignments._record(f"family{number:04d}", found.msa, found.deletions, list(found.names))
        for number, found in enumerate(parsed)
    ]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="bench")
    return store


def reader_of(store: FeatureStore, recipe: Recipe) -> SampleReader:
    return SampleReader(store, recipe, None, seed=0, global_batch=1, virtual_shards=1)


def one_core(store: FeatureStore, recipe: Recipe, rounds: int) -> dict[str, dict[str, float]]:
    """Returns milliseconds of one sample of each record, by its size."""
    reader, found = reader_of(store, recipe), {}
    for g in range(len(store)):
        planned = reader.planned(g)
        raw = RawSample.of(reader.fetch(planned).arrays)
        row = {
            "rows_read": float(len(planned.plan.rows)),
            "plan_ms": milliseconds(lambda g=g: reader.planned(g), rounds),
            "fetch_ms": milliseconds(lambda planned=planned: reader.fetch(planned), rounds),
            "general_ms": milliseconds(lambda raw=raw: featurise(raw, recipe), rounds),
            "host_ms": milliseconds(lambda raw=raw: host_features(raw, recipe), rounds),
            "compact_ms": milliseconds(lambda raw=raw: host_features(raw, recipe, COMPACT), rounds),
        }
        row["general / host"] = row["general_ms"] / row["host_ms"]
        found[f"{planned.plan.depth}x{planned.plan.length}"] = row
    return found


class Count(TorchDispatchMode):
    """Counts operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def of_a_step(samples: list[SampleArrays], recipe: Recipe, rounds: int) -> dict[str, float]:
    block = StepBlock(torch.empty(1 << 20, dtype=torch.uint8), len(samples))
    for index, arrays in enumerate(samples):
        block.put(index, arrays)
    memory, sizes = block.whole(lambda size: torch.empty(size, dtype=torch.uint8))
    raws = [RawSample.of(arrays) for arrays in samples]
    ways: dict[str, Callable[[], Any]] = {
        "sample by sample": lambda: [featurise(raw, recipe) for raw in raws],
        "whole step": lambda: step_features(memory, sizes, recipe),
    }
    row: dict[str, float] = {}
    for way, call in ways.items():
        call()
        with Count() as count:
            call()
        row[f"{way}, operators"] = count.launches
        row[f"{way}, start_ms"] = milliseconds(call, 10 * rounds)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--openfold-s", default="0.39,0.80,2.0")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = build(f"{folder}/store", SIZES)
        recipe = Recipe.named("af2", block_delete=False)
        results["all rows"] = one_core(store, recipe, arguments.rounds)
        for size, seconds in zip(SIZES, map(float, arguments.openfold_s.split(",")), strict=True):
            row = results["all rows"][f"{size[0]}x{size[1]}"]
            for way in ("general", "host"):
                total = row["plan_ms"] + row["fetch_ms"] + row[f"{way}_ms"]
                row[f"{way}, times openfold"] = 1000 * seconds / total
        results["block deletion"] = one_core(store, Recipe.named("af2"), arguments.rounds)
        small = build(f"{folder}/small", ((3, 9), (7, 12), (12, 8)))
        for name, values in {"af2": {}, "af2, labels": {"labels": True}, "af3": {}, "masked_lm": {}}.items():
            sizes: dict[str, Any] = {
                "crop_residues": 8,
                "num_clusters": 4,
                "num_extra": 4 if name.startswith("af2") else 0,
            }
            recipe = Recipe.named(name.split(",")[0], **sizes, **values)
            reader = reader_of(small, recipe)
            samples = [reader.read(g).arrays for g in range(STEP)]
            results[f"step of {STEP}, {name}"] = of_a_step(samples, recipe, arguments.rounds)
    emit(NAME, {"rounds": arguments.rounds, "openfold_s": arguments.openfold_s}, results, arguments.output)


if __name__ == "__main__":
    main()
