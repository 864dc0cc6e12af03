"""Reads what is stored by residue of many records, column by column, a bounded number of residues at a time.

Owns the way from index rows to batches of the SQL table ``residues``, and the number of observed residues.
Does not own SQL (`store.sql`) nor which records are asked for (`store.questions`). Invariants: as of
`row_scan`: an array that no asked column needs is neither opened nor read, one batch is in memory, and the
values are those that `Record` gives (tested). What a record does not have is null: ``entropy`` of a part from
before it came, ``neff`` that was not computed, the three columns of structures where there is none.

Residues come part by part, as they lie on disk, not in the order of record ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store.format.alphabet import NUM_TOKENS
from foldfeed.feature_store.format.schema import RESIDUE_CHUNK
from foldfeed.feature_store.format.structure import NO_NUMBER
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.spans import Spans, by_part
from foldfeed.feature_store.storage import Blobs

RESIDUES_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        # From 0, as windows of residues count everywhere.
        ("position", pa.int32()),
        # Of the query as it was given: B, Z, U, J, O are kept.
        ("letter", pa.string()),
        # Shares in the order of `alphabet.TOKENS`.
        ("profile", pa.list_(pa.float32(), NUM_TOKENS)),
        ("entropy", pa.float32()),
        ("gap_fraction", pa.float32()),
        ("deletion_mean", pa.float32()),
        ("neff", pa.float32()),
        ("observed", pa.bool_()),
        ("residue_number", pa.int32()),
        ("insertion_code", pa.string()),
    ]
)
FIRST_ATOMS = "first_structure_residue"
# The array behind each column that a structure gives.
STRUCTURE_ARRAYS = {
    "observed": "atom_mask",
    "residue_number": "residue_number",
    "insertion_code": "insertion_code",
}
# With all columns 10 MB.
BATCH_RESIDUES = 1 << 16
_CHARACTERS = pa.array([chr(code) for code in range(256)], pa.string())


def residue_batches(
    blobs: Blobs, index: pa.Table, columns: Sequence[str], batch_residues: int = BATCH_RESIDUES
) -> Iterator[pa.RecordBatch]:
    """Yields the residues of records, one batch in memory at a time.

    Args:
      blobs: the store's files.
      index: index rows of the records.
      columns: of `RESIDUES_SCHEMA`; the batches have these, in this order.
      batch_residues: most residues of a batch.
    Raises:
      CorruptDataError: something that is read is damaged.
    """
    schema = pa.schema([RESIDUES_SCHEMA.field(name) for name in columns])
    wanted = ["record_id", "length", FIRST_ATOMS, *(["sequence"] if "letter" in columns else [])]
    for part_id, records in by_part(index, wanted, "first_residue"):
        scan = _PartScan(PartReader(blobs, part_id), records)
        for values in scan.batches(columns, batch_residues):
            yield pa.RecordBatch.from_arrays(values, schema=schema)


def count_observed(part: PartReader, spans: Spans) -> NDArray[np.int64]:
    """Returns int64 (records,): how many residues of each structure have an atom.

    Args:
      part: holds the structures.
      spans: of their entries in the arrays of structures.
    """
    found = np.zeros(len(spans.first), dtype=np.int64)
    for low, high in spans.runs(RESIDUE_CHUNK):
        first, stop = spans.bounds(low, high)
        for start in range(first, stop, BATCH_RESIDUES):
            end = min(start + BATCH_RESIDUES, stop)
            owner, entry = spans.owners(low, high, start, end)
            mask = part.arrays["atom_mask"].read(start, end)[entry - start]
            observed = np.asarray(mask.any(axis=1))
            found += np.bincount(owner[observed], minlength=len(found))
    return found


class _PartScan:
    """Some records of one part, in the order in which they lie there."""

    def __init__(self, part: PartReader, index: pa.Table) -> None:
        self._part = part
        self._ids = index["record_id"].combine_chunks()
        self._sequences = index["sequence"].combine_chunks() if "sequence" in index.column_names else None
        length = index["length"].combine_chunks().to_numpy().astype(np.int64)
        self._spans = Spans(index["first_residue"].combine_chunks().to_numpy(), length)
        # -1 where there is no structure.
        self._first_atoms = index[FIRST_ATOMS].combine_chunks().fill_null(-1).to_numpy()

    def batches(self, columns: Sequence[str], batch_residues: int) -> Iterator[list[pa.Array]]:
        for low, high in self._spans.runs(RESIDUE_CHUNK):
            first, stop = self._spans.bounds(low, high)
            for start in range(first, stop, batch_residues):
                end = min(start + batch_residues, stop)
                owner, residue = self._spans.owners(low, high, start, end)
                if len(residue):
                    yield [self._values(name, owner, residue, start, end) for name in columns]

    def _values(
        self, name: str, owner: NDArray[np.int64], residue: NDArray[np.int64], start: int, end: int
    ) -> pa.Array:
        """Returns one column of the residues ``residue``, all within ``[start, end)``."""
        position = residue - self._spans.first[owner]
        if name == "record_id":
            return self._ids.take(pa.array(owner))
        if name == "position":
            return pa.array(position.astype(np.int32))
        if name == "letter":
            return self._letters(owner, position)
        if name in STRUCTURE_ARRAYS:
            return self._of_structure(name, owner, position)
        if name not in self._part.arrays:
            return pa.nulls(len(residue), RESIDUES_SCHEMA.field(name).type)
        values = self._part.arrays[name].read(start, end)[residue - start]
        if name == "profile":
            return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), NUM_TOKENS)
        return pa.array(values, mask=np.isnan(values))

    def _letters(self, owner: NDArray[np.int64], position: NDArray[np.int64]) -> pa.Array:
        assert self._sequences is not None
        first, last = int(owner[0]), int(owner[-1])
        text = "".join(self._sequences.slice(first, last - first + 1).to_pylist()).encode()
        # All ASCII, so letters are bytes.
        ends = np.cumsum(self._spans.size[first : last + 1])
        place = (ends - self._spans.size[first : last + 1])[owner - first] + position
        return _CHARACTERS.take(pa.array(np.frombuffer(text, dtype=np.uint8)[place]))

    def _of_structure(self, name: str, owner: NDArray[np.int64], position: NDArray[np.int64]) -> pa.Array:
        without = self._first_atoms[owner] < 0
        if without.all():
            return pa.nulls(len(owner), RESIDUES_SCHEMA.field(name).type)
        # Structures lie in the order of their records, so these entries are a run like the residues.
        entry = (self._first_atoms[owner] + position)[~without]
        start, end = int(entry[0]), int(entry[-1]) + 1
        read = self._part.arrays[STRUCTURE_ARRAYS[name]].read(start, end)[entry - start]
        values = np.zeros((len(owner), *read.shape[1:]), dtype=read.dtype)
        values[~without] = read
        if name == "observed":
            return pa.array(values.any(axis=1), mask=without)
        if name == "residue_number":
            return pa.array(values, mask=without | (values == NO_NUMBER))
        return _CHARACTERS.take(pa.array(values, mask=values == 0))
