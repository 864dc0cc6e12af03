"""What a snapshot holds a run up for, and what goes on in the background: checksums, copy, writing.

One process, no training: three flat buffers as the trainer has them, saved to memory (/dev/shm) and to disk
while steps sleep. The seconds of writing are waited for here; in a run the next steps hide them.

Run: python bench/trainer_snapshot.py [--parameters 93000000] [--rounds 4] [--step-s 2] [--disk DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rows import emit

from foldfeed.trainer.config import SnapshotConfig
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.state.interval import Interval
from foldfeed.trainer.state.snapshot import BUFFERS, SnapshotFolder, read_generation
from foldfeed.trainer.state.tiers import Saver, memory_folder


def measure(parameters: int, rounds: int, step_s: float, disk: Path, memory: str) -> dict[str, float]:
    """Returns medians over the rounds after the first two, which fill both generations in memory."""
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    buffers = {name: torch.randn(parameters) for name in BUFFERS}
    tier = memory_folder(memory, f"bench-{time.time_ns()}")
    assert tier is not None
    saver = Saver(SnapshotFolder(disk / "snapshots", keep=2), tier, ranks, SnapshotConfig(memory=memory))
    saver.begin(0)
    seconds: dict[str, list[float]] = {}
    intervals = {"share": Interval(-1), "mtbf": Interval(-1, 3600.0)}

    def timed(name: str, started: float) -> float:
        spent = time.perf_counter() - started
        seconds.setdefault(name, []).append(spent)
        return spent

    try:
        for step in range(1, rounds + 3):
            for name, memory_too in (("memory", True), ("disk", False)):
                started, cpu = time.perf_counter(), time.process_time()
                saver.begin_snapshot(
                    {"step": step}, lambda: buffers, 0.0, memory=memory_too, disk=not memory_too
                )
                stall_s = timed(f"begin_{name}_s", started)
                saver.is_staged(step_s)
                timed(f"stage_{name}_s", started)
                # The step sleeps: cores are free, as where GPUs compute.
                time.sleep(max(0.0, step_s - (time.perf_counter() - started)))
                started = time.perf_counter()
                saver.end_snapshot()
                stall_s += timed(f"end_{name}_s", started)
                seconds.setdefault(f"stall_{name}_s", []).append(stall_s)
                started = time.perf_counter()
                saver.close()
                timed(f"write_{name}_s", started)
                seconds.setdefault(f"cpu_{name}_s", []).append(time.process_time() - cpu)
                if memory_too and step > 2:
                    busy_s = seconds["stage_memory_s"][-1] + seconds["write_memory_s"][-1]
                    for interval in intervals.values():
                        interval.learn(stall_s, step_s, busy_s)
        started = time.perf_counter()
        read_generation(tier.generation_path(rounds + 2))
        timed("read_and_check_memory_s", started)
    finally:
        saver.finish()
    results = {name: round(statistics.median(values[2:] or values), 4) for name, values in seconds.items()}
    for name, interval in intervals.items():
        results[f"interval_{name}_s"] = round(interval.steps * step_s, 1)
        results[f"stall_of_time_{name}_percent"] = round(
            100 * results["stall_memory_s"] / (interval.steps * step_s), 5
        )
    return {**results, "state_gb": round(12 * parameters / 1e9, 3)}


def main() -> None:
    """Measures and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=93_000_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--step-s", type=float, default=2.0, help="for which a step computes")
    parser.add_argument("--disk", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--memory", default="/dev/shm")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/trainer_snapshot.jsonl"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.disk) as disk:
        results = measure(
            arguments.parameters, arguments.rounds, arguments.step_s, Path(disk), arguments.memory
        )
    config = {
        "parameters": arguments.parameters,
        "rounds": arguments.rounds,
        "step_s": arguments.step_s,
    }
    emit("trainer_snapshot", config, results, arguments.output)


if __name__ == "__main__":
    main()
