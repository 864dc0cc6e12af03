"""`RawSample`: one sample as read, as tensors on any device.

Compact codes and counts are the whole information of a sample at its smallest: this is what crosses to a
device, where one-hot, masking and clusters are made (`features.featurise`). Owns no reading.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from foldfeed.loader.reading.fetch import ARRAYS, SampleArrays


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """One sample as read, see `reading.fetch.SampleArrays` for what the fields are."""

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
    deletion_mean: torch.Tensor
    atom_positions: torch.Tensor
    atom_mask: torch.Tensor
    resolution: torch.Tensor
    clamped: torch.Tensor
    crop_in_columns: tuple[int, int]
    first_residue: int

    @classmethod
    def of(cls, arrays: SampleArrays) -> RawSample:
        """Returns the sample as tensors that share the arrays' memory."""
        tensors: dict[str, Any] = {name: torch.from_numpy(getattr(arrays, name)) for name in ARRAYS}
        return cls(**tensors, crop_in_columns=arrays.crop_in_columns, first_residue=arrays.first_residue)

    def to(self, device: torch.device) -> RawSample:
        """Returns a copy on a device."""
        changed: dict[str, Any] = {name: getattr(self, name).to(device) for name in ARRAYS}
        return dataclasses.replace(self, **changed)
