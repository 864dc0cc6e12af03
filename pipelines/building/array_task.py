"""One task of a job array: searches its share of a build into the shared result store, without any engine.

Owns the order of the steps and what a task reports. Does not own the split (`planning.share`) or
a search (`searches.search`). Neither Beam nor the store's writer is needed. Nothing is committed:
when all tasks are done, the same build without a task finds every answer, searches nothing and commits.

Invariants: a task may run twice, or two of the same at once, and only time is lost, because a search that is
there is not done again and equal searches publish equal bytes; a task that ends well has tried every search
of its share.

A search in a database of several files is joined from its parts, which several tasks search. Every task joins
at its end what has all parts and no answer: whoever is last sees all parts, so nothing is left over. So it is
with templates, which are searched with alignments that several tasks made; each begins with its own share.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.beam.runners import LOCAL_RUNNER, choose_runner
from foldfeed.pipelines.build_config import BuildConfig
from foldfeed.pipelines.building.job import planned
from foldfeed.pipelines.building.progress import search_progress
from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.fasta import open_query_file
from foldfeed.pipelines.planning.plan import Plan
from foldfeed.pipelines.planning.share import (
    Share,
    WorkItem,
    items_of,
    queries_of,
    shard_units_of,
    sharded_units,
)
from foldfeed.pipelines.programs.interrupt import stop_searches_on_interrupt
from foldfeed.pipelines.programs.subprocess_runner import allow_all, cancel_all, drive_build
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.search import (
    JobContext,
    Receipt,
    WorkUnit,
    join_units,
    scan_batches,
    scan_group,
    scan_shards,
    search_unit,
    units_of,
)
from foldfeed.pipelines.searches.template_search import search_template_unit, template_unit
from foldfeed.pipelines.searches.together import group_of, groups, num_groups_of, search_together
from foldfeed.pipelines.tools.search_tool import SearchedDatabase

_Work = TypeVar("_Work", list[WorkItem], WorkUnit)

# Failed searches that are shown on the terminal; the final build tries them again and lists all.
MAX_SHOWN_FAILURES = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShareReport:
    """What a task did.

    Attributes:
      share: which task.
      job_id: of the build, equal for all tasks that have the same queries, databases and programs.
      results: URL of the result store.
      num_items: searches of its share; in a database of several files each file counts.
      num_searched: of these, done in this run.
      num_reused: of these, found in the result store.
      failures: what came of the others.
      num_joined: searches in databases of several files whose parts this task joined.
      num_templates: searches of templates that this task did.
      num_planned: searches of the whole build.
      num_answered: of these, with an answer when the task ended.
      seconds: wall time.
    """

    share: Share
    job_id: str
    results: str
    num_items: int
    num_searched: int
    num_reused: int
    failures: tuple[Receipt, ...]
    num_joined: int
    num_templates: int
    num_planned: int
    num_answered: int
    seconds: float


def search_share(config: BuildConfig, share: Share) -> ShareReport:
    """Searches one task's share of a build into its result store.

    Args:
      config: of the build, the same for every task and for the build that commits.
      share: which task.
    Raises:
      ConfigError: an engine was asked for.
      PipelineError: a database or tool is not there, or the run was stopped.
      StorageFullError: no space left; what was finished is kept.
    """
    started = time.monotonic()
    allow_all()
    drive_build()
    _refuse_engine(config)
    for url in config.queries:
        open_query_file(url).close()
    databases, plan, job_id, num_parts = planned(config)
    context = _context(config, databases, plan, job_id, num_parts, share)
    results = ResultStore(context.results_url)
    items = items_of(config.queries, databases, config.max_residues, share)
    there = results.present({item.unit_id for item in items})
    todo = [item for item in items if item.unit_id not in there]
    with stop_searches_on_interrupt(), search_progress(plan, context):
        receipts = _all(
            lambda work: _search(work, context),
            _batches(todo, context, config.num_workers),
            config.num_workers,
        )
        joined = _all(
            lambda unit: [search_unit(unit, context)],
            _joinable(config, context, share),
            config.num_workers,
        )
        templates = _all(
            lambda unit: [search_template_unit(unit, context)],
            _templates(config, context, share),
            config.num_workers,
        )
    failures = tuple(receipt for receipt in [*receipts, *joined, *templates] if receipt.status != "ok")
    return ShareReport(
        share=share,
        job_id=job_id,
        results=results.url,
        num_items=len(items),
        num_searched=sum(receipt.status == "ok" for receipt in receipts),
        num_reused=len(items) - len(todo),
        failures=failures,
        num_joined=sum(receipt.status == "ok" for receipt in joined),
        num_templates=sum(receipt.status == "ok" for receipt in templates),
        num_planned=len(plan.unit_ids),
        num_answered=_count(plan, results),
        seconds=time.monotonic() - started,
    )


def lines_of(report: ShareReport) -> Iterator[str]:
    """Yields a report as lines for a person."""
    yield (
        f"task {report.share.task} of {report.share.tasks}: {report.num_items} searches in its share, "
        f"{report.num_searched} done, {report.num_reused} reused, {len(report.failures)} failed in "
        f"{report.seconds:.1f} s (kept in {report.results})"
    )
    if report.num_joined:
        yield f"joined from the files of their databases: {report.num_joined} searches"
    if report.num_templates:
        yield f"templates, with alignments that are there: {report.num_templates} searches"
    for failure in report.failures[:MAX_SHOWN_FAILURES]:
        yield f"  {', '.join(failure.record_ids)}: {failure.reason} ({failure.status})"
    if len(report.failures) > MAX_SHOWN_FAILURES:
        yield f"  ... and {len(report.failures) - MAX_SHOWN_FAILURES} more"
    left = report.num_planned - report.num_answered
    yield (
        f"job {report.job_id}: {report.num_answered} of {report.num_planned} searches have an answer; "
        + (f"{left} are left to other tasks or failed" if left else "the same command without --task commits")
    )


def _refuse_engine(config: BuildConfig) -> None:
    runner, _ = choose_runner(config.runner)
    if runner != LOCAL_RUNNER or config.beam_options:
        asked = f"--runner {config.runner}" if runner != LOCAL_RUNNER else config.beam_options[0]
        raise ConfigError(f"{asked} cannot take effect with --task, which runs no engine; leave it out")


def _context(
    config: BuildConfig,
    databases: tuple[SearchedDatabase, ...],
    plan: Plan,
    job_id: str,
    num_parts: int,
    share: Share,
) -> JobContext:
    """Returns what a search needs to know; the store, which tasks do not touch, is not made."""
    return JobContext(
        store_url=open_blobs(config.store).url,
        settings=StoreSettings(),
        results_url=open_blobs(config.results_url).url,
        databases=databases,
        job_id=job_id,
        run_id=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}",
        num_parts=num_parts,
        max_residues=config.max_residues,
        templates=plan.templates,
        num_groups=num_groups_of(plan.num_queries // share.tasks, config.num_workers),
    )


def _batches(items: Iterable[WorkItem], context: JobContext, num_workers: int) -> Iterator[list[WorkItem]]:
    """Yields what is searched in one go: a search, or what one file may be scanned for at once; in order.

    What a tool searches in one run comes first, because it takes longest.
    """
    parts: dict[tuple[int, int, int], list[WorkItem]] = {}
    alone: list[WorkItem] = []
    together: dict[int, list[WorkUnit]] = {}
    for item in items:
        run = group_of(item.unit, context)
        if run is not None:
            together.setdefault(run[0], []).append(item.unit)
        else:
            alone.append(item)
    for units in together.values():
        for group_units in groups(units, num_workers):
            yield [WorkItem(unit=unit, part=None) for unit in group_units]
    for item in alone:
        if item.part is None:
            yield [item]
        else:
            parts.setdefault(scan_group(item.part, context), []).append(item)
    for group in parts.values():
        items_of_part = {item.unit_id: item for item in group}
        for batch in scan_batches((item.part for item in group if item.part is not None), context):
            yield [items_of_part[part.unit_id] for part in batch]


def _search(items: list[WorkItem], context: JobContext) -> list[Receipt]:
    parts = [item.part for item in items if item.part is not None]
    if parts:
        return scan_shards(parts, context)
    units = [item.unit for item in items]
    if group_of(units[0], context) is None:
        return [search_unit(units[0], context)]
    found = {receipt.unit_id: [receipt] for receipt in search_together(units, context)}
    return [search_unit(unit, context, found[unit.unit_id]) for unit in units]


def _all(search: Callable[[_Work], list[Receipt]], work: Iterable[_Work], num_workers: int) -> list[Receipt]:
    """Returns the receipts of some work, in its order; the first error ends all searches and is raised."""
    with ThreadPoolExecutor(num_workers, thread_name_prefix="foldfeed-search") as pool:
        futures = [pool.submit(search, one) for one in work]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException as error:
            cancel_all(f"another search failed: {error}")
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [receipt for future in futures for receipt in future.result()]


def _joinable(config: BuildConfig, context: JobContext, share: Share) -> list[WorkUnit]:
    """Returns the searches that have all their parts and no answer, those first that others take last."""
    results = ResultStore(context.results_url)
    units = list(sharded_units(config.queries, context.databases, config.max_residues))
    parts = {
        unit.unit_id: [part.unit_id for part in shard_units_of(unit, context.databases)] for unit in units
    }
    there = results.present({*parts, *(name for names in parts.values() for name in names)})
    found = [unit for unit in units if unit.unit_id not in there and there.issuperset(parts[unit.unit_id])]
    return _from_its_own(found, share)


def _templates(config: BuildConfig, context: JobContext, share: Share) -> list[WorkUnit]:
    """Returns the searches of templates that have an alignment and no answer, in the same order."""
    if context.templates is None:
        return []
    units: dict[str, WorkUnit] = {}
    needed: dict[str, tuple[str, ...]] = {}
    for query in queries_of(config.queries, config.max_residues):
        unit = template_unit(query, context)
        there = units.get(unit.unit_id)
        units[unit.unit_id] = unit if there is None else join_units([there, unit])
        alignments = units_of(query.sequence, context.databases)
        needed[unit.unit_id] = tuple(alignments[index] for index in context.templates.msa)
    results = ResultStore(context.results_url)
    present = results.present({*units, *(name for names in needed.values() for name in names)})
    found = [unit for name, unit in units.items() if name not in present and present.issuperset(needed[name])]
    return _from_its_own(found, share)


def _from_its_own(units: list[WorkUnit], share: Share) -> list[WorkUnit]:
    """Returns units in an order in which tasks that end together begin at different places of a circle."""
    return sorted(
        units, key=lambda unit: ((int(unit.unit_id[:8], 16) - share.task) % share.tasks, unit.unit_id)
    )


def _count(plan: Plan, results: ResultStore) -> int:
    return results.count_present(plan.unit_ids)
