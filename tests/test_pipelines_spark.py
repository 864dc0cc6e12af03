"""Builds on a real Spark with two workers: the same store, whatever dies; `make test-spark` starts it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pipelines_data import GLOBINS, dead_letters_file, globins, needs_hmmer, tree_bytes, write_fasta

from foldfeed.feature_store import FeatureStore
from foldfeed.pipelines.results import ResultStore

SPARK = os.environ.get("FOLDFEED_SPARK", "")

pytestmark = [
    pytest.mark.external_tool,
    needs_hmmer,
    pytest.mark.skipif(not SPARK, reason="no Spark; `make test-spark` starts one"),
    pytest.mark.timeout(280),
]


def command(*words: object, spark: bool) -> list[str]:
    line = [sys.executable, "-m", "foldfeed.feature_store.cli.main", "build", *map(str, words)]
    if spark:
        line += ["--runner", "PortableRunner", "--", "--job_endpoint=127.0.0.1:8099"]
        line += ["--environment_type=PROCESS", f'--environment_config={{"command":"{SPARK}/boot.sh"}}']
        line += ["--sdk_worker_parallelism=1"]
    return line


def build(folder: Path, *words: object, spark: bool) -> str:
    done = subprocess.run(
        command(*words, spark=spark), cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def parts(store: Path) -> dict[str, bytes]:
    return tree_bytes(store / "parts")


def processes(word: str) -> list[int]:
    """Ids of the processes whose command line holds a word, this one's children of tests left out."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        if word.encode() in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.fixture
def place(tmp_path) -> Path:
    """Queries, one of them bad, a database in one file and one in three; all by relative paths."""
    write_fasta(tmp_path / "q.fasta", {**globins(6), "bad": "AC7"})
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    (tmp_path / "u.fasta").write_text("".join(entries))
    for number in range(3):
        (tmp_path / f"m-0000{number}-of-00003").write_text("".join(entries[number::3]))
    return tmp_path


WORDS = ("--queries", "q.fasta", "--database", "uniref90=u.fasta", "--database", "mgnify=m@3", "--parts", "3")


def test_the_store_is_that_of_the_embedded_run_and_a_second_run_searches_nothing(place):
    build(place, *WORDS, "--store", "embedded", spark=False)
    said = build(place, *WORDS, "--store", "sparked", spark=True)
    assert "6 records built" in said
    assert "bad (q.fasta" in said
    assert parts(place / "sparked") == parts(place / "embedded")
    assert len(parts(place / "sparked")) > 3
    (letters,) = (place / "sparked.results").rglob("dead_letters.jsonl")
    assert [letter["record_id"] for letter in dead_letters_file(str(letters))] == ["bad"]
    again = build(place, *WORDS, "--store", "sparked", spark=True)
    assert "no engine was started" in again
    assert "0 done, 12 reused" in again


def slow_jackhmmer(place: Path) -> dict[str, str]:
    """Environment in which jackhmmer waits before it searches, so that there is time to kill something."""
    from foldfeed.pipelines.search_tool import find_binary

    folder = place / "bin"
    folder.mkdir()
    real = find_binary("jackhmmer")
    script = folder / "jackhmmer"
    script.write_text(f'#!/bin/sh\ncase "$1" in -h) ;; *) sleep 2;; esac\nexec "{real}" "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("what", ["sdk_worker_main", "CoarseGrainedExecutorBackend"])
def test_what_is_killed_costs_time_and_nothing_else(place, what):
    """A Python worker, then a whole executor: no tool outlives it, one line says so, the next run goes on."""
    environment = slow_jackhmmer(place)
    line = command(*WORDS, "--store", "killed", spark=True)
    with subprocess.Popen(
        line, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        tool = str(place / "bin" / "jackhmmer")
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(run.stdout.read()))
        reader.start()
        deadline = time.monotonic() + 120
        while not (processes(tool) and processes(what)):
            assert run.poll() is None, said
            assert time.monotonic() < deadline, "no search began"
            time.sleep(0.1)
        os.kill(processes(what)[0], signal.SIGKILL)
        code = run.wait(timeout=200)
        reader.join(20)
    deadline = time.monotonic() + 20
    while processes(tool):
        assert time.monotonic() < deadline, "a search outlives the job"
        time.sleep(0.1)
    if code != 0:
        # Beam's runner hands the dead environment to the task's retries; then the job ends with one line.
        (problem,) = (text for text in said[0].splitlines() if text.startswith("error: "))
        assert "run the same command again to go on" in problem
        assert "Driver stacktrace" not in problem
    done = subprocess.run(
        line, cwd=place, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    build(place, *WORDS, "--store", "embedded", spark=False)
    mine, other = (FeatureStore.open(str(place / name)) for name in ("killed", "embedded"))
    assert list(mine) == list(other)
    for name in mine:
        one, two = (store[name].crop(slice(None), slice(None)) for store in (mine, other))
        assert one.msa.tobytes() == two.msa.tobytes()
        assert one.deletions.tobytes() == two.deletions.tobytes()
    results = ResultStore(str(place / "killed.results"))
    assert all(results.holds(path.stem) for path in (place / "killed.results" / "units").rglob("*.json"))
