"""A build from end to end: check, plan, and only then, if anything is missing, run and commit.

Owns what happens before an engine starts: the databases are known by their digests, the plan by one pass
over the queries, and a build with nothing to do ends here without loading Beam. Does not own any step.
Invariants: every entry of the FASTA files ends in the store or in ``dead_letters.jsonl``; an end without
an engine reports what the general way would have reported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.beam.runners import choose_runner
from foldfeed.pipelines.build_config import BuildConfig, BuildReport
from foldfeed.pipelines.building.outcome import Finished, find_finished, may_be_finished, write_dead_letters
from foldfeed.pipelines.building.tools import other_engine_of, prepare_databases, prepare_templates
from foldfeed.pipelines.fasta import open_query_file
from foldfeed.pipelines.planning.forecast import Forecast, make_forecast
from foldfeed.pipelines.planning.kept_plan import plan_of
from foldfeed.pipelines.planning.plan import Plan, default_num_parts, job_id_of
from foldfeed.pipelines.programs.subprocess_runner import allow_all, drive_build
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.tools.search_tool import SearchedDatabase


def run_build(config: BuildConfig, *, say: Callable[[str], None] | None = None) -> BuildReport:
    """Builds the records of all queries and commits them.

    Args:
      config: what to do.
      say: receives single lines that a person should see.
    Raises:
      MissingExtraError: Beam is not installed, and there may be something to do.
      PipelineError: see `foldfeed.pipelines.errors`; nothing was committed.
      NotAStoreError: the store's folder holds something else; nothing was touched.
      StorageFullError: no space left; nothing was committed.
    """
    started = time.monotonic()
    # A run before this one in the same process may have been stopped.
    allow_all()
    drive_build()
    may_be_done = may_be_finished(config)
    if not may_be_done and importlib.util.find_spec("apache_beam") is None:
        # Said before anything is read.
        raise MissingExtraError("apache_beam", "pipelines")
    runner, note = choose_runner(config.runner)
    if note is not None and say is not None:
        say(note)
    for url in config.queries:
        open_query_file(url).close()
    # What can be refused is refused before databases are read, unless reading them will probably show that
    # there is nothing to do: loading Beam takes longer than all else then.
    options = None
    if not may_be_done:
        from foldfeed.pipelines.building.run import beam_options, refuse_foreign_store

        options = beam_options(config, runner)
        refuse_foreign_store(config)
    databases, plan, job_id, num_parts = planned(config)
    found = find_finished(config, job_id, plan)
    if found is not None:
        return _nothing_to_do(config, plan, *found, started)
    for database in databases:
        if say is not None and (engine := other_engine_of(database.tool)) is not None:
            say(f"{database.name}: {engine}")
    from foldfeed.pipelines.building.run import beam_options, refuse_foreign_store, run_and_commit

    if options is None:
        options = beam_options(config, runner)
        refuse_foreign_store(config)
    report = run_and_commit(config, databases, plan, job_id, num_parts, runner, options)
    return dataclasses.replace(report, seconds=time.monotonic() - started)


def forecast_build(config: BuildConfig) -> Forecast:
    """Returns what `run_build` would do; nothing is searched, and only hashes of databases are written.

    Raises:
      PipelineError: the build cannot work.
    """
    choose_runner(config.runner)
    databases, plan, job_id, _ = planned(config)
    return make_forecast(
        config.queries,
        databases,
        config.max_residues,
        plan,
        ResultStore(config.results_url),
        is_finished=find_finished(config, job_id, plan) is not None,
        num_workers=config.num_workers,
        cpus_per_search=config.cpus_per_search,
    )


def planned(config: BuildConfig) -> tuple[tuple[SearchedDatabase, ...], Plan, str, int]:
    """Returns databases, plan, the job's name and its number of parts."""
    databases = prepare_databases(
        config.databases,
        max_hits=config.max_hits,
        cpus=config.cpus_per_search,
        timeout_s=config.timeout_s,
        digests=open_blobs(config.results_url),
        engine=config.engine,
        check=config.check_databases,
    )
    templates = None if config.templates is None else prepare_templates(config, databases)
    results = open_blobs(config.results_url)
    plan = plan_of(config.queries, databases, config.max_residues, results, templates)
    num_parts = config.parts or default_num_parts(plan.num_queries)
    job_id = job_id_of(plan, databases, num_parts, taxonomy_ids=config.taxonomy_ids)
    return databases, plan, job_id, num_parts


def _nothing_to_do(
    config: BuildConfig, plan: Plan, finished: Finished, version: int, started: float
) -> BuildReport:
    """Returns what a run would report that finds every search done and every record committed."""
    return BuildReport(
        store=finished.store,
        results=open_blobs(config.results_url).url,
        version=version,
        job_id=finished.job_id,
        part_ids=finished.part_ids,
        num_records=finished.num_records,
        num_added=0,
        num_unchanged=finished.num_records,
        dead_letters=finished.dead_letters,
        dead_letters_path=write_dead_letters(finished.dead_letters, config.results_url, finished.job_id),
        num_searched=0,
        num_reused=len(plan.unit_ids),
        num_failed=0,
        seconds=time.monotonic() - started,
        started_engine=False,
        costs=finished.costs,
        ledger_path=finished.ledger_path,
    )
