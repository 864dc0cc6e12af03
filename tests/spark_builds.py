"""Builds on the Spark that `make test-spark` started, and what else its tests need."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines_data import GLOBINS, ROOT, globins, tree_bytes, write_fasta

from foldfeed.pipelines.tools.search_tool import find_binary

SPARK = os.environ.get("FOLDFEED_SPARK", "")
NUM_QUERIES = 3
# On a machine with twenty times as much to do as it has cores, a build took two minutes.
LONGEST_BUILD_S = 400
WORDS = ("--queries", "q.fasta", "--database", "uniref90=u.fasta", "--database", "mgnify=m@3", "--parts", "3")
# A search of every query in each database, and in each of three shards.
NUM_SEARCHES = 2 * NUM_QUERIES
NUM_RUNS = 5 * NUM_QUERIES

# Processes by a piece of their command line, words apart by a zero byte.
VICTIMS = {
    "Python worker": b"/boot.py\0sdk_worker",
    "executor": b"CoarseGrainedExecutorBackend",
    "Spark worker": b"org.apache.spark.deploy.worker.Worker",
}
OF_A_JOB = (b"/boot.py\0", VICTIMS["executor"])


def options(boot: Path | None = None) -> list[str]:
    """Words that send a build to this Spark; with another boot script where one is given."""
    script = json.dumps({"command": str(boot or Path(SPARK) / "boot.sh")})
    words = ["--runner", "PortableRunner", "--", "--job_endpoint=127.0.0.1:8099"]
    words += ["--environment_type=PROCESS", f"--environment_config={script}"]
    words += ["--sdk_worker_parallelism=1", "--environment_cache_millis=3600000"]
    return [*words, f"--files_to_stage={SPARK}/boot.sh"]


def command(store: str, *, spark: bool, boot: Path | None = None) -> list[str]:
    """The command line of a build."""
    line = [sys.executable, "-m", "foldfeed.feature_store.cli.main", "build", *WORDS, "--store", store]
    return [*line, *(options(boot) if spark else ())]


def build(place: Path, store: str, *, spark: bool, boot: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a build to its end."""
    return subprocess.run(
        command(store, spark=spark, boot=boot),
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=LONGEST_BUILD_S,
        check=False,
    )


def built(place: Path, store: str, *, spark: bool) -> str:
    """Runs a build that must succeed; returns what it said."""
    done = build(place, store, spark=spark)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def parts(store: Path) -> dict[str, bytes]:
    """The files of a store's parts."""
    return tree_bytes(store / "parts")


def make_place(folder: Path) -> Path:
    """Queries, one of them bad, a database in one file and one in three; a jackhmmer that notes its runs.

    It waits a second before each while the file ``slow`` is there, so that there is time to kill something.
    """
    write_fasta(folder / "q.fasta", {**globins(NUM_QUERIES), "bad": "AC7"})
    entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
    (folder / "u.fasta").write_text("".join(entries))
    for number in range(3):
        (folder / f"m-0000{number}-of-00003").write_text("".join(entries[number::3]))
    script = f"""#!/bin/sh
case "$1" in -h) exec "{find_binary("jackhmmer")}" "$@";; esac
echo run >> {folder}/runs
if [ -e {folder}/slow ]; then sleep 1; fi
exec "{find_binary("jackhmmer")}" "$@"
"""
    tool_of(folder).parent.mkdir()
    tool_of(folder).write_text(script)
    tool_of(folder).chmod(0o755)
    return folder


def tool_of(place: Path) -> Path:
    """The jackhmmer of a place."""
    return place / "bin" / "jackhmmer"


def runs_of(place: Path) -> int:
    """How often it ran."""
    notes = place / "runs"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def environment(place: Path) -> dict[str, str]:
    """Variables with which a build finds the jackhmmer of a place."""
    return {**os.environ, "PATH": f"{tool_of(place).parent}{os.pathsep}{os.environ['PATH']}"}


def processes(*pieces: bytes) -> list[int]:
    """Ids of processes of this Spark, or started by them, with one of the pieces in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # Children inherit SPARK_HOME, so others' processes are never among them.
            is_ours = SPARK.encode() in (folder / "environ").read_bytes()
            line = (folder / "cmdline").read_bytes() if is_ours else b""
        except OSError:
            continue
        if any(piece in line for piece in pieces):
            found.append(int(folder.name))
    return found


def until(what: str, condition: Callable[[], object], seconds: float = 250.0) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def running(line: list[str], place: Path, **streams: int) -> Iterator[subprocess.Popen]:
    """A build in the background, which does not outlive the block."""
    with subprocess.Popen(line, cwd=place, env=environment(place), **streams) as run:
        try:
            yield run
        finally:
            run.terminate()


def searches_run(place: Path, run: subprocess.Popen) -> None:
    """Waits until searches run on Spark."""

    def begun() -> bool:
        assert run.poll() is None, run.returncode
        return bool(processes(bytes(tool_of(place)))) and bool(processes(VICTIMS["Python worker"]))

    until("a search on Spark", begun)


def no_process_is_left(place: Path) -> None:
    """Waits until nothing of a job is left: no tool, no Python worker, no executor."""
    until("the end of every process of the job", lambda: not processes(bytes(tool_of(place)), *OF_A_JOB), 40)


def kill_one(piece: bytes) -> None:
    """SIGKILL for the first process with a piece in its command line."""
    os.kill(min(processes(piece)), signal.SIGKILL)


def num_alive_workers() -> int:
    """Spark workers that the master counts."""
    with urllib.request.urlopen("http://127.0.0.1:8080/json/", timeout=10) as answer:
        return sum(worker["state"] == "ALIVE" for worker in json.load(answer)["workers"])


def revive_workers() -> None:
    """Starts the Spark workers that were killed."""
    for number in (1, 2):
        port = f"--webui-port\0808{number}\0".encode()
        if not [pid for pid in processes(port) if pid in processes(VICTIMS["Spark worker"])]:
            script = ROOT / "deploy" / "spark" / "local_cluster.sh"
            subprocess.run(["bash", str(script), "worker", SPARK, str(number)], check=True)
    until("two Spark workers", lambda: num_alive_workers() == 2, 60)


def folders_of_last_job() -> list[Path]:
    """What the executors of the newest job left, one folder each: ``work1/app-.../0``."""
    jobs = sorted({path.name for path in Path(SPARK).glob("work[12]/app-*")})
    return sorted(Path(SPARK).glob(f"work[12]/{jobs[-1]}/*"))
