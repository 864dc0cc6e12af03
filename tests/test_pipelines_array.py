"""A build as an array of jobs: disjoint shares, real processes that die, and the store of one plain build."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from pipelines_data import ROOT, config_of, globins, needs_hmmer, tree_bytes, write_fasta

from foldfeed.feature_store import FeatureStore
from foldfeed.pipelines import run_build
from foldfeed.pipelines.building.array_task import search_share
from foldfeed.pipelines.building.job import forecast_build
from foldfeed.pipelines.building.tools import prepare_databases
from foldfeed.pipelines.planning.forecast import lines_of
from foldfeed.pipelines.planning.packing import RESIDUES_OF_A_SCAN
from foldfeed.pipelines.planning.share import Share, deal, items_of
from foldfeed.pipelines.tools.search_tool import find_binary

pytestmark = [pytest.mark.external_tool, needs_hmmer, pytest.mark.timeout(120)]
SCRIPT = ROOT / "deploy" / "slurm" / "build.sbatch"
WORDS = ("--queries", "q.fasta", "--database", "uniref90=u.fasta", "--database", "mgnify=m@3", "--parts", "3")


@pytest.fixture
def place(tmp_path) -> Path:
    """Queries of several lengths, two of one sequence, one bad; a database in one file and one in three."""
    found = globins(6)
    entries = [f">{name}\n{residues}\n" for name, residues in globins(45).items()]
    short = {"short": list(found.values())[2][:60], "again": next(iter(found.values()))}
    write_fasta(tmp_path / "q.fasta", {**found, **short, "bad": "AC7"})
    (tmp_path / "u.fasta").write_text("".join(entries))
    for number, size in enumerate((20, 24, 1)):
        (tmp_path / f"m-0000{number}-of-00003").write_text("".join(entries[20 * number :][:size]))
    return tmp_path


def config_in(place: Path, store: str = "store", **options):
    databases = [f"uniref90={place / 'u.fasta'}", f"mgnify={place / 'm'}@3"]
    return config_of(place, place / "q.fasta", databases, store=str(place / store), **options)


def prepared(config):
    return prepare_databases(config.databases, max_hits={}, cpus=1, timeout_s=60.0, digests=None)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 7, 40])
def test_shares_are_disjoint_complete_and_even_in_every_database(place, tasks):
    config = config_in(place)
    databases = prepared(config)
    shares = [
        items_of(config.queries, databases, config.max_residues, Share(task=task, tasks=tasks))
        for task in range(tasks)
    ]
    names = [item.unit_id for share in shares for item in share]
    # Seven distinct sequences: once in uniref90, and once in each of mgnify's three files.
    assert len(names) == len(set(names)) == 7 * 4
    assert sum("again" in item.unit.record_ids for share in shares for item in share) == 4
    for index in range(2):
        counts = [sum(item.unit.database_index == index for item in share) for share in shares]
        assert sum(counts) == 7 * (1, 3)[index]
        if tasks <= 7:
            assert min(counts) > 0
    assert any(not share for share in shares) == (tasks == 40)


@pytest.mark.parametrize("seed", range(5))
def test_no_task_has_more_than_one_search_above_the_others(place, seed):
    """The bound of dealing the costliest first, on costs of very different sizes."""
    databases = prepared(config_in(place))[:1]
    known = {f"{number * (seed + 1) * 7919 % 1009:04}": 20 + number**3 % 4999 for number in range(200)}
    for tasks in (2, 3, 7, 199):
        loads = [0] * tasks
        seen: Counter[str] = Counter()
        for task in range(tasks):
            for (_, name), parts in deal([known], databases, Share(task=task, tasks=tasks)).items():
                loads[task] += sum(cost for _, cost in parts)
                seen[name] += 1
        assert seen == dict.fromkeys(known, 1)
        costs = [residues + RESIDUES_OF_A_SCAN for residues in known.values()]
        assert sum(loads) == sum(costs)
        assert max(loads) - min(loads) <= max(costs)


def slow_jackhmmer(place: Path) -> dict[str, str]:
    """Environment in which every search takes a while, so that there is time to kill something."""
    folder = place / "bin"
    folder.mkdir(exist_ok=True)
    script = folder / "jackhmmer"
    real = find_binary("jackhmmer")
    script.write_text(f'#!/bin/sh\ncase "$1" in -h) ;; *) sleep "${{SLOW:-0}}";; esac\nexec "{real}" "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLOW": "0.2"}


def start(place: Path, environment: dict[str, str], *more: object) -> subprocess.Popen:
    line = [sys.executable, "-m", "foldfeed.feature_store.cli.main", "build", *WORDS, "--store", "store"]
    return subprocess.Popen(
        [*line, "--workers", "1", *map(str, more)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_by(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=100)
    assert process.returncode == code, said
    return said


def children_of(folder: Path) -> list[int]:
    """Ids of the processes that run a program of a folder."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:
            continue
        if str(folder).encode() in line:
            found.append(int(process.name))
    return found


def test_three_tasks_one_killed_and_run_twice_at_once_give_the_store_of_one_build(place, monkeypatch):
    environment = slow_jackhmmer(place)
    tasks = [start(place, environment, "--task", task, "--tasks", 3) for task in range(3)]
    units = place / "store.results" / "units"
    deadline = time.monotonic() + 60
    # Killed in the middle: some answers are there, and a search of its own runs.
    while len(list(units.rglob("*.json"))) < 4 or not children_of(place / "bin"):
        assert time.monotonic() < deadline, "no search began"
        assert tasks[1].poll() is None
        time.sleep(0.02)
    tasks[1].send_signal(signal.SIGKILL)
    said_by(tasks[1], code=-signal.SIGKILL)
    for task in (tasks[0], tasks[2]):
        assert "left to other tasks or failed" in said_by(task)
    assert not children_of(place / "bin")
    assert not (place / "store").exists()
    twice = [said_by(one) for one in [start(place, environment, "--task", 1, "--tasks", 3) for _ in range(2)]]
    assert all("14 of 14 searches have an answer" in said for said in twice)
    # The plain build of the same command, then one that never saw a task.
    monkeypatch.setenv("PATH", environment["PATH"])
    final = run_build(config_in(place, parts=3))
    assert (final.num_records, final.num_searched, final.num_reused, final.num_failed) == (8, 0, 14, 0)
    assert [cost.num_new for cost in final.costs] == [0, 0]
    run_build(config_in(place, "plain", parts=3))
    assert tree_bytes(place / "store" / "parts") == tree_bytes(place / "plain" / "parts")
    ours, plain = (FeatureStore.open(str(place / name)) for name in ("store", "plain"))
    assert ours.fingerprint == plain.fingerprint
    answers = [tree_bytes(place / f"{name}.results" / "units", "*.zst") for name in ("store", "plain")]
    assert answers[0] == answers[1]


def test_more_tasks_than_searches_in_any_order_and_a_task_that_runs_again(place):
    config = config_in(place)
    tasks = 31
    reports = [search_share(config, Share(task=task, tasks=tasks)) for task in reversed(range(tasks))]
    assert Counter(report.num_items for report in reports) == {1: 28, 0: 3}
    # Whoever finds the last part of a search joins it; one after another nothing is joined twice.
    assert sum(report.num_joined for report in reports) == 7
    assert reports[-1].num_answered == reports[-1].num_planned == 14
    again = search_share(config, Share(task=5, tasks=tasks))
    assert (again.num_searched, again.num_reused, again.num_joined) == (0, again.num_items, 0)
    built = run_build(config)
    assert (built.num_searched, built.num_reused, built.num_records) == (0, 14, 8)


def test_a_search_that_fails_is_told_costs_no_other_and_is_tried_again_by_the_build(place, monkeypatch):
    folder = place / "bin"
    folder.mkdir()
    script = folder / "jackhmmer"
    broken = place / "broken"
    broken.touch()
    real = find_binary("jackhmmer")
    name, sequence = globins(6).popitem()
    script.write_text(
        f'#!/bin/sh\ncase "$1" in -h) exec "{real}" -h;; esac\n'
        f'for word in "$@"; do case "$word" in */query)\n'
        f'[ -e "{broken}" ] && grep -q {sequence} "$word" && exit 3;; esac; done\n'
        f'exec "{real}" "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    config = config_in(place)
    reports = [search_share(config, Share(task=task, tasks=2)) for task in range(2)]
    failed = [failure for report in reports for failure in report.failures]
    assert {failure.record_ids for failure in failed} == {(name,)}
    assert {(failure.status, failure.kind) for failure in failed} == {("poison", "ToolFailedError")}
    assert reports[1].num_answered == 12
    broken.unlink()
    built = run_build(config)
    assert (built.num_searched, built.num_reused, built.num_records) == (2, 12, 8)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--task", "3", "--tasks", "3"), "it must be 0 to 2"),
        (("--task", "-1", "--tasks", "3"), "it must be 0 to 2"),
        (("--task", "0", "--tasks", "0"), "at least 1 task"),
        (("--task", "0"), "belong together"),
        (("--task", "0", "--tasks", "2", "--dry-run"), "the whole build"),
        (("--task", "0", "--tasks", "2", "--runner", "SparkRunner"), "cannot take effect with --task"),
        (("--task", "0", "--tasks", "2", "--", "--job_name=x"), "--job_name=x cannot take effect"),
    ],
)
def test_what_cannot_work_is_refused_and_said(place, more, words):
    from click.testing import CliRunner

    from foldfeed.pipelines.cli.build import build

    line = ["--queries", str(place / "q.fasta"), "--database", f"u={place / 'u.fasta'}", "--store", "store"]
    done = CliRunner().invoke(build, [*line, *more])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_the_batch_script_in_a_loop_without_slurm(place):
    """The loop of deploy/slurm.md: the same variables, the same script, no Slurm."""
    program = place / "foldfeed"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m foldfeed.feature_store.cli.main "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "FOLDFEED": str(program), "SCRIPT": str(SCRIPT)}
    loop = """
        set -eu
        for task in 0 1 2; do
            SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=3 bash "$SCRIPT" "$@" &
        done
        wait
        bash "$SCRIPT" "$@"
    """
    words = (*WORDS[:4], "--store", "store")
    line = ["bash", "-c", loop, "loop", *words]
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"task [012] of 3: (\d) searches in its share, (\d) done", done.stdout)
    assert sum(int(share) for share, _ in shares) == 7
    assert all(share == searched != "0" for share, searched in shares)
    assert "searches: 0 done, 7 reused, 0 failed" in done.stdout
    # A part of an array that does not say how large the whole was would search other shares.
    part = {**environment, "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "1"}
    part |= {"SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "2"}
    line = ["bash", str(SCRIPT), *words]
    done = subprocess.run(line, cwd=place, env=part, capture_output=True, text=True, timeout=100)
    assert (done.returncode, "set FOLDFEED_TASKS" in done.stderr) == (2, True)
    part["FOLDFEED_TASKS"] = "3"
    done = subprocess.run(line, cwd=place, env=part, capture_output=True, text=True, timeout=100)
    assert re.search(r"task 2 of 3: (\d) searches in its share, 0 done, \1 reused", done.stdout)


def test_a_dry_run_between_tasks_takes_off_what_they_did(place):
    """The forecast of a build that is half done: searches, and files of searches that are not joined yet."""
    config = config_in(place)
    run_build(config_of(place, place / "q.fasta", [f"uniref90={place / 'u.fasta'}"], store=config.store))
    before = forecast_build(config)
    assert [(one.num_missing, one.num_files, one.num_files_done) for one in before.databases] == [
        (0, 0, 0),
        (7, 21, 0),
    ]
    (line,) = [line for line in lines_of(before, 0.05) if "mgnify" in line and "to do" in line]
    assert "cost unknown: no receipt" in line
    assert not [line for line in lines_of(before, 0.05) if "together" in line]
    reports = [search_share(config, Share(task=task, tasks=2)) for task in range(2)]
    unit = next(path for path in (place / "store.results" / "units").rglob("*.json") if is_joined(path))
    unit.unlink()
    last = forecast_build(config)
    assert [(one.num_missing, one.num_files, one.num_files_done) for one in last.databases] == [
        (0, 0, 0),
        (1, 3, 3),
    ]
    assert last.databases[1].cpu_s == 0.0
    said = lines_of(last, 0.05)
    assert "6 searches reused, 1 to do, 3 of their 3 files searched already" in said[2]
    assert said[3].startswith(
        "  together: 1 searches to do, 0 CPU hours expected, 0 hours here with 2 searches"
    )
    assert said[3].endswith("price 0")
    assert sum(report.num_joined for report in reports) == 7


def is_joined(path: Path) -> bool:
    receipt = json.loads(path.read_text())
    return receipt["search"]["database"] == "mgnify"
