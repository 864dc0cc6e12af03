"""The launcher of an elastic run: what it refuses, and what becomes of its processes when it is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_trainer_cli import TINY
from waiting import wait_until

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import elastic
from foldfeed.trainer.processes import STATE, stat_of

PARENT = 1


def lives(pid: int) -> bool:
    return stat_of(pid)[STATE : STATE + 1] not in ([], ["Z"])


def children_of(pid: int) -> list[int]:
    """Returns the processes that another one has started, the oldest first."""
    numbers = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [number for number in numbers if stat_of(number)[PARENT : PARENT + 1] == [str(pid)]]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextlib.contextmanager
def launched(*options: str, store: FeatureStore, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a launcher in a session of its own, all processes of which end with the test."""
    command = [sys.executable, "-m", "foldfeed.trainer.elastic", *options, "--"]
    command += ["--store", store.url, "--output", str(output), *TINY, "--no-tensorboard", "--steps", "100000"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_launcher_that_is_killed_leaves_ranks_that_train_and_no_spare(
    tmp_path: Path, small_store: FeatureStore
) -> None:
    """A spare that only the launcher could wake would stay for good."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    with launched("--spares", "1", "--respawn", "1", store=small_store, output=tmp_path / "run") as launcher:
        assert wait_until(lambda: lines_of(metrics) > 2)
        rank, spare = children_of(launcher.pid)
        launcher.kill()
        launcher.wait()
        assert wait_until(lambda: not lives(spare))
        before = lines_of(metrics)
        assert wait_until(lambda: lines_of(metrics) > before + 2)
        os.kill(rank, signal.SIGTERM)
        assert wait_until(lambda: not lives(rank))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ranks", "0", "--wait-for", "2"], "'--ranks': 0 is not in the range x>=1"),
        (["--spares", "-1"], "'--spares': -1 is not in the range x>=0"),
        (["--respawn", "-1"], "'--respawn': -1 is not in the range x>=0"),
        (["--wait-for", "-1"], "'--wait-for': -1 is not in the range x>=0"),
    ],
)
def test_numbers_of_processes_that_cannot_be_are_refused(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert elastic.main([*options, "--", "--store", "s", "--output", "o"]) == 2
    assert text in capsys.readouterr().err
