"""SQL over the index, by DuckDB on Arrow.

Owns one rule: a query reads the table ``records`` and nothing else. DuckDB's access to files, the network and
its own settings is switched off before user text reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import pyarrow as pa

from foldfeed.feature_store.errors import QueryError

TABLE = "records"


def sql(rows: pa.Table, text: str) -> pa.Table:
    """Returns the answer of a query over ``records``.

    Args:
      rows: what ``records`` holds.
      text: one SQL query in DuckDB's dialect.
    Raises:
      QueryError: DuckDB refuses it; its own message is kept.
    """
    with duckdb.connect(":memory:", config={"enable_external_access": "false"}) as connection:
        # Only the registered table can be reached; not a Python variable that happens to be called the same.
        connection.execute("SET python_enable_replacements = false")
        connection.execute("SET lock_configuration = true")
        connection.register(TABLE, rows)
        try:
            relation = connection.sql(text)
            if relation is None:
                raise QueryError(f"{text!r} is not a query; give one SELECT over the table {TABLE!r}")
            return relation.to_arrow_table()
        except duckdb.Error as error:
            # DuckDB's first line says what is wrong; the lines after it draw an arrow under the text.
            columns = ", ".join(rows.column_names)
            message = str(error).splitlines()[0].rstrip(".")
            raise QueryError(f"{message}. The table is {TABLE!r} with columns {columns}.") from error


def table(rows: pa.Table, columns: Sequence[str] | None, where: str | None) -> pa.Table:
    """Returns some columns of the rows that a condition keeps, in the order of ``rows``.

    Args:
      rows: the index, sorted.
      columns: names; all when None.
      where: an SQL condition; every row when None.
    Raises:
      QueryError: an unknown column, or DuckDB refuses the condition.
    """
    unknown = [name for name in columns or () if name not in rows.column_names]
    if unknown:
        raise QueryError(f"no column {unknown[0]!r}; the index has {', '.join(rows.column_names)}")
    if where is not None:
        rows = sql(rows, f"select * from {TABLE} where ({where}) order by record_id").cast(rows.schema)
    return rows.select(list(columns)) if columns is not None else rows
