"""A build on Flink: what it must be told, what contradicts itself, and Beam's options for it.

Owns the checks and the defaults. Does not own the graph, nor the cluster (deploy/flink.md). A build was run
on a real Flink 1.19 (JobManager, two TaskManagers), see that page; the checks name what fails there late, or
not at all where it should.

Source: the options of Beam 2.77 and its runner for Flink.
"""

from __future__ import annotations

import dataclasses
import json
import re

from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions, PortableOptions

from foldfeed.pipelines.beam.words import given, options_of_others, refuse, refuse_given, refuse_unknown
from foldfeed.pipelines.build_config import BuildConfig

# A worker process that is used again for as long: Flink runs a build as some fifty tasks, and a process for
# each would be most of the time of a small build.
CACHE_MILLIS = 600_000

_ADDRESS = re.compile(r"(?:https?://)?[^\s/:\[\]]+:\d{1,5}/?")
_REFUSED = {
    "streaming": "a build reads files that end; it is a batch job",
    "flink_submit_uber_jar": "with it Beam hears nothing of a job that fails, so foldfeed could not say why",
    "job_endpoint": "for a job server that runs already: --runner PortableRunner, without --flink_master",
    **options_of_others("FlinkRunner"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlinkEngine:
    """A build on Flink, checked.

    Attributes:
      searches: at a time on the whole cluster: Flink's parallelism.
      words: what else goes to Beam as it was given.
    """

    searches: int
    words: tuple[str, ...]

    @classmethod
    def of(cls, config: BuildConfig) -> FlinkEngine:
        """Returns the engine for a build.

        Raises:
          EngineError: something is missing, or two things contradict each other.
        """
        words = config.beam_options
        refuse_given(words, _REFUSED)
        refuse_unknown(words)
        options = PipelineOptions(list(words))
        _check_master(options.view_as(FlinkRunnerOptions).flink_master, given(words))
        _check_environment(options.view_as(PortableOptions))
        return cls(searches=_searches(config, options.view_as(FlinkRunnerOptions).parallelism), words=words)

    def beam_words(self) -> list[str]:
        """Returns the words for Beam."""
        there = given(self.words)
        defaults = {
            "parallelism": self.searches,
            # One Python process per TaskManager; its slots are threads of it.
            "sdk_worker_parallelism": 1,
            "environment_cache_millis": CACHE_MILLIS,
        }
        words = [f"--{name}={value}" for name, value in defaults.items() if name not in there]
        return ["--runner=FlinkRunner", *words, *self.words]


def _check_master(master: str, words: dict[str, str | None]) -> None:
    if "flink_master" not in words:
        refuse("--flink_master", "missing; the REST address of the JobManager, e.g. --flink_master=host:8081")
    if not _ADDRESS.fullmatch(master):
        refuse(
            f"--flink_master={master}",
            "it must be HOST:PORT of a JobManager; for one machine the embedded engine (no --runner) does "
            "the same without a cluster",
        )
    if "flink_job_server_jar" not in words:
        refuse(
            "--flink_job_server_jar",
            "missing; Beam's job server for your version of Flink, which Beam would otherwise download; "
            "deploy/flink.md says how to get it",
        )


def _check_environment(options: PortableOptions) -> None:
    kind = options.environment_type
    if kind is None or kind == "LOOPBACK":
        reason = (
            "missing; without it Flink starts workers by docker"
            if kind is None
            else "workers would be threads of the process that submits, so the cluster would search nothing"
        )
        refuse(
            "--environment_type" + (f"={kind}" if kind else ""),
            f"{reason}; say PROCESS (a script on every TaskManager), EXTERNAL (a pool of workers beside it) "
            "or DOCKER with --environment_config=IMAGE",
        )
    if kind == "PROCESS" and not _command_of(options.environment_config):
        refuse(
            f"--environment_config={options.environment_config}",
            'PROCESS needs {"command":"/path/of/boot.sh"}, the script of deploy/flink.md, at one path '
            "everywhere",
        )
    if kind in ("EXTERNAL", "DOCKER") and not options.environment_config:
        what = "HOST:PORT of the pool of workers" if kind == "EXTERNAL" else "the worker image"
        refuse("--environment_config", f"missing; {kind} needs {what}")


def _command_of(text: str | None) -> str | None:
    try:
        found = json.loads(text or "null")
    except ValueError:
        return None
    command = found.get("command") if isinstance(found, dict) else None
    return command if isinstance(command, str) and command else None


def _searches(config: BuildConfig, parallelism: int) -> int:
    if parallelism > 0 and config.workers is not None and parallelism != config.workers:
        refuse(
            f"--parallelism={parallelism}",
            f"--workers is {config.workers}; on Flink both are the searches at a time on the whole cluster, "
            "so give one of them",
        )
    if parallelism <= 0 and config.workers is None:
        refuse("--workers", "missing; how many searches the whole cluster runs at a time, e.g. its slots")
    return config.workers or parallelism
