"""Positions a second and core of the loader's orders, beside what NumPy does for the same.

    python bench/loader_order.py [--records N ...] [--positions N] [--rounds R]

`once` orders positions by the keyed permutation; `weighted` draws records with AlphaFold 2's weights (length
term by 1 / cluster size, synthetic) by alias table and counter RNG. The baselines hold a list of N and give
an epoch at once: numpy.random.permutation, and Generator.choice with p. Ours give any stretch of any epoch;
timed is a stretch of consecutive positions, in one thread, in CPU time, the best of the rounds: that is what
a shared machine disturbs least. 10**10 records are ordered without memory for them, so there is no baseline.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rows import emit

from foldfeed.loader.order.alias_table import AliasTable
from foldfeed.loader.order.order import SampleOrder

NAME = "loader_order"
RESULTS = Path(__file__).parent / "results"
# A permutation of 2**k + 1 goes through a network of 2**(k + 1) places: the least favourable size.
RECORDS = (100_000, 1_000_000, 2**20 + 1, 10_000_000, 10**10)
BASELINE_MAX_RECORDS = 10_000_000
WEIGHTED_MAX_RECORDS = 10_000_000


def rate(make: Callable[[], NDArray[np.int64]], rounds: int) -> float:
    """Returns results a second of CPU time, the best of some rounds."""
    best = 0.0
    for _ in range(rounds):
        started = time.process_time()
        size = make().size
        best = max(best, size / (time.process_time() - started))
    return best


def weights_of(num_records: int) -> NDArray[np.float64]:
    """Returns AlphaFold 2's weights for lengths and cluster sizes that are spread widely."""
    rng = np.random.default_rng(0)
    length = rng.lognormal(5.4, 0.7, num_records)
    cluster = np.floor(rng.pareto(1.0, num_records)) + 1
    return np.clip(length, 256, 512) / 512 / cluster


def measure(num_records: int, num_positions: int, rounds: int) -> dict[str, float | None]:
    positions = np.arange(num_positions, dtype=np.int64) + num_records // 3
    values = {"num_records": num_records, "seed": 1, "global_batch": 8, "virtual_shards": 8}
    once = SampleOrder(**values)
    found: dict[str, float | None] = {
        "once_per_s": rate(lambda: once.records(positions), rounds),
        "once_baseline_per_s": None,
        "weighted_per_s": None,
        "weighted_baseline_per_s": None,
        "table_s": None,
    }
    rng = np.random.default_rng(0)
    if num_records <= BASELINE_MAX_RECORDS:
        found["once_baseline_per_s"] = rate(lambda: rng.permutation(num_records), rounds)
    if num_records <= WEIGHTED_MAX_RECORDS:
        weights = weights_of(num_records)
        started = time.process_time()
        table = AliasTable(weights)
        found["table_s"] = time.process_time() - started
        weighted = SampleOrder(**values, table=table)
        found["weighted_per_s"] = rate(lambda: weighted.records(positions), rounds)
        chances = weights / weights.sum()
        found["weighted_baseline_per_s"] = rate(
            lambda: rng.choice(num_records, size=num_positions, p=chances), min(rounds, 3)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=RECORDS)
    parser.add_argument("--positions", type=int, default=2**20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    arguments = parser.parse_args()
    results = {}
    for num_records in arguments.records:
        found = measure(num_records, arguments.positions, arguments.rounds)
        results[str(num_records)] = found
        shown = {name: value / 1e6 for name, value in found.items() if value and name.endswith("_per_s")}
        print(f"{num_records:>14,} records, million a second:", {k: round(v, 1) for k, v in shown.items()})
    config = {"positions": arguments.positions, "rounds": arguments.rounds, "clock": "process_time, best"}
    emit(NAME, config, results, arguments.output)


if __name__ == "__main__":
    main()
