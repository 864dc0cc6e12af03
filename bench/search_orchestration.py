"""What a build costs beside its searches: planning, 1,000 searches, a second run, and two cores against one.

    python bench/search_orchestration.py --only planning second_run
    python bench/search_orchestration.py --only searches --queries 1000 --targets 25000

``searches``: the same jackhmmer commands by bash and by ``foldfeed build``, one after the other; CPU seconds
of everything that either started (the kernel tells apart ``own``, the build's process, and ``tools``, its
children; a helper that outlives the build is adopted here and counted). ``per_search_ms`` is the own time
without that of a build of one query, divided by the searches: it tells the share at any size of search.
``planning``: CPU and peak memory of parse, validate, de-duplicate and plan. ``second_run``: the whole command
again, with nothing to do, behind a build and behind as many results as ``--many`` says. ``scaling``: wall
time on one core with one worker and on two with two; what else runs on the machine counts against it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rows import emit
from search_scan import prepare, real_queries
from search_shards import homologs

from foldfeed.pipelines import BuildConfig, DatabaseSpec
from foldfeed.pipelines.building.job import planned
from foldfeed.pipelines.building.outcome import Finished, mark_finished
from foldfeed.pipelines.tools.jackhmmer import FLAGS
from foldfeed.pipelines.tools.search_tool import find_binary

PARTS = ("planning", "second_run", "searches", "scaling")
PR_SET_CHILD_SUBREAPER = 36

# Runs the command line and says what this process and its children took.
BUILD = """
import json, resource, sys
from foldfeed.feature_store.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
own, tools = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
seconds = {"own_s": own.ru_utime + own.ru_stime, "tools_s": tools.ru_utime + tools.ru_stime}
# Not ru_maxrss: a child inherits that of the process that started it.
peak_kb = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
print(json.dumps({**seconds, "peak_mb": peak_kb / 1024}))
"""
PLAN = """
import json, resource, sys
from foldfeed.pipelines.building.job import planned
from foldfeed.pipelines import BuildConfig, DatabaseSpec
names = [DatabaseSpec.parse(f"d{n}={path}") for n, path in enumerate(sys.argv[2:])]
config = BuildConfig(queries=(sys.argv[1],), databases=tuple(names), store=sys.argv[1] + ".store")
usage = lambda: resource.getrusage(resource.RUSAGE_SELF)
before = usage()
_, plan, _, _ = planned(config)
after = usage()
cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
peak_kb = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
peak_mb = round(peak_kb / 1024, 1)
print(json.dumps({"cpu_s": round(cpu_s, 2), "peak_mb": peak_mb, "queries": plan.num_queries}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--targets", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--many", type=int, default=100_000, help="results behind a second run")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "search_orchestration.jsonl"
    )
    options = parser.parse_args()
    # What is left behind by a process that we started is ours to wait for, so its CPU time counts.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        queries = write_inputs(folder, options.targets, options.queries)
        results: dict[str, object] = {}
        if "planning" in options.only:
            results["planning"] = {str(count): planning(folder, count) for count in options.entries}
        if "second_run" in options.only:
            results["second_run"] = second_runs(folder, options.many)
        if "searches" in options.only:
            results["searches"] = searches(folder, queries, options.rounds)
        if "scaling" in options.only:
            results["scaling"] = scaling(folder, options.rounds)
    config = {
        "queries": options.queries,
        "targets": options.targets,
        "rounds": options.rounds,
        "many": options.many,
        "median_query_residues": statistics.median(map(len, queries)),
    }
    emit("search_orchestration", config, results, options.output)


def write_inputs(folder: Path, targets: int, count: int) -> list[str]:
    """Writes database and queries, real ones where there are some: a third with many homologs elsewhere."""
    drawn, _ = prepare(folder / "db.fasta", targets, count, np.random.default_rng(0))
    relatives = homologs()
    pool = [*real_queries(), *relatives[:: max(1, len(relatives) // count)], *drawn]
    queries = list(dict.fromkeys(text for text in pool if 60 <= len(text) <= 1000))[:count]
    (folder / "q.fasta").write_text("".join(f">q{n}\n{text}\n" for n, text in enumerate(queries)))
    (folder / "one.fasta").write_text(f">q\n{queries[0]}\n")
    return queries


def measured(argv: list[str]) -> tuple[float, float, str]:
    """Runs a command; returns CPU seconds of all that it started, wall seconds, and what it printed last."""
    ours = children()
    before, started = children_seconds(), time.monotonic()
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    wall_s = time.monotonic() - started
    for orphan in children() - ours:
        os.waitpid(orphan, 0)
    return children_seconds() - before, wall_s, (done.stdout.splitlines() or [""])[-1]


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def build(folder: Path, store: str, *words: str, queries: str = "q.fasta") -> dict[str, float]:
    argv = ["build", "--queries", str(folder / queries), "--database", f"u={folder / 'db.fasta'}"]
    # The shells run stock jackhmmer, so the build does, whatever `auto` would choose for this size.
    argv += ["--engine", "binary", "--store", str(folder / store), *words]
    cpu_s, wall_s, last = measured([sys.executable, "-c", BUILD, *argv])
    return {"cpu_s": cpu_s, "wall_s": wall_s, **json.loads(last)}


def remove(folder: Path, store: str) -> None:
    for name in (store, f"{store}.results"):
        shutil.rmtree(folder / name, ignore_errors=True)


def by_shell(folder: Path, count: int, workers: int) -> dict[str, float]:
    """The commands of a build, dealt out to as many shells as the build has workers."""
    work = folder / "shell"
    work.mkdir(exist_ok=True)
    entries = (folder / "q.fasta").read_text().split(">")[1:]
    for number, entry in enumerate(entries):
        (work / f"{number}.fasta").write_text(f">query\n{entry.partition(chr(10))[2]}")
    binary = find_binary("jackhmmer")
    for worker in range(workers):
        lines = []
        for number in range(worker, count, workers):
            words = {"alignment": f"{number}.sto", "table": f"{number}.tbl", "query": f"{number}.fasta"}
            flags = [flag.format(cpus=1, database=folder / "db.fasta", **words) for flag in FLAGS]
            lines.append(" ".join([binary, *map(str, flags)]))
        (work / f"{worker}.sh").write_text("\n".join(["set -e", f"cd {work}", *lines, ""]))
    starts = " & ".join(f"bash {work}/{worker}.sh" for worker in range(workers))
    cpu_s, wall_s, _ = measured(["bash", "-c", f"{starts} & wait"])
    assert len(list(work.glob("*.tbl"))) == count
    shutil.rmtree(work)
    return {"cpu_s": cpu_s, "wall_s": wall_s}


def searches(folder: Path, queries: list[str], rounds: int) -> dict[str, object]:
    rows = []
    for _ in range(rounds):
        remove(folder, "one")
        one = build(folder, "one", queries="one.fasta")
        shell = by_shell(folder, len(queries), 2)
        remove(folder, "all")
        ours = build(folder, "all", "--workers", "2")
        rows.append(
            {
                "shell_cpu_s": shell["cpu_s"],
                "build_cpu_s": ours["cpu_s"],
                "build_own_s": ours["own_s"],
                "build_tools_s": ours["tools_s"],
                "fixed_own_s": one["own_s"],
                "per_search_ms": 1000 * (ours["own_s"] - one["own_s"]) / len(queries),
                "search_cpu_s": shell["cpu_s"] / len(queries),
                "own_share": ours["own_s"] / ours["cpu_s"],
                "above_shell": ours["cpu_s"] / shell["cpu_s"] - 1,
                "shell_wall_s": shell["wall_s"],
                "build_wall_s": ours["wall_s"],
                "load_average": os.getloadavg()[0],
            }
        )
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}


def scaling(folder: Path, rounds: int) -> dict[str, object]:
    """Wall seconds of the searches alone: without those of a build that finds them done.

    As many workers as cores, to which all processes are bound, and one thread a search: alone, a jackhmmer
    takes a part of a second core.
    """
    whole_machine = sorted(os.sched_getaffinity(0))
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for cores, found in times.items():
            words = ("--workers", str(cores), "--cpus-per-search", "1")
            os.sched_setaffinity(0, whole_machine[:cores])
            remove(folder, "all")
            whole = build(folder, "all", *words)
            shutil.rmtree(folder / "all")
            rest = build(folder, "all", *words)
            os.sched_setaffinity(0, whole_machine)
            found.append(whole["wall_s"] - rest["wall_s"])
    best = {cores: min(found) for cores, found in times.items()}
    return {
        "wall_s": {str(cores): [round(one, 2) for one in found] for cores, found in times.items()},
        "speedup_of_best": round(best[1] / best[2], 3),
        "load_average": os.getloadavg()[0],
    }


def write_entries(path: Path, count: int) -> None:
    random = np.random.default_rng(count)
    letters = np.frombuffer(b"ARNDCQEGHILKMFPSTWYV", dtype=np.uint8)
    text = b"ACD"
    with path.open("wb") as file:
        for number, length in enumerate(np.clip(random.lognormal(5.6, 0.55, count), 30, 2000).astype(int)):
            # Every tenth id comes twice, every tenth sequence, too.
            name = number - 1 if number % 10 == 9 else number
            text = letters[random.integers(0, 20, length)].tobytes() if number % 10 != 5 else text
            lines = [text[start : start + 60] for start in range(0, len(text), 60)]
            file.write(b"\n".join([b">seq%08d a description" % name, *lines, b""]))


def planning(folder: Path, count: int) -> dict[str, object]:
    path = folder / f"{count}.fasta"
    write_entries(path, count)
    databases = []
    for number in range(3):
        databases.append(folder / f"small{number}.fasta")
        databases[-1].write_text(f">t\nMKV{'ACD'[number]}\n")
    argv = [sys.executable, "-c", PLAN, str(path), *map(str, databases)]
    first, again = (json.loads(measured(argv)[2]) for _ in range(2))
    path.unlink()
    return {"first": first, "again": again}


def second_runs(folder: Path, many: int) -> dict[str, object]:
    def again(build_again: Callable[[], dict[str, float]]) -> dict[str, float]:
        runs = [build_again() for _ in range(3)]
        best = min(runs, key=lambda run: run["own_s"])
        return {"cpu_s": round(best["own_s"], 3), "peak_mb": round(best["peak_mb"], 1)}

    build(folder, "few", queries="one.fasta")
    few = again(lambda: build(folder, "few", queries="one.fasta"))
    build(folder, "many", queries="one.fasta")
    write_entries(folder / "many.fasta", many)
    pretend_finished(folder, "many")
    return {"one": few, f"{many}_entries": again(lambda: build(folder, "many", queries="many.fasta"))}


def pretend_finished(folder: Path, store: str) -> None:
    """Makes of a build of one query what one of many leaves, as far as a second run looks at it."""
    config = BuildConfig(
        queries=(str(folder / f"{store}.fasta"),),
        databases=(DatabaseSpec.parse(f"u={folder / 'db.fasta'}"),),
        store=str(folder / store),
    )
    (mark,) = Path(config.results_url).glob("jobs/*/finished-*.json")
    of_one = json.loads(mark.read_text())
    _, plan, job_id, _ = planned(config)
    for two, names in plan.unit_ids.buckets():
        units = Path(config.results_url, "units", two)
        units.mkdir(parents=True, exist_ok=True)
        for name in names:
            for kind in ("zst", "json"):
                (units / f"{name}.{kind}").touch()
    finished = Finished(
        store=of_one["store"],
        job_id=job_id,
        commit_id=of_one["commit_id"],
        part_ids=tuple(of_one["part_ids"]),
        num_records=plan.num_queries,
        dead_letters=(),
        costs=(),
        ledger_path="",
    )
    mark_finished(finished, config.results_url)


if __name__ == "__main__":
    main()
