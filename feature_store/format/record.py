"""`MsaRecord`: one protein with its alignment, as a pipeline hands it to the store's writer.

This is the contract between whoever makes features (pipelines, importers) and the store. It owns shapes,
dtypes and validity; it knows nothing of tiles, files or search tools. A record is a value: two records with
equal content have equal fingerprints, on any machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import InvalidRecordError
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.effective_rows import NEFF_MAX_ROWS, EffectiveRows, measure_effective_rows
from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.format.templates import Templates

# Ids are file-name and SQL friendly and cannot walk out of a folder; UniProt, PDB and UniRef ids all fit.
RECORD_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.|:+=@-]{0,254}")
MAX_RESIDUES = 100_000
MAX_ROWS = 2**31 - 1
MAX_DELETION = 2**31 - 1
SPECIES_BYTES = 8
PAIRING_KEY_BYTES = 32
# Of the numbers that `RowProvenance` holds.
ROW_DTYPES = {"database": "int16", "e_value": "float64", "bit_score": "float32"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseUse:
    """One database that was searched for a record, and what came of it.

    Attributes:
      name: the name the user gave it, e.g. ``uniref90``.
      digest: sha256 (hex) of the database's manifest: which data was searched.
      tool: ``jackhmmer``, ``hhblits``, ``import``, ...
      tool_version: as the tool prints it.
      num_hits: rows the tool returned besides the query, before merging.
      num_rows: rows of the stored alignment that came from this database (the query row counts for none).
    """

    name: str
    digest: str
    tool: str
    tool_version: str
    num_hits: int
    num_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowProvenance:
    """Where each row of an alignment comes from; every field has one entry per row, the query first.

    Attributes:
      database: int16 (depth,), position in `MsaRecord.databases`; -1 for the query row.
      e_value: float64 (depth,), of the whole target sequence; NaN where the tool gives none.
      bit_score: float32 (depth,); NaN where the tool gives none.
      hit_id: the row's name as the tool wrote it, e.g. ``UniRef90_P69905/3-140``.
      species: UniProt species mnemonic (``HUMAN``) or "".
      pairing_key: what the source pairs the rows of several chains by, or "" for a row without partners: rows
        of different records with equal keys belong together where the records say the same ``assembly`` in
        `MsaRecord.extra`. Empty when no row has one.
      taxonomy_id: int32 (depth,), NCBI taxonomy of the row's organism, 0 where it is not known; None when no
        row has one.
    """

    database: NDArray[np.int16]
    e_value: NDArray[np.float64]
    bit_score: NDArray[np.float32]
    hit_id: Sequence[str]
    species: Sequence[str]
    pairing_key: Sequence[str] = ()
    taxonomy_id: NDArray[np.int32] | None = None

    @property
    def has_taxonomy(self) -> bool:
        """Whether any row has a taxonomy id."""
        return self.taxonomy_id is not None and bool(self.taxonomy_id.any())

    @property
    def is_paired(self) -> bool:
        """Whether any row has a pairing key."""
        return any(self.pairing_key)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MsaRecord:
    """One protein and its merged alignment.

    Attributes:
      record_id: unique in a store, see `RECORD_ID`.
      description: free text, usually the rest of the FASTA header.
      sequence: upper-case one-letter residues, as searched (B, Z, U, J, O, X kept).
      msa: uint8 (depth, length) codes of `alphabet`, the query first, rows in rank order.
      deletions: int32 (depth, length): residues inserted immediately left of each column.
      rows: provenance of every row.
      databases: what was searched, in merge order.
      extra: small JSON-able facts about the record (e.g. ``{"source": "a.fasta"}``).
      structure: atoms of the query's residues, when there are any; it belongs to what the record says.
      neff: of `msa`, when whoever made the record computed it; it follows from the alignment, so it does not
        belong to what the record says.
      templates: chains of known structure that a search found; None when none was made. What was found
        belongs to what the record says.
    """

    record_id: str
    description: str
    sequence: str
    msa: NDArray[np.uint8]
    deletions: NDArray[np.int32]
    rows: RowProvenance
    databases: tuple[DatabaseUse, ...]
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)
    structure: Structure | None = None
    neff: EffectiveRows | None = None
    templates: Templates | None = None

    def __post_init__(self) -> None:
        reason = self._problem()
        if reason is not None:
            raise InvalidRecordError(self.record_id, reason)

    @property
    def depth(self) -> int:
        """Number of rows, the query included."""
        return int(self.msa.shape[0])

    @property
    def length(self) -> int:
        """Number of residues of the query."""
        return len(self.sequence)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything the record says, independent of how it is stored."""
        digest = hashlib.sha256()
        head = {
            "record_id": self.record_id,
            "description": self.description,
            "sequence": self.sequence,
            "depth": self.depth,
            "databases": [dataclasses.asdict(use) for use in self.databases],
            "extra": dict(self.extra),
        }
        digest.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        numbers = (self.rows.database, canonical_nan(self.rows.e_value), canonical_nan(self.rows.bit_score))
        for array in (self.msa, self.deletions, *numbers):
            # The bytes as they lie, not a copy of them: an alignment may fill half of the memory.
            digest.update(np.ascontiguousarray(array).data.cast("B"))
        digest.update("\x00".join(self.rows.hit_id).encode())
        digest.update("\x00".join(self.rows.species).encode())
        if self.rows.is_paired:
            digest.update("\x00".join(["pairing_key", *self.rows.pairing_key]).encode())
        if self.rows.taxonomy_id is not None and self.rows.has_taxonomy:
            digest.update(b"taxonomy_id" + np.ascontiguousarray(self.rows.taxonomy_id, dtype="<i4").tobytes())
        if self.structure is not None:
            digest.update(self.structure.fingerprint.encode())
        if self.templates is not None:
            digest.update(f"templates {self.templates.fingerprint}".encode())
        return digest.hexdigest()

    def with_neff(self, max_rows: int = NEFF_MAX_ROWS) -> MsaRecord:
        """Returns the record with its N_eff, or as it is when it has one or is deeper than ``max_rows``."""
        if self.neff is not None or self.depth > max_rows:
            return self
        return dataclasses.replace(self, neff=measure_effective_rows(self.msa))

    def _problem(self) -> str | None:
        """Returns the first rule this record breaks, or None."""
        if not RECORD_ID.fullmatch(self.record_id):
            return "an id is 1 to 255 of A-Z a-z 0-9 _ . | : + = @ - and does not start with punctuation"
        if not 1 <= self.length <= MAX_RESIDUES:
            return f"it has {self.length} residues; the format holds 1 to {MAX_RESIDUES}"
        if self.msa.dtype != np.uint8 or self.msa.ndim != 2 or self.deletions.dtype != np.int32:
            return (
                f"msa must be uint8 (depth, length) and deletions int32, not {self.msa.dtype} "
                f"{self.msa.shape} and {self.deletions.dtype}"
            )
        if self.msa.shape != self.deletions.shape or self.msa.shape[1] != self.length:
            return (
                f"msa {self.msa.shape} and deletions {self.deletions.shape} must both be "
                f"(depth, {self.length}), the length of the sequence"
            )
        if not 1 <= self.depth <= MAX_ROWS:
            return f"it has {self.depth} rows; the format holds 1 to {MAX_ROWS}"
        return self._content_problem()

    def _content_problem(self) -> str | None:
        if int(self.msa.max()) >= alphabet.NUM_TOKENS:
            return f"msa holds code {int(self.msa.max())}; codes are 0..{alphabet.NUM_TOKENS - 1}"
        if int(self.deletions.min()) < 0:
            return f"deletions holds {int(self.deletions.min())}; counts are never negative"
        if not np.array_equal(self.msa[0], alphabet.encode(self.sequence)):
            return "row 0 of msa is not the query sequence"
        if "-" in self.sequence:
            return f"its sequence has a gap at residue {self.sequence.index('-') + 1}; a query has none"
        return self._rows_problem() or self._text_problem() or self._derived_problem()

    def _rows_problem(self) -> str | None:
        for name, dtype in ROW_DTYPES.items():
            values = getattr(self.rows, name)
            if not isinstance(values, np.ndarray) or values.dtype != np.dtype(dtype) or values.ndim != 1:
                found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values)
                return f"rows.{name} must be {dtype} ({self.depth},), not {found}"
        for name in (*ROW_DTYPES, "hit_id", "species"):
            if len(getattr(self.rows, name)) != self.depth:
                return f"rows.{name} has {len(getattr(self.rows, name))} entries for {self.depth} rows"
        if len(self.rows.pairing_key) not in (0, self.depth):
            return f"rows.pairing_key has {len(self.rows.pairing_key)} entries for {self.depth} rows"
        ids = self.rows.taxonomy_id
        if ids is not None and (ids.dtype != np.int32 or ids.shape != (self.depth,) or (ids < 0).any()):
            return f"rows.taxonomy_id must be int32 ({self.depth},), 0 or more, not {ids.dtype} {ids.shape}"
        if int(self.rows.database.max()) >= len(self.databases) or int(self.rows.database.min()) < -1:
            return f"rows.database must be -1 or an index into the {len(self.databases)} databases"
        if int(self.rows.database[0]) != -1:
            return f"rows.database is {int(self.rows.database[0])} for the query; it comes from none: -1"
        return None

    def _text_problem(self) -> str | None:
        hit_ids = "".join(self.rows.hit_id)
        for what, names, limit in (
            ("species name", self.rows.species, SPECIES_BYTES),
            ("pairing key", self.rows.pairing_key, PAIRING_KEY_BYTES),
        ):
            joined = "".join(names)
            if not joined.isascii() or "\0" in joined:
                return f"a {what} holds something else than ASCII, or a zero byte"
            if any(len(name) > limit for name in names):
                return f"a {what} is longer than {limit} bytes"
        for name, text in (("a hit id", hit_ids), ("its description", self.description)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return f"{name} cannot be written as UTF-8 ({error.reason})"
        return None

    def _derived_problem(self) -> str | None:
        if self.structure is not None and self.structure.length != self.length:
            return f"its structure has {self.structure.length} residues, its sequence {self.length}"
        if self.templates is not None and self.templates.reaches() > self.length:
            return f"a template is aligned with its residue {self.templates.reaches()} of {self.length}"
        if self.neff is None:
            return None
        values = self.neff.per_residue
        if values.dtype != np.float32 or values.shape != (self.length,):
            return f"neff must be float32 ({self.length},), not {values.dtype} {values.shape}"
        # No weight is above 1, and the query's own row counts.
        inside = np.isfinite(values).all() and (values >= 0).all() and (values <= self.depth).all()
        if not inside or not 0 < self.neff.total <= self.depth:
            return f"neff {self.neff.total} is not above 0 and at most its {self.depth} rows, in all columns"
        return None


def canonical_nan(values: NDArray[Any]) -> NDArray[Any]:
    """Returns floats in which every NaN has the same bits, the array itself when it has none.

    0.0 / 0.0 is a negative NaN on some processors; fingerprints and parts must not depend on that.
    """
    unknown = np.isnan(values)
    return np.where(unknown, values.dtype.type(np.nan), values) if unknown.any() else values
