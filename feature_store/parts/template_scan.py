"""Reads template hits: of one record as `Templates`, of many as the SQL table ``templates``.

Owns the way from index rows to hits. Does not own what a hit means (`format.templates`) or SQL (`store.sql`).
Invariants: both ways read through `_Hits`, so they cannot disagree; an array that no asked column needs is
neither opened nor read; what is in memory is one batch, however many records there are; a part without
template arrays has no hits.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.format.templates import (
    NO_DATE,
    NUMBERS,
    TemplateHit,
    Templates,
    date_of,
    entry_of,
    pairs_of,
)
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.spans import by_part
from foldfeed.feature_store.storage import Blobs

TEMPLATES_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        # From 0, in the order of the tool.
        ("rank", pa.int32()),
        ("template_id", pa.string()),
        ("entry_id", pa.string()),
        ("chain_id", pa.string()),
        ("release_date", pa.date32()),
        ("resolution_angstrom", pa.float64()),
        ("e_value", pa.float64()),
        ("score", pa.float64()),
        ("probability", pa.float64()),
        ("sum_probs", pa.float64()),
        ("num_residues", pa.int32()),
        ("num_aligned", pa.int32()),
        # Of the aligned pairs; of the query's residues.
        ("identity", pa.float64()),
        ("coverage", pa.float64()),
        ("sequence", pa.string()),
    ]
)
FIRST = "first_template"
INDEX_COLUMNS = (
    "record_id",
    "sequence",
    "length",
    "num_templates",
    "first_template_id_byte",
    "first_template_residue",
    "first_template_run",
)
# Most hits of a batch, unless one record has more: with sequences some 10 MB.
BATCH_HITS = 1 << 14
_COLUMN_OF = {"release_date": "template_release_date"} | {field: name for name, field in NUMBERS.items()}


def load_templates(part: PartReader, row: Mapping[str, Any]) -> Templates | None:
    """Returns what a search for templates found for a record, or None when none was made.

    Args:
      part: that holds the record.
      row: its index row.
    Raises:
      CorruptDataError: something that is read is damaged.
    """
    if row["templates"] is None:
        return None
    where = f"{part.path}, record {row['record_id']}"
    hits = _Hits(part, [row])
    try:
        days = hits.values("template_release_date").tolist()
        numbers = {field: hits.values(name).tolist() for name, field in NUMBERS.items()}
        runs, cuts = hits.runs()
        found = tuple(
            TemplateHit(
                template_id=name,
                sequence=sequence,
                runs=runs[cuts[at] : cuts[at + 1]],
                release_date=None if days[at] == NO_DATE else date_of(days[at]),
                **{
                    field: None if values[at] != values[at] else values[at]
                    for field, values in numbers.items()
                },
            )
            for at, (name, sequence) in enumerate(zip(hits.names(), hits.sequences(), strict=True))
        )
        return Templates(hits=found, source=json.loads(row["templates"]))
    except (ValueError, OverflowError, TypeError) as error:
        raise CorruptDataError(where, f"its templates cannot be read ({error})") from error


def template_batches(
    blobs: Blobs, index: pa.Table, columns: Sequence[str], batch_hits: int = BATCH_HITS
) -> Iterator[pa.RecordBatch]:
    """Yields the template hits of records, part by part; records without hits have no row.

    Args:
      blobs: the store's files.
      index: index rows of the records.
      columns: of `TEMPLATES_SCHEMA`; the batches have these, in this order.
      batch_hits: most hits of a batch, unless one record has more.
    Raises:
      CorruptDataError: something that is read is damaged.
    """
    schema = pa.schema([TEMPLATES_SCHEMA.field(name) for name in columns])
    with_hits = index.filter(pc.greater(index["num_templates"], 0))
    for part_id, records in by_part(with_hits, INDEX_COLUMNS, FIRST):
        part = PartReader(blobs, part_id)
        for batch in _batches(records.to_pylist(), batch_hits):
            values = _Columns(part, batch)
            arrays = [values.column(name).cast(TEMPLATES_SCHEMA.field(name).type) for name in columns]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _batches(rows: list[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    """Yields records that lie one behind the other, with about so many hits."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        apart = batch and row[FIRST] != batch[-1][FIRST] + batch[-1]["num_templates"]
        if batch and (apart or size + row["num_templates"] > most):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += row["num_templates"]
    if batch:
        yield batch


class _Hits:
    """The hits of records of one part that lie one behind the other there."""

    def __init__(self, part: PartReader, rows: Sequence[Mapping[str, Any]]) -> None:
        self._part = part
        self._row = rows[0]
        self.num = sum(row["num_templates"] for row in rows)

    def values(self, name: str) -> NDArray[Any]:
        """Returns an array of one number per hit."""
        if not self.num:
            return np.empty(0, dtype=self._part.specs[name].dtype)
        return self._read(name, self._row[FIRST], self.num)

    def names(self) -> list[str]:
        """Returns the name of each."""
        cuts = self._cuts("template_id_bytes")
        text = self._read("template_id", self._row["first_template_id_byte"], cuts[-1]).tobytes()
        return [text[a:b].decode() for a, b in itertools.pairwise(cuts)]

    def sequences(self) -> list[str]:
        """Returns the sequence of each."""
        cuts = self._cuts("template_num_residues")
        text = self.letters(cuts[-1]).tobytes().decode("ascii")
        return [text[a:b] for a, b in itertools.pairwise(cuts)]

    def letters(self, num_residues: int) -> NDArray[np.uint8]:
        """Returns the sequences of all, one after the other."""
        return self._read("template_sequence", self._row["first_template_residue"], num_residues)

    def runs(self) -> tuple[NDArray[np.int32], list[int]]:
        """Returns the runs of all, and where those of each begin and end."""
        cuts = self._cuts("template_num_runs")
        return self._read("template_run", self._row["first_template_run"], cuts[-1]), cuts

    def _cuts(self, name: str) -> list[int]:
        sizes = self.values(name)
        if (sizes < 0).any():
            raise CorruptDataError(f"{self._part.path}/{name}", "it holds a negative size")
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()

    def _read(self, name: str, first: int, size: int) -> NDArray[Any]:
        if not size:
            return np.empty((0, *self._part.specs[name].chunk[1:]), dtype=self._part.specs[name].dtype)
        array = self._part.arrays.get(name)
        if array is None or first < 0 or first + size > array.length:
            raise CorruptDataError(
                f"{self._part.path}/{name}", "a record names template hits that the part does not have"
            )
        return array.read(first, first + size)


class _Columns:
    """Columns of the SQL table, each read when it is asked for."""

    def __init__(self, part: PartReader, rows: Sequence[Mapping[str, Any]]) -> None:
        self._hits = _Hits(part, rows)
        self._rows = rows
        self._sizes = np.array([row["num_templates"] for row in rows], dtype=np.int64)

    def column(self, name: str) -> pa.Array:
        """Returns one column."""
        if name == "record_id":
            return pa.array(self._of_records([row["record_id"] for row in self._rows]))
        if name == "rank":
            return pa.array(np.arange(self._hits.num) - np.repeat(_starts(self._sizes), self._sizes))
        if name in ("template_id", "entry_id", "chain_id"):
            return pa.array([_name(name, one) for one in self._hits.names()], pa.string())
        if name == "sequence":
            return pa.array(self._hits.sequences(), pa.string())
        if name == "num_residues":
            return pa.array(self._hits.values("template_num_residues"))
        if name == "release_date":
            days = self._hits.values(_COLUMN_OF[name])
            return pa.array(days, mask=days == NO_DATE).cast(pa.date32())
        if name in _COLUMN_OF:
            numbers = self._hits.values(_COLUMN_OF[name])
            return pa.array(numbers, mask=np.isnan(numbers))
        counts = self._num_aligned()
        if name == "num_aligned":
            return pa.array(counts)
        if name == "coverage":
            return pa.array(counts / self._of_records(np.array([row["length"] for row in self._rows])))
        return pa.array(self._num_equal() / counts)

    def _of_records(self, values: Any) -> Any:
        return np.repeat(np.array(values), self._sizes)

    def _num_aligned(self) -> NDArray[np.int64]:
        runs, cuts = self._hits.runs()
        return _sums(runs[:, 2].astype(np.int64), np.diff(cuts))

    def _num_equal(self) -> NDArray[np.int64]:
        """Returns how many pairs of each hit have equal letters."""
        runs, cuts = self._hits.runs()
        num_residues = self._hits.values("template_num_residues").astype(np.int64)
        theirs = self._hits.letters(int(num_residues.sum()))
        ours = np.frombuffer("".join(row["sequence"] for row in self._rows).encode("ascii"), np.uint8)
        lengths = np.array([len(row["sequence"]) for row in self._rows], dtype=np.int64)
        sizes = _sums(runs[:, 2].astype(np.int64), np.diff(cuts))
        pairs = pairs_of(runs).astype(np.int64)
        query = pairs[:, 0] + np.repeat(self._of_records(_starts(lengths)), sizes)
        template = pairs[:, 1] + np.repeat(_starts(num_residues), sizes)
        return _sums((ours[query] == theirs[template]).astype(np.int64), sizes)


def _starts(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(sizes) - sizes


def _sums(values: NDArray[np.int64], sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the sum of each group of neighbouring values; a group may be empty."""
    ends = np.concatenate([[0], np.cumsum(values)])
    stops = np.cumsum(sizes)
    return ends[stops] - ends[stops - sizes]


def _name(column: str, template_id: str) -> str:
    if column == "template_id":
        return template_id
    entry = entry_of(template_id)
    return entry if column == "entry_id" else template_id[len(entry) + 1 :]
