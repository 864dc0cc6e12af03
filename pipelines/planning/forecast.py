"""What a build would do and cost, without doing it: the answer of ``foldfeed build --dry-run``.

Owns the estimate. Does not own the plan. An estimate comes from the receipts of searches that were done
with the same tool on a database of the same name, by residues of the queries: a JackHMMER search takes a
time that grows with query length times database size. Where there is no such receipt it is None and never
a guess. Files of a database that were searched already, for a search that is not joined yet, are taken off as
the same share of its cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from foldfeed.pipelines.costs import readable_bytes
from foldfeed.pipelines.planning.plan import MAX_SHOWN_PARTS, Plan, read_queries
from foldfeed.pipelines.searches.results import ResultStore, UnitReceipt
from foldfeed.pipelines.searches.search import shard_ids_of, units_of
from foldfeed.pipelines.searches.template_search import template_unit_id
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.search_tool import SearchedDatabase
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

# Receipts that are read for an estimate; ids are hashes, so any share of them is a fair sample.
MAX_RECEIPTS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseForecast:
    """What is left to search in one database.

    Attributes:
      database: its name.
      tool: that would search it.
      num_searches: distinct searches of the plan.
      num_missing: of these, without an answer.
      missing_residues: of their queries.
      num_files: files that these searches consist of, where the database has several; else 0.
      num_files_done: of these, searched already.
      num_receipts: earlier searches that the estimate comes from.
      cpu_s: expected user plus system seconds of the missing ones; None without receipts.
      max_rss_bytes: of the largest earlier search; None without receipts.
      answer_bytes: expected size of the missing answers; None without receipts.
    """

    database: str
    tool: str
    num_searches: int
    num_missing: int
    missing_residues: int
    num_files: int
    num_files_done: int
    num_receipts: int
    cpu_s: float | None
    max_rss_bytes: int | None
    answer_bytes: float | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a build would do.

    Attributes:
      num_queries: records that would be built.
      num_rejects: entries that cannot be.
      is_finished: everything is searched and committed already.
      databases: in merge order, behind them the templates if there are any.
      num_workers: searches at a time on this machine.
      cpus_per_search: threads of one search.
    """

    num_queries: int
    num_rejects: int
    is_finished: bool
    databases: tuple[DatabaseForecast, ...]
    num_workers: int
    cpus_per_search: int


def make_forecast(
    urls: Sequence[str],
    databases: tuple[SearchedDatabase, ...],
    max_residues: int,
    plan: Plan,
    results: ResultStore,
    *,
    is_finished: bool,
    num_workers: int,
    cpus_per_search: int,
) -> Forecast:
    """Returns what a plan would do; reads the queries once more, and some receipts.

    Args:
      urls: FASTA files.
      databases: in merge order.
      max_residues: longer queries are not searched.
      plan: of these.
      results: what is there.
      is_finished: the store has the commit.
      num_workers: searches at a time on this machine.
      cpus_per_search: threads of one search.
    """
    present = results.present(plan.unit_ids)
    searched: tuple[SearchedDatabase | TemplateDatabase, ...] = databases
    if plan.templates is not None:
        searched = (*databases, plan.templates)
    known: list[set[str]] = [set() for _ in searched]
    missing = [[0, 0] for _ in searched]
    files: list[set[str]] = [set() for _ in searched]
    seen: set[str] = set()
    for entry in read_queries(urls, max_residues):
        if not isinstance(entry, QuerySequence) or entry.record_id in seen:
            continue
        seen.add(entry.record_id)
        for index, unit_id in enumerate(_units(entry.sequence, databases, plan.templates)):
            if unit_id not in known[index]:
                known[index].add(unit_id)
                if unit_id not in present:
                    missing[index][0] += 1
                    missing[index][1] += len(entry.sequence)
                    if index < len(databases) and len(files[index]) < MAX_SHOWN_PARTS:
                        files[index].update(shard_ids_of(entry.sequence, databases[index]))
    receipts = results.sample(MAX_RECEIPTS) if any(count for count, _ in missing) else []
    return Forecast(
        num_queries=plan.num_queries,
        num_rejects=plan.coverage.count - plan.num_queries,
        is_finished=is_finished,
        databases=tuple(
            _of_database(database, len(units), count, residues, receipts, parts, results.present(parts))
            for database, units, (count, residues), parts in zip(searched, known, missing, files, strict=True)
        ),
        num_workers=num_workers,
        cpus_per_search=cpus_per_search,
    )


def _units(
    sequence: str, databases: tuple[SearchedDatabase, ...], templates: TemplateDatabase | None
) -> tuple[str, ...]:
    units = units_of(sequence, databases)
    return units if templates is None else (*units, template_unit_id(sequence, databases, templates))


def _of_database(
    database: SearchedDatabase | TemplateDatabase,
    num_searches: int,
    num_missing: int,
    missing_residues: int,
    receipts: Sequence[UnitReceipt],
    files: set[str],
    files_done: set[str],
) -> DatabaseForecast:
    named = [
        receipt
        for receipt in receipts
        if receipt.facts.num_residues
        and receipt.facts.database == database.name
        and receipt.tool.name == database.tool.identity.name
    ]
    # An earlier release of the database will do where this one was never searched.
    same = [receipt for receipt in named if receipt.facts.database_digest == database.digest] or named
    residues = sum(receipt.facts.num_residues or 0 for receipt in same)
    cpu_s = sum(receipt.usage.cpu_s for receipt in same)
    stored = sum(receipt.stored_bytes for receipt in same)
    left = 1 - len(files_done) / len(files) if files else 1.0
    return DatabaseForecast(
        database=database.name,
        tool=database.tool.identity.name,
        num_searches=num_searches,
        num_missing=num_missing,
        missing_residues=missing_residues,
        num_files=len(files),
        num_files_done=len(files_done),
        num_receipts=len(same),
        cpu_s=cpu_s / residues * missing_residues * left if same else None,
        max_rss_bytes=max((receipt.usage.max_rss_bytes for receipt in same), default=None),
        answer_bytes=stored / residues * missing_residues if same else None,
    )


def lines_of(forecast: Forecast, price_per_cpu_hour: float | None) -> list[str]:
    """Returns a forecast as lines for a person."""
    what = f"{forecast.num_queries} records, {forecast.num_rejects} entries that cannot be built"
    if forecast.is_finished:
        return [f"{what}: nothing to do, every search is done and the store has the commit"]
    lines = [f"{what}; nothing was searched (--dry-run)"]
    for one in forecast.databases:
        words = [f"{one.num_searches - one.num_missing} searches reused, {one.num_missing} to do"]
        if one.num_files_done:
            words.append(f"{one.num_files_done} of their {one.num_files} files searched already")
        if one.num_missing and one.cpu_s is not None:
            words.append(
                f"{one.cpu_s / 3600:.3g} CPU hours expected from {one.num_receipts} earlier searches"
            )
            words.append(f"each at most {readable_bytes(one.max_rss_bytes or 0)} of memory so far")
            words.append(f"{readable_bytes(one.answer_bytes or 0)} of answers")
            if price_per_cpu_hour is not None:
                words.append(f"price {one.cpu_s / 3600 * price_per_cpu_hour:.4g}")
        elif one.num_missing:
            words.append("cost unknown: no receipt of an earlier search in a database of this name")
        lines.append(f"  {one.database} ({one.tool}): {', '.join(words)}")
    return [*lines, *_total_lines(forecast, price_per_cpu_hour)]


def _total_lines(forecast: Forecast, price_per_cpu_hour: float | None) -> list[str]:
    """Returns the sum over all databases; none where nothing is missing or nothing is known."""
    left = [one for one in forecast.databases if one.num_missing]
    known = [one for one in left if one.cpu_s is not None]
    if not known:
        return []
    cpu_s = sum(one.cpu_s or 0 for one in known)
    memory = max(one.max_rss_bytes or 0 for one in known) * forecast.num_workers
    cpus = forecast.num_workers * forecast.cpus_per_search
    words = [
        f"{sum(one.num_missing for one in left)} searches to do",
        f"{cpu_s / 3600:.3g} CPU hours expected",
        f"{cpu_s / cpus / 3600:.3g} hours here with {forecast.num_workers} searches at a time",
        f"{readable_bytes(memory)} of memory for these",
        f"{readable_bytes(sum(one.answer_bytes or 0 for one in known))} of disk for answers",
    ]
    if price_per_cpu_hour is not None:
        words.append(f"price {cpu_s / 3600 * price_per_cpu_hour:.4g}")
    unknown = [one.database for one in left if one.cpu_s is None]
    least = f"; at least, because the cost of {', '.join(unknown)} is unknown" if unknown else ""
    return [f"  together: {', '.join(words)}{least}"]
