"""The labels in AlphaFold 2's feature dictionary as a structure.

Owns shapes and values of ``all_atom_positions`` and ``all_atom_mask``. They say where atoms are and nothing
of the author's numbers or b-factors, so these are absent. Pure functions.

Source: AlphaFold 2 ``data/templates.py`` _get_atom_positions; OpenFold ``data/data_pipeline.py``
make_mmcif_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foldfeed.feature_store.exchange_errors import SourceFileError
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.structure import NO_NUMBER, NUM_ATOMS, Structure
from foldfeed.feature_store.parsers.mmcif.tables import day_of

LABELS = ("all_atom_positions", "all_atom_mask")


def structure_of_labels(features: Mapping[str, Any], length: int, where: str) -> Structure | None:
    """Returns the structure, or None when there are no labels.

    Args:
      features: ``all_atom_positions`` float (length, 37, 3), angstrom; ``all_atom_mask`` (length, 37), 0 or
        1; ``resolution`` (1,), angstrom, 0 where it is not known; ``release_date`` (1,), YYYY-MM-DD.
      length: residues of the sequence.
      where: for messages.
    Raises:
      SourceFileError: only one of the two is there, or one has another shape, dtype or range.
    """
    there = [name for name in LABELS if name in features]
    if not there:
        return None
    if len(there) == 1:
        raise SourceFileError(
            where, f"{there[0]!r} is there without its other half; labels are both of {LABELS}"
        )
    for name, shape in zip(LABELS, ((length, NUM_ATOMS, 3), (length, NUM_ATOMS)), strict=True):
        array = features[name]
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.shape != shape:
            raise SourceFileError(where, f"feature {name!r} must be numbers of shape {shape}")
    mask = np.asarray(features["all_atom_mask"])
    if not np.isin(mask, (0, 1)).all():
        raise SourceFileError(where, "feature 'all_atom_mask' has other values than 0 and 1")
    with np.errstate(over="ignore"):
        positions = np.where(mask[..., None] == 1, features["all_atom_positions"], 0).astype(np.float32)
    if not np.isfinite(positions).all():
        raise SourceFileError(where, "feature 'all_atom_positions' has a number that 32 bits cannot hold")
    return Structure(
        atom_positions=positions,
        atom_mask=mask.astype(np.uint8),
        b_factor=np.zeros((length, NUM_ATOMS), dtype=np.float32),
        residue_number=np.full(length, NO_NUMBER, dtype=np.int32),
        insertion_code=np.zeros(length, dtype=np.uint8),
        source={"source_format": "alphafold2", **_facts(features, where)},
    )


def _facts(features: Mapping[str, Any], where: str) -> dict[str, str]:
    facts: dict[str, str] = {}
    resolution = features.get("resolution")
    if isinstance(resolution, np.ndarray) and resolution.size == 1 and resolution.dtype.kind == "f":
        value = np.float32(resolution.reshape(-1)[0])
        if np.isfinite(value) and value > 0:
            facts["resolution_angstrom"] = np.format_float_positional(value, unique=True, trim="0")
    date = features.get(RELEASE_DATE)
    if isinstance(date, np.ndarray) and date.size == 1:
        text = date.reshape(-1)[0]
        text = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        try:
            facts[RELEASE_DATE] = day_of(text)
        except ValueError as error:
            raise SourceFileError(where, f"release_date {text[:80]!r} is no date (YYYY-MM-DD)") from error
    return facts
