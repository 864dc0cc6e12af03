"""Whole searches that one run of a tool does for many queries: MMseqs2's, in a database or in two.

Owns which queries share a run, and what becomes of them. Does not own a search
(`searches.search`) or the tool. No Beam here. A database that is searched after another one goes
with it: the same group of queries first in the one, then, with the profiles that this left in the result
store, in the other.

Invariants: an answer is that of a search alone, and is stored only after it was parsed; which queries are in
a group depends on their sequences and on the number of groups, never on the engine. A run that fails
costs nobody but the query that it is to blame on: each is searched alone then, and the run is described under
``jobs/JOB_ID/RUN_ID/together`` in the result store.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable, Sequence

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.databases.unchanged import as_planned
from foldfeed.pipelines.errors import CorruptResultError, QueryTooLongError, SearchError
from foldfeed.pipelines.searches.hits import read_hits
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.search import (
    JobContext,
    Receipt,
    WorkUnit,
    facts_of,
    first_of,
    once_more_after_a_signal,
    receipt_of,
    receipt_of_failure,
)
from foldfeed.pipelines.tools.mmseqs import Mmseqs
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, SearchResult

# Queries of one run, on average: most, and where more workers would be idle. bench/search_mmseqs.py says what
# a query costs in runs of 1, 8 and 64.
TOGETHER = 64
FEWEST = 32


def num_groups_of(num_queries: int, num_workers: int) -> int:
    """Returns into how many groups queries are divided: as few as may be, but one for each worker."""
    return max(1, -(-num_queries // TOGETHER), min(num_workers, num_queries // FEWEST))


def searches_together(databases: Sequence[SearchedDatabase]) -> bool:
    """Returns whether a tool of some databases takes several queries in one run."""
    return any(isinstance(database.tool, Mmseqs) for database in databases)


def group_of(unit: WorkUnit, context: JobContext) -> tuple[int, int] | None:
    """Returns which searches are done together: by database, or the one that it is after, and by query.

    None where the tool takes one query at a time.
    """
    database = context.databases[unit.database_index]
    if not isinstance(database.tool, Mmseqs):
        return None
    index = first_of(unit, context).database_index if database.after else unit.database_index
    number = int.from_bytes(hashlib.sha256(unit.sequence.encode("ascii")).digest()[:8], "little")
    return index, number % context.num_groups


def waits(unit: WorkUnit, context: JobContext) -> bool:
    """Returns whether a search has no answer yet, without reading it."""
    return not ResultStore(context.results_url).shows(unit.unit_id)


def search_together(units: Iterable[WorkUnit], context: JobContext) -> list[Receipt]:
    """Makes sure that the answers to some searches are in the result store.

    Args:
      units: of one group, in any order.
      context: of the build.
    Returns: a receipt of each, which says why where its answer is not there.

    Raises:
      StorageFullError: no space for the tool's files or for an answer.
      CancelledError: the run was stopped.
    """
    by_database: dict[int, list[WorkUnit]] = {}
    for unit in sorted(units, key=lambda unit: unit.unit_id):
        by_database.setdefault(unit.database_index, []).append(unit)
    # What others are searched after comes first.
    order = sorted(by_database, key=lambda index: (bool(context.databases[index].after), index))
    receipts: dict[str, Receipt] = {}
    for index in order:
        for receipt in _search_database(by_database[index], receipts, context):
            receipts[receipt.unit_id] = receipt
    return list(receipts.values())


def _search_database(
    units: Sequence[WorkUnit], known: dict[str, Receipt], context: JobContext
) -> list[Receipt]:
    """Searches one database; ``known`` holds what came of those that it may be searched after."""
    results = ResultStore(context.results_url)
    database = context.databases[units[0].database_index]
    receipts, ready = [], []
    for unit in units:
        first = known.get(first_of(unit, context).unit_id) if database.after else None
        if results.holds(unit.unit_id):
            receipts.append(receipt_of(unit, "ok"))
        elif first is not None and first.status != "ok":
            reason = f"search in {database.name!r} after {database.after!r}: {first.reason}"
            receipts.append(receipt_of(unit, first.status, reason, first.kind))
        elif (limit := database.tool.max_residues) is not None and len(unit.sequence) > limit:
            error = QueryTooLongError(database.tool.identity.name, len(unit.sequence), limit)
            receipts.append(receipt_of_failure(unit, context, error))
        else:
            ready.append(unit)
    return receipts + (_run(ready, context) if ready else [])


def _run(units: Sequence[WorkUnit], context: JobContext) -> list[Receipt]:
    """Searches in one run; if that fails, every query in a run of its own."""
    try:
        found = once_more_after_a_signal(lambda: _found(units, context))
    except SearchError as error:
        if len(units) == 1:
            return [receipt_of_failure(units[0], context, error)]
        _note(units, context, error)
        return [receipt for unit in units for receipt in _run([unit], context)]
    receipts = []
    for unit, result in zip(units, found, strict=True):
        database = context.databases[unit.database_index]
        try:
            num_hits = len(read_hits(result, unit.sequence).hit_ids) - 1
        except (SearchError, AlignmentParseError) as error:
            receipts.append(receipt_of_failure(unit, context, error))
            continue
        facts = facts_of(unit, context, database.name, database.digest, num_hits, len(units))
        ResultStore(context.results_url).put(unit.unit_id, result, facts)
        receipts.append(receipt_of(unit, "ok"))
    return receipts


def _found(units: Sequence[WorkUnit], context: JobContext) -> list[SearchResult]:
    """Returns what one run finds, while the databases are the planned ones."""
    database = context.databases[units[0].database_index]
    tool = database.tool
    assert isinstance(tool, Mmseqs), tool
    sequences = [unit.sequence for unit in units]
    with as_planned(database, context.results_url):
        if tool.first is None:
            return tool.search_many(sequences)
        earlier = [first_of(unit, context) for unit in units]
        with as_planned(context.databases[earlier[0].database_index], context.results_url):
            return tool.search_many(sequences, _earlier(tool.first, earlier, context))


def _earlier(tool: Mmseqs, units: Sequence[WorkUnit], context: JobContext) -> list[SearchResult]:
    """Returns the results of the searches before, from the store; those that it lost are done again."""
    results = ResultStore(context.results_url)
    found: list[SearchResult | None] = []
    for unit in units:
        try:
            found.append(results.get(unit.unit_id))
        except (KeyError, CorruptResultError):
            found.append(None)
    missing = [unit.sequence for unit, one in zip(units, found, strict=True) if one is None]
    anew = iter(tool.search_many(missing) if missing else [])
    return [next(anew) if one is None else one for one in found]


def _note(units: Sequence[WorkUnit], context: JobContext, error: SearchError) -> None:
    """Describes a run that failed for all of its queries."""
    names = sorted(unit.unit_id for unit in units)
    content = {
        "database": context.databases[units[0].database_index].name,
        "unit_ids": names,
        "kind": type(error).__name__,
        "reason": str(error),
        "host": socket.gethostname(),
        "then": "each query was searched in a run of its own",
    }
    name = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    path = f"{context.run_folder}/together/{name}.json"
    open_blobs(context.results_url).write_atomic(path, json.dumps(content, indent=1).encode())


def groups(units: Iterable[WorkUnit], num_workers: int) -> list[list[WorkUnit]]:
    """Returns the searches of one task as runs of at most `TOGETHER` queries, in the order of the queries."""
    by_query: dict[str, list[WorkUnit]] = {}
    for unit in units:
        by_query.setdefault(unit.sequence, []).append(unit)
    queries = list(by_query.values())
    size = -(-len(queries) // num_groups_of(len(queries), num_workers))
    return [
        [unit for query in queries[at : at + size] for unit in query] for at in range(0, len(queries), size)
    ]
