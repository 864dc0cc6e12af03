"""What a snapshot holds a run up for: checksums, the copy, and what goes on in the background.

One process, no training: three flat buffers as the trainer has them, saved to memory (/dev/shm) and to disk.
The background's seconds are waited for here; in a run the next steps hide them.

Run: python bench/trainer_snapshot.py [--parameters 93000000] [--rounds 4] [--disk DIR]
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
from foldfeed.trainer.ranks import Ranks
from foldfeed.trainer.snapshot import BUFFERS, SnapshotFolder, checksum, read_generation
from foldfeed.trainer.tiers import Capture, Saver, memory_folder


def measure(parameters: int, rounds: int, disk: Path, memory: str) -> dict[str, float]:
    """Returns medians over the rounds after the first two, which fill both generations in memory."""
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    buffers = {name: torch.randn(parameters) for name in BUFFERS}
    tier = memory_folder(memory, f"bench-{time.time_ns()}")
    assert tier is not None
    saver = Saver(SnapshotFolder(disk / "snapshots", keep=2), tier, ranks, SnapshotConfig(memory=memory))
    saver.begin(0)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, started: float) -> None:
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    try:
        for step in range(1, rounds + 3):
            started = time.perf_counter()
            checksums = {name: checksum(buffer) for name, buffer in buffers.items()}
            timed("checksums_s", started)
            state = Capture(manifest={"step": step}, buffers=buffers, checksums=checksums)
            for name, memory_too in (("memory", True), ("disk", False)):
                started = time.perf_counter()
                saver.save(state, memory=memory_too, disk=not memory_too)
                timed(f"copy_for_{name}_s", started)
                started = time.perf_counter()
                saver.close()
                timed(f"background_{name}_s", started)
        started = time.perf_counter()
        read_generation(tier.generation_path(rounds + 2))
        timed("read_and_check_memory_s", started)
    finally:
        saver.finish()
    medians = {name: round(statistics.median(values[2:] or values), 4) for name, values in seconds.items()}
    medians["state_gb"] = round(12 * parameters / 1e9, 3)
    return medians


def main() -> None:
    """Measures and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=93_000_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--disk", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--memory", default="/dev/shm")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/trainer_snapshot.jsonl"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.disk) as disk:
        results = measure(arguments.parameters, arguments.rounds, Path(disk), arguments.memory)
    config = {"parameters": arguments.parameters, "rounds": arguments.rounds}
    emit("trainer_snapshot", config, results, arguments.output)


if __name__ == "__main__":
    main()
