"""The boot script of Spark's workers: who ends with whom. Only Spark's executor is a stand-in."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from apache_beam.portability.api import beam_fn_api_pb2_grpc as services
from processes import alive

FOLDER = Path(__file__).parents[1] / "deploy" / "spark"
# What an executor does: it starts the boot script, here behind the runner's questions, and goes on.
EXECUTOR = """
import subprocess, sys
boot = subprocess.Popen([sys.executable, "-c", sys.argv[2], *sys.argv[3:]])
print(boot.pid, flush=True)
boot.wait()
print("boot ended", boot.returncode, flush=True)
sys.stdin.read()
"""
BOOT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import boot
url = f'url: "127.0.0.1:{sys.argv[2]}"'
names = ("CONTROL_API_SERVICE_DESCRIPTOR", "LOGGING_API_SERVICE_DESCRIPTOR")
code = boot.supervise({**os.environ, **dict.fromkeys(names, url), "PIPELINE_OPTIONS": "{}"}, os.getppid())
sys.exit(-code if code < 0 else code)
"""


def gone(*pids: int) -> bool:
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


class Idle(services.BeamFnControlServicer, services.BeamFnLoggingServicer):
    """A runner that has no task for its worker."""

    def __init__(self) -> None:
        self.connected = threading.Event()

    def Control(self, responses: Iterator, context: object) -> Iterator:
        self.connected.set()
        yield from (None for _ in responses)

    def Logging(self, entries: Iterator, context: object) -> Iterator:
        yield from (None for _ in entries if False)


class Worker:
    """A connected worker, its boot script and the process that started that."""

    def __init__(self, parent_name: str) -> None:
        runner = Idle()
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        services.add_BeamFnControlServicer_to_server(runner, self._server)
        services.add_BeamFnLoggingServicer_to_server(runner, self._server)
        port = str(self._server.add_insecure_port("127.0.0.1:0"))
        self._server.start()
        words = [sys.executable, "-c", EXECUTOR, parent_name, BOOT, str(FOLDER), port]
        pipe = subprocess.PIPE
        self.parent = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.boot = int(self.parent.stdout.readline())
        assert runner.connected.wait(120)
        self.worker = child_of(self.boot)

    def close(self) -> None:
        self.parent.kill()
        self.parent.communicate()
        assert gone(self.boot, self.worker)
        self._server.stop(None).wait()


@pytest.fixture
def under(request):
    worker = Worker(request.param)
    yield worker
    worker.close()


spark = pytest.mark.parametrize(
    "under", ["org.apache.spark.executor.CoarseGrainedExecutorBackend"], indirect=True
)


@spark
def test_a_worker_that_is_killed_ends_its_executor(under):
    os.kill(under.worker, signal.SIGKILL)
    assert under.parent.wait(20) == -signal.SIGTERM
    assert gone(under.boot)
    said = under.parent.stderr.read()
    assert "the Python worker ended with exit code -9, so this executor ends, to be replaced" in said


@spark
def test_an_executor_that_is_killed_ends_its_worker(under):
    os.kill(under.parent.pid, signal.SIGKILL)
    assert gone(under.worker, under.boot)


@spark
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_boot_script_that_is_told_to_end_takes_the_worker_and_leaves_the_executor(under, number):
    os.kill(under.boot, number)
    assert gone(under.worker, under.boot)
    assert under.parent.stdout.readline().startswith("boot ended")
    assert under.parent.poll() is None


@pytest.mark.parametrize("under", ["TaskManagerRunner"], indirect=True)
def test_a_parent_that_is_no_executor_of_spark_is_left_alone(under):
    os.kill(under.worker, signal.SIGKILL)
    assert under.parent.stdout.readline() == f"boot ended {signal.SIGKILL:d}\n"
    assert under.parent.poll() is None


def test_a_worker_that_does_not_start_leaves_the_executor_to_report_it():
    """Without the variables that Beam's worker needs it ends before it is connected."""
    code = BOOT.replace("**dict.fromkeys(names, url), ", "")
    words = [sys.executable, "-c", EXECUTOR, "CoarseGrainedExecutorBackend", code, str(FOLDER), "0"]
    done = subprocess.run(words, input="", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "boot ended 1"
