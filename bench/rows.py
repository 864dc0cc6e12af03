"""One self-describing JSON row per benchmark run: what ran, with which settings and versions, on what."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Exit status of a benchmark that finds nothing here that it could measure (no GPU, no server). Not 1, an
# error, nor 2, which is argparse's; BSD's name for it is EX_UNAVAILABLE.
NOTHING_TO_MEASURE = 69

PACKAGES = (
    *("foldfeed", "numpy", "zarr", "zstandard", "pyarrow", "torch", "apache-beam"),
    *("tensorstore", "zarrs", "lmdb", "h5py", "pylance", "array_record", "mosaicml-streaming", "litdata"),
    *("atomworks", "grain"),
)


def host() -> dict[str, Any]:
    """Returns what a reader needs to judge the numbers; no names of machines or people."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if "MemTotal" in line), 0)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def emit(benchmark: str, config: dict[str, Any], results: dict[str, Any], output: Path | None = None) -> None:
    """Prints one JSON row and, if asked, appends it to a file.

    Args:
      benchmark: its name.
      config: settings of this run.
      results: numbers, units in their names.
      output: a file of JSON lines.
    """
    row = {
        "benchmark": benchmark,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config,
        "results": results,
        "versions": {name: _version(name) for name in PACKAGES},
        "host": host(),
    }
    line = json.dumps(row, separators=(",", ":"))
    print(line)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(line + "\n")
    sys.stdout.flush()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
