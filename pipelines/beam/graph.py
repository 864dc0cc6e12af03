"""The Beam graph of a build.

    file urls -> read -> entries -+-> dead letters ----------------------------------+
                                  +-> first of each id -+-> losers as dead letters --+
                                                        +-> units -> SEARCH -> receipts
                                                        |   (in a database of several files, before:
                                                        |    shard units -> by shard -> batches of
                                                        |    queries -> SCAN -> receipts, by unit;
                                                        |    where a tool takes many queries in a run:
                                                        |    by group of queries -> TOGETHER -> receipts)
                                                        +------------------------+
                                       complete? <- group by record <------------+
                                           |                                     |
                              (where there are templates, before:                |
                               template units -> SEARCH -> receipts,             |
                               complete? <- group by record)                     |
                                           |                                     |
                                  group by part number <-------------------------+
                                           |
                                       write part

Owns the wiring only: every DoFn is a shell over a function that is tested without Beam. Invariants: the
search has one small output, a receipt, and a barrier behind it, so an engine that runs a stage twice finds
the answers in the result store; nothing depends on bundle boundaries or on the order in which elements
arrive; alignments never travel through Beam.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.pipelines.beam.search_step import Searching, as_text
from foldfeed.pipelines.beam.template_graph import SearchTemplates
from foldfeed.pipelines.fasta import read_fasta
from foldfeed.pipelines.planning.packing import CommonWork, cost_of_scan, cost_of_unit
from foldfeed.pipelines.planning.plan import part_of, resolve_duplicates
from foldfeed.pipelines.records.parts import PartReceipt, completed, write_one_part
from foldfeed.pipelines.searches.search import (
    JobContext,
    Receipt,
    ShardUnit,
    WorkUnit,
    join_units,
    scan_batches,
    scan_group,
    scan_shards,
    search_unit,
    shard_ids_of,
    shard_units,
    work_units,
)
from foldfeed.pipelines.searches.together import group_of, search_together, searches_together, waits
from foldfeed.pipelines.sequences import DeadLetter, QuerySequence


class ReadFile(beam.DoFn):
    """(index, url) -> every entry of the file."""

    def __init__(self, max_residues: int) -> None:
        self._max_residues = max_residues
        # A worker may run elsewhere; paths are meant where the build was started.
        self._folder = os.getcwd()

    def process(self, element: tuple[int, str]) -> Iterator[QuerySequence | DeadLetter]:
        """Reads one file."""
        file_index, url = element
        try:
            yield from read_fasta(
                url, file_index=file_index, max_residues=self._max_residues, folder=self._folder
            )
        except FoldfeedError as error:
            raise as_text(error) from error


class _Packed(Searching):
    """A step whose threads search their elements together, the costliest first.

    The local runner gives each of its threads a bundle of elements at once. They are only collected then, and
    all threads search them together when their bundles are complete (`planning.packing`). Other
    engines have their own ways to balance: there an element is searched when it comes.
    """

    _waiting: list[tuple[int, Callable[[], list[tuple[str, Receipt]]]]]

    def start_bundle(self) -> None:
        """Forgets what a bundle that failed may have left."""
        self._waiting = []

    def _searched(
        self, unit: WorkUnit, cost: int, search: Callable[[], list[tuple[str, Receipt]]]
    ) -> list[tuple[str, Receipt]]:
        """Returns what a search gives, or nothing where it waits for the end of the bundle."""
        if not self._stop_together:
            return self.guarded(unit, search)
        self._waiting.append((cost, functools.partial(self.guarded, unit, search)))
        return []

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Searches what waits, together with the other threads."""
        if self._waiting:
            common = _common_work(type(self).__name__, self.context.run_id)
            for receipts in common.do(self._waiting):
                yield from map(GlobalWindows.windowed_value, receipts)


@functools.lru_cache(maxsize=8)
def _common_work(step: str, run_id: str) -> CommonWork[list[tuple[str, Receipt]]]:
    """Returns what the threads of one step of one run share."""
    return CommonWork()


class ScanShard(_Packed):
    """Shard units of one shard -> (id of the whole unit, a receipt) of each."""

    def process(self, element: list[ShardUnit]) -> list[tuple[str, Receipt]]:
        """Searches one shard for some queries, or finds their candidates in the result store."""
        cost = cost_of_scan(element, self.context.databases)
        return self._searched(element[0].unit, cost, functools.partial(self._scan, element))

    def _scan(self, parts: list[ShardUnit]) -> list[tuple[str, Receipt]]:
        return [(receipt.unit_id, receipt) for receipt in scan_shards(parts, self.context)]


class SearchTogether(Searching):
    """(group, its searches without an answer) -> (unit id, receipt) of each."""

    def process(self, element: tuple[tuple[int, int], Iterable[WorkUnit]]) -> Iterator[tuple[str, Receipt]]:
        """Searches the queries of a group in one run of the tool."""
        units = list(element[1])
        for receipt in self.guarded(units[0], lambda: search_together(units, self.context)):
            yield receipt.unit_id, receipt


class SearchUnit(_Packed):
    """(unit id, the unit and the receipts of what was searched before) -> one receipt."""

    def process(self, element: tuple[str, tuple[WorkUnit, Iterable[Receipt]]]) -> list[tuple[str, Receipt]]:
        """Searches, or finds the answer in the result store."""
        _, (unit, scans) = element
        cost = cost_of_unit(unit, self.context.databases)
        return self._searched(unit, cost, functools.partial(self._search, unit, tuple(scans)))

    def _search(self, unit: WorkUnit, scans: tuple[Receipt, ...]) -> list[tuple[str, Receipt]]:
        return [(unit.unit_id, search_unit(unit, self.context, scans))]


class WritePart(beam.DoFn):
    """(part number, its entries) -> the part's receipt; alignments are read from the result store."""

    def __init__(self, context: JobContext) -> None:
        self._context = context

    def process(
        self, element: tuple[int, Iterable[QuerySequence | DeadLetter | None]]
    ) -> Iterator[PartReceipt]:
        """Writes one part."""
        part, entries = element
        what = f"part {part} of {self._context.num_parts}"
        try:
            yield write_one_part(part, [entry for entry in entries if entry is not None], self._context)
        except FoldfeedError as error:
            raise as_text(error, what) from error


def _is_query(entry: QuerySequence | DeadLetter) -> bool:
    return isinstance(entry, QuerySequence)


def _is_dead(entry: QuerySequence | DeadLetter) -> bool:
    return isinstance(entry, DeadLetter)


def _by_record(query: QuerySequence) -> tuple[str, QuerySequence]:
    return query.record_id, query


def _first_and_letters(element: tuple[str, Iterable[QuerySequence]]) -> list[QuerySequence | DeadLetter]:
    winner, letters = resolve_duplicates(element[1])
    return [winner, *letters]


def _units(query: QuerySequence, context: JobContext) -> list[tuple[str, WorkUnit]]:
    return [(unit.unit_id, unit) for unit in work_units(query, context.databases)]


def _joined(element: tuple[str, Iterable[WorkUnit]]) -> tuple[str, WorkUnit]:
    return element[0], join_units(list(element[1]))


def _without_scans(element: tuple[str, WorkUnit]) -> tuple[str, tuple[WorkUnit, tuple[Receipt, ...]]]:
    return element[0], (element[1], ())


def _shard_units(element: tuple[str, WorkUnit], context: JobContext) -> list[ShardUnit]:
    return shard_units(element[1], context)


def _by_group(part: ShardUnit, context: JobContext) -> tuple[tuple[int, int, int], ShardUnit]:
    return scan_group(part, context), part


def _batches(
    element: tuple[tuple[int, int, int], Iterable[ShardUnit]], context: JobContext
) -> Iterator[list[ShardUnit]]:
    return scan_batches(element[1], context)


def _by_query_group(
    element: tuple[str, WorkUnit], context: JobContext
) -> list[tuple[tuple[int, int], WorkUnit]]:
    group = group_of(element[1], context)
    return [(group, element[1])] if group is not None and waits(element[1], context) else []


def _with_scans(
    element: tuple[str, dict[str, Iterable[Any]]],
) -> tuple[str, tuple[WorkUnit, tuple[Receipt, ...]]]:
    (unit,) = element[1]["unit"]
    return element[0], (unit, tuple(element[1]["scans"]))


def _receipts_by_record(element: tuple[str, Receipt]) -> list[tuple[str, Receipt]]:
    return [(record_id, element[1]) for record_id in element[1].record_ids]


def _completed(
    element: tuple[str, dict[str, Iterable[Any]]], context: JobContext
) -> QuerySequence | DeadLetter:
    (query,) = element[1]["query"]
    return completed(query, element[1]["receipts"], context)


def _by_part(entry: QuerySequence | DeadLetter, num_parts: int) -> tuple[int, QuerySequence | DeadLetter]:
    return part_of(entry.record_id, num_parts), entry


def _empty_part(part: int) -> tuple[int, None]:
    return part, None


class ReadQueries(beam.PTransform):
    """File urls -> entries, of which only the first of each id is still a query."""

    def __init__(self, urls: Sequence[str], max_residues: int) -> None:
        super().__init__()
        self._urls = list(urls)
        self._max_residues = max_residues

    def expand(self, root: beam.pvalue.PBegin) -> tuple[beam.PCollection, beam.PCollection]:
        """Returns queries and dead letters."""
        entries = (
            root
            | "Files" >> beam.Create(list(enumerate(self._urls)))
            | "Read" >> beam.ParDo(ReadFile(self._max_residues))
        )
        rejects = entries | "Rejects" >> beam.Filter(_is_dead)
        resolved = (
            entries
            | "Valid" >> beam.Filter(_is_query)
            | "KeyById" >> beam.Map(_by_record).with_output_types(tuple[str, QuerySequence])
            | "GroupById" >> beam.GroupByKey()
            | "FirstWins" >> beam.FlatMap(_first_and_letters)
        )
        queries = resolved | "Queries" >> beam.Filter(_is_query)
        losers = resolved | "Losers" >> beam.Filter(_is_dead)
        return queries, (rejects, losers) | "DeadOnRead" >> beam.Flatten()


class SearchAll(beam.PTransform):
    """Queries -> queries that every database answered, and dead letters for the others."""

    def __init__(self, context: JobContext, stop_together: bool, hints: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context
        self._stop_together = stop_together
        self._hints = hints

    def expand(self, queries: beam.PCollection) -> beam.PCollection:
        """Returns complete queries and dead letters in one collection."""
        units = (
            queries
            | "Units" >> beam.FlatMap(_units, self._context).with_output_types(tuple[str, WorkUnit])
            # Grouping by unit both merges equal sequences and spreads the searches over the workers.
            | "GroupByUnit" >> beam.GroupByKey()
            | "JoinUnits" >> beam.Map(_joined).with_output_types(tuple[str, WorkUnit])
        )
        receipts = (
            self._with_scans(units)
            | "Search"
            >> beam.ParDo(SearchUnit(self._context, self._stop_together))
            .with_output_types(tuple[str, Receipt])
            .with_resource_hints(**self._hints)
            | "Receipts" >> beam.Reshuffle()
            | "ReceiptsByRecord" >> beam.FlatMap(_receipts_by_record).with_output_types(tuple[str, Receipt])
        )
        keyed = queries | "ByRecord" >> beam.Map(_by_record).with_output_types(tuple[str, QuerySequence])
        return (
            {"query": keyed, "receipts": receipts}
            | "GroupByRecord" >> beam.CoGroupByKey()
            | "Completed" >> beam.Map(_completed, self._context)
        )

    def _with_scans(self, units: beam.PCollection) -> beam.PCollection:
        """Returns (unit id, (unit, receipts)), after shards were searched, and groups of queries."""
        scans = []
        if any(shard_ids_of("", database) for database in self._context.databases):
            scans.append(self._shards(units))
        if searches_together(self._context.databases):
            scans.append(self._together(units))
        if not scans:
            return units | "NoShards" >> beam.Map(_without_scans)
        every = scans[0] if len(scans) == 1 else tuple(scans) | "AllScans" >> beam.Flatten()
        return (
            {"unit": units, "scans": every}
            | "GroupShards" >> beam.CoGroupByKey()
            | "WithScans" >> beam.Map(_with_scans)
        )

    def _together(self, units: beam.PCollection) -> beam.PCollection:
        """Returns receipts by unit of what one run of a tool searches for many queries."""
        return (
            units
            | "ByQueryGroup"
            >> beam.FlatMap(_by_query_group, self._context).with_output_types(
                tuple[tuple[int, int], WorkUnit]
            )
            | "GroupQueries" >> beam.GroupByKey()
            | "SpreadGroups" >> beam.Reshuffle()
            | "SearchTogether"
            >> beam.ParDo(SearchTogether(self._context, self._stop_together))
            .with_output_types(tuple[str, Receipt])
            .with_resource_hints(**self._hints)
        )

    def _shards(self, units: beam.PCollection) -> beam.PCollection:
        """Returns receipts by unit of what was searched shard by shard."""
        return (
            units
            | "ShardUnits" >> beam.FlatMap(_shard_units, self._context)
            | "ByGroup"
            >> beam.Map(_by_group, self._context).with_output_types(tuple[tuple[int, int, int], ShardUnit])
            | "GroupScans" >> beam.GroupByKey()
            | "ScanBatches" >> beam.FlatMap(_batches, self._context)
            | "SpreadScans" >> beam.Reshuffle()
            | "ScanShards"
            >> beam.ParDo(ScanShard(self._context, self._stop_together))
            .with_output_types(tuple[str, Receipt])
            .with_resource_hints(**self._hints)
        )


class WriteParts(beam.PTransform):
    """Complete queries and dead letters -> receipts of all parts, empty ones among them."""

    def __init__(self, context: JobContext) -> None:
        super().__init__()
        self._context = context

    def expand(self, entries: beam.PCollection) -> beam.PCollection:
        """Returns the receipts."""
        num_parts = self._context.num_parts
        keyed = entries | "ByPart" >> beam.Map(_by_part, num_parts).with_output_types(tuple[int, Any])
        # An entry for every part number, so that a part without records still leaves a receipt.
        anchors = (
            entries.pipeline
            | "PartNumbers" >> beam.Create([0])
            | "AllParts" >> beam.FlatMap(_part_numbers, num_parts)
            | "EmptyParts" >> beam.Map(_empty_part).with_output_types(tuple[int, Any])
        )
        return (
            (keyed, anchors)
            | "WithEmpty" >> beam.Flatten()
            | "GroupByPart" >> beam.GroupByKey()
            | "WritePart" >> beam.ParDo(WritePart(self._context))
        )


def _part_numbers(_: int, num_parts: int) -> range:
    return range(num_parts)


def build_graph(
    pipeline: beam.Pipeline,
    urls: Sequence[str],
    context: JobContext,
    *,
    stop_together: bool,
    hints: Mapping[str, str],
) -> None:
    """Adds the whole build to a pipeline.

    Args:
      pipeline: an empty one.
      urls: FASTA files.
      context: of the build.
      stop_together: see `SearchUnit`.
      hints: Beam's resource hints of the steps that search. An engine gives these steps workers of their own
        then, also one that uses no hints, so only engines that use them get any.
    """
    queries, dead = pipeline | "ReadQueries" >> ReadQueries(urls, context.max_residues)
    searched = queries | "SearchAll" >> SearchAll(context, stop_together, hints)
    if context.templates is not None:
        searched = searched | "AllTemplates" >> SearchTemplates(context, stop_together, hints)
    entries = (searched, dead) | "AllEntries" >> beam.Flatten()
    _ = entries | "WriteParts" >> WriteParts(context)
