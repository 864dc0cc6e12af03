"""The trainer's step on this machine's CPU: with and without filling new tensors, and what hooks cost.

Deterministic mode fills every new tensor unless `torch.utils.deterministic.fill_uninitialized_memory` is off,
as the trainer sets it. Both ways train the same synthetic batches from the same weights in turns, so a busy
machine slows both; the digests of the weights are compared. The ratio is that of CPU seconds (medians of the
steps), which neighbours on the machine change less than wall time.

Hooks: backward of a model of many small parameters, without a reducer, with its hooks while they wait, and
while they count down; in turns, CPU seconds of the thread, and the checks at the commit point beside them.

Run: python bench/trainer_step.py [--rounds 8] [--output bench/results/trainer_step.jsonl]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import emit

from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.task import load_task
from foldfeed.trainer.training.launch import prepare_numerics
from foldfeed.trainer.training.loop import Trainer
from foldfeed.trainer.training.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from trainer_ranks import SyntheticSource, tiny_config

SIZES = {
    "tiny, crop 10": {},
    "demo, crop 64": {"data": {"crop_residues": 64, "num_clusters": 16, "num_extra": 64, "global_batch": 4}},
}


class Many(torch.nn.Module):
    """Many parameters of eight elements, one after another."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(8)) for _ in range(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a scalar."""
        for weight in self.weights:
            x = x * weight
        return x.sum()


def hooks(number: int, rounds: int) -> dict[str, float]:
    """Returns microseconds per parameter: of backward alone, and of what the reducer adds to it."""
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"))
    plain, hooked = Many(number), Many(number)
    flats = [FlatParameters(plain), FlatParameters(hooked)]
    buckets = plan_buckets([s.padded for s in flats[1].segments], bucket_bytes=64 * 1024)
    # The exchange is another thread's: clocks are of this one.
    reducer = TreeReducer(flats[1], buckets, alone, 2)
    seconds: dict[str, list[float]] = {name: [] for name in ("alone", "waiting", "counting", "finish")}

    def clock(name: str, work: Callable[[], object]) -> None:
        started = time.thread_time()
        work()
        seconds[name].append(time.thread_time() - started)

    x = torch.ones(8)
    for _ in range(rounds):
        clock("alone", plain(x).backward)
        reducer.begin()
        for shard, name in enumerate(("waiting", "counting")):
            with reducer.shard(shard):
                clock(name, hooked(x).backward)
        clock("finish", lambda: reducer.finish([0.0]))
    reducer.close()
    found = {name: 1e6 * statistics.median(values[1:]) / number for name, values in seconds.items()}
    return {
        "parameters": number,
        "backward_alone_us": round(found["alone"], 2),
        "waiting_adds_us": round(found["waiting"] - found["alone"], 2),
        "counting_adds_us": round(found["counting"] - found["alone"], 2),
        "finish_us": round(found["finish"], 2),
    }


def measure(changes: dict[str, object], rounds: int) -> dict[str, object]:
    """Returns CPU seconds per step of both ways, and whether the weights are equal."""
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(Path(folder), **changes)
        prepare_numerics(config)
        sides = {}
        for fill in (True, False):
            source = SyntheticSource(config.data, config.seed, ranks, {})
            metrics = Metrics(Path(folder), active=False, tensorboard=False, log_every=1)
            sides[fill] = (Trainer(config, ranks, source, metrics, load_task(config)), iter(source))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for fill, (trainer, steps) in sides.items():
                torch.utils.deterministic.fill_uninitialized_memory = fill
                batch = next(steps)
                started = time.process_time()
                trainer.train_step(batch, 0.0)
                seconds[fill].append(time.process_time() - started)
        torch.utils.deterministic.fill_uninitialized_memory = False
        digests = {trainer.weights_digest() for trainer, _ in sides.values()}
        for trainer, _ in sides.values():
            trainer.reducer.close()
    # The first step of each side pays for the allocator's first blocks.
    filled, unfilled = (statistics.median(seconds[fill][1:]) for fill in (True, False))
    return {
        "filled_cpu_s": round(filled, 5),
        "unfilled_cpu_s": round(unfilled, 5),
        "ratio": round(filled / unfilled, 3),
        "equal_weights": len(digests) == 1,
    }


def main() -> None:
    """Measures each size and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/trainer_step.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {"hooks": hooks(4400, arguments.rounds)}
    results |= {name: measure(changes, arguments.rounds) for name, changes in SIZES.items()}
    emit(
        "trainer_step", {"rounds": arguments.rounds, "device": "cpu", "threads": 1}, results, arguments.output
    )


if __name__ == "__main__":
    main()
