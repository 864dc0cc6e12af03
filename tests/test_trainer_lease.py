"""One run in a folder at a time: who is refused, who takes over, what a run that lost its hold writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_trainer_cli import TINY
from waiting import wait_until
from warm_python import run_module

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer.errors import LeaseHeldError, LeaseLostError
from foldfeed.trainer.state.lease import LEASE_FILE, Lease, identity
from foldfeed.trainer.state.snapshot import BUFFERS, SnapshotFolder, checksum


def run(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m foldfeed.trainer`` in a process of its own, with its output in a folder."""
    return run_module("foldfeed.trainer", arguments, folder, **environment)


def lease_of(folder: Path, said: list[str], lease_s: float = 60.0) -> Lease:
    return Lease(folder, lease_s, said.append)


def write_lease(folder: Path, age_s: float = 0.0, **changed: object) -> Path:
    path = folder / LEASE_FILE
    path.write_text(json.dumps({"token": "other", **identity(), **changed}))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_a_second_run_is_refused_while_the_first_lives_and_not_afterwards(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = lease_of(tmp_path, said), lease_of(tmp_path, said)
    first.take()
    with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on .* renewed .* 0 s ago") as caught:
        second.take()
    assert caught.value.pid == os.getpid()
    second.release()
    first.require()
    first.release()
    assert not list(tmp_path.iterdir())
    second.take()
    second.release()
    assert said == []


def test_a_dead_process_of_this_machine_is_taken_over_at_once_with_a_line(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    said: list[str] = []
    write_lease(tmp_path, pid=dead.pid, started="1")
    lease = lease_of(tmp_path, said)
    lease.take()
    lease.release()
    assert len(said) == 1
    assert f"process {dead.pid} on" in said[0]
    assert said[0].endswith("its process is gone")


def test_a_number_that_another_process_has_by_now_is_a_dead_one(tmp_path: Path) -> None:
    said: list[str] = []
    write_lease(tmp_path, started="1")
    lease = lease_of(tmp_path, said)
    lease.take()
    lease.release()
    assert len(said) == 1


@pytest.mark.parametrize("text", [None, "", "[1]"])
def test_another_machine_is_believed_until_its_lease_is_stale(tmp_path: Path, text: str | None) -> None:
    path = write_lease(tmp_path, age_s=30, machine="another", host="far")
    if text is not None:
        path.write_text(text)
    said: list[str] = []
    lease = lease_of(tmp_path, said)
    with pytest.raises(LeaseHeldError):
        lease.take()
    os.utime(path, (time.time() - 61, time.time() - 61))
    lease.take()
    lease.release()
    assert "was not renewed for 61 s" in said[0]


@pytest.mark.parametrize(
    "changed", [{"pid": None}, {"pid": "abc"}, {"token": "../../a"}, {"token": "a\0"}, {"token": "a" * 300}]
)
def test_a_damaged_lease_becomes_stale_like_any_other(tmp_path: Path, changed: dict[str, object]) -> None:
    write_lease(tmp_path, **changed)
    with pytest.raises(LeaseHeldError, match="a run lives in this --output"):
        lease_of(tmp_path, []).take()
    write_lease(tmp_path, age_s=61, **changed)
    lease = lease_of(tmp_path, said := [])
    lease.take()
    lease.release()
    assert "it was not renewed for 61 s" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_lease_from_the_future_is_no_fresh_one(tmp_path: Path) -> None:
    """Another machine's, in a folder that was copied with its times from where a clock was wrong."""
    write_lease(tmp_path, age_s=-100_000, machine="another")
    lease = lease_of(tmp_path, [])
    lease.take()
    lease.release()


def test_a_restart_waits_for_a_holder_that_may_have_died_elsewhere(tmp_path: Path) -> None:
    write_lease(tmp_path, machine="another")
    said: list[str] = []
    lease = lease_of(tmp_path, said, lease_s=0.6)
    lease.take(wait=True)
    lease.release()
    assert len(said) == 1


def test_a_holder_keeps_its_lease_fresh(tmp_path: Path) -> None:
    """Its file grows old, and is young again before another may take the run over."""
    first = lease_of(tmp_path, [], lease_s=6.0)
    path = tmp_path / LEASE_FILE
    first.take()
    for _ in range(2):
        old = time.time() - 4.0
        os.utime(path, (old, old))
        wait_until(lambda old=old: path.stat().st_mtime > old + 2.0, 30.0)
        with pytest.raises(LeaseHeldError):
            lease_of(tmp_path, [], lease_s=6.0).take()
    first.release()


def test_of_many_that_take_a_stale_lease_over_one_wins(tmp_path: Path) -> None:
    for _ in range(20):
        write_lease(tmp_path, age_s=1000, machine="another")
        leases = [lease_of(tmp_path, []) for _ in range(6)]
        held: list[Lease] = []
        gate = threading.Barrier(len(leases), timeout=30)

        def attempt(lease: Lease, gate: threading.Barrier = gate, held: list[Lease] = held) -> None:
            gate.wait()
            try:
                lease.take()
            except LeaseHeldError:
                return
            held.append(lease)

        threads = [threading.Thread(target=attempt, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(held) == 1
        held[0].require()
        held[0].release()
        assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_lease_publishes_nothing(tmp_path: Path) -> None:
    lease = lease_of(tmp_path, [])
    lease.take()
    folder = SnapshotFolder(tmp_path / "snapshots", 2, before_write=lease.require)
    buffers = {name: torch.ones(3) for name in BUFFERS}
    sums = {name: checksum(buffer) for name, buffer in buffers.items()}
    folder.write({"step": 1}, buffers, sums)
    write_lease(tmp_path, host="far")
    with pytest.raises(LeaseLostError, match="of far"):
        folder.write({"step": 2}, buffers, sums)
    assert folder.steps() == [1]
    lease.release()
    assert (tmp_path / LEASE_FILE).exists(), "the other run's lease stays"


def test_a_folder_that_is_removed_while_its_run_lives_is_named(
    tmp_path: Path, small_store: FeatureStore
) -> None:
    """Not the ledger, which is gone as well when the run tells where its time went."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "foldfeed.trainer", "--store", small_store.url, "--output", str(output)]
    command += [*TINY, "--no-tensorboard", "--memory-snapshots", "none", "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert wait_until(lambda: (output / "snapshots" / "step-00000004").exists())
            (output / LEASE_FILE).unlink()
            (output / "goodput.jsonl").unlink()
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "run.lease is gone or damaged" in said


def test_two_trainers_in_one_output(tmp_path: Path, small_store: FeatureStore) -> None:
    """The second is refused by name; after a SIGKILL of the first it goes on at once, every step once."""
    arguments = ["--store", small_store.url, "--output", tmp_path / "run", *TINY, "--no-tensorboard"]
    endless = [*arguments, "--steps", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "foldfeed.trainer", *map(str, endless)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        while "snapshot: step" not in (line := first.stdout.readline()):
            assert line, "the first run ended"
        second = run(tmp_path, *endless)
        first.send_signal(signal.SIGKILL)
        first.stdout.read()
    assert second.returncode == 1
    assert f"process {first.pid} on" in second.stderr
    assert "another --output" in second.stderr
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    total = str(steps[-1] + 3)
    third = run(tmp_path, *arguments, "--steps", total)
    assert third.returncode == 0, third.stderr
    assert "its process is gone" in third.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, int(total) + 1))
    assert not (tmp_path / "run" / LEASE_FILE).exists()


@pytest.mark.parametrize("limit", [5, 0])
def test_a_run_that_diverged_is_no_success(tmp_path: Path, small_store: FeatureStore, limit: int) -> None:
    arguments = ["--store", small_store.url, "--output", tmp_path / "run", *TINY, "--no-tensorboard"]
    arguments += ["--lr", "1e38", "--steps", "14", "--snapshot-every", "1", "--max-skipped", str(limit)]
    done = run(tmp_path, *arguments)
    if limit == 0:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert "weights_digest" not in done.stdout
    skipped = [line for line in done.stdout.splitlines() if "skipped on all ranks" in line]
    first = int(skipped[0].split()[1])
    assert len(skipped) == limit
    assert f"5 steps in a row, from step {first} on" in done.stderr
    assert f"the last snapshot before it is {tmp_path}/run/snapshots/step-{first - 1:08d}" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_short_run_of_which_every_step_was_skipped_is_no_success(
    tmp_path: Path, small_store: FeatureStore
) -> None:
    arguments = ["--store", small_store.url, "--output", tmp_path / "run", *TINY, "--no-tensorboard"]
    broken = run(tmp_path, *arguments, "--lr", "1e38", "--steps", "2")
    # The first step is finite and makes the weights useless; from there on every step is skipped.
    done = run(tmp_path, *arguments, "--lr", "1e38", "--steps", "4", "--max-skipped", "2")
    assert broken.returncode == 0, broken.stderr
    assert done.returncode == 1
    assert "there is no snapshot before it" in done.stderr or "the last snapshot before it is" in done.stderr


def test_a_beat_that_fails_for_a_moment_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = lease_of(tmp_path, [], lease_s=3.0)
    failures: list[object] = []

    def failing(path: object) -> None:
        failures.append(path)
        raise OSError(116, "Stale file handle")

    lease.take()
    with monkeypatch.context() as broken:
        broken.setattr(os, "utime", failing)
        wait_until(lambda: bool(failures), 30.0)
    then = (tmp_path / LEASE_FILE).stat().st_mtime
    wait_until(lambda: (tmp_path / LEASE_FILE).stat().st_mtime > then, 30.0)
    lease.release()


def test_a_port_that_is_taken_is_named(tmp_path: Path, small_store: FeatureStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = run(
            tmp_path,
            "--store",
            small_store.url,
            "--output",
            tmp_path / "run",
            *TINY,
            MASTER_PORT=port,
            **ranks,
        )
    assert done.returncode == 1
    assert f"cannot meet at 127.0.0.1:{port}: the port is in use" in done.stderr
    assert "set MASTER_PORT to a free port" in done.stderr
    assert "lost its peers" not in done.stderr


def test_residues_per_second_count_residues_that_exist(tmp_path: Path, small_store: FeatureStore) -> None:
    """Records shorter than the crop are padded; padding is no throughput."""
    longest = max(small_store.table(["length"])["length"].to_pylist())
    done = run(
        tmp_path,
        *("--store", small_store.url, "--output", tmp_path / "run", *TINY, "--no-tensorboard"),
        *("--crop-residues", 2 * longest, "--steps", 2),
    )
    assert done.returncode == 0, done.stderr
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        per_sample = scalars["throughput(residues/s)"] / scalars["throughput(samples/s)"]
        assert 0 < per_sample <= longest + 1e-6
    assert "samples/s: " in done.stdout


def test_the_ranks_of_an_elastic_run_hold_one_lease_after_another(tmp_path: Path) -> None:
    first, second, other = (lease_of(tmp_path, [], lease_s=0.6) for _ in range(3))
    first.take()
    second.token = first.token
    first.let_go()
    second.hold()
    second.require()
    # The former first rank, left out, gives nothing back that is not its own any more.
    first.release()
    second.require()
    # It woke up late and signed once more: the holder signs again with its next beat.
    write_lease(tmp_path, token=second.token, pid=1)
    wait_until(lambda: json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid(), 30.0)
    other.token = "of another run"
    with pytest.raises(LeaseLostError):
        other.hold()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_left_out_may_begin_the_run_again_when_nobody_is_left(tmp_path: Path) -> None:
    """It let the lease go that it had signed; a second run in the same process is another matter."""
    said: list[str] = []
    first = lease_of(tmp_path, said)
    first.take()
    former = first.token
    first.let_go()
    with pytest.raises(LeaseHeldError):
        lease_of(tmp_path, said).take()
    write_lease(tmp_path, token=former, host="far", machine="another")
    with pytest.raises(LeaseHeldError):
        first.take()
    write_lease(tmp_path, token=former)
    first.take()
    assert first.token != former
    first.require()
    first.release()
    assert said == []
