"""How long a loader takes to its first batch, new and resumed, for stores of few and of many records.

    python bench/loader_start.py [--records N ...] [--processes N ...] [--repeat R]

Each measurement is a fresh process that has imported torch and foldfeed.loader (said apart). From
`FeatureStore.open` to the first batch of `crop_first` (AlphaFold 2's sizes, batch 8, no cache), then to the
first batch after `load_state_dict` of step 1,000,000. Wall-clock seconds, and CPU seconds of the process with
those of its reading processes: at the moment of the first batch (on a machine that others use, this says what
it would be on a quiet one, and is more than that, because a reading process works beside the trainer's), and
until the loader was closed. Medians. Python's compiled files are there, as after an installation. A row is
written to results/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rows import emit

if TYPE_CHECKING:
    from foldfeed.loader import CropLoader

NAME = "loader_start"
RESULTS = Path(__file__).parent / "results"
FAR_STEP = 1_000_000


def cpu_s() -> float:
    """Returns CPU seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def readers_cpu_s(loader: CropLoader) -> float:
    """Returns CPU seconds of a loader's reading processes, which run."""
    ticks = 0
    for pid in getattr(loader._supply, "pids", ()):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_here(folder: str, num_processes: int) -> dict[str, float]:
    """Returns what this fresh process needs."""
    started, cpu = time.perf_counter(), cpu_s()
    import torch

    from foldfeed.feature_store import FeatureStore
    from foldfeed.loader import CropLoader, Recipe

    torch.set_num_threads(1)
    found = {"import_s": time.perf_counter() - started, "import_cpu_s": cpu_s() - cpu}
    started, cpu = time.perf_counter(), cpu_s()
    store = FeatureStore.open(folder)
    len(store)
    found |= {"open_s": time.perf_counter() - started, "open_cpu_s": cpu_s() - cpu}
    options = {"seed": 1, "global_batch": 8, "num_processes": num_processes}
    with CropLoader(store, Recipe.named("crop_first"), **options) as loader:
        next(loader)
        found["first_batch_s"] = time.perf_counter() - started
        found["at_first_batch_cpu_s"] = cpu_s() - cpu + readers_cpu_s(loader)
        state = loader.state_dict(FAR_STEP)
    # Ended, so that its processes count.
    found["first_batch_cpu_s"] = cpu_s() - cpu
    started, cpu = time.perf_counter(), cpu_s()
    with CropLoader(store, Recipe.named("crop_first"), **options) as loader:
        loader.load_state_dict(state)
        batch = next(loader)
        found["resumed_s"] = time.perf_counter() - started
        found["at_resumed_cpu_s"] = cpu_s() - cpu + readers_cpu_s(loader)
    assert batch.step == FAR_STEP, batch.step
    found["resumed_cpu_s"] = cpu_s() - cpu
    return found


def compiled_in(folder: str) -> dict[str, str]:
    """Returns an environment in which Python keeps compiled files, in that folder."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": f"{folder}/compiled"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[140, 100_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "PROCESSES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_here(arguments.measure[0], int(arguments.measure[1]))))
        return
    # Here, because a process that is measured must not import what this one needs.
    from care import make_index

    results = {}
    for num_records in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            make_index(Path(folder) / "store", num_records)
            for num_processes in arguments.processes:
                measure = ["--measure", f"{folder}/store", str(num_processes)]
                command, environment = [sys.executable, __file__, *measure], compiled_in(folder)
                # One more than asked for: the first writes the compiled files.
                runs = [
                    json.loads(subprocess.check_output(command, text=True, env=environment))
                    for _ in range(arguments.repeat + 1)
                ][1:]
                found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                results[f"{num_records} records, {num_processes} processes"] = found
                print(num_records, num_processes, {k: round(v, 3) for k, v in found.items()}, flush=True)
    emit(NAME, {"repeat": arguments.repeat, "far_step": FAR_STEP}, results, arguments.output)


if __name__ == "__main__":
    main()
