"""A child process is owned until nothing of it is left: time limits, dead workers, chatter, cost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import alive
from waiting import wait_until

from foldfeed.pipelines.errors import CancelledError, ToolFailedError, ToolTimeoutError
from foldfeed.pipelines.programs import subprocess_runner
from foldfeed.pipelines.programs.subprocess_runner import (
    allow_all,
    cancel_all,
    launcher,
    run_program,
    running,
)

SH = "/bin/sh"


def pids_in(path: Path, count: int) -> list[int]:
    assert wait_until(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(word) for word in path.read_text().split()]


def test_exit_code_output_and_cost(tmp_path):
    done = run_program([SH, "-c", "echo out; echo err >&2; exit 7"], folder=tmp_path, timeout_s=10)
    assert (done.exit_code, done.stdout_tail, done.stderr_tail) == (7, "out", "err")
    assert 0 < done.usage.wall_s < 10


def test_memory_is_the_programs_or_its_childrens_and_not_this_processes(tmp_path):
    ballast = bytearray(200 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    small = run_program(["/bin/sleep", "0.2"], folder=tmp_path, timeout_s=10)
    assert 0 < small.usage.max_rss_bytes < 50 << 20
    code = "x = bytearray(120 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(0.4)"
    big = run_program([sys.executable, "-c", code], folder=tmp_path, timeout_s=20)
    assert 120 << 20 < big.usage.max_rss_bytes < 190 << 20
    assert big.usage.cpu_s > 0.01
    script = '"$0" -c "$1"; exit $?'
    inside = run_program([SH, "-c", script, sys.executable, code], folder=tmp_path, timeout_s=20)
    assert 120 << 20 < inside.usage.max_rss_bytes < 190 << 20


def test_a_signal_is_a_negative_exit_code(tmp_path):
    assert run_program([SH, "-c", "kill -9 $$"], folder=tmp_path, timeout_s=10).exit_code == -9


def test_a_megabyte_of_chatter_does_not_stop_the_child(tmp_path):
    code = "import sys; sys.stdout.write('o' * 2**20); sys.stderr.write('e' * 2**20)"
    done = run_program([sys.executable, "-c", code], folder=tmp_path, timeout_s=20)
    assert done.exit_code == 0
    assert len(done.stderr_tail) == subprocess_runner.TAIL_BYTES


def test_timeout_kills_the_whole_group(tmp_path):
    script = f"echo $$ > {tmp_path}/pids; sleep 100 & echo $! >> {tmp_path}/pids; wait"
    started = time.monotonic()
    with pytest.raises(ToolTimeoutError, match=r"did not end within 1\.5 s"):
        run_program([SH, "-c", script], folder=tmp_path, timeout_s=1.5)
    # The programs would sleep for 100 s.
    assert 1.5 <= time.monotonic() - started < 50
    pids = pids_in(tmp_path / "pids", 2)
    assert wait_until(lambda: not any(map(alive, pids)))


def test_children_left_behind_by_a_finished_program_are_killed(tmp_path):
    done = run_program([SH, "-c", f"sleep 100 & echo $! > {tmp_path}/pids"], folder=tmp_path, timeout_s=10)
    assert done.exit_code == 0
    (pid,) = pids_in(tmp_path / "pids", 1)
    assert wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("has_setpriv", [True, False])
def test_a_killed_worker_leaves_no_orphan(tmp_path, has_setpriv):
    code = f"""
import sys, threading
from pathlib import Path
from foldfeed.pipelines.programs import subprocess_runner as runner
if not {has_setpriv}:
    runner.shutil.which = lambda name: None
script = "echo $$ > {tmp_path}/pids; exec sleep 100"
thread = threading.Thread(target=runner.run_program, args=(["/bin/sh", "-c", script],),
                          kwargs=dict(folder=Path({str(tmp_path)!r}), timeout_s=100))
thread.start()
thread.join()
"""
    if has_setpriv and "setpriv" not in launcher()[0]:
        pytest.skip("util-linux's setpriv is not installed")
    worker = subprocess.Popen([sys.executable, "-c", code])
    try:
        (pid,) = pids_in(tmp_path / "pids", 1)
        assert alive(pid)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("way", ["waited for", "beside"])
def test_a_killed_worker_leaves_nothing_of_a_tools_group(tmp_path, way):
    """A wrapper script, its children and theirs: the parent-death signal reaches the first of them only."""
    script = f"""
echo $$ >> {tmp_path}/pids
(echo $BASHPID >> {tmp_path}/pids; sleep 100 & echo $! >> {tmp_path}/pids; wait) &
wait"""
    code = f"""
import sys, time
from pathlib import Path
from foldfeed.pipelines.programs.subprocess_runner import run_program, running
words = ["/bin/bash", "-c", {script!r}]
if sys.argv[1] == "waited for":
    run_program(words, folder=Path({str(tmp_path)!r}), timeout_s=100)
else:
    with running(words, folder=Path({str(tmp_path)!r}), name="tool"):
        time.sleep(100)
"""
    worker = subprocess.Popen([sys.executable, "-c", code, way])
    try:
        pids = pids_in(tmp_path / "pids", 3)
        assert len({os.getpgid(pid) for pid in pids}) == 1
        group = os.getpgid(pids[0])
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert wait_until(lambda: not any(map(alive, pids)))
    assert wait_until(lambda: not group_is_alive(group))


def test_a_program_beside_ends_with_its_block_whatever_happens(tmp_path):
    script = f"echo $$ >> {tmp_path}/pids; sleep 100 & echo $! >> {tmp_path}/pids; wait"
    started = []

    def broken() -> None:
        with running([SH, "-c", script], folder=tmp_path, name="tool") as tool:
            started.append((tool, pids_in(tmp_path / "pids", 2)))
            tool.check()
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    ((tool, pids),) = started
    assert wait_until(lambda: not any(map(alive, pids)))
    assert tool.usage is not None
    assert tool.usage.wall_s > 0
    with running([SH, "-c", "echo no >&2; exit 3"], folder=tmp_path, name="tool") as tool:
        assert wait_until(lambda: tool.has_ended)
        with pytest.raises(ToolFailedError, match=r"tool failed \(exit code 3\): no"):
            tool.check()
    with running([SH, "-c", "sleep 100"], folder=tmp_path, name="tool") as tool:
        cancel_all("of a test")
        try:
            with pytest.raises(CancelledError, match="tool was stopped: of a test"):
                tool.check()
            with (
                pytest.raises(CancelledError, match="late was not started"),
                running([SH, "-c", "true"], folder=tmp_path, name="late"),
            ):
                pass
        finally:
            allow_all()
    assert not alive(tool.pid)


def group_is_alive(group: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def test_a_killed_warden_is_replaced(tmp_path):
    run_program([SH, "-c", "true"], folder=tmp_path, timeout_s=10)
    warden = subprocess_runner._warden
    first = warden._pid
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: not alive(first))
    assert run_program([SH, "-c", "exit 4"], folder=tmp_path, timeout_s=10).exit_code == 4
    assert warden._pid != first
    assert alive(warden._pid)


def test_the_warden_ends_with_its_worker(tmp_path):
    code = f"""
from pathlib import Path
from foldfeed.pipelines.programs import subprocess_runner as runner
runner.run_program(["/bin/true"], folder=Path({str(tmp_path)!r}), timeout_s=10)
print(runner._warden._pid)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert wait_until(lambda: not alive(int(said)))


@pytest.mark.parametrize("how", ["parent killed", "main thread ended"])
def test_a_worker_whose_engine_is_gone_kills_its_tools_and_ends(tmp_path, how):
    worker_code = f"""
import os, sys, threading
from pathlib import Path
from foldfeed.pipelines.programs import subprocess_runner as runner
runner.follow_parent()
script = "echo $$ > {tmp_path}/pids; exec sleep 100"
thread = threading.Thread(target=runner.run_program, args=(["/bin/sh", "-c", script],),
                          kwargs=dict(folder=Path({str(tmp_path)!r}), timeout_s=100))
thread.start()
Path({str(tmp_path / "worker")!r}).write_text(str(os.getpid()))
if {how == "parent killed"}:
    thread.join()
"""
    (tmp_path / "worker.py").write_text(worker_code)
    engine_code = f"""
import subprocess, sys
subprocess.run([sys.executable, {str(tmp_path / "worker.py")!r}], stderr=subprocess.DEVNULL)
"""
    engine = subprocess.Popen([sys.executable, "-c", engine_code])
    try:
        (worker,) = pids_in(tmp_path / "worker", 1)
        if how == "parent killed":
            (tool,) = pids_in(tmp_path / "pids", 1)
            assert alive(tool)
            engine.send_signal(signal.SIGKILL)
        assert wait_until(lambda: not alive(worker))
    finally:
        engine.kill()
        engine.wait()
    if (tmp_path / "pids").exists():
        (tool,) = pids_in(tmp_path / "pids", 1)
        assert wait_until(lambda: not alive(tool))


def test_a_process_that_submits_builds_may_outlive_its_parent(monkeypatch):
    monkeypatch.setattr(subprocess_runner, "_drives_build", True)
    monkeypatch.setattr(subprocess_runner, "_parent_pid", None)
    subprocess_runner.follow_parent()
    assert not subprocess_runner._is_abandoned()


def test_cancel_kills_what_runs_and_refuses_what_comes(tmp_path):
    failures = []

    def run():
        try:
            run_program(
                [SH, "-c", f"echo $$ > {tmp_path}/pids; exec sleep 100"], folder=tmp_path, timeout_s=100
            )
        except CancelledError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        (pid,) = pids_in(tmp_path / "pids", 1)
        cancel_all()
        thread.join(timeout=10)
        assert len(failures) == 1
        assert not alive(pid)
        with pytest.raises(CancelledError, match="was not started"):
            run_program([SH, "-c", "true"], folder=tmp_path, timeout_s=10)
    finally:
        allow_all()
        thread.join()
    assert run_program([SH, "-c", "true"], folder=tmp_path, timeout_s=10).exit_code == 0


def test_many_threads_each_get_their_own_child(tmp_path):
    codes: dict[int, int] = {}

    def run(number: int):
        folder = tmp_path / str(number)
        folder.mkdir()
        codes[number] = run_program([SH, "-c", f"exit {number}"], folder=folder, timeout_s=20).exit_code

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {number: number for number in range(16)}
    assert not [name for name in os.listdir("/proc/self/fd") if "pidfd" in _link(name)]


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
