"""The goodput ledger: parts sum to the wall time, over kills, stops and restarts; torn lines; the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from elastic_ranks import ledger_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_cli import TINY

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import goodput
from foldfeed.trainer.config import DataConfig, RunConfig
from foldfeed.trainer.errors import TrainerError
from foldfeed.trainer.goodput import GOODPUT_FILE, Ledger, Part, account
from foldfeed.trainer.training.metrics import Metrics


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@given(
    attempts=st.lists(
        st.tuples(
            st.integers(1, 6),
            st.integers(0, 6),
            st.sampled_from(["killed", "failed", "stopped"]),
            st.floats(0, 50),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_parts_sum_to_the_wall_time_and_every_kept_step_counts_once(attempts: list[tuple[Any, ...]]) -> None:
    """Any number of starts, each going back to some step, doing a few, and ending in some way."""
    entries: list[dict[str, Any]] = []
    clock, done = 100.0, 0
    for num_steps, back, end, gap_s in attempts:
        clock += gap_s if entries else 0.0
        began, step = clock, max(0, done - back)
        clock += 3.0
        entries.append(
            {"event": "start", "began": began, "time": clock, "step": step, "parts": {"idle": 3.0}}
        )
        for number in range(step + 1, step + num_steps + 1):
            clock += 1.0
            entries.append({"event": "step", "step": number, "time": clock, "parts": {Part.PRODUCTIVE: 1.0}})
        done = step + num_steps
        if end != "killed":
            clock += 0.5
            entries.append({"event": "end", "reason": end, "time": clock, "parts": {"other": 0.5}})
    found = goodput._sum_up(entries)
    assert sum(found.parts.values()) == pytest.approx(found.wall_s)
    assert found.wall_s == pytest.approx(clock - 100.0)
    assert found.parts[Part.PRODUCTIVE] == pytest.approx(done), "one second per step that the weights keep"
    assert all(seconds >= -1e-9 for seconds in found.parts.values())
    assert found.starts == len(attempts)


def test_a_torn_line_is_cut_and_a_second_run_of_one_process_counts_no_second_twice(tmp_path: Path) -> None:
    first = time.time() - 5
    for start in range(3):
        ledger = Ledger(tmp_path, active=True, began=time.time() - 5)
        ledger.mark(Part.STARTUP)
        ledger.start(step=start, world=1)
        time.sleep(0.05)
        ledger.mark(Part.PRODUCTIVE)
        ledger.step(start + 1)
        with (tmp_path / GOODPUT_FILE).open("ab") as file:
            file.write(b'{"event": "st')
        if start == 2:
            ledger.end("finished")
        else:
            ledger._file.close()  # as a kill would
    found = account(tmp_path / GOODPUT_FILE)
    assert sum(found.parts.values()) == pytest.approx(found.wall_s, abs=1e-6)
    assert 5.15 <= found.wall_s <= time.time() - first
    assert found.starts == 3


def test_the_time_until_a_failure_is_noticed_belongs_to_the_failure(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, active=True)
    ledger.start(step=0, world=2)
    ledger.mark(Part.PRODUCTIVE)
    time.sleep(0.3)
    found = ledger.end("failed")
    assert found is not None
    assert found.parts[Part.RECOVERY] >= 0.29
    assert found.parts[Part.RECOVERY] + found.parts[Part.STARTUP] == pytest.approx(found.wall_s, abs=0.01)


def test_a_damaged_ledger_and_none_at_all_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert goodput.main([str(tmp_path)]) == 1
    assert "give the --output of a run" in capsys.readouterr().err
    (tmp_path / GOODPUT_FILE).write_text("[]\n")
    with pytest.raises(TrainerError, match="line 1 is damaged"):
        account(tmp_path / GOODPUT_FILE)
    assert goodput.main([]) == 2


START = {"event": "start", "time": 2.0, "began": 1.0, "step": 0, "world": 1, "parts": {"other": 1.0}}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"time": "2.0"}, "'2.0' is no number"),
        ({"parts": {"other": "1.0"}}, "'1.0' is no number"),
        ({"parts": {"othes": 1.0}}, "othes is no part"),
        ({"parts": [1.0]}, "no attribute"),
        ({"step": None}, "None is no number"),
        ({"event": "step", "began": None}, "None is no number"),
        ({"event": "end"}, "'reason'"),
    ],
)
def test_a_damaged_line_is_refused_before_a_step_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: dict[str, Any], why: str
) -> None:
    """Not with a traceback, and not by the account at the end of the run."""
    (tmp_path / GOODPUT_FILE).write_text(json.dumps(START | damage) + "\n")
    with pytest.raises(TrainerError, match=f"line 1 is damaged .*{why}.* Move the file away"):
        Ledger(tmp_path, active=True).start(0, 1)
    assert goodput.main([str(tmp_path)]) == 1
    assert "line 1 is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_run_accounts_for_the_time_it_lost(tmp_path: Path, small_store: FeatureStore) -> None:
    """SIGKILL in the middle, a pause, and the end: against a stopwatch outside of the processes."""
    output = tmp_path / "run"
    arguments = ["--store", small_store.url, "--output", str(output), *TINY, "--no-tensorboard"]
    arguments += ["--memory-snapshots", "none", "--snapshot-every", "3"]
    command = [sys.executable, "-m", "foldfeed.trainer", *arguments]
    began = time.time()
    with subprocess.Popen(
        [*command, "--steps", "100000"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as first:
        assert first.stdout is not None
        # Snapshots after 3, 6, ...: the kill after the line of step 5 or 8 costs two steps or so.
        for line in first.stdout:
            if line.startswith("step:") and int(line.split()[1]) == 8:
                break
        first.send_signal(signal.SIGKILL)
    killed = time.time()
    time.sleep(2.0)
    before = lines_of(output / GOODPUT_FILE)
    restarted = time.time()
    last = max(entry["step"] for entry in before if entry["event"] == "step")
    said = []
    with subprocess.Popen([*command, "--steps", str(last + 2)], stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout is not None
        for line in second.stdout:
            if line.startswith("goodput: "):
                ended = time.time()  # from here on the interpreter only ends, which takes seconds at times
            said.append(line)
    assert second.returncode == 0
    out = "".join(said)
    resumed = int(out.partition("resumed: step ")[2].split()[0])
    found = account(output / GOODPUT_FILE)
    assert sum(found.parts.values()) == pytest.approx(found.wall_s, rel=0.005)
    # A process's start is known to a hundredth of a second; the print takes its turn on a busy machine.
    assert found.wall_s == pytest.approx(ended - began, rel=0.005, abs=0.3)
    lost = [entry for entry in before if entry["event"] == "step" and entry["step"] > resumed]
    assert found.parts[Part.WASTED] == pytest.approx(sum(sum(entry["parts"].values()) for entry in lost))
    assert len(lost) == last - resumed
    gap = restarted - before[-1]["time"]
    assert gap >= 2.0 + killed - before[-1]["time"] - 0.5
    assert found.parts[Part.RECOVERY] == pytest.approx(gap, abs=1.0)
    assert (found.starts, found.failures) == (2, 1)
    kept = [entry for entry in lines_of(output / GOODPUT_FILE) if entry["event"] == "step"]
    assert len(kept) == last + 2 + len(lost)
    # Printed at the end, and offline from the file.
    assert f"goodput: {100 * found.goodput:.1f} % of {found.wall_s:.1f} s (started 2 times" in out
    assert Part.WASTED in out or found.parts[Part.WASTED] < 0.05
    assert set(found.parts) == set(Part)


def test_sigterm_prints_the_ledger(tmp_path: Path, small_store: FeatureStore) -> None:
    arguments = ["--store", small_store.url, "--output", str(tmp_path / "run"), *TINY, "--no-tensorboard"]
    command = [sys.executable, "-m", "foldfeed.trainer", *arguments, "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step:"):
                break
        first.send_signal(signal.SIGTERM)
        said = first.stdout.read()
    assert first.returncode == 0
    assert "goodput: " in said
    assert lines_of(tmp_path / "run" / GOODPUT_FILE)[-1]["reason"] == "stopped"


def test_the_ledger_changes_hands_while_the_run_goes_on(tmp_path: Path) -> None:
    """A first rank is stopped, another one goes on with the file, and the first one wakes up and writes."""
    began = time.time()
    one, two = Ledger(tmp_path, active=True, began=began), Ledger(tmp_path, active=False, began=began)
    one.start(step=0, world=2)
    two.regroup(False, step=0, world=2, generation=1)
    for step in (1, 2):
        time.sleep(0.05)
        for ledger in (one, two):
            ledger.mark(Part.PRODUCTIVE)
            ledger.step(step)
    one._file.write(b'{"event": "st')  # stopped amid a line
    one._file.flush()
    time.sleep(0.1)
    two.mark(Part.WASTED)
    two.move(Part.WASTED, Part.DETECTION, 0.08)
    two.regroup(True, step=2, world=1, generation=2)
    one.step(3)
    time.sleep(0.05)
    two.mark(Part.PRODUCTIVE)
    two.step(3)
    found = two.end("finished")
    assert found is not None
    assert sum(found.parts.values()) == pytest.approx(found.wall_s, abs=1e-6)
    assert (found.starts, found.failures, found.regroups) == (1, 0, 1)
    assert found.parts[Part.DETECTION] == pytest.approx(0.08)
    assert found.parts[Part.PRODUCTIVE] >= 0.15
    assert [entry.get("step") for entry in lines_of(tmp_path / GOODPUT_FILE)] == [0, 1, 2, 2, 3, None]
    assert "1 changes of ranks" in found.lines()[0]
    one._file.close()


@settings(max_examples=50, deadline=None)
@given(
    ops=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["mark", "move", "step", "step", "lead", "lead", "begin", "left out"]),
            st.floats(0, 9),
        ),
        max_size=40,
    ),
    ahead_s=st.tuples(*[st.sampled_from([0.0, -0.3, 7.0])] * 3),
)
def test_parts_sum_to_the_wall_time_whoever_writes_and_whatever_its_clock_says(
    ops: list[tuple[int, str, float]], ahead_s: tuple[float, ...]
) -> None:
    """Three ranks that lead by turns, begin the run again, or wake up late and write on."""
    seconds = [100.0]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(time, "monotonic", lambda: seconds[0])
        ledgers = []
        for offset in ahead_s:
            patch.setattr(time, "time", lambda offset=offset: seconds[0] + 1e6 + offset)
            ledgers.append(Ledger(Path(folder), active=not ledgers))
            seconds[0] += 1.0
        try:
            follow_many_hands(ledgers, ops, seconds)
        finally:
            for ledger in ledgers:
                ledger.follow()


def follow_many_hands(ledgers: list[Ledger], ops: list[tuple[int, str, float]], seconds: list[float]) -> None:
    ledgers[0].mark(Part.STARTUP)
    ledgers[0].start(step=0, world=3)
    for rank, what, elapsed in [*ops, (1, "lead", 0.0)]:
        seconds[0] += elapsed
        ledger = ledgers[rank]
        if what == "mark":
            ledger.mark(Part.DATA)
        elif what == "move":
            ledger.move(Part.DATA, Part.SAVE, elapsed / 2)
        elif what == "left out":
            ledger.follow()
        else:
            ledger.mark(Part.PRODUCTIVE)
            if what == "step":
                ledger.step(1)
            elif what == "begin":
                ledger.start(step=0, world=3)
            else:
                # Who was first before may be stopped and know nothing of it.
                ledger.regroup(True, step=1, world=1, generation=2)
            lines = lines_of(ledger.path)
            assert ledger_error(lines) * account(ledger.path).wall_s < 1e-3
            times = [time for line in lines for time in (line.get("began", line["time"]), line["time"])]
            assert times == sorted(times)
    found = ledgers[1].end("finished")
    assert found is not None
    assert sum(found.parts.values()) == pytest.approx(found.wall_s, abs=1e-3)


def test_metrics_change_hands_and_hold_every_step_once(tmp_path: Path) -> None:
    scalars = dict.fromkeys(("loss_metrics/global_avg_loss", "grad_norm", "lr", "train/skipped"), 1.0)
    scalars |= dict.fromkeys(("throughput(samples/s)", "throughput(residues/s)"), 1.0)
    scalars |= dict.fromkeys(("time_metrics/data_loading(%)", "comm/exposed_ms"), 1.0)
    config = RunConfig(output=str(tmp_path), data=DataConfig(store="s"), tensorboard=False, log_every=9)
    one, two = (Metrics(config, active=first) for first in (True, False))
    one.start(0)
    for step in (1, 2):
        one.log(step, scalars)
    for step in (1, 2, 3):
        two.log(step, {**scalars, "grad_norm": float("nan")})
    one._file.write('{"step": 3, ')  # it was stopped amid the line of the step that both completed
    one._file.flush()
    two.lead(3, two.last)
    one.log(3, scalars)
    two.log(4, scalars)
    two.follow()
    two.log(5, scalars)
    found = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[2]["grad_norm"] is None
    one.close()
