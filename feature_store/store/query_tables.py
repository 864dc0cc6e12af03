"""The tables that SQL over records can name, each read only when a query names it.

Owns which tables there are and which records each is made of. Does not own how they are read (`parts`,
`record_sets`, `splits`) nor SQL (`store.sql`). Invariant: a table shows the records of the source it was made
for, at that source's version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.parts.residue_scan import RESIDUES_SCHEMA, residue_batches
from foldfeed.feature_store.parts.row_scan import ROWS_SCHEMA, row_batches
from foldfeed.feature_store.parts.template_scan import TEMPLATES_SCHEMA, template_batches
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.store import record_sets, splits
from foldfeed.feature_store.store.record_sets import RecordSet
from foldfeed.feature_store.store.splits import Split
from foldfeed.feature_store.store.sql import LazyTable
from foldfeed.feature_store.store.structure_table import STRUCTURES_SCHEMA, structure_batches

SETS_SCHEMA = pa.schema([("name", pa.string()), *record_sets.SCHEMA])
SPLITS_SCHEMA = pa.schema([("name", pa.string()), *splits.SCHEMA])
# What lies beside a record rather than in the index.
PER_RECORD = ("rows", "residues", "structures", "templates")


class _Source(Protocol):
    """What the tables are made of."""

    def index_rows(self) -> pa.Table: ...
    def set_names(self) -> list[str]: ...
    def set(self, name: str) -> RecordSet: ...
    def split_names(self) -> list[str]: ...
    def split(self, name: str) -> Split: ...


def lazy_tables(
    source: _Source, files: Callable[[], Blobs], allowed: Sequence[str] | None
) -> dict[str, LazyTable]:
    """Returns the tables of a source by name, those of `PER_RECORD` and the saved names.

    Args:
      source: of the records.
      files: gives the store's files.
      allowed: the only records of which `PER_RECORD` shall hold anything; all when None.
    """

    def records(only: frozenset[str] | None) -> pa.Table:
        index = source.index_rows()
        for names in (allowed, only):
            if names is not None:
                index = index.filter(pc.is_in(index["record_id"], pa.array(sorted(names), pa.string())))
        return index

    def set_batches(_: frozenset[str] | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for name in source.set_names():
            yield from _named(name, source.set(name).table, columns)

    def split_batches(_: frozenset[str] | None, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for name in source.split_names():
            yield from _named(name, source.split(name).table, columns)

    key = "record_id"
    return {
        "rows": LazyTable(
            ROWS_SCHEMA, lambda only, columns: row_batches(files(), records(only), columns), key
        ),
        "residues": LazyTable(
            RESIDUES_SCHEMA, lambda only, columns: residue_batches(files(), records(only), columns), key
        ),
        "structures": LazyTable(
            STRUCTURES_SCHEMA, lambda only, columns: structure_batches(files(), records(only), columns), key
        ),
        "templates": LazyTable(
            TEMPLATES_SCHEMA, lambda only, columns: template_batches(files(), records(only), columns), key
        ),
        "sets": LazyTable(SETS_SCHEMA, set_batches),
        "splits": LazyTable(SPLITS_SCHEMA, split_batches),
    }


def _named(name: str, table: pa.Table, columns: Sequence[str]) -> list[pa.RecordBatch]:
    return table.add_column(0, "name", pa.repeat(name, len(table))).select(columns).to_batches()
