"""From stored search results to the record that goes into the feature store.

Owns the step "results of all databases -> `MsaRecord`". Does not own merging rules
(`records.msa`) or the array format (`foldfeed.feature_store`). Invariant: a record depends on
the query, the results and the caps only, so a build done again gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from foldfeed.feature_store.format.record import DatabaseUse, MsaRecord
from foldfeed.pipelines.records.msa import merge
from foldfeed.pipelines.searches.hits import read_hits
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, SearchResult


def build_record(
    query: QuerySequence,
    databases: Sequence[SearchedDatabase],
    results: Sequence[SearchResult],
    *,
    taxonomy_ids: bool = False,
) -> MsaRecord:
    """Returns the record of one query.

    Args:
      query: what was searched.
      databases: in merge order.
      results: one per database.
      taxonomy_ids: keep those of the rows.
    Raises:
      AlignmentParseError, ToolOutputError: a tool's alignment cannot be used.
      InvalidRecordError: the store's format cannot hold the record.
    """
    caps = [database.max_hits for database in databases]
    hits = [read_hits(result, query.sequence, cap) for result, cap in zip(results, caps, strict=True)]
    merged = merge(query.sequence, hits, caps)
    uses = tuple(
        DatabaseUse(
            name=database.name,
            digest=database.digest,
            tool=result.tool.name,
            tool_version=result.tool.version,
            num_hits=one.num_hits,
            num_rows=num_rows,
        )
        for database, result, one, num_rows in zip(databases, results, hits, merged.num_rows, strict=True)
    )
    return MsaRecord(
        record_id=query.record_id,
        description=query.description,
        sequence=query.sequence,
        msa=merged.msa,
        deletions=merged.deletions,
        # The tools knew the query by a neutral name, because records of equal sequence share their results.
        rows=dataclasses.replace(
            merged.rows,
            hit_id=[query.record_id, *merged.rows.hit_id[1:]],
            taxonomy_id=merged.rows.taxonomy_id if taxonomy_ids else None,
        ),
        databases=uses,
    ).with_neff()
