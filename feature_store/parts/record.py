"""`Record`: one record of one version of a store, as a reader sees it: rows in rank order, fresh arrays.

Owns the way from what a caller asks for (residues, ranks) to calls of the part that holds the record. Does
not own how a part is read (`parts.reader`) or which version a record belongs to (`store`). Cheap to make;
reads when asked. Thread safe, because its part is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.format.grid import (
    Rows,
    StoredRun,
    Window,
    num_rows_of,
    resolve_rows,
    resolve_run,
    resolve_window,
)
from foldfeed.feature_store.format.structure import ARRAYS as STRUCTURE_ARRAYS
from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.format.templates import Templates
from foldfeed.feature_store.parts.dataset import to_dataset
from foldfeed.feature_store.parts.reader import PartReader, RecordLocation, RecordRead
from foldfeed.feature_store.parts.shard_reader import FileRange
from foldfeed.feature_store.parts.template_scan import load_templates
from foldfeed.feature_store.parts.tiles import Crop, CropArrays, CropPlan, Slab, TiledRecord, pair_of

# What is stored for every residue of a record, whether or not it has a structure.
PER_RESIDUE = ("aatype", "profile", "deletion_mean", "gap_fraction", "entropy", "neff")
_WINDOWED = (*PER_RESIDUE, *STRUCTURE_ARRAYS)


class CropShape(NamedTuple):
    """What a crop covers, checked against its record.

    Attributes:
      window: residues ``[start, stop)``.
      rows: ranks or a run of stored rows.
    """

    window: tuple[int, int]
    rows: Rows

    @property
    def size(self) -> tuple[int, int]:
        """Rows and residues."""
        return num_rows_of(self.rows), self.window[1] - self.window[0]


class Record:
    """One record of one version of a store; cheap to make, reads when asked."""

    def __init__(self, part: PartReader, row: Mapping[str, Any]) -> None:
        """Use `FeatureStore.__getitem__`."""
        self._part = part
        self._row = row
        self._at = RecordLocation(
            record_id=row["record_id"],
            depth=row["depth"],
            length=row["length"],
            first_tile=row["first_tile"],
            first_row=row["first_row"],
            first_hit_id_byte=row["first_hit_id_byte"],
            first_residue=row["first_residue"],
            first_overflow=row["first_overflow"],
            num_overflow=row["num_overflow"],
            first_structure_residue=row["first_structure_residue"],
        )

    def __reduce__(self) -> tuple[Any, tuple[PartReader, dict[str, Any]]]:
        return Record, (self._part, dict(self._row))

    def __repr__(self) -> str:
        return f"Record({self.record_id!r}, length={self.length}, depth={self.depth})"

    @property
    def record_id(self) -> str:
        """Unique in the store."""
        return self._row["record_id"]

    @property
    def description(self) -> str:
        """Free text, usually from the FASTA header."""
        return self._row["description"]

    @property
    def sequence(self) -> str:
        """Upper-case one-letter residues."""
        return self._row["sequence"]

    @property
    def length(self) -> int:
        """Number of residues."""
        return self._at.length

    @property
    def depth(self) -> int:
        """Number of rows of the alignment, the query included."""
        return self._at.depth

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the record says."""
        return self._row["fingerprint"]

    @property
    def databases(self) -> list[dict[str, Any]]:
        """What was searched, in merge order: name, digest, tool, tool_version, num_hits, num_rows."""
        return self._row["databases"]

    @property
    def extra(self) -> dict[str, str]:
        """Further facts that the writer recorded."""
        return json.loads(self._row["extra"])

    @property
    def part(self) -> PartReader:
        """The part that holds it."""
        return self._part

    @property
    def tiled(self) -> TiledRecord:
        """What reading its tiles needs to know."""
        return self._part.tiled(self._at)

    def resolve(self, residues: Window | None, rows: Window | Rows | None) -> CropShape:
        """Returns what a crop covers, checked.

        Raises:
          IndexError: outside the record.
        """
        window = resolve_window("residues", residues, self.length)
        if isinstance(rows, StoredRun):
            return CropShape(window, resolve_run(rows, self.depth))
        return CropShape(window, resolve_rows(rows, self.depth))

    def crop(
        self,
        residues: Window | None = None,
        rows: Window | Rows | None = None,
        *,
        out: CropArrays | None = None,
    ) -> Crop:
        """Returns a piece of the alignment, reading only the tiles it touches.

        Args:
          residues: window ``slice(a, b)``, cut to the record as NumPy cuts slices; an integer picks one, and
            the array keeps its axis; everything when None.
          rows: ranks, the query is 0: a window like ``residues``, or int64 indices in any order; everything
            when None. Or a `StoredRun`, see `slab`.
          out: uint8 and int32 arrays of exactly that shape, of any strides, to read into. What they hold
            after an error is undefined.
        Returns: `Crop` of msa uint8 and deletions int32, both (rows, residues), owned by the caller.
        Raises:
          IndexError: an integer outside the record, an empty window, a step.
          ValueError: ``out`` has another shape or dtype.
          CorruptDataError: a tile does not match its checksum.
        """
        shape = self.resolve(residues, rows)
        if out is not None:
            _check_out(out, shape.size)
        return self._part.crop(self._at, shape.window, shape.rows, out)

    def slab(
        self,
        residues: Window | None = None,
        *,
        start: int = 0,
        num_rows: int | None = None,
        out: CropArrays | None = None,
    ) -> Slab:
        """Returns the query and a contiguous cyclic run of hits in stored order.

        In a store of row order ``permuted`` that is a uniform sample of the hits without repeats when
        ``start`` is uniform in 0..depth-2, and it reads few tiles; in one of ``rank`` it is a run of ranks.
        A `crop` of the first ranks is the other way round: few tiles with ``rank``, nearly all in the other.

        Args:
          residues: as for `crop`.
          start: the first hit, counted in stored order from 0 to depth - 2.
          num_rows: rows, the query counted; all when None.
          out: as for `crop`.
        Returns: `Slab`, whose ``ranks`` say which rows it holds; row 0 is the query.
        Raises:
          IndexError: outside the record.
          ValueError: ``out`` has another shape or dtype.
          CorruptDataError: a tile does not match its checksum.
        """
        run = StoredRun(start, self.depth if num_rows is None else num_rows)
        shape = self.resolve(residues, run)
        if out is not None:
            _check_out(out, shape.size)
        slab = self._part.crop(self._at, shape.window, shape.rows, out)
        assert isinstance(slab, Slab)
        return slab

    def read(
        self,
        residues: Window | None = None,
        rows: Window | Rows | None = None,
        per_residue: Sequence[tuple[str, tuple[int, int]]] = (),
        *,
        out: CropArrays | None = None,
        into: Mapping[str, NDArray[Any]] | None = None,
    ) -> RecordRead:
        """Returns a crop and other arrays of the record, all of them read at the same time.

        Behind a network that is one round of reads, a second one only for what nobody read of the part before
        (the indices of its shards) and for deletion counts above 254. `ranges` says which reads.

        Args:
          residues: of the crop, as for `crop`.
          rows: of it, as for `crop`, or a `StoredRun` as for `slab`.
          per_residue: names of other arrays (`PER_RESIDUE`, or of a `Structure`) with the residues ``[start,
            stop)`` wanted of each.
          out: as for `crop`.
          into: arrays to read some of the others into, by name, of their shape and dtype and any strides;
            those of a structure that the record does not have stay as they are.
        Raises:
          IndexError: outside the record.
          ValueError: an unknown name, or one twice; an array to read into has another shape or dtype.
          CorruptDataError: a tile or chunk does not match its checksum.
        """
        shape = self.resolve(residues, rows)
        if out is not None:
            _check_out(out, shape.size)
        names = [name for name, _ in per_residue]
        for name, (start, stop) in per_residue:
            if name not in _WINDOWED or names.count(name) > 1:
                raise ValueError(f"per_residue: {name!r} must be one of {', '.join(_WINDOWED)}, once")
            if not 0 <= start <= stop <= self.length:
                raise IndexError(f"{name} [{start}, {stop}) is outside of 0..{self.length}")
        if into is None:
            return self._part.read(self._at, shape.window, shape.rows, per_residue, out)
        self._check_into(into, dict(per_residue))
        return self._part.read(self._at, shape.window, shape.rows, per_residue, out, into)

    def _check_into(self, into: Mapping[str, NDArray[Any]], asked: Mapping[str, tuple[int, int]]) -> None:
        for name, array in into.items():
            if name not in asked:
                raise ValueError(f"into: {name!r} is not among the arrays that are read, {sorted(asked)}")
            spec = self._part.specs[name]
            start, stop = asked[name]
            shape = (stop - start, *spec.chunk[1:])
            if array.shape != shape or array.dtype != spec.dtype:
                raise ValueError(
                    f"into: {name} is {array.dtype} {array.shape}; its window needs {spec.dtype} {shape}"
                )

    def plan(self, residues: Window | None = None, rows: Window | Rows | None = None) -> CropPlan:
        """Returns which tiles such a crop reads, how many cells that is and how many bytes.

        Arithmetic, but for the number of bytes, which the shard indices know: these are read when the first
        crop of a part is planned or read, and kept (16 bytes per tile).

        Args:
          residues: as for `crop`.
          rows: as for `crop`, or a `StoredRun` as for `slab`.
        Raises:
          IndexError: outside the record.
          CorruptDataError: a shard index is damaged.
        """
        window, found = self.resolve(residues, rows)
        return self._part.tiles.plan(self.tiled, window, found, self._part.max_read_bytes)

    def ranges(
        self,
        residues: Window | None = None,
        rows: Window | Rows | None = None,
        per_residue: Iterable[tuple[str, tuple[int, int]]] = (),
    ) -> list[FileRange]:
        """Returns the stretches of the store's files that reading all that takes; see `PartReader.ranges`.

        Args:
          residues: of a crop, as for `crop`.
          rows: of it, as for `crop`, or a `StoredRun` as for `slab`.
          per_residue: names and residues ``[start, stop)`` of other arrays that are read with it.
        Raises:
          IndexError: outside the record.
          CorruptDataError: a shard index is damaged.
        """
        window, found = self.resolve(residues, rows)
        return self._part.ranges(self._at, window, found, per_residue)

    def crop_bytes(self, residues: Window | None = None, rows: Window | Rows | None = None) -> int:
        """Returns the stored bytes of the tiles that `crop` would read for the same arguments."""
        return self.plan(residues, rows).num_bytes

    def msa(self) -> NDArray[np.uint8]:
        """Returns uint8 (depth, length), rows in rank order, the query first."""
        return self.crop().msa

    def deletions(self) -> NDArray[np.int32]:
        """Returns int32 (depth, length): residues inserted immediately left of each column."""
        return self.crop().deletions

    def aatype(self, residues: Window | None = None) -> NDArray[np.uint8]:
        """Returns uint8 (length,): codes of the query; of a window as for `crop` when one is given."""
        return self.per_residue("aatype", residues)

    def profile(self, residues: Window | None = None) -> NDArray[np.float32]:
        """Returns float32 (length, 22): share of each token over all rows; of a window when one is given."""
        return self.per_residue("profile", residues)

    def deletion_mean(self, residues: Window | None = None) -> NDArray[np.float32]:
        """Returns float32 (length,): mean deletion count over all rows; of a window when one is given."""
        return self.per_residue("deletion_mean", residues)

    def gap_fraction(self, residues: Window | None = None) -> NDArray[np.float32]:
        """Returns float32 (length,): share of rows with a gap; of a window when one is given."""
        return self.per_residue("gap_fraction", residues)

    def entropy_per_residue(self, residues: Window | None = None) -> NDArray[np.float32]:
        """Returns float32 (length,): entropy in bits of the residues of each column, see `sidecars`.

        Of a window when one is given. NaN when the record was written before format v1 had it.
        """
        return self.per_residue("entropy", residues)

    def entropy(self, residues: Window | None = None) -> NDArray[np.float32]:
        """Returns `entropy_per_residue`, of which this is the older name."""
        return self.entropy_per_residue(residues)

    @property
    def neff(self) -> float | None:
        """N_eff of the alignment at 80 % identity, or None when it was not computed; see `effective_rows`.

        A fact of the whole record, like `depth`; `neff_per_residue` is the counterpart of
        `entropy_per_residue`.
        """
        return self._row["neff"]

    def neff_per_residue(self, residues: Window | None = None) -> NDArray[np.float32]:
        """Returns float32 (length,): sum of the weights of rows with a residue there; NaN if not computed.

        Of a window when one is given.
        """
        return self.per_residue("neff", residues)

    def per_residue(self, name: str, residues: Window | None = None) -> NDArray[Any]:
        """Returns a per-residue array by its name in `features`, which is that in the SQL table ``residues``.

        Args:
          name: one of `PER_RESIDUE`.
          residues: as for `crop`.
        Raises:
          ValueError: an unknown name.
          IndexError: an integer outside the record, an empty window, a step.
          CorruptDataError: a chunk does not match its checksum.
        """
        if name not in PER_RESIDUE:
            raise ValueError(f"no per-residue array {name!r}; there are {', '.join(PER_RESIDUE)}")
        return self._part.per_residue(name, self._at, resolve_window("residues", residues, self.length))

    def structure(self, residues: Window | None = None) -> Structure | None:
        """Returns the atoms of a window of residues, or None when the record has no structure.

        Args:
          residues: as for `crop`.
        Raises:
          IndexError: an integer outside the record, an empty window, a step.
          CorruptDataError: a chunk does not match its checksum, or the atoms are not a structure.
        """
        arrays = self._part.structure(self._at, resolve_window("residues", residues, self.length))
        if arrays is None:
            return None
        try:
            return Structure(**arrays, source=json.loads(self._row["structure"]))
        except (ValueError, TypeError) as error:
            raise CorruptDataError(f"{self._part.path}, record {self.record_id}", str(error)) from error

    @property
    def structure_source(self) -> dict[str, str] | None:
        """Facts of the record's structure, see `Structure`; None without one. Known without reading it."""
        if self._at.first_structure_residue is None:
            return None
        found: dict[str, str] = json.loads(self._row["structure"])
        return found

    def atoms(
        self, residues: Window | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], dict[str, str]] | None:
        """Returns positions, mask and source of a structure without reading its other arrays.

        Args:
          residues: as for `crop`.
        Returns: float32 (residues, 37, 3) in angstrom, uint8 (residues, 37) and the facts, see `Structure`;
          None without a structure.

        Raises:
          IndexError: an integer outside the record, an empty window, a step.
          CorruptDataError: a chunk does not match its checksum.
        """
        window = resolve_window("residues", residues, self.length)
        found = self._part.structure(self._at, window, ("atom_positions", "atom_mask"))
        if found is None:
            return None
        return found["atom_positions"], found["atom_mask"], json.loads(self._row["structure"])

    def templates(self, **rules: Any) -> Templates | None:
        """Returns the chains of known structure that a search found, or None when none was searched.

        Example:
          >>> record.templates(max_date="2018-04-30", max_hits=20)

        Args:
          **rules: which of them, see `Templates.select`; all when none is given.
        Raises:
          ValueError: a rule that cannot be.
          CorruptDataError: a chunk does not match its checksum, or what it holds is no hit.
        """
        found = load_templates(self._part, self._row)
        return found.select(self.sequence, **rules) if found is not None and rules else found

    def rows(self) -> pa.Table:
        """Returns the provenance of every row, see `RowProvenance`.

        Columns are rank, database, e_value, bit_score, hit_id, species, pairing_key and taxonomy_id.
        ``database`` is null for the query row; ``e_value`` and ``bit_score`` are null where the tool gave
        none, ``taxonomy_id`` where it is not known; ``species`` and ``pairing_key`` are empty where a row has
        none.
        """
        return self._part.row_table(self._at, [entry["name"] for entry in self.databases])

    def features(self, *, msa: bool = False) -> dict[str, NDArray[Any]]:
        """Returns the per-residue arrays of `PER_RESIDUE` by name.

        Args:
          msa: also ``msa`` and ``deletions``, (depth, length) each; they are read only when asked for.
        """
        found: dict[str, NDArray[Any]] = {name: self.per_residue(name) for name in PER_RESIDUE}
        if msa:
            crop = self.crop()
            found |= {"msa": crop.msa, "deletions": crop.deletions}
        return found

    def to_xarray(self, *, msa: bool = False) -> Any:
        """Returns `features` as an ``xarray.Dataset``, see `dataset.to_dataset`.

        Raises:
          MissingExtraError: xarray is not installed.
        """
        facts = ("record_id", "description", "sequence", "depth", "fingerprint", "extra")
        attributes = {name: self._row[name] for name in facts} | {"databases": json.dumps(self.databases)}
        return to_dataset(self.features(msa=msa), self.sequence, attributes)


def _check_out(out: CropArrays, shape: tuple[int, int]) -> None:
    """Raises unless arrays can take a crop of that shape."""
    msa, deletions = pair_of(out)
    for name, array, dtype in (("msa", msa, np.uint8), ("deletions", deletions, np.int32)):
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"out: {name} is {array.dtype} {array.shape}; this crop needs {np.dtype(dtype)} {shape}"
            )
