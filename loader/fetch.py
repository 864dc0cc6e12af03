"""Reads exactly what a plan says, into compact buffers of its own.

Owns the way from a plan to arrays; the store owns tiles, checksums and files. One sample is one crop read
plus two sidecars. What comes back is the whole information of a sample at its smallest (codes as uint8,
deletions as int32): this is what crosses to a device, where one-hot, masking and clusters are made
(featurise).

Thread safe, as the store is. Errors of the store pass through unchanged; the loader adds the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from foldfeed.feature_store import Record
from foldfeed.loader.plan import SamplePlan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """One sample as read: n rows, W columns, R residues in the crop (R <= W).

    Attributes:
      msa: uint8 (n, W), codes as stored.
      deletions: int32 (n, R): deletion counts matter inside the crop only.
      aatype: uint8 (R,), the query.
      profile: float32 (W, 22), share of each token over ALL rows of the record, not only those read.
      centre_at: int64 (C,), places of the centres in the rows read.
      extra_at: int64 (E,), places of the extra rows in the rows read.
      member_at: int64 (n - C,), places of the rows that join a cluster: all that are no centre.
      action: uint8 (C, W), see `foldfeed.loader.plan.MaskDraw`.
      profile_at: int64 (k,).
      profile_u: float64 (k,).
      crop_in_columns: the crop, counted from the first column read.
      first_residue: position of the crop in the protein, from 0.
    """

    msa: torch.Tensor
    deletions: torch.Tensor
    aatype: torch.Tensor
    profile: torch.Tensor
    centre_at: torch.Tensor
    extra_at: torch.Tensor
    member_at: torch.Tensor
    action: torch.Tensor
    profile_at: torch.Tensor
    profile_u: torch.Tensor
    crop_in_columns: tuple[int, int]
    first_residue: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what one sample costs to hold, and to copy to a device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def to(self, device: torch.device) -> RawSample:
        """Returns a copy on a device; asynchronous on the current stream when this one is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> RawSample:
        """Returns a copy in page-locked memory, which a device can read while the program goes on."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> RawSample:
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changed)

    def _tensors(self) -> dict[str, torch.Tensor]:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, torch.Tensor)}


def fetch(record: Record, plan: SamplePlan) -> RawSample:
    """Returns what a plan asks for.

    Args:
      record: the plan's record.
      plan: what to read.
    Raises:
      CorruptDataError: stored bytes do not match their checksum.
      OSError: the file system or the network failed.
    """
    assert (record.length, record.depth) == (plan.length, plan.depth), (record, plan)
    columns = slice(*plan.columns)
    crop = record.crop(columns, plan.selection)
    rows = plan.rows
    start, stop = plan.crop_in_columns
    centre_at = np.searchsorted(rows, plan.centres)
    is_member = np.ones(len(rows), dtype=bool)
    is_member[centre_at] = False
    return RawSample(
        msa=torch.from_numpy(crop.msa),
        deletions=torch.from_numpy(np.ascontiguousarray(crop.deletions[:, start:stop])),
        aatype=torch.from_numpy(record.aatype(slice(*plan.crop))),
        profile=torch.from_numpy(record.profile(columns)),
        centre_at=torch.from_numpy(centre_at),
        extra_at=torch.from_numpy(np.searchsorted(rows, plan.extras)),
        member_at=torch.from_numpy(np.flatnonzero(is_member)),
        action=torch.from_numpy(plan.masking.action),
        profile_at=torch.from_numpy(plan.masking.profile_at),
        profile_u=torch.from_numpy(plan.masking.profile_u),
        crop_in_columns=(start, stop),
        first_residue=plan.crop[0],
    )
