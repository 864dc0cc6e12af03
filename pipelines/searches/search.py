"""One unit of search: a query sequence against a database, with its answer in the result store.

Owns the decision what happens to a unit: reuse, search, retry, or give up with a reason. Does not own tools
or storage. No Beam here; DoFns of `beam.graph` are shells over `scan_shards` and `search_unit`.
Invariants: an answer is stored only after it was parsed and found to be of this query; searching a unit
twice is harmless.

In a database of several files a unit has a part for every shard, which `scan_shards` may do anywhere and in
any order; `search_unit` joins what they left in the result store, and does itself what is missing or damaged
there. So it does with what `searches.together` searches before, many queries in one run. A batch of
queries whose scan fails is scanned one by one: it costs nobody but the query that it is to blame on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.databases.unchanged import as_planned, shard_as_planned
from foldfeed.pipelines.errors import (
    CorruptResultError,
    DatabaseChangedError,
    DeviceError,
    SearchError,
    ToolFailedError,
    ToolTimeoutError,
    UnreadableDatabaseError,
)
from foldfeed.pipelines.searches.hits import read_hits
from foldfeed.pipelines.searches.results import ResultStore, SearchFacts, unit_id_of
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.fast_jackhmmer import FastJackhmmer
from foldfeed.pipelines.tools.mmseqs import Mmseqs
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, SearchResult
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

# A signal (the kernel's out-of-memory killer, a lost node) may not come again; one more try is cheap.
ATTEMPTS_AFTER_SIGNAL = 2

# Queries of a batch that failed are scanned alone; where so many fail and none succeeds, the rest are not.
LONE_FAILURES = 3

# Into so many groups the queries of a file are divided before they are scanned together: few queries still
# keep several workers busy.
SCAN_GROUPS = 8

Status = Literal["ok", "retryable", "poison"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobContext:
    """What every step of a build needs to know; small and picklable.

    Attributes:
      store_url: the feature store.
      settings: of the feature store.
      results_url: the result store.
      databases: in merge order.
      job_id: names the job by its content.
      run_id: names this attempt at the job.
      num_parts: parts of the store that the job writes.
      max_residues: longer queries are not searched.
      templates: what is searched with the alignments; None for none.
      num_groups: into so many groups queries fall that a tool may search together.
      taxonomy_ids: records keep those of their rows.
    """

    store_url: str
    settings: StoreSettings
    results_url: str
    databases: tuple[SearchedDatabase, ...]
    job_id: str
    run_id: str
    num_parts: int
    max_residues: int
    templates: TemplateDatabase | None = None
    taxonomy_ids: bool = False

    @property
    def searched(self) -> tuple[SearchedDatabase | TemplateDatabase, ...]:
        """The databases, and behind them the templates where there are any."""
        return self.databases if self.templates is None else (*self.databases, self.templates)

    num_groups: int = 1

    @property
    def run_folder(self) -> str:
        """Where this attempt keeps its receipts, under the result store."""
        return f"jobs/{self.job_id}/{self.run_id}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """One search to do.

    Attributes:
      unit_id: its name in the result store.
      database_index: position in `JobContext.searched`.
      sequence: the query.
      record_ids: records that wait for it, sorted.
    """

    unit_id: str
    database_index: int
    sequence: str
    record_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What came of one search; the answer itself is in the result store.

    Attributes:
      unit_id: its name there.
      database_index: position in `JobContext.searched`.
      record_ids: records that wait for it.
      status: ``ok``; ``retryable`` when the same search may succeed later; ``poison`` when it will not.
      reason: why not ok, else "".
      kind: name of the error, else "".
    """

    unit_id: str
    database_index: int
    record_ids: tuple[str, ...]
    status: Status
    reason: str = ""
    kind: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardUnit:
    """The part of a unit that one shard of its database is.

    Attributes:
      unit_id: name of its candidates in the result store.
      number: of the shard.
      unit: the whole.
    """

    unit_id: str
    number: int
    unit: WorkUnit


def units_of(sequence: str, databases: tuple[SearchedDatabase, ...]) -> tuple[str, ...]:
    """Returns the unit ids of one sequence, one per database."""
    return tuple(
        unit_id_of(sequence, database.digest, database.tool.identity.digest) for database in databases
    )


def work_units(query: QuerySequence, databases: tuple[SearchedDatabase, ...]) -> list[WorkUnit]:
    """Returns the searches that one query needs."""
    return [
        WorkUnit(
            unit_id=unit_id, database_index=index, sequence=query.sequence, record_ids=(query.record_id,)
        )
        for index, unit_id in enumerate(units_of(query.sequence, databases))
    ]


def join_units(units: list[WorkUnit]) -> WorkUnit:
    """Returns one unit for records of equal sequence, which are searched once."""
    names = sorted({name for unit in units for name in unit.record_ids})
    return dataclasses.replace(units[0], record_ids=tuple(names))


def shard_ids_of(sequence: str, database: SearchedDatabase) -> tuple[str, ...]:
    """Returns the unit ids of one sequence in the shards of a database; none where there are no shards.

    They depend on no other shard: a release that keeps some files keeps their candidates.
    """
    tool = database.tool
    if not isinstance(tool, ShardedJackhmmer):
        return ()
    return tuple(unit_id_of(sequence, shard.digest, tool.scan_identity.digest) for shard in tool.shards)


def shard_units(unit: WorkUnit, context: JobContext) -> list[ShardUnit]:
    """Returns the parts of a unit that have to be done before it; none where its answer is there."""
    parts = _parts_of(unit, context)
    return [] if not parts or ResultStore(context.results_url).shows(unit.unit_id) else parts


def scan_batches(parts: Iterable[ShardUnit], context: JobContext) -> Iterator[list[ShardUnit]]:
    """Yields parts of one shard as batches to be scanned together; each alone where that saves nothing.

    Nothing is held beyond one batch.
    """
    batch: list[ShardUnit] = []
    for part in parts:
        tool = context.databases[part.unit.database_index].tool
        batch.append(part)
        assert isinstance(tool, ShardedJackhmmer), tool
        if len(batch) == tool.scanner.num_together:
            yield batch
            batch = []
    if batch:
        yield batch


def scan_group(part: ShardUnit, context: JobContext) -> tuple[int, int, int]:
    """Returns which parts may be scanned together: those of one shard, in a few groups by their sequences."""
    tool = context.databases[part.unit.database_index].tool
    assert isinstance(tool, ShardedJackhmmer), tool
    groups = context.num_groups if tool.scanner.few_batches else SCAN_GROUPS
    return part.unit.database_index, part.number, int(part.unit_id[:8], 16) % groups


def scan_shards(parts: Sequence[ShardUnit], context: JobContext) -> list[Receipt]:
    """Makes sure that the candidates of some queries in one shard are in the result store.

    Args:
      parts: of one shard.
      context: of the build.
    Returns: a receipt of each whole unit, which says why where its candidates are not there.

    Raises:
      StorageFullError: no space for the tool's files or for the candidates.
      CancelledError: the run was stopped.
    """
    results = ResultStore(context.results_url)
    missing = [part for part in parts if not results.holds(part.unit_id)]
    error = _keep_scanned(missing, context)
    left = [] if error is None else [part for part in missing if not results.holds(part.unit_id)]
    lost = {} if error is None else _scan_alone(left, error, context)
    return [lost.get(part.unit_id) or receipt_of(part.unit, "ok") for part in parts]


def _scan_alone(parts: Sequence[ShardUnit], error: SearchError, context: JobContext) -> dict[str, Receipt]:
    """Scans what a failed batch left one by one; returns receipts of those that fail so, too, by name.

    Where the file is to blame, or the first ones all fail, which means the machine, the others are not tried.
    """
    hopeless = len(parts) == 1 or isinstance(error, DatabaseChangedError | UnreadableDatabaseError)
    lost: dict[str, Receipt] = {}
    for number, part in enumerate(parts):
        hopeless = hopeless or len(lost) == number == LONE_FAILURES
        found = error if hopeless else _keep_scanned([part], context)
        if found is not None:
            lost[part.unit_id], error = receipt_of_failure(part.unit, context, found), found
    return lost


def _keep_scanned(parts: Sequence[ShardUnit], context: JobContext) -> SearchError | None:
    """Puts the candidates of parts of one shard into the result store; returns what ended that early."""
    try:
        for part, found in zip(parts, _scan(parts, context), strict=True):
            _keep_candidates(part, found, context)
    except SearchError as error:
        return error
    return None


def search_unit(unit: WorkUnit, context: JobContext, scans: Iterable[Receipt] = ()) -> Receipt:
    """Makes sure that the answer to a unit is in the result store, or says why it is not.

    Args:
      unit: what to search.
      context: of the build.
      scans: what came of its shards; one that failed fails the unit.
    Raises:
      StorageFullError: no space for the tool's files or for the answer.
      CancelledError: the run was stopped.
    """
    results = ResultStore(context.results_url)
    if results.holds(unit.unit_id):
        return receipt_of(unit, "ok")
    # In an order that does not depend on the engine; what will never work comes first.
    lost = sorted(
        (scan for scan in scans if scan.status != "ok"), key=lambda scan: (scan.status, scan.reason)
    )
    if lost:
        write_failure(lost[0], context)
        return lost[0]
    database = context.databases[unit.database_index]
    try:
        result = _search(unit, context)
        hits = read_hits(result, unit.sequence, database.max_hits)
    except (SearchError, AlignmentParseError) as error:
        receipt = receipt_of_failure(unit, context, error)
        write_failure(receipt, context)
        return receipt
    # Several files were scanned before, perhaps elsewhere; receipts of their candidates say by what.
    scan = database.tool.kernel_name if isinstance(database.tool, FastJackhmmer) else ""
    facts = facts_of(unit, context, database.name, database.digest, hits.num_hits, scan=scan)
    results.put(unit.unit_id, result, facts)
    return receipt_of(unit, "ok")


def failure_folder(context: JobContext) -> str:
    """Returns where the failed searches of a run are described, one file each."""
    return f"{context.run_folder}/failed"


def _search(unit: WorkUnit, context: JobContext) -> SearchResult:
    database = context.databases[unit.database_index]
    tool = database.tool
    if isinstance(tool, Mmseqs) and tool.first is not None:
        return _search_after(unit, tool, context)
    if not isinstance(tool, ShardedJackhmmer):
        with as_planned(database, context.results_url):
            return once_more_after_a_signal(lambda: tool.search(unit.sequence))
    candidates = [_candidates(part, context) for part in _parts_of(unit, context)]
    return once_more_after_a_signal(lambda: tool.join(unit.sequence, candidates))


def _search_after(unit: WorkUnit, tool: Mmseqs, context: JobContext) -> SearchResult:
    """Searches with the profile of the earlier search, which is done again where its answer is not kept."""
    database = context.databases[unit.database_index]
    first = first_of(unit, context)
    try:
        earlier = ResultStore(context.results_url).get(first.unit_id)
    except (KeyError, CorruptResultError):
        earlier = None
    with (
        as_planned(context.databases[first.database_index], context.results_url),
        as_planned(database, context.results_url),
    ):
        if earlier is None:
            return once_more_after_a_signal(lambda: tool.search(unit.sequence))
        return once_more_after_a_signal(lambda: tool.search_many([unit.sequence], [earlier])[0])


def first_of(unit: WorkUnit, context: JobContext) -> WorkUnit:
    """Returns the search of the same query that another one begins with, in the database that it is after."""
    after = context.databases[unit.database_index].after
    (index,) = (index for index, database in enumerate(context.databases) if database.name == after)
    database = context.databases[index]
    unit_id = unit_id_of(unit.sequence, database.digest, database.tool.identity.digest)
    return dataclasses.replace(unit, unit_id=unit_id, database_index=index)


def _parts_of(unit: WorkUnit, context: JobContext) -> list[ShardUnit]:
    ids = shard_ids_of(unit.sequence, context.databases[unit.database_index])
    return [ShardUnit(unit_id=name, number=number, unit=unit) for number, name in enumerate(ids)]


def _candidates(part: ShardUnit, context: JobContext) -> SearchResult:
    """Returns the candidates of a shard from the result store, after a search if they are not there."""
    try:
        return ResultStore(context.results_url).get(part.unit_id)
    except (KeyError, CorruptResultError):
        pass
    (found,) = _scan([part], context)
    _keep_candidates(part, found, context)
    return found


def _scan(parts: Sequence[ShardUnit], context: JobContext) -> Iterator[SearchResult]:
    """Yields the candidates of parts of one shard, each while the shard is still the planned one."""
    if not parts:
        return
    database = context.databases[parts[0].unit.database_index]
    tool, number = database.tool, parts[0].number
    assert isinstance(tool, ShardedJackhmmer), tool
    sequences = [part.unit.sequence for part in parts]
    many = tool.scan_many(sequences, number) if min(len(parts), tool.scanner.num_together) > 1 else None
    for sequence in sequences:
        with shard_as_planned(database, tool.shards[number], context.results_url):
            if many is None:
                found = once_more_after_a_signal(functools.partial(tool.scan, sequence, number))
            else:
                found = next(many)
        yield found


def _keep_candidates(part: ShardUnit, found: SearchResult, context: JobContext) -> None:
    database = context.databases[part.unit.database_index]
    tool = database.tool
    assert isinstance(tool, ShardedJackhmmer), tool
    name = f"{database.name}, shard {part.number + 1} of {len(tool.shards)}"
    digest = tool.shards[part.number].digest
    facts = facts_of(part.unit, context, name, digest, None, scan=tool.scanner.name_here)
    ResultStore(context.results_url).put(part.unit_id, found, facts)


def once_more_after_a_signal(search: Callable[[], T]) -> T:
    """Returns what a search gives, which is tried again where a signal killed it."""
    for left in reversed(range(ATTEMPTS_AFTER_SIGNAL)):
        try:
            return search()
        except ToolFailedError as error:
            if error.exit_code >= 0 or left == 0:
                raise
    raise AssertionError("the loop returns or raises")


def facts_of(
    unit: WorkUnit,
    context: JobContext,
    database: str,
    digest: str,
    num_hits: int | None,
    num_together: int | None = None,
    scan: str = "",
) -> SearchFacts:
    """Returns what a receipt says of a search beside its cost, as of now and here."""
    return SearchFacts(
        database=database,
        database_digest=digest,
        num_residues=len(unit.sequence),
        num_hits=num_hits,
        host=socket.gethostname(),
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        run_id=context.run_id,
        num_together=num_together,
        scan=scan,
    )


def receipt_of_failure(unit: WorkUnit, context: JobContext, error: Exception) -> Receipt:
    """Returns the receipt of a search that an error ended."""
    reason = f"search in {context.searched[unit.database_index].name!r}: {error}"
    return receipt_of(unit, _status(error), reason, type(error).__name__)


def _status(error: Exception) -> Status:
    killed = isinstance(error, ToolFailedError) and error.exit_code < 0
    passing = isinstance(error, ToolTimeoutError | DatabaseChangedError | DeviceError)
    return "retryable" if killed or passing else "poison"


def receipt_of(unit: WorkUnit, status: Status, reason: str = "", kind: str = "") -> Receipt:
    """Returns what came of a search."""
    return Receipt(
        unit_id=unit.unit_id,
        database_index=unit.database_index,
        record_ids=unit.record_ids,
        status=status,
        reason=reason,
        kind=kind,
    )


def write_failure(receipt: Receipt, context: JobContext) -> None:
    """Leaves a failed search in the run's folder, for the count and for people."""
    text = json.dumps({**dataclasses.asdict(receipt), "host": socket.gethostname()}, indent=1)
    blobs = open_blobs(context.results_url)
    blobs.write_atomic(f"{failure_folder(context)}/{receipt.unit_id}.json", text.encode())
