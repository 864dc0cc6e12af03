"""The fast scan: Gcells/s of HMMER's first filter, and CPU seconds of a search against jackhmmer alone.

    python bench/search_scan.py --targets 200000 --queries 16

Targets and queries are real proteins where FOLDFEED_TEST_DATA points to some, filled up with shuffled copies;
without it they are drawn, with roughly Swiss-Prot's composition. A cell is a query residue times a target
residue. CPU seconds per query are user plus system of this process and its children, with the database in
memory (fast, with every kernel that this processor runs) or in the page cache (jackhmmer); reading the
database into memory is given apart, and what a query costs in one that does not stay there. With
FOLDFEED_SCAN_DEVICE=cuda the device is measured, too: its rate by the clock, and how many cores it keeps busy
with what it leaves to them (CPU seconds of a query over the device's).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import lzma
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from rows import emit

from foldfeed.pipelines.fast_scan import database as scan_database
from foldfeed.pipelines.fast_scan import memory as scan_memory
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.choice import best_kernel, scan_kernel
from foldfeed.pipelines.fast_scan.database import ScanDatabase, open_database
from foldfeed.pipelines.fast_scan.kernels import DeviceKernel, Kernel, kernels
from foldfeed.pipelines.search_speed import cpu_seconds
from foldfeed.pipelines.tools.fast_jackhmmer import F1, FastJackhmmer, forget_profiles, passing_extents
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer

# Plain C is the reference of the others and a hundred times slower than them.
VECTOR_KERNELS = ("sse4.1", "avx2", "avx512", "neon")

# Queries that a kernel's rate is measured with, where all of them would take long.
RATE_QUERIES = 16

# Roughly Swiss-Prot's, percent.
COMPOSITION = dict(
    zip(
        "ACDEFGHIKLMNPQRSTVWY",
        (
            *(8.3, 1.4, 5.5, 6.7, 3.9, 7.1, 2.3, 5.9, 5.8, 9.6),
            *(2.4, 4.1, 4.7, 3.9, 5.5, 6.6, 5.4, 6.9, 1.1, 2.9),
        ),
        strict=True,
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--kernels", nargs="*", metavar="NAME", help="those to measure. [default: all]")
    parser.add_argument("--streamed", type=int, default=16, help="queries without the database in memory")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "search_scan.jsonl"
    )
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        database = Path(name) / "targets.fasta"
        queries, source = prepare(database, options.targets, options.queries, random)
        results = measure(str(database), queries, options.kernels, options.streamed)
    config = {"targets": options.targets, "queries": len(queries), "sequences": source, "f1": F1}
    config["median_query_residues"] = statistics.median(map(len, queries))
    emit("search_scan", config, results, options.output)


def prepare(path: Path, targets: int, queries: int, random: np.random.Generator) -> tuple[list[str], str]:
    """Writes the database and returns the queries and where the sequences come from."""
    real = real_targets()
    source = "real, the rest shuffled" if real else "drawn"
    pool = real or ["".join(random.choice(list(COMPOSITION), n, p=shares())) for n in lengths(random, 2000)]
    with path.open("w") as file:
        for number in range(targets):
            text = pool[number % len(pool)]
            if number >= len(pool):
                letters = np.frombuffer(text.encode(), dtype="S1")
                text = random.permutation(letters).tobytes().decode()
            file.write(f">t{number}\n{text}\n")
    # Around 300 residues.
    asked = real_queries() or pool
    asked = sorted(
        (text for text in asked if 100 <= len(text) <= 1200), key=lambda text: abs(len(text) - 300)
    )
    chosen = [asked[int(i)] for i in random.permutation(min(len(asked), 2 * queries))[:queries]]
    return chosen, source


def shares() -> np.ndarray:
    weights = np.array(list(COMPOSITION.values()))
    return weights / weights.sum()


def lengths(random: np.random.Generator, number: int) -> np.ndarray:
    return np.clip(random.lognormal(5.6, 0.7, number), 20, 5000).astype(int)


def real_targets() -> list[str]:
    folder = Path(os.environ.get("FOLDFEED_TEST_DATA", "")) / "searchdb"
    if not os.environ.get("FOLDFEED_TEST_DATA") or not folder.is_dir():
        return []
    files = [path for path in sorted(folder.glob("*.fasta.xz")) if "homologs" not in path.name]
    files += sorted(folder.glob("*.faa.xz"))
    return [text for path in files for text in entries(lzma.decompress(path.read_bytes()).decode())]


def real_queries() -> list[str]:
    path = Path(os.environ.get("FOLDFEED_TEST_DATA", "")) / "queries" / "mmseqs_500.fasta.gz"
    if not os.environ.get("FOLDFEED_TEST_DATA") or not path.exists():
        return []
    return entries(gzip.decompress(path.read_bytes()).decode())


def entries(text: str) -> list[str]:
    return ["".join(entry.partition("\n")[2].split()).upper() for entry in text.split(">")[1:]]


def timed(function):
    started = cpu_seconds()
    answer = function()
    return answer, cpu_seconds() - started


def measure(path: str, queries: list[str], names: list[str] | None, streamed: int) -> dict[str, object]:
    plain = Jackhmmer.find(database=path, cpus=1, timeout_s=3600)
    # Once before, so that the file is in the page cache.
    plain.search(queries[0][:1])
    expected, plain_s = timed(lambda: [plain.search(query) for query in queries])
    number, profiles = len(queries), [scan.profile_of(query) for query in queries]
    residues = sum(chunk.num_residues for chunk in ScanDatabase(path, best_kernel()).chunks())
    cells = residues * sum(map(len, queries))
    used: list[Kernel | DeviceKernel] = [
        kernel for kernel in kernels() if kernel.usable and kernel.name in (names or VECTOR_KERNELS)
    ]
    if not isinstance(device := scan_kernel(), Kernel):
        used.append(device)
    by_kernel = {kernel.name: measure_kernel(path, kernel, queries, profiles) for kernel in used}
    for one in by_kernel.values():
        answers = one.pop("answers")
        pairs = list(zip(answers, expected, strict=True))
        one["equal_alignments"] = sum(a.alignment == b.alignment for a, b in pairs)
        one["equal_tables"] = sum(a.table.split() == b.table.split() for a, b in pairs)
        one["times_less_cpu"] = round(plain_s / number / one["fast"], 2)
    return {
        "residues": residues,
        "jackhmmer_gcells_per_cpu_s": round(cells / plain_s / 1e9, 1),
        "jackhmmer_cpu_s_per_query": round(plain_s / number, 4),
        "jackhmmer_in_one_target_cpu_s_per_query": round(start_of_jackhmmer(queries) / number, 4),
        "kernel_chosen": best_kernel().name,
        "by_kernel": by_kernel,
        "streamed_cpu_s_per_query": measure_streamed(path, profiles[:streamed]) if streamed else {},
        "rows": sum(answer.table.count(b"\n") for answer in expected),
    }


def start_of_jackhmmer(queries: list[str]) -> float:
    """CPU seconds of jackhmmer on a database of one target: a process, and a profile built and calibrated."""
    with tempfile.TemporaryDirectory() as name:
        tiny = Path(name) / "tiny.fasta"
        tiny.write_text(f">one\n{''.join(COMPOSITION)}\n")
        tool = Jackhmmer.find(database=str(tiny), cpus=1, timeout_s=3600)
        return timed(lambda: [tool.search(query) for query in queries])[1]


def measure_kernel(
    path: str, kernel: Kernel | DeviceKernel, queries: list[str], profiles: list[scan.FilterProfile]
) -> dict[str, object]:
    """Rates of the scan, and CPU seconds a query by stage with the database in memory."""
    number, is_device = len(queries), not isinstance(kernel, Kernel)
    # A device's seconds are those of the clock; nothing else may run beside it then.
    clock = clocked if is_device else timed
    with mock.patch.object(scan_database, "scan_kernel", return_value=kernel):
        tool = FastJackhmmer.find(database=path, cpus=1, timeout_s=3600)
        database = open_database(path)
        chunks, read_s = timed(lambda: list(database.chunks()))
        some = profiles if is_device else profiles[:RATE_QUERIES]
        cells = sum(chunk.num_residues for chunk in chunks) * sum(map(len, some))
        rates = {}
        for way, groups in (("batch", [some]), ("single", [[profile] for profile in some])):
            # Once before: kernels of a device are compiled, and its memory filled.
            scan.best_cells(some[:1] if not is_device else some, chunks[0], kernel=kernel)
            _, took = clock(
                lambda groups=groups: [scan.best_cells(g, c, kernel=kernel) for c in chunks for g in groups]
            )
            rates[way] = round(cells / took / 1e9, 1)
        forget_profiles()
        with counted(scan, "profile_of") as made, counted(scan, "survivors") as scanned:
            answers, fast_s = timed(lambda: [tool.search(query) for query in queries])
        total = number * database.num_records
        database.forget()
    through = [one for found in scanned.answers for one in found]
    row = {
        "gcells_per_s": rates,
        "read_database_cpu_s": round(read_s, 3),
        "share_let_through": round(sum(len(one.records) for one in through) / total, 6),
        "msv_share": round(sum(one.num_msv for one in through) / total, 6),
        "fast": round(fast_s / number, 4),
        "of_it_profile": round(made.cpu_s / number, 4),
        "of_it_scan": round(scanned.cpu_s / number, 4),
        "of_it_jackhmmer_on_what_passes": round((fast_s - scanned.cpu_s - made.cpu_s) / number, 4),
        "answers": answers,
    }
    if is_device:
        device_s = cells / number / rates["batch"] / 1e9
        row |= {"device_s_per_query": round(device_s, 5), "cores_fed": round(fast_s / number / device_s, 1)}
    return row


class Counted:
    """What a function answered, and the CPU seconds of its thread that it took."""

    def __init__(self) -> None:
        self.answers, self.cpu_s = [], 0.0


@contextlib.contextmanager
def counted(module, name: str):
    """Counts the calls of a module's function."""
    found, function = Counted(), getattr(module, name)

    def call(*args, **words):
        started = time.thread_time()
        answer = function(*args, **words)
        found.cpu_s += time.thread_time() - started
        found.answers.append(answer)
        return answer

    with mock.patch.object(module, name, call):
        yield found


def clocked(function):
    started = time.monotonic()
    answer = function()
    return answer, time.monotonic() - started


def measure_streamed(path: str, profiles: list[scan.FilterProfile]) -> dict[str, float]:
    """CPU seconds a query of reading and scanning a database that does not stay in memory."""
    with mock.patch.object(scan_memory, "RESIDENT_SHARE", 0.0):
        database = ScanDatabase(path, best_kernel())
        sizes = {"one_query": 1, "batch_of_4": 4, "batch_of_16": 16}
        taken = {}
        for name, size in sizes.items():
            batches = [profiles[start : start + size] for start in range(0, len(profiles), size)]
            # Once before, so that neither starts with memory that the system has to clear first.
            passing_extents(batches[0], database, threads=1)
            _, took = timed(
                lambda batches=batches: [passing_extents(b, database, threads=1) for b in batches]
            )
            taken[name] = round(took / len(profiles), 4)
    return taken


if __name__ == "__main__":
    sys.exit(main())
