"""Writes whole parts: records in, one immutable content-addressed folder out.

Owns the way from an `MsaRecord` to arrays (tiling, deletion overflow, sidecars, row provenance). Does not own
visibility: a part means nothing until the index names it (`FeatureStore.commit`).

Invariants: a part's name is the sha256 of its group metadata, which holds the sha256 of every file in it; the
same records give the same bytes whoever writes them; one record at a time is in memory; a failed write leaves
no visible name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import InvalidRecordError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.grid import grid_of
from foldfeed.feature_store.format.record import (
    PAIRING_KEY_BYTES,
    SPECIES_BYTES,
    MsaRecord,
    canonical_nan,
)
from foldfeed.feature_store.format.row_order import RowOrder
from foldfeed.feature_store.format.schema import (
    DELETION_OVERFLOW,
    GROUP_FILE,
    PAIRING_KEY,
    ROW_CHUNK,
    TAXONOMY,
    TEMPLATE_ARRAYS,
    ArraySpec,
    array_specs,
    chunk_entries_of,
    group_metadata,
)
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.format.sidecars import summarise
from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.format.templates import Templates, arrays_of
from foldfeed.feature_store.parts.shard_writer import ShardWriter
from foldfeed.feature_store.storage import open_blobs

PART_ID_HEX = 40
# Arrays that a part has only where a record needs them.
_ROWS_WHEN_USED = (PAIRING_KEY, TAXONOMY)
_WHEN_USED = (*_ROWS_WHEN_USED, *TEMPLATE_ARRAYS)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPart:
    """What `write_part` made.

    Attributes:
      part_id: name of the part under ``parts/``; also the hash of its content.
      num_records: records in it.
      num_bytes: size of its files.
    """

    part_id: str
    num_records: int
    num_bytes: int


def write_part(
    root_url: str | os.PathLike[str], records: Iterable[MsaRecord], settings: StoreSettings
) -> WrittenPart:
    """Writes records as one part of a store and returns its name; nothing refers to it yet.

    Args:
      root_url: the store, local path or fsspec URL.
      records: in strictly increasing ``record_id``, so that equal sets give equal bytes; consumed one by one.
      settings: the store's settings.
    Raises:
      InvalidRecordError: a record out of order, or the same id twice; nothing is published.
      ValueError: no record at all.
      StorageFullError: no space left; nothing is published.
    """
    blobs = open_blobs(root_url)
    with blobs.staging_folder() as folder:
        with PartWriter(folder, settings) as writer:
            for record in records:
                writer.add(record)
                # Not held while the next one is made: two deep alignments would be in memory at once.
                del record
            part_id, num_bytes = writer.finish()
        blobs.publish_folder(folder, f"parts/{part_id}")
    return WrittenPart(part_id=part_id, num_records=writer.num_records, num_bytes=num_bytes)


class PartWriter(contextlib.AbstractContextManager["PartWriter"]):
    """Fills one empty local folder with the files of a part. Belongs to one thread."""

    def __init__(
        self, folder: Path, settings: StoreSettings, specs: Mapping[str, ArraySpec] | None = None
    ) -> None:
        """Opens a file for each array.

        Args:
          folder: empty.
          settings: of the store.
          specs: all arrays of today, with the chunks to write them in; those of this release when None.
        """
        self.num_records = 0
        self._folder = folder
        self._settings = settings
        specs = array_specs(settings) if specs is None else specs
        self._chunk_entries = chunk_entries_of(specs)
        self._specs = specs
        self._shards = {
            name: ShardWriter(folder, spec) for name, spec in specs.items() if name not in _WHEN_USED
        }
        self._last_id = ""

    def __exit__(self, *exc: object) -> None:
        for shard in self._shards.values():
            shard.abort()

    def add(self, record: MsaRecord) -> None:
        """Appends one record.

        Raises:
          InvalidRecordError: its id is not greater than the one before.
        """
        if self.num_records and record.record_id <= self._last_id:
            raise InvalidRecordError(
                record.record_id,
                f"it comes after {self._last_id!r}; records of a part come in strictly increasing id order",
            )
        row = self._index_row(record)
        self._append_tiles(record, row)
        self._append_rows(record)
        row["gap_fraction"] = self._append_sidecars(record)
        if record.structure is not None:
            for name, values in record.structure.arrays.items():
                self._shards[name].append(values)
        if record.templates is not None and record.templates.hits:
            self._append_templates(record.templates)
        # Nulls are left out: a record that does not use a later column is the same bytes as before it came.
        known = {name: value for name, value in row.items() if value is not None}
        line = json.dumps(known, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        self._shards["record_json"].append(np.frombuffer(line, dtype=np.uint8))
        self._last_id = record.record_id
        self.num_records += 1

    def finish(self) -> tuple[str, int]:
        """Completes every file; returns the part's id and the bytes written."""
        if not self.num_records:
            raise ValueError("a part needs at least one record; an empty job has nothing to write")
        files: dict[str, dict[str, Any]] = {}
        for name in _ROWS_WHEN_USED:
            self._pad_rows(name)
        for shard in self._shards.values():
            files.update(shard.close())
        lengths = {name: shard.length for name, shard in self._shards.items()}
        group = group_metadata(self._settings, lengths, files, self.num_records, self._chunk_entries)
        (self._folder / GROUP_FILE).write_bytes(group)
        part_id = hashlib.sha256(group).hexdigest()[:PART_ID_HEX]
        return part_id, len(group) + sum(entry["bytes"] for entry in files.values())

    def _index_row(self, record: MsaRecord) -> dict[str, Any]:
        """Returns the record's index row but for what depends on the part's name and the job."""
        return {
            "record_id": record.record_id,
            "description": record.description,
            "sequence": record.sequence,
            "sequence_sha256": hashlib.sha256(record.sequence.encode()).hexdigest(),
            "length": record.length,
            "depth": record.depth,
            "databases": [dataclasses.asdict(use) for use in record.databases],
            "extra": json.dumps(dict(record.extra), sort_keys=True),
            "fingerprint": record.fingerprint,
            "first_tile": self._shards["msa"].length,
            "first_row": self._shards["row_database"].length,
            "first_hit_id_byte": self._shards["row_hit_id"].length,
            "first_residue": self._shards["aatype"].length,
            "first_overflow": self._shards["deletion_overflow"].length,
            "neff": None if record.neff is None else record.neff.total,
            **self._structure_columns(record.structure),
            **self._template_columns(record.templates),
        }

    def _structure_columns(self, found: Structure | None) -> dict[str, Any]:
        if found is None:
            return {"structure": None, "first_structure_residue": None}
        return {
            "structure": json.dumps(dict(found.source), sort_keys=True),
            "first_structure_residue": self._shards["atom_mask"].length,
        }

    def _template_columns(self, found: Templates | None) -> dict[str, Any]:
        if found is None:
            return {}
        return {
            "templates": json.dumps(dict(found.source), sort_keys=True),
            "num_templates": len(found.hits),
            "first_template": self._length_of("template_id_bytes"),
            "first_template_id_byte": self._length_of("template_id"),
            "first_template_residue": self._length_of("template_sequence"),
            "first_template_run": self._length_of("template_run"),
        }

    def _length_of(self, name: str) -> int:
        return self._shards[name].length if name in self._shards else 0

    def _append_templates(self, found: Templates) -> None:
        for name in TEMPLATE_ARRAYS:
            if name not in self._shards:
                self._shards[name] = ShardWriter(self._folder, self._specs[name])
        sizes, names = encode_names([hit.template_id for hit in found.hits])
        lengths, sequences = encode_names([hit.sequence for hit in found.hits])
        values = arrays_of(found.hits) | {
            "template_id_bytes": sizes,
            "template_id": np.frombuffer(names, dtype=np.uint8),
            "template_num_residues": lengths,
            "template_sequence": np.frombuffer(sequences, dtype=np.uint8),
        }
        for name in TEMPLATE_ARRAYS:
            self._shards[name].append(values[name])

    def _append_tiles(self, record: MsaRecord, row: dict[str, Any]) -> None:
        grid = grid_of(row["first_tile"], record.depth, record.length, self._settings)
        shape = (grid.tile_rows, grid.col_tiles * grid.tile_cols)
        order = RowOrder(self._settings, record.record_id, record.depth)
        num_overflow = 0
        for band in range(grid.row_tiles):
            stored = slice(band * grid.tile_rows, min(record.depth, (band + 1) * grid.tile_rows))
            num_rows = stored.stop - stored.start
            rows = stored if order.is_rank else order.ranks(np.arange(stored.start, stored.stop))
            tokens = np.full(shape, alphabet.PADDING, dtype=np.uint8)
            tokens[:num_rows, : record.length] = record.msa[rows]
            self._shards["msa"].append(_to_tiles(tokens, grid.tile_cols))
            exact = np.zeros(shape, dtype=np.int32)
            exact[:num_rows, : record.length] = record.deletions[rows]
            tiles = _to_tiles(exact, grid.tile_cols)
            self._shards["deletion"].append(np.minimum(tiles, DELETION_OVERFLOW).astype(np.uint8))
            cells = np.flatnonzero(tiles.ravel() >= DELETION_OVERFLOW)
            counts = tiles.ravel()[cells]
            # A cell's number counts from the record's own first tile, so a record can move between parts.
            first_cell = band * grid.col_tiles * grid.tile_rows * grid.tile_cols
            self._shards["deletion_overflow"].append(
                np.stack([cells + first_cell, counts], axis=1).astype("<i8")
            )
            num_overflow += len(cells)
        row["num_overflow"] = num_overflow

    def _append_rows(self, record: MsaRecord) -> None:
        rows = record.rows
        self._shards["row_database"].append(rows.database)
        self._shards["row_e_value"].append(canonical_nan(rows.e_value))
        self._shards["row_bit_score"].append(canonical_nan(rows.bit_score))
        self._shards["row_species"].append(fixed_width(rows.species, SPECIES_BYTES))
        if rows.is_paired:
            self._append_when_used(PAIRING_KEY, fixed_width(rows.pairing_key, PAIRING_KEY_BYTES))
        if rows.taxonomy_id is not None and rows.has_taxonomy:
            self._append_when_used(TAXONOMY, rows.taxonomy_id.astype("<i4"))
        sizes, text = encode_names(rows.hit_id)
        self._shards["row_hit_id_bytes"].append(sizes)
        self._shards["row_hit_id"].append(np.frombuffer(text, dtype=np.uint8))

    def _append_when_used(self, name: str, values: NDArray[Any]) -> None:
        """Appends to an array of rows that only some parts have, for the record appended just before."""
        if name not in self._shards:
            self._shards[name] = ShardWriter(self._folder, self._specs[name])
        self._pad_rows(name, len(values))
        self._shards[name].append(values)

    def _pad_rows(self, name: str, num_left: int = 0) -> None:
        """Gives the rows before the last ``num_left`` the fill value, if there is such an array at all."""
        if name not in self._shards:
            return
        shard = self._shards[name]
        shape = shard.spec.chunk[1:]
        missing = self._shards["row_database"].length - num_left - shard.length
        for start in range(0, missing, ROW_CHUNK):
            shard.append(np.zeros((min(ROW_CHUNK, missing - start), *shape), dtype=shard.spec.dtype))

    def _append_sidecars(self, record: MsaRecord) -> float:
        sidecars = summarise(record.msa, record.deletions)
        self._shards["aatype"].append(record.msa[0])
        self._shards["profile"].append(sidecars.profile.astype("<f4"))
        self._shards["deletion_mean"].append(sidecars.deletion_mean.astype("<f4"))
        self._shards["gap_fraction"].append(sidecars.gap_fraction.astype("<f4"))
        self._shards["entropy"].append(sidecars.entropy.astype("<f4"))
        unknown = np.full(record.length, np.nan, dtype="<f4")
        self._shards["neff"].append(unknown if record.neff is None else record.neff.per_residue.astype("<f4"))
        return sidecars.mean_gap_fraction


def _to_tiles(band: NDArray[Any], tile_cols: int) -> NDArray[Any]:
    """Returns (tiles, tile_rows, tile_cols) from one band (tile_rows, tiles * tile_cols)."""
    return band.reshape(band.shape[0], -1, tile_cols).swapaxes(0, 1)


def encode_names(names: Sequence[str]) -> tuple[NDArray[np.int32], bytes]:
    """Returns int32 (n,) sizes in bytes, and all names one after the other as UTF-8."""
    joined = "".join(names)
    if joined.isascii():
        # Nearly always so; name by name took a tenth of the whole writing.
        return np.fromiter(map(len, names), dtype="<i4", count=len(names)), joined.encode()
    text = [name.encode() for name in names]
    return np.array([len(name) for name in text], dtype="<i4"), b"".join(text)


def fixed_width(names: Sequence[str], width: int) -> NDArray[np.uint8]:
    """Returns uint8 (n, width): ASCII names, none longer than ``width``, padded with zero bytes."""
    return np.array(names, dtype=f"S{width}").view(np.uint8).reshape(-1, width)
