"""The trainer's step: with and without filling new tensors, and what hooks cost; on the CPU or a CUDA device.

Deterministic mode fills every new tensor unless `torch.utils.deterministic.fill_uninitialized_memory` is off,
as the trainer sets it. Both ways train the same synthetic batches from the same weights in turns, so a busy
machine slows both; the digests of the weights are compared. The ratio is that of CPU seconds (medians of the
steps), which neighbours on the machine change less than wall time.

Hooks: backward of a model of many small parameters, without a reducer, with its hooks while they wait, and
while they count down; in turns, CPU seconds of the thread, and the checks at the commit point beside them.

On a CUDA device seconds are those of the clock until it is done, and a model of four blocks (c_m 128, crops
of 256 residues, 128 + 1,024 rows, eight virtual shards) is measured, too: as it is, in bfloat16, and with
compiled blocks (`--compiled`, a run of its own, a minute or two), with its seconds until the first step.

Run: python bench/trainer_step.py [--rounds 8] [--device cuda] [--output bench/results/trainer_step.jsonl]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from foldfeed.trainer.training.source import Source

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from trainer_ranks import SyntheticSource, tiny_config

SIZES: dict[str, dict[str, Any]] = {
    "tiny, crop 10": {},
    "demo, crop 64": {"data": {"crop_residues": 64, "num_clusters": 16, "num_extra": 64, "global_batch": 4}},
}
# Of a device.
LARGE = {
    "data": {"crop_residues": 256, "num_clusters": 128, "num_extra": 1024},
    "model": {"c_m": 128, "c_z": 64, "c_e": 64, "num_blocks": 4, "num_heads": 8, "c_opm": 16, "c_tri": 64},
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


class Clock:
    """Seconds of some work: of the CPU, or on a device by the clock until it is done."""

    def __init__(self, device: torch.device, cpu_s: Callable[[], float]) -> None:
        self._device = device
        self._now = time.perf_counter if device.type == "cuda" else cpu_s

    def __call__(self, work: Callable[[], object]) -> float:
        """Returns what the work took."""
        self._wait()
        started = self._now()
        work()
        self._wait()
        return self._now() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def hooks(number: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Returns microseconds per parameter: of backward alone, and of what the reducer adds to it."""
    alone = Ranks(rank=0, world=1, device=device)
    plain, hooked = Many(number), Many(number)
    flats = [FlatParameters(model, device) for model in (plain, hooked)]
    buckets = plan_buckets([s.padded for s in flats[1].segments], bucket_bytes=64 * 1024)
    # The exchange is another thread's: clocks are of this one.
    reducer = TreeReducer(flats[1], buckets, alone, 2)
    seconds: dict[str, list[float]] = {name: [] for name in ("alone", "waiting", "counting", "finish")}

    taken = Clock(device, time.thread_time)

    def clock(name: str, work: Callable[[], object]) -> None:
        seconds[name].append(taken(work))

    x = torch.ones(8, device=device)
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


def measure(
    changes: dict[str, Any], rounds: int, device: torch.device, ways: Sequence[bool] = (True, False)
) -> dict[str, object]:
    """Returns seconds per step of both ways (or one), and whether the weights are equal."""
    ranks = Ranks(rank=0, world=1, device=device)
    taken = Clock(device, time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(Path(folder), **changes, device=device.type)
        prepare_numerics(config)
        sides = {}
        for fill in ways:
            source = SyntheticSource(config.data, config.seed, ranks, {})
            metrics = Metrics(config, active=False)
            trainer = Trainer(config, ranks, Source(source, ""), metrics, load_task(config))
            sides[fill] = (trainer, iter(source))
        seconds: dict[bool, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for fill, (trainer, steps) in sides.items():
                torch.utils.deterministic.fill_uninitialized_memory = fill
                batch = next(steps)
                seconds[fill].append(
                    taken(lambda trainer=trainer, batch=batch: trainer.train_step(batch, 0.0))
                )
        torch.utils.deterministic.fill_uninitialized_memory = False
        digests = {trainer.weights_digest() for trainer, _ in sides.values()}
        for trainer, _ in sides.values():
            trainer.reducer.close()
    # The first step of each side pays for the allocator's first blocks.
    unit = "s" if device.type == "cuda" else "cpu_s"
    found = {fill: statistics.median(values[1:]) for fill, values in seconds.items()}
    row: dict[str, object] = {f"unfilled_{unit}": round(found[False], 5)}
    row[f"first_step_{unit}"] = round(seconds[False][0], 3)
    if True in found:
        row |= {f"filled_{unit}": round(found[True], 5), "ratio": round(found[True] / found[False], 3)}
        row["equal_weights"] = len(digests) == 1
    return row


def main() -> None:
    """Measures each size and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compiled", action="store_true", help="only the model of four blocks, compiled")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/trainer_step.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    results: dict[str, object] = {}
    if arguments.compiled:
        for precision in ("fp32", "bf16"):
            changes: dict[str, Any] = {**LARGE, "precision": precision, "compile": True}
            results[f"c_m 128, 4 blocks, {precision}, compiled"] = measure(
                changes, arguments.rounds, device, (False,)
            )
    else:
        results["hooks"] = hooks(4400, arguments.rounds, device)
        results |= {name: measure(changes, arguments.rounds, device) for name, changes in SIZES.items()}
        if device.type == "cuda":
            results["c_m 128, 4 blocks"] = measure(LARGE, arguments.rounds, device)
            changes = {**LARGE, "precision": "bf16"}
            results["c_m 128, 4 blocks, bf16"] = measure(changes, arguments.rounds, device, (False,))
    config = {"rounds": arguments.rounds, "device": arguments.device, "threads": 1}
    emit("trainer_step", config, results, arguments.output)


if __name__ == "__main__":
    main()
