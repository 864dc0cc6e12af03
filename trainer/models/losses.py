"""What a virtual shard's loss is, and the losses of the compact Evoformer.

A loss is kept per sample until the step is summed: the step's mean then does not move with padding, with the
number of ranks, or with how samples are shared between virtual shards. A sample that a loss says nothing of
(no masked position, no known structure) is not counted.

Shape suffixes
    b  samples          s  clustered rows   r, i, j  residues
    t  the 23 MSA tokens (20 residues, X, gap, mask)          d  bins of distances

Pure functions of tensors; nothing here reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

NUM_DISTANCE_BINS = 64
# Angstrom; supplementary section 1.9.8: 64 bins of equal width, the last one takes what is farther.
FIRST_BREAK_ANGSTROM, LAST_BREAK_ANGSTROM = 2.3125, 21.6875


class PerSample(NamedTuple):
    """One value for each sample of a batch.

    Attributes:
      values: float (b,), 0 where a sample is not counted.
      counted: bool (b,).
    """

    values: torch.Tensor
    counted: torch.Tensor


class Loss(NamedTuple):
    """What one virtual shard adds to the step; `Loss.of` makes it.

    Attributes:
      total: scalar, the sum of the counted samples' losses; backward is called on it.
      num_samples: scalar, how many samples were counted.
      per_sample: (b,), detached, 0 where a sample was not counted.
      counted: bool (b,).
      parts: detached, for the metrics alone: what the loss is made of, by name.
    """

    total: torch.Tensor
    num_samples: torch.Tensor
    per_sample: torch.Tensor
    counted: torch.Tensor
    parts: Mapping[str, PerSample]

    @classmethod
    def of(
        cls,
        per_sample: torch.Tensor,
        counted: torch.Tensor | None = None,
        parts: Mapping[str, PerSample] | None = None,
    ) -> Loss:
        """Returns the loss of a shard from one value per sample.

        Args:
          per_sample: (b,), with a gradient; 0 where a sample is not counted.
          counted: bool (b,); every sample when None.
          parts: for the metrics.
        """
        # Losses add up in float32, whatever the model computed in.
        per_sample = per_sample.to(torch.promote_types(per_sample.dtype, torch.float32))
        if counted is None:
            counted = torch.ones_like(per_sample, dtype=torch.bool)
        detached = {
            name: PerSample(part.values.detach(), part.counted) for name, part in (parts or {}).items()
        }
        return cls(per_sample.sum(), counted.sum(), per_sample.detach(), counted, detached)


def masked_msa_loss(logits_bsrt: torch.Tensor, features: Mapping[str, torch.Tensor]) -> PerSample:
    """Returns each sample's mean cross-entropy over its masked positions (supplementary section 1.9.9).

    Args:
      logits_bsrt: (b, s, r, 23).
      features: ``true_msa`` int64 (b, s, r), ``bert_mask`` and ``msa_mask`` float (b, s, r).
    """
    return _cross_entropy(logits_bsrt, features["true_msa"], features["bert_mask"] * features["msa_mask"])


def distogram_loss(logits_bijd: torch.Tensor, features: Mapping[str, torch.Tensor]) -> PerSample:
    """Returns each sample's mean cross-entropy of the distances between its residues (section 1.9.8).

    Two residues at 3.0 angstrom are in bin 3: bins end at 2.3125, 2.625, 2.9375, 3.25, ... angstrom.

    Args:
      logits_bijd: (b, i, j, 64), symmetric in i and j.
      features: ``pseudo_beta`` float32 (b, r, 3), angstrom, and ``pseudo_beta_mask`` float32 (b, r).
    """
    mask = features["pseudo_beta_mask"]
    known_bij = mask[:, :, None] * mask[:, None, :]
    return _cross_entropy(logits_bijd, distance_bins(features["pseudo_beta"]), known_bij)


def _cross_entropy(logits: torch.Tensor, classes: torch.Tensor, mask: torch.Tensor) -> PerSample:
    """Returns each sample's mean over a mask (b, x, y); logits are (b, x, y, class), classes (b, x, y)."""
    flat = logits.float().flatten(0, 2)
    errors = nn.functional.cross_entropy(flat, classes.flatten(), reduction="none").view(mask.shape)
    # `where`, not a product: a position outside the mask may hold an infinity.
    kept = torch.where(mask > 0, errors, torch.zeros_like(mask))
    positions = mask.sum((1, 2))
    return PerSample(kept.sum((1, 2)) / positions.clamp(min=1.0), positions > 0)


def distance_bins(positions_br3: torch.Tensor) -> torch.Tensor:
    """Returns the bin of each pair's distance, int64 (b, i, j); positions in angstrom."""
    breaks = torch.linspace(
        FIRST_BREAK_ANGSTROM, LAST_BREAK_ANGSTROM, NUM_DISTANCE_BINS - 1, device=positions_br3.device
    )
    offset = positions_br3[:, :, None] - positions_br3[:, None, :]
    # Squares are compared: no square root, whose last bit may differ between devices.
    return torch.bucketize(offset.square().sum(-1), breaks.square())
