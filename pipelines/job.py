"""A build from end to end: check, plan, run, audit, commit.

Owns the order of these steps on the submitter and the one commit at the end. Does not own any step. Beam is
imported only when the run starts. Invariants: nothing is visible in the store before the audit passed; a
job that ran before commits nothing; every entry of the FASTA files ends in the store or in
``dead_letters.jsonl``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.feature_store.format.record import MAX_RESIDUES
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.index.transactions import ON_EXISTING
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore, choose_settings
from foldfeed.pipelines.databases import DatabaseSpec
from foldfeed.pipelines.errors import ConfigError, NothingCommittedError
from foldfeed.pipelines.fasta import open_query_file
from foldfeed.pipelines.features import SearchedDatabase
from foldfeed.pipelines.parts import PartReceipt, audit
from foldfeed.pipelines.plan import Plan, default_num_parts, job_id_of, make_plan
from foldfeed.pipelines.progress import count_done, search_progress
from foldfeed.pipelines.search import JobContext
from foldfeed.pipelines.sequences import DeadLetter
from foldfeed.pipelines.subprocess_runner import allow_all, cancel_all
from foldfeed.pipelines.tools import ENGINES, Engine, other_engine_of, prepare_databases

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

# Longest query of a build unless told otherwise. JackHMMER's memory grows with query x target length: 7,096
# residues took 1.2 GB, so this takes roughly 2 GB.
DEFAULT_MAX_RESIDUES = 10_000
DEFAULT_TIMEOUT_S = 6 * 3600.0


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
      engine: how jackhmmer is run: ``binary``, the program alone; ``fast``, behind the fast scan, with the
        same rows; ``auto``, which is ``binary``.
      timeout_s: longest wall time of one search.
      max_residues: longer queries become dead letters.
      parts: parts of the store that this build writes; chosen by the number of queries when None.
      on_existing: what to do with a record id that is in the store with other content: ``error``,
        ``replace`` or ``skip``.
      runner: Beam runner.
      beam_options: further options for Beam.
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

    def __post_init__(self) -> None:
        if not self.queries:
            raise ConfigError("no query file; give at least one FASTA file")
        if not self.databases:
            raise ConfigError("no database; give at least one NAME=PATH")
        names = [database.name for database in self.databases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"database name {twice[0]!r} is given twice; every database needs its own name")
        unknown = sorted(set(self.max_hits) - set(names))
        if unknown:
            raise ConfigError(f"max_hits names {unknown[0]!r}, which is no database of this build ({names})")
        numbers: dict[str, float] = {f"max_hits of {name!r}": value for name, value in self.max_hits.items()}
        numbers |= {"cpus_per_search": self.cpus_per_search, "timeout_s": self.timeout_s}
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

    @property
    def results_url(self) -> str:
        """Where search results are kept."""
        return self.results if self.results is not None else self.store.rstrip("/") + ".results"

    @property
    def num_workers(self) -> int:
        """Searches at a time with the local runner."""
        return self.workers or max(1, len(os.sched_getaffinity(0)) // self.cpus_per_search)


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


def run_build(config: BuildConfig, *, say: Callable[[str], None] | None = None) -> BuildReport:
    """Builds the records of all queries and commits them.

    Args:
      config: what to do.
      say: receives single lines that a person should see.
    Raises:
      PipelineError: see `foldfeed.pipelines.errors`; nothing was committed.
      NotAStoreError: the store's folder holds something else; nothing was touched.
      StorageFullError: no space left; nothing was committed.
    """
    started = time.monotonic()
    # A run before this one in the same process may have been stopped.
    allow_all()
    options = _beam_options(config, say or _silent)
    say = say or _silent
    context, plan = _prepare(config)
    for database in context.databases:
        if (engine := other_engine_of(database.tool)) is not None:
            say(f"{database.name}: {engine}")
    reused, _ = count_done(plan, context)
    if plan.num_queries:
        with stop_searches_on_interrupt(), search_progress(plan, context):
            _run_on_beam(config, context, options)
        receipts = audit(plan, context)
    else:
        receipts = []
    done, failed = count_done(plan, context)
    letters = _dead_letters(receipts) if receipts else plan.rejects
    letters_path = _write_dead_letters(letters, context)
    part_ids = tuple(receipt.part_id for receipt in receipts if receipt.part_id is not None)
    if not part_ids:
        raise NothingCommittedError(len(letters), str(letters[0]) if letters else "none", letters_path)
    store = FeatureStore.open(config.store)
    commit = store.commit(
        part_ids,
        job_id=_commit_id(part_ids),
        message=f"foldfeed build {context.job_id}",
        on_existing=config.on_existing,
    )
    return BuildReport(
        store=store.url,
        results=open_blobs(config.results_url).url,
        version=store.version,
        job_id=context.job_id,
        part_ids=part_ids,
        num_records=sum(receipt.num_records for receipt in receipts),
        num_added=commit.num_added,
        num_unchanged=commit.num_unchanged,
        dead_letters=letters,
        dead_letters_path=letters_path,
        num_searched=done - reused,
        num_reused=reused,
        num_failed=failed,
        seconds=time.monotonic() - started,
    )


def _silent(_: str) -> None:
    return


def _beam_options(config: BuildConfig, say: Callable[[str], None]) -> PipelineOptions:
    """Returns Beam's options; fails before any work when Beam is missing or an option is refused."""
    _import_beam()
    from foldfeed.pipelines.engine import choose_runner, make_options

    runner, note = choose_runner(config.runner)
    if note is not None:
        say(note)
    return make_options(runner, config.num_workers, config.beam_options)


def _import_beam() -> None:
    """Imports Beam without the line it logs about optional Google libraries."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        importlib.import_module("apache_beam")
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "apache_beam", "pipelines") from error
    finally:
        logging.disable(disabled)


def _prepare(config: BuildConfig) -> tuple[JobContext, Plan]:
    """Checks everything that can be checked before a search, and makes the store and the plan."""
    for url in config.queries:
        open_query_file(url).close()
    if open_blobs(config.store).exists(""):
        # Refuse a folder that is no store before hours of search; a new one is made only when needed.
        FeatureStore.create(config.store, _settings(config))
    databases = prepare_databases(
        config.databases,
        max_hits=config.max_hits,
        cpus=config.cpus_per_search,
        timeout_s=config.timeout_s,
        digests=open_blobs(config.results_url),
        engine=config.engine,
    )
    plan = make_plan(config.queries, databases, config.max_residues)
    settings = _settings(config)
    settings = (
        FeatureStore.create(config.store, settings).settings
        if plan.num_queries
        else settings or StoreSettings()
    )
    num_parts = config.parts or default_num_parts(plan.num_queries)
    return _context(config, databases, settings, plan, num_parts), plan


def _settings(config: BuildConfig) -> StoreSettings | None:
    try:
        return choose_settings(config.store, config.row_order, config.row_order_seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _context(
    config: BuildConfig,
    databases: tuple[SearchedDatabase, ...],
    settings: StoreSettings,
    plan: Plan,
    num_parts: int,
) -> JobContext:
    return JobContext(
        store_url=config.store,
        settings=settings,
        results_url=config.results_url,
        databases=databases,
        job_id=job_id_of(plan, databases, num_parts),
        run_id=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
        num_parts=num_parts,
        max_residues=config.max_residues,
    )


def _run_on_beam(config: BuildConfig, context: JobContext, options: PipelineOptions) -> None:
    from foldfeed.pipelines.engine import LOCAL_RUNNER, choose_runner, quiet_beam, run_pipeline
    from foldfeed.pipelines.graph import build_graph

    is_local = choose_runner(config.runner)[0] == LOCAL_RUNNER
    build = functools.partial(build_graph, urls=config.queries, context=context, stop_together=is_local)
    with quiet_beam():
        run_pipeline(options, build)


class StoppedBySignal(KeyboardInterrupt):
    """A signal ended the build; its searches are dead.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@contextlib.contextmanager
def stop_searches_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM kill the running searches first; the block then raises `StoppedBySignal`.

    Without it the interpreter would wait at its end for worker threads, and these for searches of hours.
    """
    allow_all()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        cancel_all()
        raise StoppedBySignal(signum)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _dead_letters(receipts: list[PartReceipt]) -> tuple[DeadLetter, ...]:
    letters = [letter for receipt in receipts for letter in receipt.dead_letters]
    return tuple(sorted(letters, key=lambda letter: (letter.file_index, letter.item_index)))


def _write_dead_letters(letters: tuple[DeadLetter, ...], context: JobContext) -> str:
    path = f"jobs/{context.job_id}/dead_letters.jsonl"
    blobs = open_blobs(context.results_url)
    blobs.write_atomic(path, "".join(json.dumps(letter.to_json()) + "\n" for letter in letters).encode())
    return f"{blobs.url}/{path}"


def _commit_id(part_ids: tuple[str, ...]) -> str:
    """Returns the transaction id of a commit: of what is added, so that adding it again adds nothing.

    The job's own id would not do: a search that timed out in the first run and works in the second gives the
    same job other parts.
    """
    return hashlib.sha256("\n".join(sorted(part_ids)).encode()).hexdigest()
