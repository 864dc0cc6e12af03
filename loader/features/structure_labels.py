"""What a structure teaches: the features of AlphaFold 2's losses, from the atoms of a crop.

Owns the geometry: backbone frames (supplementary algorithm 21), pseudo-beta positions, torsion angles. Names
and shapes are those of AlphaFold 2's and OpenFold's features. What follows from the residue types alone, or
from these features (``atom14_*``, ``rigidgroups_*``, ``chi_angles_sin_cos`` = ``torsion_angles_sin_cos[:,
3:]``), is the model's to make.

All arithmetic is elementwise in float64 and rounded once, so it gives the same bits on any device. Where a
mask is 0 the value is 0, and the frame of a residue of the crop the identity. No operation reads a value back
or copies one from the host, once a device has its tables, so none waits for a device. Thread safe (pure
functions).

Source: Jumper et al. 2021, supplementary sections 1.2.1, 1.8.1, 1.8.4 and 1.9.8; AlphaFold 2 ``all_atom.py``
(``atom37_to_torsion_angles``, ``atom37_to_frames``) and ``modules.pseudo_beta_fn``. AlphaFold 2 adds 1e-8 to
the lengths that it divides by; here a frame or torsion of atoms on one point or one line counts as absent.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.structure import ATOM_NAMES

NUM_CHI = 4
# Angstrom; of something shorter float32 positions do not tell the direction.
SHORTEST = 1e-4
# The atoms of the side chain's torsions chi 1 to chi 4 (IUPAC-IUB 1970), by residue. Two that follow on one
# another share three atoms, so one chain of names says all.
_CHI_CHAINS = {
    "R": "N CA CB CG CD NE CZ",
    "N": "N CA CB CG OD1",
    "D": "N CA CB CG OD1",
    "C": "N CA CB SG",
    "Q": "N CA CB CG CD OE1",
    "E": "N CA CB CG CD OE1",
    "H": "N CA CB CG ND1",
    "I": "N CA CB CG1 CD1",
    "L": "N CA CB CG CD1",
    "K": "N CA CB CG CD CE NZ",
    "M": "N CA CB CG SD CE",
    "F": "N CA CB CG CD1",
    "P": "N CA CB CG CD",
    "S": "N CA CB OG",
    "T": "N CA CB OG1",
    "W": "N CA CB CG CD1",
    "Y": "N CA CB CG CD1",
    "V": "N CA CB CG1",
}
# A turn by 180 degrees gives the same side chain: (residue, chi).
_PERIODIC_BY_PI = (("D", 2), ("E", 3), ("F", 2), ("Y", 2))
_N, _CA, _C, _CB, _O = (ATOM_NAMES.index(name) for name in ("N", "CA", "C", "CB", "O"))
_GLYCINE = alphabet.RESIDUES.index("G")


def _chi_tables() -> tuple[list[list[list[int]]], list[list[bool]], list[list[bool]]]:
    """Returns, by residue code (X included) and chi: slots of four atoms, existence, periodicity by pi."""
    atoms, exists, periodic = [], [], []
    for letter in alphabet.TOKENS[: alphabet.UNKNOWN + 1]:
        chain = [ATOM_NAMES.index(name) for name in _CHI_CHAINS.get(letter, "").split()]
        count = max(0, len(chain) - 3)
        atoms.append([chain[at : at + 4] if at < count else [0] * 4 for at in range(NUM_CHI)])
        exists.append([at < count for at in range(NUM_CHI)])
        periodic.append([(letter, at + 1) in _PERIODIC_BY_PI for at in range(NUM_CHI)])
    return atoms, exists, periodic


class _Tables(NamedTuple):
    """What `_torsions` looks up, on one device.

    Attributes:
      slots: int64 (21, 7, 4), atoms of each torsion among those of (residue before, residue): slot + 37 is
        own.
      exists: bool (21, 7), whether a residue has the torsion.
      periodic: bool (21, 7), whether a turn by pi gives the same side chain.
      sign: float64 (7,), -1 for psi, which is measured by O: it lies opposite the next residue's N.
    """

    slots: torch.Tensor
    exists: torch.Tensor
    periodic: torch.Tensor
    sign: torch.Tensor


@functools.lru_cache(maxsize=64)
def _tables(device: torch.device) -> _Tables:
    atoms, exists, periodic = (torch.tensor(table) for table in _chi_tables())
    own = len(ATOM_NAMES)
    backbone = torch.tensor(
        [
            [_CA, _C, own + _N, own + _CA],
            [_C, own + _N, own + _CA, own + _C],
            [own + _N, own + _CA, own + _C, own + _O],
        ]
    )
    true = torch.ones((len(atoms), len(backbone)), dtype=torch.bool)
    tables = _Tables(
        slots=torch.cat([backbone.expand(len(atoms), -1, -1), own + atoms], dim=1),
        exists=torch.cat([true, exists], dim=1),
        periodic=torch.cat([~true, periodic], dim=1),
        sign=torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
    )
    return _Tables(*(table.to(device) for table in tables))


def label_features(
    aatype: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, resolution: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the labels of a crop of R residues, or of several at once.

    Args:
      aatype: uint8 (..., R), codes of the query.
      positions: float32 (..., R + 1, 37, 3), angstrom, of the residue before the crop and of those in it; 0
        where there is no atom.
      mask: uint8 (..., R + 1, 37), 1 where there is an atom.
      resolution: float32 (..., 1), angstrom; 0 where there is none (NMR, a prediction, no structure).
    Returns: by name, behind the leading axes:
      all_atom_positions float32 (R, 37, 3), all_atom_mask float32 (R, 37); pseudo_beta float32 (R, 3) and
      pseudo_beta_mask float32 (R,): CB, of glycine CA; backbone_rigid_tensor float32 (R, 4, 4): x from CA to
      C, N in the x-y plane, origin CA, and backbone_rigid_mask float32 (R,); torsion_angles_sin_cos float32
      (R, 7, 2) of pre-omega, phi, psi (by O), chi 1 to 4, alt_torsion_angles_sin_cos the same where a turn by
      pi gives an equal side chain, torsion_angles_mask float32 (R, 7); resolution float32 ().
    """
    exists = mask[..., 1:, :] != 0
    here = positions[..., 1:, :, :]
    beta, has_beta = _pseudo_beta(aatype, here, exists)
    frames, has_frame, torsions, alternative, has_torsion = _frames_and_torsions(
        aatype.long(), positions.to(torch.float64), mask != 0
    )
    return {
        "all_atom_positions": here,
        "all_atom_mask": exists.to(torch.float32),
        "pseudo_beta": beta,
        "pseudo_beta_mask": has_beta.to(torch.float32),
        "backbone_rigid_tensor": frames,
        "backbone_rigid_mask": has_frame.to(torch.float32),
        "torsion_angles_sin_cos": torsions,
        "alt_torsion_angles_sin_cos": alternative,
        "torsion_angles_mask": has_torsion.to(torch.float32),
        "resolution": resolution[..., 0].clone(),
    }


def _pseudo_beta(
    aatype: torch.Tensor, positions: torch.Tensor, exists: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    is_glycine = aatype == _GLYCINE
    position = torch.where(is_glycine[..., None], positions[..., _CA, :], positions[..., _CB, :])
    return position, torch.where(is_glycine, exists[..., _CA], exists[..., _CB])


def _frames_and_torsions(
    aatype: torch.Tensor, positions: torch.Tensor, exists: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the backbone's frames, float32 (..., R, 4, 4), bool (..., R), and the torsions.

    Those are float32 (..., R, 7, 2) twice, bool (..., R, 7). No phi where no residue comes before. A torsion
    is measured in a frame of its own; all frames of a residue are made at once.
    """
    tables = _tables(aatype.device)
    # Atoms of (residue before, residue) side by side.
    both = torch.cat([positions[..., :-1, :, :], positions[..., 1:, :, :]], dim=-2)
    both_exist = torch.cat([exists[..., :-1, :], exists[..., 1:, :]], dim=-1)
    slots = tables.slots[aatype]
    flat = slots.flatten(-2)
    chosen = both.gather(-2, flat[..., None].expand(*flat.shape, 3)).unflatten(-2, slots.shape[-2:])
    all_exist = both_exist.gather(-1, flat).unflatten(-1, slots.shape[-2:]).all(dim=-1)
    first, second, third, fourth = chosen.unbind(dim=-2)
    here, here_exist = positions[..., 1:, :, :], exists[..., 1:, :]
    origin = here[..., _CA, :]
    axes, valid = _axes(
        torch.cat([third - second, (here[..., _C, :] - origin)[..., None, :]], dim=-2),
        torch.cat([first - third, (here[..., _N, :] - origin)[..., None, :]], dim=-2),
    )
    has_frame = valid[..., -1] & here_exist[..., _N] & here_exist[..., _CA] & here_exist[..., _C]
    frames = _frames(torch.stack(axes, dim=-1)[..., -1, :, :], origin, has_frame)
    rest = fourth - third
    cosine, sine = _dot(axes[1][..., :-1, :], rest), _dot(axes[2][..., :-1, :], rest)
    norm = torch.sqrt(cosine * cosine + sine * sine)
    has_torsion = valid[..., :-1] & (norm > SHORTEST) & all_exist & tables.exists[aatype]
    scale = tables.sign / norm.masked_fill(~has_torsion, 1.0)
    angles = torch.stack([sine * scale, cosine * scale], dim=-1)
    angles = angles.masked_fill(~has_torsion[..., None], 0.0).to(torch.float32)
    alternative = torch.where(tables.periodic[aatype][..., None], 0.0 - angles, angles)
    return frames, has_frame, angles, alternative, has_torsion


def _frames(rotation: torch.Tensor, origin: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Returns float32 (..., R, 4, 4), the identity where there is no frame."""
    frames = torch.eye(4, dtype=torch.float32, device=origin.device).repeat(*valid.shape, 1, 1)
    rows = torch.cat([rotation, origin[..., None]], dim=-1).to(torch.float32)
    frames[..., :3, :] = torch.where(valid[..., None, None], rows, frames[..., :3, :])
    return frames


def _axes(
    along: torch.Tensor, in_plane: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns the unit vectors of frames (..., 3) by Gram-Schmidt, and whether each exists, bool (...)."""
    length = torch.sqrt(_dot(along, along))
    x = along / length.masked_fill(length == 0, 1.0)[..., None]
    y = in_plane - _dot(in_plane, x)[..., None] * x
    height = torch.sqrt(_dot(y, y))
    valid = (length > SHORTEST) & (height > SHORTEST)
    y = y / height.masked_fill(~valid, 1.0)[..., None]
    z = torch.stack(
        [x[..., at - 2] * y[..., at - 1] - x[..., at - 1] * y[..., at - 2] for at in range(3)], dim=-1
    )
    return (x, y, z), valid


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the products of the last axis (3), in a fixed order on any device."""
    product = one * other
    return product[..., 0] + product[..., 1] + product[..., 2]
