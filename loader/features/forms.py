"""The two forms of features: the usual one, and a compact one with codes instead of one-hot channels.

The usual form is what AlphaFold 2's modules take: float32, int64 codes, one-hot channels. A sample of 256
residues x (128 + 1,024) rows is 12.2 MB of it. The compact form says the same in 2.8 MB: codes and masks are
uint8, ``msa_feat`` and ``target_feat`` are left out in favour of what they are made of, and what is a share
or a squashed count is bfloat16, so it is rounded to 8 bits. Positions, frames and angles stay float32: in
bfloat16 an atom 100 angstrom from the origin would move by up to 0.25 angstrom.

`expand_features` makes the usual form of the compact one, on any device and with any leading axes. Owns names
and dtypes of both; does not own how they are computed (featurise, host_features, step_features).

Shape legend: C cluster centres or rows, E extra rows, R residues; ``...`` any leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from foldfeed.loader.features.clusters import NUM_CLASSES
from foldfeed.loader.features.featurise import NUM_AATYPES

FULL = "full"
COMPACT = "compact"
FORMS = (FULL, COMPACT)

Features = dict[str, torch.Tensor]

_CODES = ("aatype", "msa", "true_msa", "extra_msa")
_FLAGS = (
    *("seq_mask", "msa_mask", "bert_mask", "extra_msa_mask"),
    *("all_atom_mask", "pseudo_beta_mask", "backbone_rigid_mask", "torsion_angles_mask"),
)
_ROUNDED = (
    *("deletion_value", "extra_deletion_value", "profile", "deletion_mean"),
    *("cluster_profile", "cluster_deletion_value"),
)
# Made again from what stays.
_LEFT_OUT = ("target_feat", "msa_feat", "has_deletion", "extra_has_deletion")


def compact_features(features: Mapping[str, torch.Tensor]) -> Features:
    """Returns the compact form of features in the usual one.

    Args:
      features: of one sample or a batch, see `features.featurise.featurise`.
    Returns: by name:
      aatype uint8 (..., R), residue_index int32 (..., R), seq_mask uint8 (..., R);
      of ``af2`` and ``crop_first`` instead of msa_feat: msa uint8 (..., C, R) with masks, deletion_value and
      cluster_deletion_value bfloat16 (..., C, R), cluster_profile bfloat16 (..., C, R, 23); msa_mask,
      true_msa and bert_mask uint8 (..., C, R); extra_msa and extra_msa_mask uint8 (..., E, R),
      extra_deletion_value bfloat16 (..., E, R);
      of ``af3``: msa, msa_mask uint8, deletion_value bfloat16 (..., C, R), profile bfloat16 (..., R, 22),
      deletion_mean bfloat16 (..., R);
      of ``masked_lm``: msa, true_msa, msa_mask, bert_mask uint8 (..., C, R);
      labels: their masks as uint8, all else as in the usual form.
      Whether something was deleted is whether its deletion value is above 0. Tensors that need no change are
      shared with ``features``.
    """
    found: Features = {}
    for name, value in features.items():
        if name == "msa_feat":
            found["msa"] = value[..., :NUM_CLASSES].argmax(dim=-1).to(torch.uint8)
            found["deletion_value"] = value[..., NUM_CLASSES + 1].to(torch.bfloat16)
            found["cluster_profile"] = value[..., NUM_CLASSES + 2 : -1].to(torch.bfloat16)
            found["cluster_deletion_value"] = value[..., -1].to(torch.bfloat16)
        elif name not in _LEFT_OUT:
            found[name] = value.to(compact_dtype(name, value.dtype))
    return found


def expand_features(compact: Mapping[str, torch.Tensor]) -> Features:
    """Returns the usual form of compact features.

    Equal to features that were never compact in all but the last bits of what was rounded to bfloat16.

    Args:
      compact: of one sample or a batch, as from ``CropLoader(features="compact")``.
    Returns: see `features.featurise.featurise`; where nothing changes the tensor itself.
    """
    found: Features = {}
    for name, value in compact.items():
        if name in _CODES or name == "residue_index":
            found[name] = value.to(torch.int64)
        elif name in _FLAGS or name in _ROUNDED:
            found[name] = value.to(torch.float32)
        else:
            found[name] = value
    one_hot = functional.one_hot(found["aatype"], NUM_AATYPES) * found["seq_mask"][..., None]
    found["target_feat"] = functional.pad(one_hot, (1, 0))
    if "extra_deletion_value" in found:
        found["extra_has_deletion"] = (found["extra_deletion_value"] > 0).to(torch.float32)
    if "deletion_value" in found:
        found["has_deletion"] = (found["deletion_value"] > 0).to(torch.float32)
    if "cluster_profile" in found:
        found["msa_feat"] = _msa_feat(found)
    return found


def _msa_feat(found: Features) -> torch.Tensor:
    """Returns float32 (..., C, R, 49), and takes what is no feature of its own out of ``found``."""
    one_hot = functional.one_hot(found.pop("msa"), NUM_CLASSES)
    parts = (
        one_hot * found["msa_mask"][..., None],
        found.pop("has_deletion")[..., None],
        found.pop("deletion_value")[..., None],
        found.pop("cluster_profile"),
        found.pop("cluster_deletion_value")[..., None],
    )
    return torch.cat(parts, dim=-1)


def compact_dtype(name: str, usual: torch.dtype) -> torch.dtype:
    """Returns the dtype that a feature of the usual form has in the compact one."""
    if name in _CODES or name in _FLAGS:
        return torch.uint8
    if name in _ROUNDED:
        return torch.bfloat16
    return torch.int32 if name == "residue_index" else usual
