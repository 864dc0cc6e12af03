"""The launcher of the Dataflow flex template: parameters in, a job handed to Dataflow.

Owns the template's parameters: their names, texts and patterns, of which ``deploy/dataflow/metadata.json`` is
made, and the way from them to a `BuildConfig`. Does not own the submission (`building.submit`).
Dataflow starts ``deploy/dataflow/launcher.py`` in the image with these parameters and its own options as
flags; what is not a parameter here goes to Beam.

Source: Google's documentation of flex templates (metadata, regular expressions, launcher).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.pipelines.beam.runners import DATAFLOW
from foldfeed.pipelines.build_config import (
    DEFAULT_MAX_RESIDUES,
    DEFAULT_TIMEOUT_S,
    ENGINES,
    BuildConfig,
    default_results,
)
from foldfeed.pipelines.building.submit import lines_of, submit_build
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.errors import ConfigError

# Where deploy/images.md puts databases.
DATABASES_FOLDER = "/databases"
# Between the members of a list: commas are what gcloud puts between parameters.
SEPARATOR = ";"

_URL = r"gs://[a-z0-9][a-z0-9_.-]+/[^;\s]+"
_NUMBER = r"[1-9][0-9]*"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of the template.

    Attributes:
      name: of the flag.
      label: a few words.
      help: sentences.
      pattern: of the whole value.
      default: what holds without it; None where it must be given, "" where it has no value then.
    """

    name: str
    label: str
    help: str
    pattern: str
    default: str | None = None


PARAMETERS = (
    Parameter(
        name="queries",
        label="Query files",
        help="FASTA files (plain, gzip, zstd) in buckets, with ; between them.",
        pattern=rf"{_URL}(?:;{_URL})*",
    ),
    Parameter(
        name="databases",
        label="Databases",
        help="NAME=PATH[:TOOL] with ; between them, paths in the worker image, e.g. "
        "uniref90=/databases/uniref90.fasta;uniref30=/databases/UniRef30_2023_02:hhblits",
        pattern=r"[A-Za-z0-9_][A-Za-z0-9_.-]*=/[^;\s]+(?:;[A-Za-z0-9_][A-Za-z0-9_.-]*=/[^;\s]+)*",
    ),
    Parameter(
        name="store", label="Feature store", help="Where the records go; made when absent.", pattern=_URL
    ),
    Parameter(
        name="results",
        label="Result store",
        help="Where search results are kept and reused; STORE.results when not given.",
        pattern=_URL,
        default="",
    ),
    Parameter(
        name="workers",
        label="Searches at a time on one worker",
        help="By default as many as the CPUs of the machine type allow.",
        pattern=_NUMBER,
        default="",
    ),
    Parameter(
        name="cpus_per_search", label="CPUs of one search", help="Threads.", pattern=_NUMBER, default="1"
    ),
    Parameter(
        name="search_ram",
        label="Memory of one search",
        help="With a unit, e.g. 4GB; the hint of the steps that search is made of it.",
        pattern=r"[0-9]+(?:\.[0-9]+)?(?:MB|MiB|GB|GiB)",
        default="4GB",
    ),
    Parameter(
        name="databases_folder",
        label="Folder of the databases",
        help="The folder of the image that all databases lie in.",
        pattern=r"/[^;\s]*",
        default=DATABASES_FOLDER,
    ),
    Parameter(
        name="search_engine",
        label="How jackhmmer searches",
        help="binary: the program alone; fast, pyhmmer, hmmpgmd: the same rows behind our own scan, HMMER's "
        "filters in memory, or its daemon; auto: binary.",
        pattern="|".join(ENGINES),
        default="auto",
    ),
    Parameter(
        name="max_hits",
        label="Most rows of a database",
        help="NAME=N with ; between them, the query counted; AlphaFold 2's numbers when not given.",
        pattern=rf"[A-Za-z0-9_][A-Za-z0-9_.-]*={_NUMBER}(?:;[A-Za-z0-9_][A-Za-z0-9_.-]*={_NUMBER})*",
        default="",
    ),
    Parameter(
        name="timeout",
        label="Longest time of one search",
        help="In seconds.",
        pattern=_NUMBER,
        default=str(round(DEFAULT_TIMEOUT_S)),
    ),
    Parameter(
        name="max_residues",
        label="Longest query",
        help="Longer ones become dead letters.",
        pattern=_NUMBER,
        default=str(DEFAULT_MAX_RESIDUES),
    ),
    Parameter(
        name="parts", label="Parts to write", help="By number of queries.", pattern=_NUMBER, default=""
    ),
)


def metadata() -> dict[str, Any]:
    """Returns the template's metadata, as Google's command line reads them."""
    return {
        "name": "foldfeed build",
        "description": "Searches protein sequences with JackHMMER and HHblits and writes the parts of a "
        "feature store. When the job is done, `foldfeed build` with the same words commits.",
        "streaming": False,
        "parameters": [
            {
                "name": one.name,
                "label": one.label,
                "helpText": one.help,
                "isOptional": one.default is not None,
                "regexes": [f"^(?:{one.pattern})$"],
                **({"defaultValue": one.default} if one.default else {}),
            }
            for one in PARAMETERS
        ],
    }


def config_of(words: Sequence[str]) -> BuildConfig:
    """Returns the build that a launch asks for.

    Args:
      words: ``--NAME=VALUE``, ours and Beam's.
    Raises:
      ConfigError: a parameter is missing or has another form than its pattern.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for one in PARAMETERS:
        parser.add_argument(f"--{one.name}", default=one.default)
    found, rest = parser.parse_known_args(list(words))
    values: dict[str, str | None] = vars(found)
    for one in PARAMETERS:
        _check(one, values[one.name])
    given = {name: value or "" for name, value in values.items()}
    return BuildConfig(
        queries=tuple(given["queries"].split(SEPARATOR)),
        databases=tuple(DatabaseSpec.parse(text) for text in given["databases"].split(SEPARATOR)),
        store=given["store"],
        results=given["results"] or default_results(given["store"]),
        max_hits={
            name: int(number)
            for name, _, number in (
                pair.partition("=") for pair in given["max_hits"].split(SEPARATOR) if pair
            )
        },
        cpus_per_search=int(given["cpus_per_search"]),
        workers=int(given["workers"]) if given["workers"] else None,
        engine=next(engine for engine in ENGINES if engine == given["search_engine"]),
        timeout_s=float(given["timeout"]),
        max_residues=int(given["max_residues"]),
        parts=int(given["parts"]) if given["parts"] else None,
        runner=DATAFLOW,
        beam_options=(
            f"--databases_folder={given['databases_folder']}",
            f"--search_ram={given['search_ram']}",
            # The launcher names the runner; we do.
            *(word for word in rest if word not in ("--runner=DataflowRunner", "--runner=dataflow")),
        ),
    )


def _check(parameter: Parameter, value: str | None) -> None:
    if value is None:
        raise ConfigError(f"parameter {parameter.name!r} is missing: {parameter.help}")
    if value != parameter.default and not re.fullmatch(parameter.pattern, value):
        raise ConfigError(
            f"parameter {parameter.name!r} is {value!r}, which does not match {parameter.pattern}: "
            f"{parameter.help}"
        )


def main(words: Sequence[str] | None = None) -> int:
    """Launches; returns the exit code. ``--print-metadata`` prints the metadata instead."""
    words = sys.argv[1:] if words is None else words
    if list(words) == ["--print-metadata"]:
        print(json.dumps(metadata(), indent=2))
        return 0
    try:
        for line in lines_of(submit_build(config_of(words))):
            print(line)
    except FoldfeedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
