"""Columns that readers of an index ask for by name: its own, and ``extra.KEY`` for a fact of every record."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from foldfeed.feature_store.errors import QueryError

RELEASE_DATE = "release_date"
EXTRA_PREFIX = "extra."
# Key of a record's `extra`: the complex whose chains its pairing keys pair it with.
ASSEMBLY = "assembly"


def column_values(index: pa.Table, name: str) -> list[Any]:
    """Returns a column of the index, or with ``extra.KEY`` that fact of every record (None where absent).

    Raises:
      QueryError: no such column.
    """
    if name.startswith(EXTRA_PREFIX):
        key = name.removeprefix(EXTRA_PREFIX)
        return [json.loads(text).get(key) for text in index["extra"].to_pylist()]
    if name not in index.column_names:
        raise QueryError(
            f"no column {name!r}; the index has {', '.join(index.column_names)} and {EXTRA_PREFIX}KEY"
        )
    return index[name].to_pylist()
