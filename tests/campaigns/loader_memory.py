"""Memory of a loader over a million samples: the trainer's and the reading processes stay as they are.

    python tests/campaigns/loader_memory.py --samples 1000000 --processes 1

Small records and a small recipe, so that a sample costs little and everything that is kept for one would be
seen. Whole steps are made, with features and meters. Every so many samples the resident memory, descriptors
and threads of the trainer's process and of each reading process are noted; it fails when, after the first
tenth (allocators, pools and caches fill then), memory has grown by more than `LIMIT_MB`, or more than
`LIMIT_BYTES_A_SAMPLE`, whichever is larger, or when a descriptor or thread stays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from records import make_record  # noqa: E402

from foldfeed.feature_store import FeatureStore, write_part  # noqa: E402
from foldfeed.loader import CropLoader, Recipe  # noqa: E402
from foldfeed.loader.reading.reading import ReadingProcesses  # noqa: E402

LIMIT_MB = 8.0
# Half of what a list takes that gets one small object for every sample: 16 MB of a million samples.
LIMIT_BYTES_A_SAMPLE = 16
RECORDS, BATCH = 24, 100
RECIPE = Recipe(
    name="crop_first", crop_residues=8, num_clusters=3, num_extra=3, block_delete=False, masked_fraction=0.0
)


def build(url: Path) -> FeatureStore:
    """Returns a store of small records of different sizes, some without a structure."""
    store = FeatureStore.create(url)
    records = [make_record(f"r{n:02}", 3 + n, 6 + n, seed=n, big_deletions=False) for n in range(RECORDS)]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id="memory")
    return store


def usage(pid: int) -> dict[str, float]:
    """Returns resident memory in MB, descriptors and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def faults_of(notes: list[dict[str, dict[str, float]]], samples: list[int]) -> list[str]:
    """Returns what has grown from the first note after a tenth of the samples to the last."""
    first = next(n for n, count in enumerate(samples) if count >= samples[-1] / 10)
    limit_mb = max(LIMIT_MB, LIMIT_BYTES_A_SAMPLE * (samples[-1] - samples[first]) / 1e6)
    found = []
    for name, last in notes[-1].items():
        before = notes[first].get(name)
        if before is None:
            found.append(f"{name} was started meanwhile")
            continue
        if last["mb"] - before["mb"] > limit_mb:
            found.append(f"{name} grew from {before['mb']} to {last['mb']} MB ({limit_mb:.1f} allowed)")
        found += [
            f"{name} has {last[what]:.0f} {what}, {before[what]:.0f} before"
            for what in ("descriptors", "threads")
            if last[what] > before[what]
        ]
    return found


def run(
    folder: Path, num_samples: int, every: int, num_processes: int
) -> tuple[list[str], dict[str, object]]:
    """Returns what has grown, and the notes."""
    store = build(folder / "store")
    notes: list[dict[str, dict[str, float]]] = []
    samples: list[int] = []
    started = time.perf_counter()
    options = {"num_processes": num_processes, "read_ahead_bytes": 4 << 20, "num_threads": 1}
    with CropLoader(store, RECIPE, seed=1, global_batch=BATCH, **options) as loader:
        while not samples or samples[-1] < num_samples:
            for _ in range(every // BATCH):
                next(loader)
            supply = loader._supply
            pids = supply.pids if isinstance(supply, ReadingProcesses) else []
            named = {"trainer": os.getpid()} | {f"reader {pid}": pid for pid in pids}
            notes.append({name: usage(pid) for name, pid in named.items()})
            samples.append(int(loader.stats["samples"]))
            rate = samples[-1] / (time.perf_counter() - started)
            print(samples[-1], f"{rate:.0f}/s", json.dumps(notes[-1]), flush=True)
    return faults_of(notes, samples), {"samples": samples, "notes": notes}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=50_000)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        faults, found = run(Path(folder), arguments.samples, arguments.every, arguments.processes)
    print(json.dumps({"processes": arguments.processes, "faults": faults} | found))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
