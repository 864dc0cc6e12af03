"""Per-record features in the forms that analysis tools take: a dict of NumPy arrays, an xarray Dataset.

Owns names of axes and coordinates. Does not read anything: the arrays come from `store.Record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from foldfeed.feature_store.errors import ANALYSIS_EXTRA, MissingExtraError
from foldfeed.feature_store.format import alphabet

# Axes of every feature, outermost first; a feature that is not listed has one axis, residues.
AXES = {"profile": ("residue", "token"), "msa": ("row", "residue"), "deletions": ("row", "residue")}


def to_dataset(features: Mapping[str, NDArray[Any]], residues: str, attributes: Mapping[str, Any]) -> Any:
    """Returns features of one record as an ``xarray.Dataset``.

    Args:
      features: arrays by name, see `AXES`.
      residues: one-letter codes of the query, the label of each residue.
      attributes: of the data set; plain numbers and text, so that it can be written as netCDF or Zarr.
    Returns: coordinates ``residue`` (0-based), ``amino_acid`` (along it), ``token`` (letters, where a feature
      has that axis), ``row`` (rank, the query is 0, where a feature has it).
    Raises:
      MissingExtraError: xarray is not installed.
    """
    try:
        import xarray  # optional: analysis only
    except ModuleNotFoundError as error:
        raise MissingExtraError("xarray", ANALYSIS_EXTRA) from error
    variables = {name: (AXES.get(name, ("residue",)), array) for name, array in features.items()}
    used = {axis for axes, _ in variables.values() for axis in axes}
    coordinates: dict[str, Any] = {
        "residue": range(len(residues)),
        "amino_acid": ("residue", list(residues)),
    }
    if "token" in used:
        coordinates["token"] = list(alphabet.TOKENS)
    if "row" in used:
        coordinates["row"] = range(len(features["msa"]))
    return xarray.Dataset(variables, coords=coordinates, attrs=dict(attributes))
