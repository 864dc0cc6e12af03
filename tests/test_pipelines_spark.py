"""Builds on a real Spark with two workers: the same store, whatever dies; `make test-spark` starts it."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import apache_beam
import pytest
from pipelines_data import ROOT, dead_letters_file, needs_hmmer
from spark_builds import (
    LONGEST_BUILD_S,
    NUM_QUERIES,
    NUM_RUNS,
    NUM_SEARCHES,
    SPARK,
    VICTIMS,
    build,
    built,
    command,
    folders_of_last_job,
    kill_one,
    make_place,
    no_process_is_left,
    parts,
    revive_workers,
    running,
    runs_of,
    searches_run,
    tool_of,
)

from foldfeed.feature_store import FeatureStore

pytestmark = [
    pytest.mark.external_tool,
    needs_hmmer,
    pytest.mark.skipif(not SPARK, reason="no Spark; `make test-spark` starts one"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A place in which the embedded engine has built; its parts are what every other run must give."""
    place = make_place(tmp_path_factory.mktemp("spark"))
    built(place, "embedded", spark=False)
    assert runs_of(place) == NUM_RUNS
    return place


@pytest.fixture
def place(origin):
    """The same place, since relative paths and the tool are part of a build, with slow searches."""
    (origin / "runs").unlink(missing_ok=True)
    (origin / "slow").touch()
    yield origin
    (origin / "slow").unlink(missing_ok=True)
    revive_workers()


def test_the_store_is_that_of_the_embedded_run_and_a_second_run_searches_nothing(origin):
    (origin / "runs").unlink()
    said = built(origin, "sparked", spark=True)
    assert f"{NUM_QUERIES} records built" in said
    assert "bad (q.fasta" in said
    assert parts(origin / "sparked") == parts(origin / "embedded")
    assert len(parts(origin / "sparked")) > 3
    assert runs_of(origin) == NUM_RUNS
    (letters,) = (origin / "sparked.results").rglob("dead_letters.jsonl")
    assert [letter["record_id"] for letter in dead_letters_file(str(letters))] == ["bad"]
    # Both Spark workers had tasks.
    finished = {
        folder.parents[1].name: (folder / "stderr").read_text().count("Finished task")
        for folder in folders_of_last_job()
    }
    assert set(finished) == {"work1", "work2"}
    assert min(finished.values()) > 3
    again = built(origin, "sparked", spark=True)
    assert "no engine was started" in again
    assert f"0 done, {NUM_SEARCHES} reused" in again
    assert runs_of(origin) == NUM_RUNS
    no_process_is_left(origin)


@pytest.mark.parametrize("victim", list(VICTIMS))
def test_what_is_killed_costs_time_and_nothing_else(place, victim):
    """SIGKILL in the middle of a search: the job ends well, only what was under way is searched again."""
    store = f"without {victim}".replace(" ", "-")
    line = command(store, spark=True)
    with running(line, place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        searches_run(place, run)
        kill_one(VICTIMS[victim])
        said = run.communicate(timeout=LONGEST_BUILD_S)[0].decode()
    assert run.returncode == 0, said
    assert f"{NUM_QUERIES} records built" in said
    assert "error" not in said
    assert parts(place / store) == parts(place / "embedded")
    # Two workers of one search each: what ran when they died is done again.
    assert NUM_RUNS <= runs_of(place) <= NUM_RUNS + 2
    no_process_is_left(place)


def test_a_stopped_build_shows_progress_ends_its_job_and_goes_on_later(place):
    """A live bar and rate from receipts; after SIGTERM nothing runs on, and the same command goes on."""
    terminal, other_end = pty.openpty()
    line = command("stopped", spark=True)
    with running(line, place, stdout=other_end, stderr=other_end) as run:
        os.close(other_end)
        # The first searches are counted while others run.
        said = read_until(terminal, rb"searching .* [1-9]\d*/\d+.* [\d.]+/min", 300)
        run.send_signal(signal.SIGTERM)
        said += read_until(terminal, rb"goes on from there", 60)
        assert run.wait(30) == 128 + signal.SIGTERM
    os.close(terminal)
    assert b"stopped by SIGTERM" in said
    assert b"may run on" not in said
    no_process_is_left(place)
    done = runs_of(place)
    assert 0 < done < NUM_RUNS
    (place / "slow").unlink()
    built(place, "stopped", spark=True)
    assert parts(place / "stopped") == parts(place / "embedded")
    assert runs_of(place) <= NUM_RUNS + 2


def read_until(terminal: int, pattern: bytes, seconds: float) -> bytes:
    """Reads what appears on a terminal until a pattern does."""
    said, end = b"", time.monotonic() + seconds
    while not re.search(pattern, said):
        left_s = end - time.monotonic()
        assert left_s > 0, said
        if select.select([terminal], [], [], left_s)[0]:
            said += os.read(terminal, 1 << 16)
    return said


def reason_of(place: Path, script: str) -> str:
    """Runs a build whose workers are started by a script and which must fail; returns its one line."""
    boot = place / "boot.sh"
    boot.write_text(f"#!/bin/sh\nset -e\n{script}\n")
    boot.chmod(0o755)
    done = build(place, "failed", spark=True, boot=boot)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.endswith("finished searches are kept, run the same command again to go on.")
    assert not FeatureStore.open(str(place / "failed")).ids
    return line


@pytest.mark.slow
def test_a_worker_without_foldfeed_is_a_failed_run_that_says_so(place):
    """A Python that has Beam and all else, but not foldfeed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "bare")], check=True)
    (packages,) = (place / "bare").glob("lib/python*/site-packages")
    for entry in Path(apache_beam.__file__).parents[1].iterdir():
        if "foldfeed" not in entry.name and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    boot = ROOT / "deploy" / "spark" / "boot.py"
    line = reason_of(place, f'unset PYTHONPATH\nexec {place}/bare/bin/python {boot} "$@"')
    assert "the Python that boot.py starts on a worker has no foldfeed" in line


in_a_namespace = pytest.mark.skipif(
    os.geteuid() != 0
    or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="mounting for one process needs root",
)


@pytest.mark.slow
@in_a_namespace
def test_a_worker_without_the_tool_is_named_with_step_and_host(place):
    hide = f"mount --bind /dev/null {tool_of(place)}"
    line = reason_of(place, f"""exec unshare -m sh -c '{hide}; exec "$0" "$@"' {SPARK}/boot.sh "$@\"""")
    assert "in step 'SearchAll/ScanShards'" in line
    assert f"{tool_of(place)} is not on this worker ({socket.gethostname()})" in line
    assert runs_of(place) == 0


@pytest.mark.slow
@in_a_namespace
def test_a_full_work_disk_on_a_worker_names_step_record_and_place(place):
    small = "mount -t tmpfs -o size=16k tmpfs /mnt; TMPDIR=/mnt"
    line = reason_of(place, f"""exec unshare -m sh -c '{small} exec "$0" "$@"' {SPARK}/boot.sh "$@\"""")
    assert re.search(
        r"in step 'SearchAll/ScanShards': record '[^']+', search in 'mgnify': no space left", line
    )
    assert "/mnt/foldfeed-jackhmmer" in line
