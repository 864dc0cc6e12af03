"""What all readable versions of a store name, together: which rows, in which parts, shown by which versions.

Owns the way from the log to the parts that anybody can still open. Does not own the checks. Reads every index
file that a readable version needs once, and gives each record's place once, however many versions show it.
Which versions are readable: those from ``retention.json`` on, tagged ones, and the newest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.care.verify_index import NeededFile
from foldfeed.feature_store.care.verify_parts import Problem
from foldfeed.feature_store.errors import CorruptDataError, FormatVersionError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.index.files import read_files
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.store import named_tables, record_sets
from foldfeed.feature_store.store.feature_store import PLACE_COLUMNS

# Rows that agree in these lie at the same place and say the same.
_IDENTITY = [*PLACE_COLUMNS, "fingerprint"]
_POSITION = "position"
# About so many rows are compared at once with those before: of small files each would cost as much.
_COMPARED_ROWS = 1 << 17


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NamedRows:
    """What the readable versions name.

    Attributes:
      rows: of the index, each place of a record once, in no order.
      spans: the first and the last readable version that shows a part, by part.
      problems: index files that cannot be read; what only they name is not in ``rows``.
    """

    rows: pa.Table
    spans: Mapping[str, tuple[int, int]]
    problems: tuple[Problem, ...]

    @property
    def num_records(self) -> int:
        """Records, each content of an id counted once."""
        return pc.count_distinct(_content(self.rows)).as_py()


def named_rows(blobs: Blobs, index_schema: pa.Schema, needed: Mapping[str, NeededFile]) -> NamedRows:
    """Returns what index files name.

    Args:
      blobs: the store's files.
      index_schema: columns of the newest version.
      needed: files by name, with the versions that show them.
    """
    schema = pa.schema([index_schema.field(name) for name in INDEX_SCHEMA.names])
    kept, waiting = [schema.empty_table()], []
    seen = kept[0].select(_IDENTITY)
    spans: dict[str, tuple[int, int]] = {}
    problems = []
    for name, file in sorted(needed.items()):
        try:
            table = read_files(blobs, [name], schema)
        except CorruptDataError as error:
            problems.append(Problem(where=error.where, reason=error.reason, versions=file.versions))
            continue
        for part_id in table["part_id"].unique().to_pylist():
            first, last = spans.get(part_id, file.versions)
            spans[part_id] = min(first, file.versions[0]), max(last, file.versions[1])
        waiting.append(table)
        if sum(map(len, waiting)) > len(seen) // 4 + _COMPARED_ROWS:
            kept.append(_unseen(seen, waiting))
            seen, waiting = pa.concat_tables([seen, kept[-1].select(_IDENTITY)]), []
    kept += [_unseen(seen, waiting)] if waiting else []
    return NamedRows(rows=pa.concat_tables(kept), spans=spans, problems=tuple(problems))


def stale_sets(blobs: Blobs, settings: StoreSettings, named: NamedRows) -> tuple[str, ...]:
    """Returns the record sets of which a record is, as it was saved, in none of the versions."""
    here = _content(named.rows)
    stale = []
    for name in named_tables.names(blobs, record_sets.FOLDER):
        try:
            found = record_sets.load(blobs, settings, name)
        except (CorruptDataError, FormatVersionError):
            # `check_names` reports it.
            continue
        if not pc.all(pc.is_in(_content(found.table), value_set=here)).as_py():
            stale.append(name)
    return tuple(stale)


def _unseen(seen: pa.Table, tables: Sequence[pa.Table]) -> pa.Table:
    """Returns the rows of tables whose identity is not among those seen, each once."""
    rows = pa.concat_tables(tables)
    keys = pa.concat_tables([seen, rows.select(_IDENTITY)])
    positions = pa.array(np.arange(len(keys)))
    keys = keys.append_column(_POSITION, positions).group_by(_IDENTITY, use_threads=False)
    keys = keys.aggregate([(_POSITION, "min")])
    firsts = keys[f"{_POSITION}_min"].combine_chunks()
    return rows.filter(pc.is_in(positions.slice(len(seen)), value_set=firsts))


def _content(rows: pa.Table) -> pa.ChunkedArray:
    """Returns id and fingerprint of each row as one text."""
    return pc.binary_join_element_wise(rows["record_id"], rows["fingerprint"], "\0")
