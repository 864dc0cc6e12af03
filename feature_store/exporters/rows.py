"""What every export format is made from: the rows of one record with their names, as plain arrays.

Owns letters, safe names and the limits that texts share. Does not own any format. What a store does not hold
no export can give back: which residues were inserted (their number is exact; they are written as ``x``), and
ambiguity letters of hits (B, Z, U, J, O). The query's own letters are exact.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.exchange_errors import ExportError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.store.feature_store import Record

MAX_TEXT_BYTES = 4 << 30
INSERTED = ord("x")

_BREAKS = re.compile(r"[\x00-\x20\x7f]+")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportRows:
    """One record, ready to be written in another program's format.

    Attributes:
      record_id: its id.
      description: free text.
      sequence: the query.
      msa: uint8 (depth, length) codes of `foldfeed.feature_store.format.alphabet`, the query first.
      deletions: int32 (depth, length).
      databases: name of the database of every row; "" for the query.
      hit_ids: name of every row.
      species: of every row, or "".
      pairing_keys: of every row, or "", see `RowProvenance`.
      searched: names of all databases, in merge order, also of those without a row.
      structure: of the query; None where there is none, or where the format does not ask for it.
    """

    record_id: str
    description: str
    sequence: str
    msa: NDArray[np.uint8]
    deletions: NDArray[np.int32]
    databases: Sequence[str]
    hit_ids: Sequence[str]
    species: Sequence[str]
    pairing_keys: Sequence[str]
    searched: Sequence[str] = ()
    structure: Structure | None = None

    @property
    def depth(self) -> int:
        """Number of rows."""
        return int(self.msa.shape[0])

    @property
    def length(self) -> int:
        """Number of residues of the query."""
        return len(self.sequence)

    def letters(self) -> NDArray[np.uint8]:
        """Returns uint8 (depth, length) ASCII letters; the query row has the letters it was given with."""
        letters = alphabet.DECODE[self.msa]
        letters[0] = np.frombuffer(self.sequence.encode("ascii"), dtype=np.uint8)
        return letters

    def refuse(self, reason: str) -> ExportError:
        """Returns the error that says why a format cannot hold this record."""
        return ExportError(self.record_id, reason)

    def take(self, rows: NDArray[np.int64]) -> ExportRows:
        """Returns the record with some of its rows; the first must be the query."""
        return dataclasses.replace(
            self,
            msa=self.msa[rows],
            deletions=self.deletions[rows],
            databases=[self.databases[row] for row in rows],
            hit_ids=[self.hit_ids[row] for row in rows],
            species=[self.species[row] for row in rows],
            pairing_keys=[self.pairing_keys[row] for row in rows],
        )


def rows_of_record(record: Record, max_rows: int | None = None, structure: bool = False) -> ExportRows:
    """Returns the rows of a record of a store.

    Args:
      record: of any version.
      max_rows: most rows, in rank order; all when None. Fewer are read, too.
      structure: read the structure, too, if there is one.
    Raises:
      CorruptDataError: a tile does not match its checksum.
    """
    depth = record.depth if max_rows is None else min(max_rows, record.depth)
    piece = record.crop(rows=slice(0, depth))
    table = record.rows().slice(0, depth)
    return ExportRows(
        record_id=record.record_id,
        description=record.description,
        sequence=record.sequence,
        msa=piece.msa,
        deletions=piece.deletions,
        databases=[name or "" for name in table["database"].to_pylist()],
        hit_ids=table["hit_id"].to_pylist(),
        species=table["species"].to_pylist(),
        pairing_keys=table["pairing_key"].to_pylist(),
        searched=[use["name"] for use in record.databases],
        structure=record.structure() if structure else None,
    )


def rows_of_msa(record: MsaRecord) -> ExportRows:
    """Returns the rows of a record that is not in a store."""
    names = [use.name for use in record.databases]
    return ExportRows(
        record_id=record.record_id,
        description=record.description,
        sequence=record.sequence,
        msa=record.msa,
        deletions=record.deletions,
        databases=["" if code < 0 else names[code] for code in record.rows.database.tolist()],
        hit_ids=list(record.rows.hit_id),
        species=list(record.rows.species),
        pairing_keys=list(record.rows.pairing_key or [""] * record.depth),
        searched=names,
        structure=record.structure,
    )


def one_word(name: str, fallback: str) -> str:
    """Returns a name without white space and control characters, or the fallback for an empty one."""
    return _BREAKS.sub("_", name.strip()) or fallback


def one_line(text: str) -> str:
    """Returns text without line breaks and control characters."""
    return _BREAKS.sub(" ", text).strip()
