"""`Structure`: the atoms of one protein chain in the 37 heavy-atom slots that folding models train on.

This is the contract between whoever reads coordinate files (`parsers.mmcif.entry`, pipelines) and the store.
It owns shapes, dtypes, units and validity; it parses nothing. Residue i is residue i of the record's
sequence, so a residue that was not observed has an empty row and nothing shifts.

Source: J. Jumper et al., Nature 596 (2021), supplementary information 1.2.1 and AlphaFold 2's
``residue_constants.atom_types`` (order of the 37 names).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# fmt: off
ATOM_NAMES = (
    "N", "CA", "C", "CB", "O", "CG", "CG1", "CG2", "OG", "OG1", "SG", "CD", "CD1", "CD2", "ND1", "ND2", "OD1",
    "OD2", "SD", "CE", "CE1", "CE2", "CE3", "NE", "NE1", "NE2", "OE1", "OE2", "CH2", "NH1", "NH2", "OH", "CZ",
    "CZ2", "CZ3", "NZ", "OXT",
)
# fmt: on
NUM_ATOMS = len(ATOM_NAMES)
# Stands in `residue_number` where the file gives the residue no number.
NO_NUMBER = -(2**31)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Structure:
    """One model of one chain.

    Attributes:
      atom_positions: float32 (length, 37, 3), angstrom, in the order of `ATOM_NAMES`; 0 where there is no
        atom.
      atom_mask: uint8 (length, 37), 1 where there is an atom.
      b_factor: float32 (length, 37), square angstrom (or pLDDT in predicted models); 0 where there is no
        atom.
      residue_number: int32 (length,), the author's number of the residue (``auth_seq_id``); `NO_NUMBER` where
        the file has none.
      insertion_code: uint8 (length,), ASCII code of ``pdbx_PDB_ins_code``; 0 where there is none.
      source: small JSON-able facts: entry_id, label_asym_id, auth_asym_id, model, method, release_date, ...
    """

    atom_positions: NDArray[np.float32]
    atom_mask: NDArray[np.uint8]
    b_factor: NDArray[np.float32]
    residue_number: NDArray[np.int32]
    insertion_code: NDArray[np.uint8]
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        reason = self._problem()
        if reason is not None:
            raise ValueError(f"the structure {dict(self.source)} is not valid: {reason}")

    @property
    def length(self) -> int:
        """Number of residues, observed or not."""
        return int(self.atom_mask.shape[0])

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Whether a residue has any atom, (length,)."""
        return np.asarray(self.atom_mask.any(axis=1))

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The arrays by name, in the order of the class."""
        return {name: getattr(self, name) for name in ARRAYS}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the source and all arrays, independent of how they are stored."""
        source = json.dumps(dict(self.source), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(source.encode())
        for name, (dtype, _) in ARRAYS.items():
            digest.update(np.ascontiguousarray(getattr(self, name), dtype=dtype).tobytes())
        return digest.hexdigest()

    def window(self, start: int, stop: int) -> Structure:
        """Returns residues ``[start, stop)``, as views."""
        cut = {name: array[start:stop] for name, array in self.arrays.items()}
        return Structure(**cut, source=self.source)  # type: ignore[arg-type]

    def _problem(self) -> str | None:
        """Returns the first rule that is broken, or None."""
        length = self.length
        for name, (dtype, shape) in ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != np.dtype(dtype) or array.shape != (length, *shape):
                wanted = f"{np.dtype(dtype).name} {(length, *shape)}"
                return f"{name} must be {wanted}, not {array.dtype} {array.shape}"
        if length and int(self.atom_mask.max()) > 1:
            return f"atom_mask holds {int(self.atom_mask.max())}; it is 0 or 1"
        for name in ("atom_positions", "b_factor"):
            array = getattr(self, name)
            if not np.isfinite(array).all():
                return f"{name} holds a number that is not finite"
            if (array[self.atom_mask == 0] != 0).any():
                return f"{name} is not 0 where atom_mask says that there is no atom"
        return None


# Name -> dtype and the axes after the residue.
ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "atom_positions": ("<f4", (NUM_ATOMS, 3)),
    "atom_mask": ("|u1", (NUM_ATOMS,)),
    "b_factor": ("<f4", (NUM_ATOMS,)),
    "residue_number": ("<i4", ()),
    "insertion_code": ("|u1", ()),
}
