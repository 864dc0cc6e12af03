"""SQL over a store, by DuckDB on Arrow.

Owns two rules. A query reads the tables it is given and nothing else: DuckDB's access to files, the network
and its own settings is switched off before user text reaches it. And a `LazyTable` costs nothing until a
query reads it, then only the columns that the query needs, one batch at a time, so that a question about a
billion rows needs the memory of one batch. Values come in as DuckDB's prepared parameters, never as text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from foldfeed.feature_store.errors import ANALYSIS_EXTRA, MissingExtraError, QueryError, QueryTimeoutError
from foldfeed.feature_store.store.sql_shape import constant_keys, parameters
from foldfeed.feature_store.store.time_limit import TimeLimit

RECORDS = "records"

# Values for `?` in order, or for `$name`.
Params: TypeAlias = "Sequence[Any] | Mapping[str, Any]"
BatchMaker: TypeAlias = "Callable[[frozenset[str] | None, Sequence[str]], Iterator[pa.RecordBatch]]"


class LazyTable:
    """A table that is made when DuckDB reads it, and read again when a query names it twice.

    Attributes:
      schema: of all its columns.
      key: column whose values the maker can be asked for; None when there is no such column.
      was_read: a query has read from it.
    """

    def __init__(self, schema: pa.Schema, make: BatchMaker, key: str | None = None) -> None:
        """Takes the maker.

        Args:
          schema: of all columns.
          make: given the key values that the query can need (None: all) and the columns that it needs, yields
            batches of exactly these columns in that order.
          key: see the class.
        """
        self.schema = schema
        self.key = key
        self.was_read = False
        self.error: Exception | None = None
        self._make = make
        self._only: frozenset[str] | None = None
        self._limit: TimeLimit | None = None
        self._open: list[Generator[pa.RecordBatch, None, None]] = []

    def restrict(self, keys: frozenset[str] | None, limit: TimeLimit | None = None) -> None:
        """Sets the only key values that will be asked for, None for all, and when reading must end."""
        self._only = keys
        self._limit = limit

    def batches(self, columns: Sequence[str], condition: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        """Returns some columns of the rows that a condition keeps; reads the columns of both."""
        self._open.append(self._batches(columns, condition))
        return self._open[-1]

    def close(self) -> None:
        """Ends every reading: one that DuckDB left in the middle would hold what it reads from."""
        while self._open:
            self._open.pop().close()

    def _batches(
        self, columns: Sequence[str], condition: pc.Expression | None
    ) -> Generator[pa.RecordBatch, None, None]:
        self.was_read = True
        needed = _columns_of(self.schema, columns, condition)
        try:
            for batch in self._make(self._only, needed):
                # A condition may keep nothing for long; DuckDB would not get to stop this.
                if self._limit is not None:
                    self._limit.check()
                if condition is None:
                    yield batch.select(columns)
                else:
                    kept = pa.Table.from_batches([batch]).filter(condition).select(columns)
                    yield from kept.to_batches()
        except Exception as error:
            # DuckDB would only keep its text; `sql` raises the error itself.
            self.error = error
            raise


class _LazyDataset(pads.InMemoryDataset):
    """How DuckDB sees a `LazyTable`: of a dataset it asks the columns and rows that it needs.

    Of any other stream it reads all columns. The dataset itself is empty; only `scanner` is ever asked.
    """

    def __init__(self, lazy: LazyTable) -> None:
        super().__init__(lazy.schema.empty_table())
        self._lazy = lazy

    def scanner(
        self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None, **_: object
    ) -> _LazyScan:
        """Returns what DuckDB reads from; the further arguments are hints about sizes."""
        return _LazyScan(self._lazy, list(self.schema.names if columns is None else columns), filter)


@dataclasses.dataclass(frozen=True, slots=True)
class _LazyScan:
    """One reading of a `LazyTable`, the part of a ``pyarrow.dataset.Scanner`` that DuckDB uses."""

    lazy: LazyTable
    columns: list[str]
    condition: pc.Expression | None

    @property
    def projected_schema(self) -> pa.Schema:
        """Schema of the batches."""
        return pa.schema([self.lazy.schema.field(name) for name in self.columns])

    def to_reader(self) -> pa.RecordBatchReader:
        """Returns the batches; the maker starts when the first one is asked for."""
        batches = self.lazy.batches(self.columns, self.condition)
        return pa.RecordBatchReader.from_batches(self.projected_schema, batches)


def _columns_of(schema: pa.Schema, columns: Sequence[str], condition: pc.Expression | None) -> list[str]:
    """Returns the columns that a selection and a condition need, in the order of the schema."""
    needed = set(columns)
    if condition is not None:
        for name in schema.names:
            # Arrow tells the columns of an expression to nobody; it needs one if it cannot do without it.
            others = schema.empty_table().drop_columns([name])
            try:
                others.filter(condition)
            except (pa.ArrowInvalid, KeyError):
                needed.add(name)
    return [name for name in schema.names if name in needed]


Tables: TypeAlias = "Mapping[str, pa.Table | LazyTable]"


def sql(tables: Tables, text: str, params: Params | None = None, limit: TimeLimit | None = None) -> pa.Table:
    """Returns the answer of a query.

    Args:
      tables: what it may read, by name.
      text: one SQL query in DuckDB's dialect.
      params: values of its parameters, which are never made part of the text.
      limit: when to stop.
    Raises:
      QueryError: DuckDB refuses it, and its own message is kept; or it holds several statements.
      QueryTimeoutError: the time was up.
    """
    named = _by_name(params)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(
            duckdb.connect(":memory:", config={"enable_external_access": "false"})
        )
        # Only the registered tables can be reached; not a Python variable that happens to be called the same.
        connection.execute("SET python_enable_replacements = false")
        connection.execute("SET lock_configuration = true")
        shape = _shape(connection, text)
        _check_given(parameters(shape), named)
        for name, table in tables.items():
            if isinstance(table, LazyTable):
                keys = None if table.key is None else constant_keys(shape, name, table.key, named)
                table.restrict(keys, limit)
                stack.callback(table.close)
            connection.register(name, _LazyDataset(table) if isinstance(table, LazyTable) else table)
        if limit is not None:
            limit.check()
            stack.enter_context(limit.interrupting(connection))
        try:
            # DuckDB would run them all and answer the last.
            count = len(connection.extract_statements(text))
            if count > 1:
                raise QueryError(f"{text!r} holds {count} statements; give one SELECT over {_names(tables)}")
            relation = connection.sql(text, params=params) if params else connection.sql(text)
            if relation is None:
                raise QueryError(f"{text!r} is not a query; give one SELECT over {_names(tables)}")
            return relation.to_arrow_table()
        except duckdb.Error as error:
            for table in tables.values():
                if isinstance(table, LazyTable) and table.error is not None:
                    raise table.error from None
            if limit is not None and limit.is_over and isinstance(error, duckdb.InterruptException):
                raise QueryTimeoutError(limit.timeout_s) from error
            # DuckDB's first line says what is wrong; the lines after it draw an arrow under the text.
            message = str(error).splitlines()[0].rstrip(".")
            raise QueryError(f"{message}. {_described(tables)}") from error


def _by_name(params: Params | None) -> Mapping[str, Any]:
    """Returns the values of parameters by the names that DuckDB's parse has for them."""
    if params is None:
        return {}
    if isinstance(params, Mapping):
        return params
    if isinstance(params, str | bytes) or not isinstance(params, Sequence):
        raise QueryError(
            f"params {params!r} is neither a list (for ?) nor a dict (for $name); one value is a list of one"
        )
    return {str(number): value for number, value in enumerate(params, 1)}


def _check_given(names: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises for a parameter without a value; DuckDB's own words for it say little and differ by release."""
    known = {name.lower() for name in given}
    missing = [name for name in names if name.lower() not in known]
    if missing:
        name = missing[0]
        what = f"? number {name}: params=[...]" if name.isdecimal() else f"${name}: params={{{name!r}: ...}}"
        raise QueryError(f"no value for {what}, or --param NAME=VALUE for $NAME")


def table(
    rows: pa.Table, columns: Sequence[str] | None, where: str | None, limit: TimeLimit | None = None
) -> pa.Table:
    """Returns some columns of the rows that a condition keeps, in the order of ``rows``.

    Args:
      rows: the index, sorted.
      columns: names; all when None.
      where: an SQL condition; every row when None.
      limit: see `sql`.
    Raises:
      QueryError: an unknown column, or DuckDB refuses the condition.
    """
    names = known_columns("the index", columns, rows.column_names)
    if where is not None:
        text = f"select * from {RECORDS} where ({where}) order by record_id"
        kept = sql({RECORDS: rows}, text, limit=limit)
        rows = kept.cast(rows.schema)
    return rows.select(names)


def known_columns(where: str, asked: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """Returns the columns asked for, all when None.

    Raises:
      QueryError: one of them is not there; ``where`` says of what, for the message.
    """
    unknown = [name for name in asked or () if name not in there]
    if unknown:
        raise QueryError(f"no column {unknown[0]!r}; {where} has {', '.join(there)}")
    return list(there if asked is None else asked)


def to_pandas(answer: pa.Table) -> Any:
    """Returns an Arrow table as a ``pandas.DataFrame``.

    Raises:
      MissingExtraError: pandas is not installed.
    """
    try:
        import pandas  # noqa: F401  optional: analysis only; pyarrow imports it by itself
    except ModuleNotFoundError as error:
        raise MissingExtraError("pandas", ANALYSIS_EXTRA) from error
    return answer.to_pandas()


def to_polars(answer: pa.Table) -> Any:
    """Returns an Arrow table as a ``polars.DataFrame``; columns are shared, not copied, where Polars can.

    Raises:
      MissingExtraError: Polars is not installed.
    """
    try:
        import polars  # optional: analysis only
    except ModuleNotFoundError as error:
        raise MissingExtraError("polars", ANALYSIS_EXTRA) from error
    return polars.from_arrow(answer)


def _shape(connection: duckdb.DuckDBPyConnection, text: str) -> dict[str, Any] | None:
    """Returns DuckDB's own parse of a query; None for what it cannot write down (PIVOT, bad syntax)."""
    try:
        answer = connection.execute("select json_serialize_sql(?)", [text]).fetchall()
    except duckdb.Error:
        return None
    shape = json.loads(answer[0][0])
    return None if shape["error"] else shape


def _names(tables: Tables) -> str:
    return ", ".join(f"{name!r}" for name in tables)


def _described(tables: Tables) -> str:
    found = (f"{name!r} with columns {', '.join(table.schema.names)}" for name, table in tables.items())
    return f"The tables are {'; '.join(found)}."
