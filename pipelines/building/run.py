"""The part of a build that costs something: searches on an engine, the audit, the commit.

Owns the order of these steps. Does not own any of them, nor what comes before (`building.job`,
which imports this module only when there is something to do: Beam and the reader of parts take seconds to
load). Invariants: nothing is visible in the store before the audit passed; a job that ran before commits
nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore, choose_settings
from foldfeed.pipelines.beam.runners import LOCAL_RUNNER
from foldfeed.pipelines.build_config import BuildConfig, BuildReport
from foldfeed.pipelines.building.outcome import (
    Finished,
    mark_finished,
    write_completeness,
    write_dead_letters,
)
from foldfeed.pipelines.building.progress import count_done, search_progress
from foldfeed.pipelines.errors import ConfigError, NothingCommittedError
from foldfeed.pipelines.planning.plan import Plan
from foldfeed.pipelines.programs.interrupt import stop_searches_on_interrupt
from foldfeed.pipelines.records import ledger
from foldfeed.pipelines.records.parts import PartReceipt, audit, ledger_path
from foldfeed.pipelines.searches.search import JobContext
from foldfeed.pipelines.searches.together import num_groups_of
from foldfeed.pipelines.sequences import DeadLetter
from foldfeed.pipelines.tools.search_tool import SearchedDatabase

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions


def beam_options(config: BuildConfig, runner: str) -> PipelineOptions:
    """Returns Beam's options.

    Args:
      config: of the build.
      runner: as `beam.runners.choose_runner` returned it.
    Raises:
      MissingExtraError: Beam is not installed.
      EngineError: an option is refused.
    """
    _import_beam()
    from foldfeed.pipelines.beam.engine import options_of

    return options_of(config, runner)


def refuse_foreign_store(config: BuildConfig) -> None:
    """Refuses a folder that is no store before hours of search; a new one is made only when needed.

    Raises:
      NotAStoreError: the store's folder holds something else.
      StoreSettingsError: the store has another row order than the one asked for.
    """
    if open_blobs(config.store).exists(""):
        FeatureStore.create(config.store, _settings(config))


def run_and_commit(
    config: BuildConfig,
    databases: tuple[SearchedDatabase, ...],
    plan: Plan,
    job_id: str,
    num_parts: int,
    runner: str,
    options: PipelineOptions,
) -> BuildReport:
    """Searches what is missing, writes the parts, checks that all is there, commits.

    Args:
      config: of the build.
      databases: in merge order.
      plan: what the FASTA files hold.
      job_id: of the plan.
      num_parts: parts to write.
      runner: Beam's.
      options: Beam's.
    Raises:
      PipelineError: see `foldfeed.pipelines.errors`; nothing was committed.
      StorageFullError: no space left; nothing was committed.
    """
    started = time.monotonic()
    context = context_of(config, databases, plan, job_id, num_parts)
    reused, _ = count_done(plan, context)
    receipts: list[PartReceipt] = []
    if plan.num_queries:
        with stop_searches_on_interrupt(), search_progress(plan, context):
            _run_on_beam(config, context, runner, options)
        receipts = audit(plan, context)
    done, failed = count_done(plan, context)
    letters = _dead_letters(receipts) if receipts else plan.rejects
    letters_path = write_dead_letters(letters, config.results_url, job_id)
    num_records = sum(receipt.num_records for receipt in receipts)
    write_completeness(
        plan,
        letters,
        num_records=num_records,
        num_answered=done,
        num_failed=failed,
        results_url=config.results_url,
        job_id=job_id,
    )
    paths = [ledger_path(receipt.part, context) for receipt in receipts]
    table, where = ledger.join(config.results_url, paths, job_id)
    costs = ledger.costs(table, context.run_id)
    part_ids = tuple(receipt.part_id for receipt in receipts if receipt.part_id is not None)
    if not part_ids:
        raise NothingCommittedError(len(letters), str(letters[0]) if letters else "none", letters_path)
    store = FeatureStore.open(config.store)
    commit_id = _commit_id(part_ids)
    commit = store.commit(
        part_ids,
        job_id=commit_id,
        message=f"foldfeed build {job_id}",
        on_existing=config.on_existing,
    )
    report = BuildReport(
        store=store.url,
        results=open_blobs(config.results_url).url,
        version=store.version,
        job_id=job_id,
        part_ids=part_ids,
        num_records=num_records,
        num_added=commit.num_added,
        num_unchanged=commit.num_unchanged,
        dead_letters=letters,
        dead_letters_path=letters_path,
        num_searched=done - reused,
        num_reused=reused,
        num_failed=failed,
        seconds=time.monotonic() - started,
        costs=costs,
        ledger_path=where,
    )
    if done == len(plan.unit_ids) and not failed:
        mark_finished(
            Finished(
                store=report.store,
                job_id=job_id,
                commit_id=commit_id,
                part_ids=part_ids,
                num_records=report.num_records,
                dead_letters=letters,
                costs=costs,
                ledger_path=where,
            ),
            config.results_url,
        )
    return report


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


def _settings(config: BuildConfig) -> StoreSettings | None:
    try:
        return choose_settings(config.store, config.row_order, config.row_order_seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def context_of(
    config: BuildConfig, databases: tuple[SearchedDatabase, ...], plan: Plan, job_id: str, num_parts: int
) -> JobContext:
    """Returns what the steps of a build need to know; makes the store where there is something to build."""
    settings = _settings(config)
    if plan.num_queries:
        settings = FeatureStore.create(config.store, settings).settings
    num_queries = len(plan.unit_ids) // max(1, len(databases) + (plan.templates is not None))
    # Without relative paths: a worker may run in another folder.
    return JobContext(
        store_url=open_blobs(config.store).url,
        settings=settings or StoreSettings(),
        results_url=open_blobs(config.results_url).url,
        databases=databases,
        job_id=job_id,
        run_id=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
        num_parts=num_parts,
        max_residues=config.max_residues,
        templates=plan.templates,
        num_groups=num_groups_of(num_queries, config.num_workers),
        taxonomy_ids=config.taxonomy_ids,
    )


def _run_on_beam(config: BuildConfig, context: JobContext, runner: str, options: PipelineOptions) -> None:
    from foldfeed.pipelines.beam.engine import quiet_beam, run_pipeline

    with quiet_beam():
        run_pipeline(options, graph_of(config, context, runner))


def graph_of(config: BuildConfig, context: JobContext, runner: str) -> Callable[[beam.Pipeline], None]:
    """Returns what adds the graph of a build to an empty pipeline."""
    from foldfeed.pipelines.beam.engine import search_hints
    from foldfeed.pipelines.beam.graph import build_graph

    return functools.partial(
        build_graph,
        urls=config.queries,
        context=context,
        stop_together=runner == LOCAL_RUNNER,
        hints=search_hints(config, runner),
    )


def _dead_letters(receipts: list[PartReceipt]) -> tuple[DeadLetter, ...]:
    letters = [letter for receipt in receipts for letter in receipt.dead_letters]
    return tuple(sorted(letters, key=lambda letter: (letter.file_index, letter.item_index)))


def _commit_id(part_ids: tuple[str, ...]) -> str:
    """Returns the transaction id of a commit: of what is added, so that adding it again adds nothing.

    The job's own id would not do: a search that timed out in the first run and works in the second gives the
    same job other parts.
    """
    return hashlib.sha256("\n".join(sorted(part_ids)).encode()).hexdigest()
