"""What a build is asked to do, and what it reports: two frozen records.

Owns the checks of a configuration. Does not own any step of a build (`building.job`). Nothing
heavy is imported here, so that the command line can be asked for help quickly.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from foldfeed.feature_store.format.record import MAX_RESIDUES
from foldfeed.feature_store.format.templates import to_date
from foldfeed.feature_store.index.transactions import ON_EXISTING
from foldfeed.pipelines.costs import DatabaseCost
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.sequences import DeadLetter
from foldfeed.pipelines.tools.template_tool import DEFAULT_MAX_TEMPLATE_HITS

# Longest query of a build unless told otherwise. JackHMMER's memory grows with query x target length: 7,096
# residues took 1.2 GB, so this takes roughly 2 GB.
DEFAULT_MAX_RESIDUES = 10_000
DEFAULT_TIMEOUT_S = 6 * 3600.0
# How jackhmmer is run: alone, or on what another program found first, with the same rows. `auto` stays with
# the binary, so that the results that a person has stay in use: those of another engine have names of their
# own.
Engine = Literal["auto", "binary", "fast", "pyhmmer", "hmmpgmd"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Everything that describes a build.

    Attributes:
      queries: FASTA files, paths or fsspec URLs.
      databases: what to search; the order decides only among names that AlphaFold 2 does not know.
      store: URL of the feature store, made when there is none.
      row_order: of a new store, ``rank`` or ``permuted``; one that exists must have it. None: whatever it
        has, or ``rank``.
      row_order_seed: of ``permuted``; None: whatever the store has, or 0.
      results: URL of the result store; ``STORE.results`` when None.
      max_hits: caps by database name that replace AlphaFold 2's (the query counts).
      cpus_per_search: threads of one search.
      workers: searches at a time with the local runner; the CPUs of this process divided among them when
        None.
      engine: how jackhmmer is run: ``binary``, the program alone; ``fast``, behind the fast scan;
        ``pyhmmer``, behind HMMER's filters in memory; ``hmmpgmd``, behind HMMER's daemon; all with the same
        rows. ``auto`` is ``binary``.
      timeout_s: longest wall time of one search.
      max_residues: longer queries become dead letters.
      parts: parts of the store that this build writes; chosen by the number of queries when None.
      on_existing: what to do with a record id that is in the store with other content: ``error``,
        ``replace`` or ``skip``.
      runner: Beam runner.
      beam_options: further options for Beam.
      check_databases: read the databases again even where their files look unchanged.
      templates: sequences of known structures that each record's alignment is searched in; None for none.
      template_msa: name of the database whose rows make the profile of that search; the record's whole
        alignment when None.
      max_template_hits: most hits that a record keeps.
      max_template_date: hits released later, or on an unknown day, are not kept (``YYYY-MM-DD``); None for
        all, which leaves the choice to whoever reads them.
      taxonomy_ids: keep the NCBI taxonomy ids that descriptions of rows tell.
    """

    queries: tuple[str, ...]
    databases: tuple[DatabaseSpec, ...]
    store: str
    row_order: str | None = None
    row_order_seed: int | None = None
    results: str | None = None
    max_hits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cpus_per_search: int = 1
    workers: int | None = None
    engine: Engine = "auto"
    timeout_s: float = DEFAULT_TIMEOUT_S
    max_residues: int = DEFAULT_MAX_RESIDUES
    parts: int | None = None
    on_existing: str = "error"
    runner: str = "FnApiRunner"
    beam_options: tuple[str, ...] = ()
    check_databases: bool = False
    templates: DatabaseSpec | None = None
    template_msa: str | None = None
    max_template_hits: int = DEFAULT_MAX_TEMPLATE_HITS
    max_template_date: str | None = None
    taxonomy_ids: bool = False

    def __post_init__(self) -> None:
        if not self.queries:
            raise ConfigError("no query file; give at least one FASTA file")
        if not self.databases:
            raise ConfigError("no database; give at least one NAME=PATH")
        names = [database.name for database in self.databases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"database name {twice[0]!r} is given twice; every database needs its own name")
        self._check_templates(names)
        unknown = sorted(set(self.max_hits) - set(names))
        if unknown:
            raise ConfigError(f"max_hits names {unknown[0]!r}, which is no database of this build ({names})")
        numbers: dict[str, float] = {f"max_hits of {name!r}": value for name, value in self.max_hits.items()}
        numbers |= {"cpus_per_search": self.cpus_per_search, "timeout_s": self.timeout_s}
        numbers |= {"max_template_hits": self.max_template_hits}
        numbers |= {"workers": self.workers or 1, "parts": self.parts or 1, "max_residues": self.max_residues}
        for name, value in numbers.items():
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be greater than 0")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine is {self.engine!r}; it must be one of {', '.join(ENGINES)}")
        if self.on_existing not in ON_EXISTING:
            raise ConfigError(
                f"on_existing is {self.on_existing!r}; it must be one of {', '.join(ON_EXISTING)}"
            )
        if self.max_residues > MAX_RESIDUES:
            raise ConfigError(f"max_residues is {self.max_residues}; the store holds at most {MAX_RESIDUES}")

    def _check_templates(self, names: Sequence[str]) -> None:
        wrong = next((database for database in self.databases if database.searches_templates), None)
        if wrong is not None:
            raise ConfigError(f"database {wrong.name!r} holds templates; give it as --templates {wrong.name}")
        options = (self.template_msa, self.max_template_date)
        if self.templates is None:
            if any(option is not None for option in options) or (
                self.max_template_hits != DEFAULT_MAX_TEMPLATE_HITS
            ):
                raise ConfigError(
                    "template_msa, max_template_hits and max_template_date have no effect without templates"
                )
            return
        if not self.templates.searches_templates:
            raise ConfigError(
                f"templates {self.templates.name!r} is a database of {self.templates.tool}, which makes "
                f"alignments; give it as --database {self.templates.name}"
            )
        if self.templates.name in names:
            raise ConfigError(f"templates and a database are both called {self.templates.name!r}")
        if self.template_msa is not None and self.template_msa not in names:
            raise ConfigError(
                f"template_msa is {self.template_msa!r}, which is no database of this build "
                f"({', '.join(names)})"
            )
        if self.max_template_date is not None:
            try:
                to_date(self.max_template_date)
            except ValueError as error:
                raise ConfigError(f"max_template_date: {error}") from error

    @property
    def results_url(self) -> str:
        """Where search results are kept."""
        return self.results if self.results is not None else default_results(self.store)

    @property
    def num_workers(self) -> int:
        """Searches at a time with the local runner."""
        return self.workers or max(1, len(os.sched_getaffinity(0)) // self.cpus_per_search)


def default_results(store: str) -> str:
    """Returns where the search results of a store are kept unless told otherwise."""
    return store.rstrip("/") + ".results"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What a build did.

    Attributes:
      store: URL of the feature store.
      results: URL of the result store.
      version: of the store after the commit.
      job_id: names the job's folder in the result store.
      part_ids: parts of the store that hold the job's records.
      num_records: records of this job that are in the store.
      num_added: of these, new ones.
      num_unchanged: of these, ones that were there before with equal content.
      dead_letters: entries that are not in the store.
      dead_letters_path: where all of them are listed.
      num_searched: searches done in this run.
      num_reused: searches found in the result store.
      num_failed: searches that gave no usable result.
      seconds: wall time.
      started_engine: whether Beam ran; False when there was nothing to do.
      costs: what the searches behind these records cost, by database; those of earlier runs among them.
      ledger_path: the same by record and database, a Parquet file.
    """

    store: str
    results: str
    version: int
    job_id: str
    part_ids: tuple[str, ...]
    num_records: int
    num_added: int
    num_unchanged: int
    dead_letters: tuple[DeadLetter, ...]
    dead_letters_path: str
    num_searched: int
    num_reused: int
    num_failed: int
    seconds: float
    started_engine: bool = True
    costs: tuple[DatabaseCost, ...] = ()
    ledger_path: str = ""
