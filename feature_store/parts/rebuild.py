"""Reads records back as they were given to the writer, and writes parts anew from them.

Owns the way from a stored part back to `MsaRecord` and once more to bytes: `compact`, `repair` and the deep
`verify` stand on it. Does not own what is done with the result. Invariant: `load_record` returns a record
whose fingerprint is the one in its index row, or raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store.errors import CorruptDataError, InvalidRecordError
from foldfeed.feature_store.format.effective_rows import EffectiveRows
from foldfeed.feature_store.format.record import DatabaseUse, MsaRecord, RowProvenance
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.record import Record
from foldfeed.feature_store.parts.writer import PartWriter
from foldfeed.feature_store.storage import Blobs, open_blobs

_DATABASE_FIELDS = [field.name for field in dataclasses.fields(DatabaseUse)]


def load_record(part: PartReader, row: Mapping[str, Any]) -> MsaRecord:
    """Returns a record as its writer got it; the whole alignment is in memory.

    Args:
      part: that holds it.
      row: its index row, or its line of ``record_json``.
    Raises:
      CorruptDataError: something of it is damaged, or it does not say what its fingerprint stands for.
    """
    where = f"{part.path}, record {row['record_id']}"
    # Names of databases need not differ, their positions do.
    numbered = [entry | {"name": str(number)} for number, entry in enumerate(row["databases"])]
    reader = Record(part, {**row, "databases": numbered})
    try:
        found = MsaRecord(
            record_id=row["record_id"],
            description=row["description"],
            sequence=row["sequence"],
            msa=reader.msa(),
            deletions=reader.deletions(),
            rows=_provenance(reader),
            databases=tuple(
                DatabaseUse(**{name: entry[name] for name in _DATABASE_FIELDS}) for entry in row["databases"]
            ),
            extra=json.loads(row["extra"]),
            structure=reader.structure(),
            neff=_neff(reader),
            templates=reader.templates(),
        )
    except (InvalidRecordError, UnicodeDecodeError, AssertionError, IndexError, ValueError) as error:
        raise CorruptDataError(where, f"it is not a valid record ({error})") from error
    if found.fingerprint != row["fingerprint"]:
        raise CorruptDataError(where, "its content does not match its fingerprint")
    return found


def _neff(reader: Record) -> EffectiveRows | None:
    if reader.neff is None:
        return None
    return EffectiveRows(total=reader.neff, per_residue=reader.neff_per_residue())


def _provenance(reader: Record) -> RowProvenance:
    rows = reader.rows()
    database = [-1 if name is None else int(name) for name in rows["database"].to_pylist()]
    return RowProvenance(
        database=np.array(database, dtype=np.int16),
        e_value=rows["e_value"].to_numpy().astype(np.float64),
        bit_score=rows["bit_score"].to_numpy().astype(np.float32),
        hit_id=rows["hit_id"].to_pylist(),
        species=rows["species"].to_pylist(),
        pairing_key=rows["pairing_key"].to_pylist(),
        taxonomy_id=None if rows["taxonomy_id"].null_count == len(rows) else _zeros(rows["taxonomy_id"]),
    )


def _zeros(column: pa.ChunkedArray) -> NDArray[np.int32]:
    return column.fill_null(0).to_numpy().astype(np.int32)


@contextlib.contextmanager
def rewritten(
    blobs: Blobs, part_id: str, check: Callable[[MsaRecord], None] = lambda _: None
) -> Iterator[tuple[Blobs, str]]:
    """Gives a scratch copy of a part that was written anew from its records, and the copy's id.

    The id is the part's own when the same release of zstd writes it; the arrays hold the same values with
    any.

    Args:
      blobs: the store's files.
      part_id: the part.
      check: is shown each record on the way, so that nobody has to read it twice.
    Raises:
      CorruptDataError: the part's metadata or a record cannot be read.
    """
    part = PartReader(blobs, part_id)
    with tempfile.TemporaryDirectory(prefix="foldfeed-rebuild-") as folder:
        staging = Path(folder, "staging")
        staging.mkdir()
        with PartWriter(staging, part.settings, part.specs) as writer:
            for row in part.index_rows():
                record = load_record(part, row)
                check(record)
                writer.add(record)
                # Not held while the next one is read: two deep alignments would be in memory at once.
                del record
            new_id, _ = writer.finish()
        target = Path(folder, "parts", new_id)
        target.parent.mkdir()
        staging.rename(target)
        yield open_blobs(folder), new_id
