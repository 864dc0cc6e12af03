"""One task's share of the searches of a build, for job arrays: who searches what, without asking anybody.

Owns the split. Does not own searching (`building.array_task`). Invariants: the shares of tasks 0 to
N - 1 are disjoint and together all searches; they depend on queries, databases and N alone, never on what is
done already, so tasks that start at different times, or twice, agree.

Every database is dealt out by itself, the costliest search first, each to the task with the least so far:
then no task has more than one search above its share of any database, whatever a search with one tool costs
beside one with another. Memory: about 200 bytes per distinct search.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
from collections.abc import Iterator, Mapping, Sequence

from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.planning.packing import predicted_cost
from foldfeed.pipelines.planning.plan import read_queries
from foldfeed.pipelines.searches.search import (
    ShardUnit,
    WorkUnit,
    join_units,
    shard_ids_of,
    units_of,
    work_units,
)
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.search_tool import SearchedDatabase
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One task of an array.

    Attributes:
      task: its number, 0 to tasks - 1.
      tasks: how many there are.
    """

    task: int
    tasks: int

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ConfigError(f"--tasks is {self.tasks}; an array has at least 1 task")
        if not 0 <= self.task < self.tasks:
            raise ConfigError(
                f"--task is {self.task}; with --tasks {self.tasks} it must be 0 to {self.tasks - 1}. When "
                "one task of an array is started again, --tasks stays that of the whole array"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """What a task searches in one go.

    Attributes:
      unit: a search.
      part: the file of its database that is meant, where the database has several; else None.
    """

    unit: WorkUnit
    part: ShardUnit | None

    @property
    def unit_id(self) -> str:
        """Its name in the result store."""
        return self.unit.unit_id if self.part is None else self.part.unit_id


def items_of(
    urls: Sequence[str], databases: tuple[SearchedDatabase, ...], max_residues: int, share: Share
) -> list[WorkItem]:
    """Returns what one task searches, the costliest first; reads the queries twice.

    Args:
      urls: FASTA files.
      databases: in merge order.
      max_residues: longer queries are not searched.
      share: whose.
    """
    lengths: list[dict[str, int]] = [{} for _ in databases]
    for query in queries_of(urls, max_residues):
        for known, unit_id in zip(lengths, units_of(query.sequence, databases), strict=True):
            known[unit_id] = len(query.sequence)
    mine = deal(lengths, databases, share)
    units: dict[str, WorkUnit] = {}
    for query in queries_of(urls, max_residues):
        of_query = work_units(query, databases)
        _follow(of_query, databases, mine)
        for unit in of_query:
            if (unit.database_index, unit.unit_id) in mine:
                there = units.get(unit.unit_id)
                units[unit.unit_id] = unit if there is None else join_units([there, unit])
    items = [
        (cost, WorkItem(unit=units[name], part=_part(units[name], number, databases)))
        for (_, name), parts in mine.items()
        for number, cost in parts
    ]
    return [item for _, item in sorted(items, key=lambda pair: (-pair[0], pair[1].unit_id))]


def deal(
    lengths: Sequence[Mapping[str, int]], databases: Sequence[SearchedDatabase], share: Share
) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Returns what falls to one task: (database, unit id) -> (number of the file, cost) of each.

    Args:
      lengths: by database, residues of the query of every distinct search.
      databases: of the build; what is searched after another one goes with that, see `items_of`.
      share: whose.
    """
    mine: dict[tuple[int, str], list[tuple[int, int]]] = {}
    totals = [0] * share.tasks
    for index, (known, database) in enumerate(zip(lengths, databases, strict=True)):
        if database.after:
            continue
        # Among tasks that have equally much of this database the one goes first that has less of all.
        heap = [(0, total, task) for task, total in enumerate(totals)]
        heapq.heapify(heap)
        for cost, unit_id, number in _by_cost(known, database):
            load, total, task = heapq.heappop(heap)
            heapq.heappush(heap, (load + cost, total + cost, task))
            totals[task] += cost
            if task == share.task:
                mine.setdefault((index, unit_id), []).append((number, cost))
    return mine


def _follow(
    units: Sequence[WorkUnit],
    databases: Sequence[SearchedDatabase],
    mine: dict[tuple[int, str], list[tuple[int, int]]],
) -> None:
    """Adds to a task's share the searches of a query that come after one of the share."""
    for unit in units:
        after = databases[unit.database_index].after
        for first in units if after else ():
            key = (first.database_index, first.unit_id)
            if databases[first.database_index].name == after and key in mine:
                mine[unit.database_index, unit.unit_id] = mine[key]


def _by_cost(known: Mapping[str, int], database: SearchedDatabase) -> Iterator[tuple[int, str, int]]:
    """Yields (cost, unit id, number of the file) from the costliest on; equal ones by name."""
    tool = database.tool
    if isinstance(tool, ShardedJackhmmer):
        sizes = [os.path.getsize(shard.path) for shard in tool.shards]
    else:
        sizes = [1]
    costs = [
        (-predicted_cost(residues, size), unit_id, number)
        for unit_id, residues in known.items()
        for number, size in enumerate(sizes)
    ]
    costs.sort()
    return ((-cost, unit_id, number) for cost, unit_id, number in costs)


def shard_units_of(unit: WorkUnit, databases: Sequence[SearchedDatabase]) -> list[ShardUnit]:
    """Returns the parts of a search, by number; none where its database is one file."""
    ids = shard_ids_of(unit.sequence, databases[unit.database_index])
    return [ShardUnit(unit_id=name, number=number, unit=unit) for number, name in enumerate(ids)]


def sharded_units(
    urls: Sequence[str], databases: tuple[SearchedDatabase, ...], max_residues: int
) -> Iterator[WorkUnit]:
    """Yields the distinct searches in databases of several files; reads the queries once if there are any."""
    if not any(shard_ids_of("", database) for database in databases):
        return
    seen: set[str] = set()
    for query in queries_of(urls, max_residues):
        for unit in work_units(query, databases):
            sharded = isinstance(databases[unit.database_index].tool, ShardedJackhmmer)
            if sharded and unit.unit_id not in seen:
                seen.add(unit.unit_id)
                yield unit


def _part(unit: WorkUnit, number: int, databases: Sequence[SearchedDatabase]) -> ShardUnit | None:
    parts = shard_units_of(unit, databases)
    return parts[number] if parts else None


def queries_of(urls: Sequence[str], max_residues: int) -> Iterator[QuerySequence]:
    """Yields the entries that are searched: valid, the first of their id."""
    seen: set[str] = set()
    for entry in read_queries(urls, max_residues):
        if isinstance(entry, QuerySequence) and entry.record_id not in seen:
            seen.add(entry.record_id)
            yield entry
