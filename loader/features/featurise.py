"""The features of one sample, from what was read: of the sequence, the MSA and, as labels, the structure.

Of a clustered MSA the order of the steps is AlphaFold 2's: mask the centres, find clusters over all columns
read, then crop, then features, then zero padding to fixed shapes. Whether that is the whole record (``af2``)
or the crop (``crop_first``) was decided by the plan; the arithmetic is the same. All chance is in the plan as
well, so the functions here are deterministic, on the CPU to the bit for any number of threads: they count in
whole numbers and round once.

Tensors may live on any device; nothing moves between devices here. Thread safe (pure functions).

Shape legend: C centres (or rows), E extra rows, n rows read, W columns read, r residues of the crop; padded
to the recipe's ``num_clusters``, ``num_extra`` and R = ``crop_residues``.

Source: AlphaFold 2 ``alphafold/model/tf/data_transforms.py`` (make_masked_msa, make_msa_feat,
make_fixed_size) and ``input_pipeline.py`` for the order; Jumper et al. 2021, supplementary table 1.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from foldfeed.feature_store.format import alphabet
from foldfeed.loader.features import clusters
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.features.structure_labels import label_features
from foldfeed.loader.features.templates import template_slots
from foldfeed.loader.reading.plan import FROM_PROFILE, NOT_MASKED, SAME
from foldfeed.loader.recipe import AF3, MASKED_LM, Recipe

NUM_MSA_CHANNELS = 49
NUM_TARGET_CHANNELS = 22
NUM_AATYPES = 21


def featurise(raw: RawSample, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Returns the features of one sample, zero padded to the recipe's shapes, with masks.

    The tensors share no memory with ``raw``.

    Args:
      raw: one sample as read.
      recipe: for the kind and the shapes.
    Returns: by name, with C, E, R of the recipe:
      aatype int64 (R,), residue_index int64 (R,), seq_mask float32 (R,), target_feat float32 (R, 22);
      of ``af2`` and ``crop_first``, see `clustered_features`: msa_feat float32 (C, R, 49), msa_mask float32
      (C, R), true_msa int64 (C, R), bert_mask float32 (C, R), extra_msa int64 (E, R), extra_has_deletion,
      extra_deletion_value and extra_msa_mask float32 (E, R);
      of ``af3``: msa int64 (C, R), msa_mask, has_deletion and deletion_value float32 (C, R), profile float32
      (R, 22) and deletion_mean float32 (R,) of the full MSA;
      of ``masked_lm``: msa int64 (C, R), masked, true_msa int64 (C, R), bert_mask and msa_mask float32 (C,
      R); and with labels what `features.structure_labels.label_features` gives, and use_clamped_fape
      float32 (); and what `features.templates.template_slots` gives.
    """
    per_residue = target_features(raw)
    per_extra: dict[str, torch.Tensor] = {}
    if recipe.name == AF3:
        per_row = row_features(raw)
        per_residue |= {"profile": raw.profile, "deletion_mean": raw.deletion_mean}
    elif recipe.name == MASKED_LM:
        per_row = masked_rows(raw)
    else:
        per_row, per_extra = clustered_features(raw)
    single: dict[str, torch.Tensor] = {}
    # Only the first of several alignments of a sample was read with labels.
    if recipe.labels and len(raw.resolution):
        labels = label_features(raw.aatype, raw.atom_positions, raw.atom_mask, raw.resolution)
        single = {"resolution": labels.pop("resolution"), "use_clamped_fape": raw.clamped[0].clone()}
        per_residue |= labels
    residues = recipe.crop_residues
    return {
        **{name: _pad(value, (residues,)) for name, value in per_residue.items()},
        **{name: _pad(value, (recipe.num_clusters, residues)) for name, value in per_row.items()},
        **{name: _pad(value, (recipe.num_extra, residues)) for name, value in per_extra.items()},
        **template_slots(recipe, raw.msa.device),
        **single,
    }


def clustered_features(raw: RawSample) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns AlphaFold 2's features of the clustered MSA (C, r) and of the extra MSA (E, r)."""
    crop = slice(*raw.crop_in_columns)
    true_centres = raw.msa[raw.centre_at]
    centres = replace_masked(true_centres, raw.action, raw.profile, raw.profile_at, raw.profile_u)
    members = raw.msa[raw.member_at]
    assignment = clusters.assign(members, centres)
    centre_deletions = raw.deletions[raw.centre_at]
    profile, deletion_mean = clusters.summarise(
        centres[:, crop],
        centre_deletions,
        members[:, crop],
        raw.deletions[raw.member_at],
        assignment,
    )
    centre_features = {
        "msa_feat": msa_features(centres[:, crop], centre_deletions, profile, deletion_mean),
        "msa_mask": torch.ones_like(profile[:, :, 0]),
        "true_msa": true_centres[:, crop].long(),
        "bert_mask": (raw.action[:, crop] != NOT_MASKED).to(torch.float32),
    }
    return centre_features, extra_features(raw, crop)


def row_features(raw: RawSample) -> dict[str, torch.Tensor]:
    """Returns AlphaFold 3's features of the rows (C, r); the model makes the codes one-hot.

    Source: Abramson et al. 2024, supplementary table 5 (msa, has_deletion, deletion_value).
    """
    deletions = raw.deletions[raw.centre_at]
    return {
        "msa": raw.msa[raw.centre_at].long(),
        "msa_mask": torch.ones(deletions.shape, dtype=torch.float32, device=deletions.device),
        "has_deletion": deletions.clamp(0, 1).to(torch.float32),
        "deletion_value": deletion_value(deletions),
    }


def masked_rows(raw: RawSample) -> dict[str, torch.Tensor]:
    """Returns rows (C, r) for a masked language model: what it sees, what was there and where it counts."""
    rows = raw.msa[raw.centre_at]
    is_target = raw.action != NOT_MASKED
    return {
        "msa": replace_masked(rows, raw.action, raw.profile, raw.profile_at, raw.profile_u).long(),
        "msa_mask": torch.ones(rows.shape, dtype=torch.float32, device=rows.device),
        "true_msa": rows.long(),
        "bert_mask": is_target.to(torch.float32),
    }


def replace_masked(
    codes: torch.Tensor,
    action: torch.Tensor,
    profile: torch.Tensor,
    profile_at: torch.Tensor,
    profile_u: torch.Tensor,
) -> torch.Tensor:
    """Returns the centres with masked positions replaced as drawn.

    Args:
      codes: uint8 (C, W), as stored.
      action: uint8 (C, W), see `reading.plan.MaskDraw`.
      profile: float32 (W, 22), over all rows of the record.
      profile_at: int64 (k,), flat positions that take a token from the profile of their column.
      profile_u: float64 (k,), uniform numbers for those.
    Returns: uint8 (C, W), a fresh tensor.
    """
    keeps = (action == NOT_MASKED) | (action == SAME) | (action == FROM_PROFILE)
    replaced = torch.where(keeps, codes, action)
    # Inverse of the cumulative profile. It is scaled by its own last value, which float32 shares leave a
    # little off 1, so that no u can point behind the last token or at one that never occurs.
    cumulative = profile.to(torch.float64).cumsum(dim=1)[profile_at % codes.shape[1]]
    token = (cumulative <= (profile_u[:, None] * cumulative[:, -1:])).sum(dim=1)
    replaced.view(-1)[profile_at] = token.to(torch.uint8)
    return replaced


def msa_features(
    centres: torch.Tensor, deletions: torch.Tensor, profile: torch.Tensor, deletion_mean: torch.Tensor
) -> torch.Tensor:
    """Returns the 49 channels of the clustered MSA.

    [0:23] one-hot (20 residues, X, gap, mask), [23] has a deletion, [24] deletion value, [25:48] cluster
    profile, [48] value of the cluster's mean deletion count.

    Args:
      centres: uint8 (C, r), masked.
      deletions: int32 (C, r).
      profile: float32 (C, r, 23).
      deletion_mean: float32 (C, r).
    Returns: float32 (C, r, 49).
    """
    one_hot = functional.one_hot(centres.long(), clusters.NUM_CLASSES).to(torch.float32)
    single = (
        deletions.clamp(0, 1).to(torch.float32)[:, :, None],
        deletion_value(deletions)[:, :, None],
    )
    return torch.cat([one_hot, *single, profile, deletion_value(deletion_mean)[:, :, None]], dim=2)


def target_features(raw: RawSample) -> dict[str, torch.Tensor]:
    """Returns what describes the query: aatype, residue_index, seq_mask, target_feat (r, 22).

    Channel 0 of target_feat says that a domain break follows, which single chains never have.
    """
    aatype = raw.aatype.long()
    index = torch.arange(len(aatype), device=aatype.device)
    one_hot = functional.one_hot(aatype, NUM_AATYPES).to(torch.float32)
    return {
        "aatype": aatype,
        "residue_index": index + raw.first_residue,
        "seq_mask": torch.ones(len(aatype), dtype=torch.float32, device=aatype.device),
        "target_feat": functional.pad(one_hot, (1, 0)),
    }


def extra_features(raw: RawSample, crop: slice) -> dict[str, torch.Tensor]:
    """Returns the extra MSA (E, r): codes, deletion flags and values, mask; the model makes it one-hot."""
    deletions = raw.deletions[raw.extra_at]
    return {
        "extra_msa": raw.msa[raw.extra_at][:, crop].long(),
        "extra_has_deletion": deletions.clamp(0, 1).to(torch.float32),
        "extra_deletion_value": deletion_value(deletions),
        "extra_msa_mask": torch.ones(deletions.shape, dtype=torch.float32, device=deletions.device),
    }


def deletion_value(deletions: torch.Tensor) -> torch.Tensor:
    """Returns (2 / pi) * atan(d / 3), float32: 0 for none, towards 1 for many.

    Computed in float64 and rounded once: vector and scalar code of the arc tangent may differ in the last bit
    of float32, and which one handles an element depends on how threads share the work.
    """
    return (torch.atan(deletions.to(torch.float64) / 3.0) * (2.0 / math.pi)).to(torch.float32)


def _pad(value: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Returns the tensor with its first axes grown to ``sizes`` by zeros at their ends."""
    assert all(have <= want for have, want in zip(value.shape, sizes, strict=False)), (value.shape, sizes)
    padding = [0, 0] * (value.dim() - len(sizes))
    for axis in reversed(range(len(sizes))):
        padding += [0, sizes[axis] - value.shape[axis]]
    return functional.pad(value, padding)


assert alphabet.MASK < clusters.NUM_CLASSES < SAME
