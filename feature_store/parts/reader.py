"""Reads records out of one part: crops, sidecars, row provenance.

Owns the way from index row and crop to arrays. Does not own the index or versions. Thread safe, because its
shard readers are; a fork shares the descriptors harmlessly (every read carries its offset).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from foldfeed.feature_store.errors import CorruptDataError, FormatVersionError
from foldfeed.feature_store.format import structure
from foldfeed.feature_store.format.grid import Rows, grid_of
from foldfeed.feature_store.format.row_order import RowOrder
from foldfeed.feature_store.format.schema import (
    GROUP_FILE,
    INDEX_SCHEMA,
    PAIRING_KEY,
    TAXONOMY,
    array_specs,
    stored_specs,
)
from foldfeed.feature_store.format.settings import SUPPORTED_VERSIONS, StoreSettings
from foldfeed.feature_store.parts.presence import missing_file
from foldfeed.feature_store.parts.shard_reader import FileRange, ShardReader
from foldfeed.feature_store.parts.tiles import Crop, CropArrays, TiledRecord, TileReader, sizes_of
from foldfeed.feature_store.parts.writer import PART_ID_HEX
from foldfeed.feature_store.storage import Blobs, LocalBlobs, open_blobs
from foldfeed.feature_store.storage.read_pool import (
    DEFAULT_IN_FLIGHT,
    LOCAL_READ_BYTES,
    REMOTE_READ_BYTES,
    run_tasks,
)

# Arrays whose entries are tiles.
TILED = ("msa", "deletion")
# What a row says that was written before a column came.
_NOWHERE: Mapping[str, np.ndarray] = {}
_LATER_COLUMNS = {field.name: None for field in INDEX_SCHEMA if field.nullable}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordLocation:
    """Which record it is, where its entries start in the arrays of its part, and how many there are.

    ``first_structure_residue`` is None for a record without a structure.
    """

    record_id: str
    depth: int
    length: int
    first_tile: int
    first_row: int
    first_hit_id_byte: int
    first_residue: int
    first_overflow: int
    num_overflow: int
    first_structure_residue: int | None


class RecordRead(NamedTuple):
    """A crop and other arrays of one record.

    Attributes:
      crop: what `PartReader.crop` returns.
      arrays: the others by name; None for those of a structure that the record does not have.
      num_bytes: that the tiles of the crop take on disk, see `CropPlan`.
      num_cells: that were decoded, see `CropPlan`.
    """

    crop: Crop
    arrays: dict[str, np.ndarray | None]
    num_bytes: int
    num_cells: int


class PartReader:
    """One immutable part."""

    def __init__(self, blobs: Blobs, part_id: str) -> None:
        """Reads the part's metadata.

        Raises:
          CorruptDataError: it is missing or does not hash to the part's id.
          StoreGoneError: it is missing, and so is the whole store.
        """
        self.part_id = part_id
        self.blobs = blobs
        self.path = f"parts/{part_id}"
        self._url = blobs.url
        # A read of a local file is over before a thread would have been told about it, and so is one of files
        # that somebody brings here before they are read.
        self.is_local = getattr(blobs, "answers_at_once", isinstance(blobs, LocalBlobs))
        self.max_read_bytes = LOCAL_READ_BYTES if self.is_local else REMOTE_READ_BYTES
        where = f"{self.path}/{GROUP_FILE}"
        try:
            data = blobs.read(where)
        except FileNotFoundError as error:
            raise missing_file(blobs, where) from error
        if hashlib.sha256(data).hexdigest()[:PART_ID_HEX] != part_id:
            raise CorruptDataError(where, "the metadata does not hash to the name of its part")
        about = json.loads(data)["attributes"]["foldfeed"]
        if about["version"] not in SUPPORTED_VERSIONS:
            raise FormatVersionError(where, about["version"], SUPPORTED_VERSIONS)
        self.settings = StoreSettings(**about["settings"])
        self.files: dict[str, dict[str, Any]] = about["files"]
        self.num_records: int = about["num_records"]
        # All arrays of today, in the chunks that this part has or would have them in.
        self.specs = stored_specs(self.settings, about.get("chunk_entries", {}))
        self.arrays = {
            name: ShardReader(
                blobs,
                self.path,
                spec,
                about["lengths"][name],
                self.files.get(spec.shard_path, {}).get("bytes"),
            )
            for name, spec in self.specs.items()
            # A part from before an array came has none of it, and its records have nothing there.
            if name in about["lengths"]
        }
        self.tiles = TileReader(part_id, self.path, self.arrays)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        # Open files and thread pools stay behind; another process reads the metadata again.
        return _open_part, (self._url, self.part_id)

    def index_rows(self) -> list[dict[str, Any]]:
        """Returns the index row of every record of the part, without the part's id and the job's.

        Raises:
          CorruptDataError: a chunk is missing or does not match its checksum.
        """
        array = self.arrays["record_json"]
        lines = array.read(0, array.length).tobytes().splitlines()
        return [_LATER_COLUMNS | json.loads(line) for line in lines]

    def tiled(self, at: RecordLocation) -> TiledRecord:
        """Returns what reading a record's tiles needs to know."""
        return TiledRecord(
            at.record_id,
            grid_of(at.first_tile, at.depth, at.length, self.settings),
            RowOrder(self.settings, at.record_id, at.depth),
            at.first_residue,
            at.first_overflow,
            at.num_overflow,
        )

    def crop(
        self, at: RecordLocation, window: tuple[int, int], rows: Rows, out: CropArrays | None = None
    ) -> Crop:
        """Returns a crop of a record.

        Args:
          at: the record.
          window: residues ``[start, stop)``, checked by `grid.resolve_window`.
          rows: ranks checked by `grid.resolve_rows`, or stored rows checked by `grid.resolve_run`.
          out: arrays of the crop's shape to fill; fresh ones when None.
        Returns: a `Slab` for a run of stored rows.
        """
        job = self.tiles.job(self.tiled(at), window, rows, out)
        in_flight = 1 if self.is_local else DEFAULT_IN_FLIGHT
        run_tasks(self.tiles.openers([job]), in_flight)
        run_tasks(self.tiles.tasks([job], self.tiles.reads([job], self.max_read_bytes)), in_flight)
        self.tiles.finish(job)
        return self.tiles.result(job)

    def read(
        self,
        at: RecordLocation,
        window: tuple[int, int],
        rows: Rows,
        per_residue: Sequence[tuple[str, tuple[int, int]]],
        out: CropArrays | None = None,
        into: Mapping[str, np.ndarray] = _NOWHERE,
    ) -> RecordRead:
        """Returns a crop and other arrays of a record: `crop`, `per_residue` and `structure` in one round.

        Args:
          at: the record.
          window: of the crop, as for `crop`.
          rows: of it, as for `crop`.
          per_residue: name and residues ``[start, stop)`` of other arrays; no name twice.
          out: of the crop, as for `crop`.
          into: arrays to read some of the others into, by name; fresh ones for those that are not among them.
        """
        job = self.tiles.job(self.tiled(at), window, rows, out)
        found: dict[str, np.ndarray | None] = {}

        def read(name: str, residues: tuple[int, int]) -> None:
            if name not in structure.ARRAYS:
                found[name] = self.per_residue(name, at, residues, into.get(name))
            else:
                arrays = self.structure(at, residues, (name,), into)
                found[name] = None if arrays is None else arrays[name]

        in_flight = 1 if self.is_local else DEFAULT_IN_FLIGHT
        openers = self.tiles.openers([job])
        if not self.is_local:
            # Else they are opened where they are read: there is no round to be saved.
            openers += [
                self.arrays[name].open
                for name, _ in per_residue
                if name in self.arrays and not self.arrays[name].is_open and self.entries_of(name, at)[1]
            ]
        run_tasks(openers, in_flight)
        others = [functools.partial(read, name, residues) for name, residues in per_residue]
        reads = self.tiles.reads([job], self.max_read_bytes)
        run_tasks([*self.tiles.tasks([job], reads), *others], in_flight)
        self.tiles.finish(job)
        return RecordRead(self.tiles.result(job), found, *sizes_of(reads, job.record.grid))

    def per_residue(
        self,
        name: str,
        at: RecordLocation,
        window: tuple[int, int] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns a per-residue array (``aatype``, ``profile``, ...) of a record, or of a window of it.

        All fill value (NaN) when the part was written before that array came. Read into ``out`` if given.
        """
        start, stop = window or (0, at.length)
        if name not in self.arrays:
            spec = array_specs(self.settings)[name]
            if out is None:
                out = np.empty((stop - start, *spec.chunk[1:]), dtype=spec.dtype)
            out[...] = spec.fill_value
            return out
        return self.arrays[name].read(at.first_residue + start, at.first_residue + stop, out)

    def structure(
        self,
        at: RecordLocation,
        window: tuple[int, int],
        names: Iterable[str] = structure.ARRAYS,
        into: Mapping[str, np.ndarray] = _NOWHERE,
    ) -> dict[str, np.ndarray] | None:
        """Returns some arrays of `structure.ARRAYS` for a window of residues; None when there are none.

        Those that have a place in ``into`` are read into it.
        """
        if at.first_structure_residue is None:
            return None
        start, stop = (at.first_structure_residue + edge for edge in window)
        return {name: self.arrays[name].read(start, stop, into.get(name)) for name in names}

    def entries_of(self, name: str, at: RecordLocation) -> tuple[int, int]:
        """Returns the entries ``[start, stop)`` of an array that are a record's; none where it has none."""
        if name in TILED:
            grid = grid_of(at.first_tile, at.depth, at.length, self.settings)
            return at.first_tile, at.first_tile + grid.num_tiles
        if name == "deletion_overflow":
            return at.first_overflow, at.first_overflow + at.num_overflow
        first = at.first_structure_residue if name in structure.ARRAYS else at.first_residue
        return (0, 0) if first is None else (first, first + at.length)

    def ranges(
        self,
        at: RecordLocation,
        window: tuple[int, int],
        rows: Rows,
        per_residue: Iterable[tuple[str, tuple[int, int]]],
    ) -> list[FileRange]:
        """Returns what a crop and some per-residue arrays of a record read, before any of it is read.

        Only the indices of shards are read, once. What a crop needs to restore large deletion counts is among
        it whether or not there are such counts in the crop.

        Args:
          at: the record.
          window: residues ``[start, stop)`` of the crop.
          rows: of the crop, as for `crop`.
          per_residue: name and residues ``[start, stop)`` of other arrays; ones the part does not have are
            left out.
        """
        found = self.tiles.ranges(self.tiled(at), window, rows, self.max_read_bytes)
        for name, (start, stop) in per_residue:
            first, end = self.entries_of(name, at) if name in self.arrays else (0, 0)
            if end > first:
                found += self.arrays[name].ranges(first + start, first + stop)
        return found

    def row_table(self, at: RecordLocation, database_names: list[str]) -> pa.Table:
        """Returns the provenance of every row, see `Record.rows`."""
        start, stop = at.first_row, at.first_row + at.depth
        database = self.arrays["row_database"].read(start, stop)
        names = [None if code < 0 else database_names[code] for code in database.tolist()]
        return pa.table(
            {
                "rank": pa.array(np.arange(at.depth, dtype=np.int32)),
                "database": pa.array(names, type=pa.string()),
                "e_value": _nullable(self.arrays["row_e_value"].read(start, stop)),
                "bit_score": _nullable(self.arrays["row_bit_score"].read(start, stop)),
                "hit_id": pa.array(self._hit_ids(at), type=pa.string()),
                "species": pa.array(self._names("row_species", start, stop), type=pa.string()),
                "pairing_key": pa.array(self._names(PAIRING_KEY, start, stop), type=pa.string()),
                "taxonomy_id": self._taxonomy_ids(start, stop),
            }
        )

    def _names(self, array: str, start: int, stop: int) -> list[str]:
        """Returns names of fixed width; "" where the part has no such array."""
        if array not in self.arrays:
            return [""] * (stop - start)
        return [row.tobytes().rstrip(b"\0").decode() for row in self.arrays[array].read(start, stop)]

    def _taxonomy_ids(self, start: int, stop: int) -> pa.Array:
        if TAXONOMY not in self.arrays:
            return pa.nulls(stop - start, pa.int32())
        found = self.arrays[TAXONOMY].read(start, stop)
        return pa.array(found, mask=found == 0)

    def _hit_ids(self, at: RecordLocation) -> list[str]:
        sizes = self.arrays["row_hit_id_bytes"].read(at.first_row, at.first_row + at.depth)
        cuts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()
        first = at.first_hit_id_byte
        text = self.arrays["row_hit_id"].read(first, first + cuts[-1]).tobytes()
        return [text[a:b].decode() for a, b in itertools.pairwise(cuts)]


def _open_part(url: str, part_id: str) -> PartReader:
    return PartReader(open_blobs(url), part_id)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
