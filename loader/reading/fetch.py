"""Reads exactly what a plan says, into arrays of its own or into room that the caller gives.

Owns the way from a plan to arrays; the store owns tiles, checksums and files. One sample is one crop with a
few sidecars, read together. The shapes of all arrays follow from the plan, so room for them can be found
before anything is read (`ring`), and tiles are decoded straight into it.

Knows NumPy and no torch, so that a process that only reads starts quickly. Thread safe, as the store is.
Errors of the store pass through unchanged; the loader adds the sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store import Record
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.structure import NUM_ATOMS
from foldfeed.feature_store.parsers.mmcif.tables import is_plain_number
from foldfeed.loader.reading.plan import SamplePlan

# Fields of `SampleArrays` that are arrays, in the order in which they lie in a slot.
DTYPES: dict[str, np.dtype[Any]] = {
    "msa": np.dtype(np.uint8),
    "deletions": np.dtype(np.int32),
    "aatype": np.dtype(np.uint8),
    "profile": np.dtype(np.float32),
    "centre_at": np.dtype(np.int64),
    "extra_at": np.dtype(np.int64),
    "member_at": np.dtype(np.int64),
    "action": np.dtype(np.uint8),
    "profile_at": np.dtype(np.int64),
    "profile_u": np.dtype(np.float64),
    "deletion_mean": np.dtype(np.float32),
    "atom_positions": np.dtype(np.float32),
    "atom_mask": np.dtype(np.uint8),
    "resolution": np.dtype(np.float32),
    "clamped": np.dtype(np.float32),
}
ARRAYS = tuple(DTYPES)
_ITEM_BYTES = tuple((name, dtype.itemsize) for name, dtype in DTYPES.items())
Room = Mapping[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleArrays:
    """One sample as read: n rows, W columns, R residues in the crop (R <= W).

    Attributes:
      msa: uint8 (n, W), codes as stored.
      deletions: int32 (n, R): deletion counts matter inside the crop only.
      aatype: uint8 (R,), the query.
      profile: float32 (W, 22), share of each token over ALL rows of the record, not only those read.
      centre_at: int64 (C,), places of the centres in the rows read.
      extra_at: int64 (E,), places of the extra rows in the rows read.
      member_at: int64 (n - C,), places of the rows that join a cluster: all that are no centre.
      action: uint8 (C, W), see `reading.plan.MaskDraw`.
      profile_at: int64 (k,).
      profile_u: float64 (k,).
      deletion_mean: float32 (R,), over ALL rows of the record; (0,) where the recipe has no use for it.
      atom_positions: float32 (R + 1, 37, 3), angstrom, of the residue before the crop (0 where there is none)
        and of the crop; (0, 37, 3) where the recipe has no labels.
      atom_mask: uint8 (R + 1, 37), likewise.
      resolution: float32 (1,), angstrom, 0 where the record's structure has none; (0,) without labels.
      clamped: float32 (1,), 1 where the structure loss is to be clamped; (0,) without labels.
      crop_in_columns: the crop, counted from the first column read.
      first_residue: position of the crop in the protein, from 0.
    """

    msa: NDArray[np.uint8]
    deletions: NDArray[np.int32]
    aatype: NDArray[np.uint8]
    profile: NDArray[np.float32]
    centre_at: NDArray[np.int64]
    extra_at: NDArray[np.int64]
    member_at: NDArray[np.int64]
    action: NDArray[np.uint8]
    profile_at: NDArray[np.int64]
    profile_u: NDArray[np.float64]
    deletion_mean: NDArray[np.float32]
    atom_positions: NDArray[np.float32]
    atom_mask: NDArray[np.uint8]
    resolution: NDArray[np.float32]
    clamped: NDArray[np.float32]
    crop_in_columns: tuple[int, int]
    first_residue: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays: what one sample costs to hold, and to copy to a device."""
        return sum(getattr(self, name).nbytes for name in ARRAYS)


class Fetched(NamedTuple):
    """A sample as read, and what that took.

    Attributes:
      arrays: the sample.
      sizes: by name, ``stored_bytes`` that the tiles of its crop take in the store; ``decoded_bytes`` of all
        their cells (a byte for each token and each deletion count); ``used_bytes`` of the cells among them
        that the sample is made of.
    """

    arrays: SampleArrays
    sizes: dict[str, int]


def shapes_of(plan: SamplePlan) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays that `fetch` gives for a plan, by name, before anything is read."""
    num_rows, width = len(plan.rows), plan.columns[1] - plan.columns[0]
    residues, centres = plan.crop[1] - plan.crop[0], len(plan.centres)
    replaced = len(plan.masking.profile_at)
    with_atoms = residues + 1 if plan.labels else 0
    return {
        "msa": (num_rows, width),
        "deletions": (num_rows, residues),
        "aatype": (residues,),
        "profile": (width, alphabet.NUM_TOKENS),
        "centre_at": (centres,),
        "extra_at": (len(plan.extras),),
        "member_at": (num_rows - centres,),
        "action": (centres, width),
        "profile_at": (replaced,),
        "profile_u": (replaced,),
        "deletion_mean": (residues if plan.full_deletion_mean else 0,),
        "atom_positions": (with_atoms, NUM_ATOMS, 3),
        "atom_mask": (with_atoms, NUM_ATOMS),
        "resolution": (int(plan.labels),),
        "clamped": (int(plan.labels),),
    }


def num_bytes_of(shapes: Mapping[str, tuple[int, ...]], alignment: int = 1) -> int:
    """Returns the bytes of arrays of such shapes, each begun at a multiple of ``alignment``."""
    total = 0
    for name, item_bytes in _ITEM_BYTES:
        total += -(-math.prod(shapes[name]) * item_bytes // alignment) * alignment
    return total


def arrays_of(plan: SamplePlan) -> list[tuple[str, tuple[int, int]]]:
    """Returns which arrays of a record a plan reads beside its crop, and residues ``[start, stop)`` of each.

    The query's residues are not among them: they are row 0 of the crop.
    """
    arrays = [("profile", plan.columns)]
    if plan.full_deletion_mean:
        arrays.append(("deletion_mean", plan.crop))
    if plan.labels:
        arrays += [("atom_positions", plan.atoms), ("atom_mask", plan.atoms)]
        if plan.min_plddt:
            arrays.append(("b_factor", plan.atoms))
    return arrays


def fetch(record: Record, plan: SamplePlan, room: Room | None = None) -> Fetched:
    """Returns what a plan asks for; behind a network in one round of reads, see `Record.read`.

    Args:
      record: the plan's record.
      plan: what to read.
      room: C-contiguous arrays of `shapes_of` the plan and `DTYPES` to read into; fresh ones when None. What
        they hold after an error is undefined.
    Raises:
      CorruptDataError: stored bytes do not match their checksum.
      OSError: the file system or the network failed.
    """
    assert (record.length, record.depth) == (plan.length, plan.depth), (record, plan)
    if room is None:
        room = {name: np.empty(shape, dtype=DTYPES[name]) for name, shape in shapes_of(plan).items()}
    start, stop = plan.crop_in_columns
    is_whole = (start, stop) == (0, plan.columns[1] - plan.columns[0])
    # Deletions of columns outside of the crop are read with their tiles and left behind.
    deletions = room["deletions"] if is_whole else np.empty(room["msa"].shape, dtype=np.int32)
    out = room["msa"], deletions
    into = {"profile": room["profile"]}
    if plan.full_deletion_mean:
        into["deletion_mean"] = room["deletion_mean"]
    read = record.read(slice(*plan.columns), plan.selection, arrays_of(plan), out=out, into=into)
    if not is_whole:
        room["deletions"][:] = deletions[:, start:stop]
    rows = plan.rows
    # Row 0 is the query, which is what the store's aatype is made of.
    assert rows[0] == 0, rows
    room["aatype"][:] = room["msa"][0, start:stop]
    _put_places(plan, room)
    room["action"][:] = plan.masking.action
    room["profile_at"][:] = plan.masking.profile_at
    room["profile_u"][:] = plan.masking.profile_u
    if plan.labels:
        _put_atoms(record.structure_source, read.arrays, plan, room)
    arrays = SampleArrays(**room, crop_in_columns=(start, stop), first_residue=plan.crop[0])
    sizes = {
        "stored_bytes": read.num_bytes,
        "decoded_bytes": read.num_cells,
        "used_bytes": len(rows) * (room["msa"].shape[1] + stop - start),
    }
    return Fetched(arrays, sizes)


def _put_places(plan: SamplePlan, room: Room) -> None:
    rows = plan.rows
    centre_at, extra_at, member_at = room["centre_at"], room["extra_at"], room["member_at"]
    if rows[-1] == len(rows) - 1:
        # Every row is at its own place: a slab, or all rows.
        centre_at[:], extra_at[:] = plan.centres, plan.extras
    else:
        # A look-up costs a fifth of a search; entries between the rows are not read.
        place_of = np.empty(rows[-1] + 1, dtype=np.int64)
        place_of[rows] = np.arange(len(rows))
        centre_at[:], extra_at[:] = place_of[plan.centres], place_of[plan.extras]
    if len(extra_at) == len(member_at):
        # Nothing is read but centres and extra rows, which have no row in common.
        member_at[:] = extra_at
        member_at.sort()
    else:
        is_member = np.ones(len(rows), dtype=bool)
        is_member[centre_at] = False
        member_at[:] = np.flatnonzero(is_member)


def _put_atoms(
    source: Mapping[str, str] | None,
    read: Mapping[str, NDArray[Any] | None],
    plan: SamplePlan,
    room: Room,
) -> None:
    room["clamped"][:] = plan.clamped
    positions, mask = (read[name] for name in ("atom_positions", "atom_mask"))
    if source is None or positions is None or mask is None:
        for name in ("atom_positions", "atom_mask", "resolution"):
            room[name][:] = 0
        return
    if plan.min_plddt:
        # Source: OpenFold ``data_pipeline.make_pdb_features``.
        confidence = read["b_factor"]
        assert confidence is not None
        kept = np.asarray((confidence > plan.min_plddt).any(axis=1))
        positions, mask = np.where(kept[:, None, None], positions, np.float32(0)), mask * kept[:, None]
    # The first residue of a protein has none before it.
    missing = len(room["atom_mask"]) - len(mask)
    for name, values in (("atom_positions", positions), ("atom_mask", mask)):
        room[name][:missing] = 0
        room[name][missing:] = values
    # As in AlphaFold 2, what has no resolution (NMR, a predicted structure) has 0. Text that is no plain
    # number counts as none, as in the SQL tables and exports; only structures that a program made by itself
    # have it.
    text = source.get("resolution_angstrom", "")
    room["resolution"][:] = float(text) if is_plain_number(text) else 0.0
