"""Starts Beam's Python worker on a Spark executor, as /opt/apache/beam/boot does in Beam's container images.

Spark starts it through a two-line script that names the Python of an environment with foldfeed in it
(environment type PROCESS), once for each worker. It asks the runner for the options of the job, fetches
staged files, starts the worker with the environment variables that it expects, and stays as its parent:

- A worker that is killed takes its executor with it. Beam's runner keeps the connection to a worker for all
  tasks of an executor and never asks whether it is alive, so every later task there would fail within
  milliseconds, and four of those end the job. Spark replaces a lost executor and runs its tasks again.
- An executor that is killed takes the worker with it, and the worker its searches.

Source: Beam's container contract (sdks/python/container/boot.go) and its protocols.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
from apache_beam.portability.api import (
    beam_artifact_api_pb2 as artifacts,
)
from apache_beam.portability.api import (
    beam_artifact_api_pb2_grpc as artifacts_grpc,
)
from apache_beam.portability.api import (
    beam_provision_api_pb2 as provision,
)
from apache_beam.portability.api import (
    beam_provision_api_pb2_grpc as provision_grpc,
)
from apache_beam.portability.api import (
    beam_runner_api_pb2 as runner,
)
from apache_beam.portability.api import (
    endpoints_pb2,
)
from google.protobuf import json_format, text_format

ANSWER_S = 60
FETCH_S = 600
# Between two looks whether the executor is still there; the end of the worker itself is seen at once.
LOOK_S = 0.5
# An executor that is told to end gets so long for its own tidying.
TIDY_S = 10
# Exit codes that `foldfeed.pipelines.beam.errors` knows, too.
NO_FOLDFEED = 81
OTHER_FOLDFEED = 82
PR_SET_PDEATHSIG = 1
# What the command line of a Spark executor holds, on a cluster of Spark's own, on YARN and on Kubernetes.
EXECUTOR = b"ExecutorBackend"
# First word of the command line of the worker itself, and what it reports when it is about to connect.
WORKER = "sdk_worker"
CONNECTED = b"1"


class _WithWorkerId(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Tells the runner in every call which worker asks."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def intercept_unary_unary(self, call: Callable[..., Any], details: Any, request: Any) -> Any:
        """Adds the id to a call with one answer."""
        return call(self._with_id(details), request)

    def intercept_unary_stream(self, call: Callable[..., Any], details: Any, request: Any) -> Any:
        """Adds the id to a call with many answers."""
        return call(self._with_id(details), request)

    def _with_id(self, details: Any) -> grpc.ClientCallDetails:
        changed = grpc.ClientCallDetails()
        changed.method, changed.timeout = details.method, details.timeout
        changed.credentials, changed.wait_for_ready, changed.compression = details.credentials, True, None
        changed.metadata = [*(details.metadata or ()), ("worker_id", self._worker_id)]
        return changed


def main() -> int:
    """Prepares a worker, starts it and waits for its end; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("id", "logging_endpoint", "artifact_endpoint", "provision_endpoint", "control_endpoint"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--semi_persist_dir", default="semi")
    arguments, _ = parser.parse_known_args()
    executor = os.getppid()
    # Beam's runner waits for ever for a worker that cannot load the steps of a job. What a process prints
    # here is thrown away, its exit code is in the runner's message.
    if importlib.util.find_spec("foldfeed") is None:
        return NO_FOLDFEED
    variables = prepared(arguments)
    if not is_planned_version(json.loads(variables["PIPELINE_OPTIONS"])):
        return OTHER_FOLDFEED
    return supervise(variables, executor)


def is_planned_version(options: dict[str, Any]) -> bool:
    """Returns whether the foldfeed here is the version that submitted the job, where the job says it."""
    for word in options.get("beam:option:experiments:v1") or ():
        name, _, version = word.partition("=")
        if name == "foldfeed_version":
            return version == importlib.metadata.version("foldfeed")
    return True


def prepared(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of the worker; what the job staged lies in its folder then."""

    def channel(url: str) -> grpc.Channel:
        return grpc.intercept_channel(grpc.insecure_channel(url), _WithWorkerId(arguments.id))

    info = (
        provision_grpc.ProvisionServiceStub(channel(arguments.provision_endpoint))
        .GetProvisionInfo(provision.GetProvisionInfoRequest(), timeout=ANSWER_S)
        .info
    )
    variables = dict(os.environ)
    variables["WORKER_ID"] = arguments.id
    variables["PIPELINE_OPTIONS"] = json_format.MessageToJson(info.pipeline_options)
    variables["SEMI_PERSISTENT_DIRECTORY"] = arguments.semi_persist_dir
    for name in ("control", "logging"):
        url = getattr(arguments, f"{name}_endpoint") or getattr(info, f"{name}_endpoint").url
        variables[f"{name.upper()}_API_SERVICE_DESCRIPTOR"] = text_format.MessageToString(
            endpoints_pb2.ApiServiceDescriptor(url=url)
        )
    if info.HasField("status_endpoint"):
        variables["STATUS_API_SERVICE_DESCRIPTOR"] = text_format.MessageToString(info.status_endpoint)
    variables["RUNNER_CAPABILITIES"] = " ".join(info.runner_capabilities)
    url = arguments.artifact_endpoint or info.artifact_endpoint.url
    if info.dependencies and url:
        fetch_staged(channel(url), info.dependencies, Path(arguments.semi_persist_dir) / "staged")
    return variables


def supervise(variables: dict[str, str], executor: int) -> int:
    """Runs the worker to its end and returns its exit code, or minus the number of a signal.

    Args:
      variables: its environment.
      executor: the process that started this one. It ends with a worker that ended by itself while it was
        connected; a worker that never came so far is a failed start, which Beam's runner sees and reports.
    """
    reading, writing = os.pipe()
    # Nobody reads the pipe that the runner gives for standard output; a full one would stop the worker.
    worker = subprocess.Popen(
        [sys.executable, __file__, WORKER, str(os.getpid()), str(writing)],
        env=variables,
        stdout=subprocess.DEVNULL,
        pass_fds=(writing,),
    )
    # Told to stop, by the runner or with the executor: not the worker's fault.
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        worker.kill()

    signal.signal(signal.SIGTERM, stop)
    os.close(writing)
    handle = os.pidfd_open(worker.pid)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    while not poller.poll(LOOK_S * 1000):
        if os.getppid() != executor:
            worker.kill()
    code = worker.wait()
    was_connected = os.read(reading, 1) == CONNECTED
    if code != 0 and was_connected and not told and os.getppid() == executor:
        end_executor(executor, f"the Python worker ended with exit code {code}")
    return code


def end_executor(executor: int, why: str) -> None:
    """Ends a Spark executor, whose Spark replaces it; any other kind of parent is left alone."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        if EXECUTOR not in Path(f"/proc/{executor}/cmdline").read_bytes():
            return
        # Into the executor's log, which Spark's pages show; what this process prints is thrown away.
        log = os.open(f"/proc/{executor}/fd/2", os.O_WRONLY | os.O_APPEND)
        os.write(log, f"foldfeed's boot.py: {why}, so this executor ends, to be replaced\n".encode())
        os.close(log)
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.kill(executor, number)
            end = time.monotonic() + TIDY_S
            while os.getppid() == executor and time.monotonic() < end:
                time.sleep(0.1)


def become_worker(parent: int, report: int) -> None:
    """Becomes Beam's worker, which ends when its parent does, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It ended before the request.
        return
    from apache_beam.runners.worker import sdk_worker_main

    # What sdk_worker_main.main does, with the report where a start can fail no more but by the connection.
    log_handler, worker, _ = sdk_worker_main.create_harness(dict(os.environ))
    os.write(report, CONNECTED)
    os.close(report)
    try:
        worker.run()
    finally:
        if log_handler:
            log_handler.close()


def fetch_staged(channel: grpc.Channel, dependencies: Any, folder: Path) -> None:
    """Fetches the files that the job was submitted with; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    service = artifacts_grpc.ArtifactRetrievalServiceStub(channel)
    asked = artifacts.ResolveArtifactsRequest(artifacts=dependencies)
    for artifact in service.ResolveArtifacts(asked, timeout=ANSWER_S).replacements:
        role = runner.ArtifactStagingToRolePayload()
        role.ParseFromString(artifact.role_payload)
        # A name of the job's; never a path out of the folder.
        name = os.path.basename(role.staged_name) or hashlib.sha256(artifact.type_payload).hexdigest()
        partial = folder / f"{name}.{os.getpid()}.tmp"
        with partial.open("wb") as file:
            for answer in service.GetArtifact(
                artifacts.GetArtifactRequest(artifact=artifact), timeout=FETCH_S
            ):
                file.write(answer.data)
        os.replace(partial, folder / name)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        become_worker(*map(int, sys.argv[2:4]))
    else:
        sys.exit(main())
