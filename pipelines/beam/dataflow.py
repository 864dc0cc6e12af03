"""A build on Dataflow: what it must be told, what contradicts itself, and Beam's options for it.

Owns the checks and the defaults. Does not own the graph, nor the submission of a template
(`foldfeed.pipelines.template`). Everything is refused before a database is read: Dataflow itself finds most
of these faults after minutes, on workers, or never.

Source: the options of Beam 2.77; Dataflow's documentation of custom containers and of Dataflow Prime. The
words were checked against the jobs that Beam makes of them; no job was run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from typing import NoReturn

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    WorkerOptions,
)

from foldfeed.pipelines.beam.words import (
    PORTABLE_OPTIONS,
    OwnParser,
    options_of_others,
    refuse,
    refuse_given,
    refuse_unknown,
)
from foldfeed.pipelines.build_config import BuildConfig
from foldfeed.pipelines.errors import EngineError

# Memory of one search unless told otherwise: jackhmmer took 1.2 GB for a query of 7,096 residues.
DEFAULT_SEARCH_RAM = "4GB"
# What a worker needs beside its searches: the Python process, answers on their way to the store.
WORKER_RAM_BYTES = 2_000_000_000

_UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(MB|MiB|GB|GiB)")
# e2-standard-8, n2-highmem-16, c3-standard-8-lssd, n2-custom-8-32768, custom-4-16384-ext
_MACHINE = re.compile(r"(?:[a-z]\w*-)?(?:[a-z]+-)(\d+)(?:-(?:lssd|\d+))?(?:-ext)?")
_BUCKET_URL = re.compile(r"gs://[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9](?:/.*)?")
_IN_THE_IMAGE = (
    "the worker image has everything that a worker needs (see deploy/images.md); what is installed at the "
    "start of every worker costs minutes and differs from worker to worker"
)
_REFUSED = {
    "streaming": "a build reads files that end; it is a batch job",
    "number_of_worker_harness_threads": "use foldfeed's own --workers: searches at a time on one worker",
    "sdk_location": "foldfeed sets it to container, because the image brings Beam",
    **dict.fromkeys(
        ("setup_file", "requirements_file", "extra_package", "extra_packages", "file_to_stage"), _IN_THE_IMAGE
    ),
    **dict.fromkeys(("files_to_stage", "prebuild_sdk_container_engine"), _IN_THE_IMAGE),
    **dict.fromkeys(
        ("resource_hint", "resource_hints"),
        "it would hold for the cheap steps, too; say --workers, --cpus-per-search and --search_ram, from "
        "which the steps that search get theirs",
    ),
    **dict.fromkeys(PORTABLE_OPTIONS, "an option of portable runners; Dataflow starts workers from an image"),
    **options_of_others("DataflowRunner"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataflowEngine:
    """A build on Dataflow, checked.

    Attributes:
      searches: at a time on one worker machine; by default as many as its CPUs allow.
      cpus_per_search: threads of one search.
      search_ram_bytes: memory of one search.
      staging_location: where Beam puts the job's files.
      words: what else goes to Beam as it was given.
    """

    searches: int
    cpus_per_search: int
    search_ram_bytes: int
    staging_location: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, config: BuildConfig) -> DataflowEngine:
        """Returns the engine for a build.

        Raises:
          EngineError: something is missing, or two things contradict each other.
        """
        own, words = _own_options(config.beam_options)
        refuse_given(words, _REFUSED)
        refuse_unknown(words)
        options = PipelineOptions(list(words))
        cloud = options.view_as(GoogleCloudOptions)
        _require(options)
        _check_places(config, own.databases_folder)
        _check_experiments(options)
        machine = options.view_as(WorkerOptions).machine_type
        searches = _searches(config, machine, _is_prime(options))
        return cls(
            searches=searches,
            cpus_per_search=config.cpus_per_search,
            search_ram_bytes=_num_bytes(own.search_ram),
            staging_location=cloud.staging_location or f"{cloud.temp_location.rstrip('/')}/staging",
            words=words,
        )

    def beam_words(self) -> list[str]:
        """Returns the words for Beam."""
        return [
            "--runner=DataflowRunner",
            "--sdk_location=container",
            f"--staging_location={self.staging_location}",
            # One process with so many threads per machine; by default Beam starts one for every CPU, and each
            # of them would start searches.
            "--experiments=no_use_multiple_sdk_containers",
            f"--number_of_worker_harness_threads={self.searches}",
            *(word for word in self.words if not word.startswith("--staging_location")),
        ]

    def search_hints(self) -> dict[str, str]:
        """Returns Beam's resource hints of the steps that search, for a whole worker machine."""
        num_bytes = self.searches * self.search_ram_bytes + WORKER_RAM_BYTES
        # Beam takes the number of CPUs as text only.
        return {"cpu_count": str(self.searches * self.cpus_per_search), "min_ram": f"{num_bytes}B"}


def _own_options(words: tuple[str, ...]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Returns our options of this engine, and the words that are Beam's."""
    parser = OwnParser()
    parser.add_argument("--databases_folder")
    parser.add_argument("--search_ram", default=DEFAULT_SEARCH_RAM)
    own, rest = parser.parse_known_args(list(words))
    return own, tuple(rest)


def _require(options: PipelineOptions) -> None:
    cloud = options.view_as(GoogleCloudOptions)
    needed = {
        "project": (cloud.project, "the Google Cloud project that is billed"),
        "region": (cloud.region, "where workers run, e.g. --region=europe-west4"),
        "temp_location": (cloud.temp_location, "e.g. --temp_location=gs://my-bucket/temp"),
        "sdk_container_image": (
            options.view_as(WorkerOptions).sdk_container_image,
            "the worker image with foldfeed, HMMER and HH-suite; deploy/images.md builds it",
        ),
    }
    for name, (value, what) in needed.items():
        if not value:
            refuse(f"--{name}", f"missing; {what}")
    for name in ("temp_location", "staging_location"):
        value = getattr(cloud, name)
        if value and not _BUCKET_URL.fullmatch(value):
            refuse(
                f"--{name}={value}", "it must be in a bucket, e.g. gs://my-bucket/temp (3 or more characters)"
            )


def _check_places(config: BuildConfig, folder: str | None) -> None:
    """Refuses what a worker would not see."""
    places = [("--queries", url) for url in config.queries]
    places += [("--store", config.store), ("--results", config.results_url)]
    for option, url in places:
        scheme, separator, _ = url.partition("://")
        if not separator or scheme in ("file", "local"):
            refuse(
                f"{option} {url}",
                "a path of this machine, which Dataflow's workers do not see; put it into a bucket, e.g. "
                "gs://my-bucket/name",
            )
    if folder is None:
        refuse(
            "--databases_folder",
            "missing; the folder that the worker image, and the machine that submits, have the databases in, "
            "e.g. --databases_folder=/databases",
        )
    for database in config.databases:
        for path in database.paths:
            if not os.path.isabs(folder) or os.path.commonpath([folder, path]) != folder.rstrip("/"):
                refuse(
                    f"--database {database.name}={path}",
                    f"not in --databases_folder={folder}, so workers may not have it; put it into the worker "
                    "image at the path that it has here",
                )


def _check_experiments(options: PipelineOptions) -> None:
    debug = options.view_as(DebugOptions)
    if debug.lookup_experiment("use_multiple_sdk_containers"):
        refuse(
            "--experiments=use_multiple_sdk_containers",
            "a process for every CPU would each start searches; foldfeed runs one with --workers threads",
        )
    for name in ("disable_runner_v2", "disable_portable_runner"):
        if debug.lookup_experiment(name):
            refuse(f"--experiments={name}", "without it Dataflow knows neither the image nor its hints")


def _is_prime(options: PipelineOptions) -> bool:
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    return "enable_prime" in services or bool(options.view_as(DebugOptions).lookup_experiment("enable_prime"))


def _searches(config: BuildConfig, machine: str | None, prime: bool) -> int:
    """Returns how many searches a worker runs at a time."""
    if prime and machine:
        refuse(
            f"--machine_type={machine}",
            "Dataflow Prime chooses machines by the hints of the steps; leave it out, or enable_prime",
        )
    cpus = _cpus_of(machine) if machine else None
    if config.workers is None and cpus is None:
        refuse(
            "--workers",
            "missing; say how many searches a worker runs at a time"
            + (f" (the CPUs of {machine!r} are not in its name)" if machine else ", or name --machine_type"),
        )
    if config.workers is None and cpus is not None and cpus < config.cpus_per_search:
        refuse(
            f"--machine_type={machine}",
            f"it has {cpus} CPUs, one search has {config.cpus_per_search} threads",
        )
    searches = config.workers or (cpus or 1) // config.cpus_per_search
    if cpus is not None and searches * config.cpus_per_search > cpus:
        refuse(
            f"--machine_type={machine}",
            f"it has {cpus} CPUs; --workers {searches} with --cpus-per-search {config.cpus_per_search} needs "
            f"{searches * config.cpus_per_search}",
        )
    return searches


def _cpus_of(machine: str) -> int | None:
    found = _MACHINE.fullmatch(machine)
    return int(found.group(1)) if found else None


def _num_bytes(size: str) -> int:
    found = _SIZE.fullmatch(size)
    if not found:
        _bad_size(size)
    return round(float(found.group(1)) * _UNITS[found.group(2)])


def _bad_size(size: str) -> NoReturn:
    raise EngineError(f"--search_ram={size}", "it must be a number with a unit, e.g. 4GB or 512MiB")
