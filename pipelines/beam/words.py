"""What the classes of engines share: reading Beam's words, and refusing some of them.

Owns the list of options that belong to one engine, the search for typing errors, and the form of a refusal.
Does not own what an engine needs (`beam.dataflow`, `beam.flink`).
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

from foldfeed.pipelines.errors import EngineError

_FLAG = re.compile(r"--([A-Za-z0-9_]+)(?:=(.*))?", re.DOTALL)

# How argparse names an option that it cannot take.
_ARGUMENT = re.compile(r"argument (--[^:/]+)\S*: (.*)", re.DOTALL)

# Options that mean something to one runner only, by that runner.
RUNNER_OPTIONS = {
    "FnApiRunner": ("direct_num_workers", "direct_running_mode"),
    "FlinkRunner": (
        *("flink_master", "flink_version", "flink_job_server_jar", "flink_submit_uber_jar"),
        *("parallelism", "max_parallelism"),
    ),
    "SparkRunner": (
        *("spark_master_url", "spark_job_server_jar", "spark_submit_uber_jar", "spark_rest_url"),
        "spark_version",
    ),
    "DataflowRunner": (
        *("dataflow_endpoint", "template_location", "dataflow_service_option", "dataflow_service_options"),
        *("flexrs_goal", "machine_type", "worker_machine_type", "disk_size_gb", "worker_disk_type"),
        *("num_workers", "max_num_workers", "autoscaling_algorithm", "sdk_container_image", "subnetwork"),
    ),
}
# Options of runners that take jobs by Beam's job service.
PORTABLE_OPTIONS = (
    *("job_endpoint", "artifact_endpoint", "environment_type", "environment_config", "environment_option"),
    *("environment_options", "sdk_worker_parallelism", "environment_cache_millis", "artifacts_dir"),
    "output_executable_path",
)


def options_of_others(runner: str) -> dict[str, str]:
    """Returns the options that mean something to another runner only, and why each is refused."""
    return {
        name: f"an option of {other}"
        for other, names in RUNNER_OPTIONS.items()
        if other != runner
        for name in names
    }


class _Parser(_BeamArgumentParser):
    """Raises where argparse would print the usage of some hundred options and end the process."""

    def error(self, message: str) -> NoReturn:
        found = _ARGUMENT.fullmatch(message)
        refuse(found.group(1) if found else "Beam's options", found.group(2) if found else message)


class OwnParser(argparse.ArgumentParser):
    """Parses options of our own among Beam's; a fault is a typed error, too."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises the refusal of an option."""
        found = _ARGUMENT.fullmatch(message)
        refuse(found.group(1) if found else "options", found.group(2) if found else message)


def given(words: Sequence[str]) -> dict[str, str | None]:
    """Returns the options among some words, with their values where these stand behind ``=``."""
    return {match.group(1): match.group(2) for word in words if (match := _FLAG.fullmatch(word))}


def refuse(option: str, reason: str) -> NoReturn:
    """Raises the error of a refused option."""
    raise EngineError(option, reason)


def refuse_given(words: Sequence[str], reasons: Mapping[str, str]) -> None:
    """Raises if one of some options was given.

    Args:
      words: of the command line.
      reasons: why not, by option.
    Raises:
      EngineError: the first of them.
    """
    for name in given(words):
        if name in reasons:
            refuse(f"--{name}", reasons[name])


def refuse_unknown(words: Sequence[str]) -> None:
    """Raises if Beam does not know a word, or its value is of another kind.

    Beam itself only logs "Discarding unparseable args", and a typing error would go unnoticed.

    Raises:
      EngineError: the first such word.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    for options in PipelineOptions.__subclasses__():
        with contextlib.suppress(argparse.ArgumentError):
            options._add_argparse_args(parser)
    unknown = parser.parse_known_args(list(words))[1]
    if unknown:
        refuse(unknown[0], f"Beam {beam.__version__} knows no such option")
