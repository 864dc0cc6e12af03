"""Around an elastic run: what its launcher refuses, what outlives it, and who comes late."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from processes import alive, children_of
from test_trainer_cli import TINY
from trainer_ranks import tiny_config
from waiting import wait_until

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import elastic
from foldfeed.trainer.errors import TrainerError
from foldfeed.trainer.training.process import RESULT_FILE, has_finished

# They are killed, and would leave their snapshots in memory.
ENDLESS = [*TINY, "--no-tensorboard", "--memory-snapshots", "none", "--steps", "100000"]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextlib.contextmanager
def launched(
    *options: str, store: FeatureStore, output: Path, said: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a launcher, all processes of which end with the test."""
    arguments = ["foldfeed.trainer.elastic", *options, "--", "--store", store.url, "--output", str(output)]
    with running([*arguments, *ENDLESS], said) as process:
        yield process


@contextlib.contextmanager
def running(
    module: Sequence[str], said: Path | None, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a module in a session of its own, all processes of which end with the test."""
    command = [sys.executable, "-m", *module]
    with (
        open(said or os.devnull, "wb") as log,
        subprocess.Popen(command, start_new_session=True, stdout=stdout, stderr=log) as process,
    ):
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
        assert wait_until(lambda: not alive(spare))
        before = lines_of(metrics)
        assert wait_until(lambda: lines_of(metrics) > before + 2)
        os.kill(rank, signal.SIGTERM)
        assert wait_until(lambda: not alive(rank))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_launcher_says_why_it_ends_when_a_rank_was_killed_that_none_replaces(
    tmp_path: Path, small_store: FeatureStore
) -> None:
    output, said = tmp_path / "run", tmp_path / "said"
    with launched(store=small_store, output=output, said=said) as launcher:
        assert wait_until(lambda: lines_of(output / "metrics.jsonl") > 2)
        os.kill(*children_of(launcher.pid), signal.SIGKILL)
        assert launcher.wait(30) == 1
    assert "rank in slot 0 died of SIGKILL" in said.read_text()
    assert "were killed, and none is replaced (any more); the same command goes on" in said.read_text()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_more_ranks_than_the_run_takes_may_join_and_wait(tmp_path: Path, small_store: FeatureStore) -> None:
    """Three come to one, and the run takes one of them: another one is there when that is killed."""
    output = tmp_path / "run"
    most = ("--max-ranks", "2")
    with (
        launched(*most, store=small_store, output=output) as first,
        launched(*most, "--join", "--ranks", "3", store=small_store, output=output) as second,
    ):
        assert wait_until(lambda: len(members_of(output)) == 2)
        (joined,) = set(members_of(output)) & set(children_of(second.pid))
        os.kill(joined, signal.SIGKILL)
        assert wait_until(lambda: len(set(members_of(output)) - {joined}) == 2)
        assert first.poll() is None
        assert second.poll() is None


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "module", [("foldfeed.trainer",), ("foldfeed.trainer.elastic", "--ranks", "2", "--")]
)
def test_a_run_outlives_who_reads_its_output(
    tmp_path: Path, small_store: FeatureStore, module: tuple[str, ...]
) -> None:
    """As after Ctrl-C in a pipeline, whose `tee` is gone when the snapshot of the stop is written."""
    metrics, said = tmp_path / "run" / "metrics.jsonl", tmp_path / "said"
    arguments = [*module, "--store", small_store.url, "--output", str(tmp_path / "run"), *ENDLESS]
    arguments += ["--snapshot-every", "100000", "--log-every", "1"]
    with running(arguments, said, stdout=subprocess.PIPE) as process:
        assert wait_until(lambda: lines_of(metrics) > 2)
        assert process.stdout is not None
        process.stdout.close()
        before = lines_of(metrics)
        assert wait_until(lambda: lines_of(metrics) > before + 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, said.read_text()
    assert len(list(tmp_path.glob("run/snapshots/step-*"))) == 1
    assert "nobody reads what this process prints any more; it goes on" in said.read_text()


def members_of(output: Path) -> list[int]:
    """Returns the process numbers of the newest generation; none before the first."""
    views = sorted(output.glob("elastic/*/generation-*.json"))
    return [one["identity"]["pid"] for one in json.loads(views[-1].read_text())["members"]] if views else []


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_only_rank_of_a_machine_is_replaced_while_those_of_others_go_on(
    tmp_path: Path, small_store: FeatureStore
) -> None:
    """Of the launcher that began the run, and of one that joined it."""
    output = tmp_path / "run"
    with (
        launched("--respawn", "2", store=small_store, output=output) as first,
        launched("--respawn", "2", "--join", store=small_store, output=output) as second,
    ):
        assert wait_until(lambda: len(members_of(output)) == 2)
        for launcher in (first, second):
            (rank,) = children_of(launcher.pid)
            os.kill(rank, signal.SIGKILL)
            assert wait_until(lambda rank=rank: len(set(members_of(output)) - {rank}) == 2)
            assert first.poll() is None
            assert second.poll() is None
        starts = [json.loads(line) for line in (output / "goodput.jsonl").read_text().splitlines()]
        assert [line["event"] for line in starts].count("start") == 1


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": "many"}', '{"steps": null}'])
def test_a_damaged_result_is_named_to_a_rank_that_comes_late(tmp_path: Path, text: str) -> None:
    config = tiny_config(tmp_path)
    assert not has_finished(tmp_path, config)
    (tmp_path / RESULT_FILE).write_text(text)
    with pytest.raises(
        TrainerError, match=r"result\.json is damaged .* a start without --join writes it anew"
    ):
        has_finished(tmp_path, config)
