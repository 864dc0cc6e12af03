"""Starts Beam's Python worker on a Spark executor, as /opt/apache/beam/boot does in Beam's container images.

Spark starts it through a two-line script that names the Python of an environment with foldfeed in it
(environment type PROCESS), once for each worker. It asks the runner for the options of the job, fetches
staged files, and becomes the worker, which then has the environment variables that it expects.

Source: Beam's container contract (sdks/python/container/boot.go) and its protocols.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
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


def main() -> None:
    """Becomes the worker; returns only by an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("id", "logging_endpoint", "artifact_endpoint", "provision_endpoint", "control_endpoint"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--semi_persist_dir", default="semi")
    arguments, _ = parser.parse_known_args()

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
    # Nobody reads the pipe that the runner gives for standard output; a full one would stop the worker.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.execve(sys.executable, [sys.executable, "-m", "apache_beam.runners.worker.sdk_worker_main"], variables)


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
    main()
