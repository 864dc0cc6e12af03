"""Text forms of tables and alignments for the command line: table, CSV, JSON lines, Parquet.

Pure but for the writing of bytes to a given stream. Owns no choice of what to show.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from foldfeed.feature_store.cli.terminal import printable

FORMATS = ("table", "csv", "json", "parquet")

MAX_CELL = 60


def write_table(table: pa.Table, form: str, out: BinaryIO) -> None:
    """Writes an Arrow table to a binary stream.

    Args:
      table: any columns.
      form: ``table`` for people, ``csv``, ``json`` (one object per line), ``parquet``.
      out: stays open.
    """
    if form == "parquet":
        pq.write_table(table, out)
    elif form == "json":
        for row in table.to_pylist():
            out.write(json.dumps(row, default=_plain, separators=(",", ":")).encode() + b"\n")
    elif form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows([_cell(value) for value in row.values()] for row in table.to_pylist())
        out.write(text.getvalue().encode())
    else:
        out.write(_pretty(table).encode())


def _pretty(table: pa.Table) -> str:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        grid.add_column(field.name, justify="right" if number else "left", overflow="fold")
    for row in table.to_pylist():
        grid.add_row(*(_shorten(printable(_cell(value))) for value in row.values()))
    text = io.StringIO()
    # Wide on purpose: a pipe or a pager folds lines better than a table folds its cells.
    Console(file=text, width=400, no_color=True, highlight=False, markup=False).print(grid)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        return json.dumps(value, default=_plain, separators=(",", ":"))
    return str(value)


def _plain(value: object) -> str:
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    return str(value)
