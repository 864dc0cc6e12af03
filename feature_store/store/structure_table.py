"""The SQL table ``structures``: the facts of each record's structure as columns that have a type.

Owns which facts are columns and how their text is read. Does not own SQL (`store.sql`). Only the index is
read, but for ``num_observed``, which looks at the atom masks. A fact that the source did not give is null; a
text that is no number or no date is an error that names its record, and only where the column is asked for.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import CorruptDataError, QueryError
from foldfeed.feature_store.parsers.mmcif.tables import day_of, is_plain_number
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.residue_scan import FIRST_ATOMS, count_observed
from foldfeed.feature_store.parts.spans import Spans, by_part
from foldfeed.feature_store.storage import Blobs

STRUCTURES_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("entry_id", pa.string()),
        ("label_asym_id", pa.string()),
        ("auth_asym_id", pa.string()),
        ("entity_id", pa.string()),
        ("model", pa.string()),
        ("method", pa.string()),
        ("resolution_angstrom", pa.float64()),
        ("release_date", pa.date32()),
        ("num_residues", pa.int32()),
        ("num_observed", pa.int32()),
    ]
)
BATCH_RECORDS = 1 << 12


def structure_batches(blobs: Blobs, index: pa.Table, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the structures of records, one row each, part by part; records without one have no row.

    Args:
      blobs: the store's files.
      index: index rows of the records.
      columns: of `STRUCTURES_SCHEMA`; the batches have these, in this order.
    Raises:
      QueryError: a resolution that is no number, a release date that is no date.
      CorruptDataError: something that is read is damaged.
    """
    schema = pa.schema([STRUCTURES_SCHEMA.field(name) for name in columns])
    with_one = index.filter(pc.is_valid(index[FIRST_ATOMS]))
    for part_id, whole in by_part(with_one, ["record_id", "length", "structure"], FIRST_ATOMS):
        part = PartReader(blobs, part_id) if "num_observed" in columns else None
        for start in range(0, len(whole), BATCH_RECORDS):
            records = whole.slice(start, BATCH_RECORDS)
            values = _values(records, columns, part)
            yield pa.RecordBatch.from_arrays([values[name] for name in columns], schema=schema)


def _values(records: pa.Table, columns: Sequence[str], part: PartReader | None) -> dict[str, pa.Array]:
    ids = records["record_id"].to_pylist()
    found = {"record_id": pa.array(ids, pa.string()), "num_residues": records["length"].combine_chunks()}
    if part is not None:
        size = records["length"].combine_chunks().to_numpy().astype(np.int64)
        spans = Spans(records[FIRST_ATOMS].combine_chunks().to_numpy(), size)
        found["num_observed"] = pa.array(count_observed(part, spans).astype(np.int32))
    names = [name for name in columns if name not in (*found, "num_observed")]
    if names:
        facts = [_facts(name, text) for name, text in zip(ids, records["structure"].to_pylist(), strict=True)]
        for name in names:
            values = [
                _value(record_id, name, of_one.get(name))
                for record_id, of_one in zip(ids, facts, strict=True)
            ]
            found[name] = pa.array(values, STRUCTURES_SCHEMA.field(name).type)
    return found


def _facts(record_id: str, text: str | None) -> dict[str, str]:
    try:
        facts = json.loads(text or "")
    except ValueError as error:
        raise CorruptDataError(
            f"index, record {record_id}", f"structure is {text!r}, not JSON ({error})"
        ) from error
    if not isinstance(facts, dict):
        raise CorruptDataError(f"index, record {record_id}", f"structure is {text!r}, not a JSON object")
    return facts


def _value(record_id: str, name: str, text: str | None) -> Any:
    if text is None:
        return None
    if name == "resolution_angstrom":
        if not is_plain_number(text):
            raise _unreadable(record_id, name, text, "a decimal number")
        return float(text)
    if name == "release_date":
        try:
            return datetime.date.fromisoformat(day_of(text))
        except ValueError as error:
            raise _unreadable(record_id, name, text, "a date YYYY-MM-DD") from error
    return str(text)


def _unreadable(record_id: str, name: str, text: str, wanted: str) -> QueryError:
    return QueryError(
        f"{name} of the structure of {record_id!r} is {text!r}, not {wanted}; as text it is "
        f"structure->>'{name}' of the table records"
    )
