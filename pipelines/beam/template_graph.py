"""The part of a build's Beam graph that searches templates, behind the searches of alignments.

    complete queries -> template units -> by unit -> SEARCH -> receipts -> by record -> complete? -> queries

Owns the wiring only, as `beam.graph` does, which joins it in where a build has templates: a
build without them has the same graph as before. Invariants are those of that module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam

from foldfeed.pipelines.beam.search_step import Searching
from foldfeed.pipelines.records.parts import completed
from foldfeed.pipelines.searches.search import JobContext, Receipt, WorkUnit, join_units
from foldfeed.pipelines.searches.template_search import search_template_unit, template_unit
from foldfeed.pipelines.sequences import DeadLetter, QuerySequence


class SearchTemplateUnit(Searching):
    """(unit id, unit) -> (unit id, receipt)."""

    def process(self, element: tuple[str, WorkUnit]) -> Iterator[tuple[str, Receipt]]:
        """Searches, or finds the answer in the result store."""
        name, unit = element
        yield name, self.guarded(unit, lambda: search_template_unit(unit, self.context))


def _by_unit(query: QuerySequence, context: JobContext) -> tuple[str, WorkUnit]:
    unit = template_unit(query, context)
    return unit.unit_id, unit


def _joined(element: tuple[str, Iterable[WorkUnit]]) -> tuple[str, WorkUnit]:
    return element[0], join_units(list(element[1]))


def _receipts_by_record(element: tuple[str, Receipt]) -> list[tuple[str, Receipt]]:
    return [(record_id, element[1]) for record_id in element[1].record_ids]


def _by_record(query: QuerySequence) -> tuple[str, QuerySequence]:
    return query.record_id, query


def _is_query(entry: QuerySequence | DeadLetter) -> bool:
    return isinstance(entry, QuerySequence)


def _is_dead(entry: QuerySequence | DeadLetter) -> bool:
    return isinstance(entry, DeadLetter)


def _completed(
    element: tuple[str, dict[str, Iterable[Any]]], context: JobContext
) -> QuerySequence | DeadLetter:
    (query,) = element[1]["query"]
    return completed(query, element[1]["receipts"], context, [len(context.databases)])


class SearchTemplates(beam.PTransform):
    """Queries whose alignments are there, and dead letters -> the same, fewer queries where searches fail."""

    def __init__(self, context: JobContext, stop_together: bool, hints: Mapping[str, str]) -> None:
        super().__init__()
        self._context = context
        self._stop_together = stop_together
        self._hints = hints

    def expand(self, entries: beam.PCollection) -> beam.PCollection:
        """Returns complete queries and dead letters in one collection."""
        queries = entries | "WithAlignment" >> beam.Filter(_is_query)
        receipts = (
            queries
            | "TemplateUnits" >> beam.Map(_by_unit, self._context).with_output_types(tuple[str, WorkUnit])
            # As of alignments: merges equal sequences and spreads the searches over the workers.
            | "GroupByTemplateUnit" >> beam.GroupByKey()
            | "JoinTemplateUnits" >> beam.Map(_joined).with_output_types(tuple[str, WorkUnit])
            | "SearchTemplates"
            >> beam.ParDo(SearchTemplateUnit(self._context, self._stop_together))
            .with_output_types(tuple[str, Receipt])
            .with_resource_hints(**self._hints)
            | "TemplateReceipts" >> beam.Reshuffle()
            | "TemplateReceiptsByRecord"
            >> beam.FlatMap(_receipts_by_record).with_output_types(tuple[str, Receipt])
        )
        keyed = queries | "TemplatesByRecord" >> beam.Map(_by_record).with_output_types(
            tuple[str, QuerySequence]
        )
        complete = (
            {"query": keyed, "receipts": receipts}
            | "GroupTemplatesByRecord" >> beam.CoGroupByKey()
            | "WithTemplates" >> beam.Map(_completed, self._context)
        )
        dead = entries | "WithoutAlignment" >> beam.Filter(_is_dead)
        return (complete, dead) | "TemplatesOrDead" >> beam.Flatten()
