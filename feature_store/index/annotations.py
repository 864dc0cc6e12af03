"""Columns of one's own in the index: cluster, release date, whatever a lab wants to ask by.

Owns the rules for such columns. Does not own transactions (`index`). Invariant: annotating changes neither
what a record says nor its fingerprint; columns of the format cannot be set this way.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import CommitConflictError, RecordNotFoundError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.index.transactions import CommitResult, Index


def annotate(index: Index, columns: pa.Table, *, job_id: str, message: str) -> CommitResult:
    """Sets columns for the records that a table names; see `FeatureStore.annotate`."""
    names = [name for name in columns.column_names if name != "record_id"]
    ids = columns["record_id"] if "record_id" in columns.column_names else None
    if ids is None or not names:
        raise ValueError(
            f"the table has columns {columns.column_names}; give record_id and the columns to set"
        )
    own = [name for name in names if name in INDEX_SCHEMA.names]
    if own:
        raise CommitConflictError(
            f"column {own[0]!r} belongs to the format and cannot be set; use another name"
        )
    if pc.count_distinct(ids).as_py() != len(ids):
        raise CommitConflictError("a record id occurs more than once in the table; give each record one row")
    index.add_columns([columns.schema.field(name) for name in names])

    def change(rows: pa.Table) -> pa.Table:
        position = pc.index_in(ids, value_set=rows["record_id"])
        absent = ids.filter(pc.is_null(position))
        if len(absent):
            raise RecordNotFoundError(absent[0].as_py())
        source = pc.index_in(rows["record_id"], value_set=ids)
        for name in names:
            at = rows.schema.get_field_index(name)
            values = columns[name].cast(rows.schema.field(name).type).take(source)
            rows = rows.set_column(at, rows.schema.field(name), values)
        return rows

    return index.update(ids.to_pylist(), change, operation="annotate", job_id=job_id, message=message)
