"""A model of your own in the trainer: predicts every residue of an alignment from its neighbours.

python -m foldfeed.trainer --task examples/own_task.py:NeighbourTask --store STORE --output runs/own
"""

import torch
from torch import nn

from foldfeed.trainer import Loss, Task


class Neighbours(nn.Module):
    """Takes AlphaFold 2's features as they come: msa_feat (b, rows, residues, 49), masks in msa_mask."""

    def __init__(self, channels: int, width: int = 5) -> None:
        super().__init__()
        self.along = nn.Conv1d(49, channels, width, padding=width // 2)
        self.head = nn.Linear(channels, 23)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns logits (b, rows, residues, 23)."""
        rows = (features["msa_feat"] * features["msa_mask"][..., None]).flatten(0, 1)
        mixed = torch.relu(self.along(rows.transpose(1, 2))).transpose(1, 2)
        return self.head(mixed).view(*features["msa_mask"].shape, 23)


class NeighbourTask(Task):
    """The loss of a sample is the mean over its masked positions; one without any does not count."""

    def build(self) -> nn.Module:
        """Returns the model; its first weights come from the run's seed."""
        return Neighbours(channels=32)

    def loss(self, model: nn.Module, features: dict[str, torch.Tensor]) -> Loss:
        """Returns one loss per sample; the trainer sums them exactly, on any number of ranks."""
        logits, masked = model(features).permute(0, 3, 1, 2), features["bert_mask"]
        errors = nn.functional.cross_entropy(logits, features["true_msa"], reduction="none") * masked
        positions = masked.sum((1, 2))
        return Loss.of(errors.sum((1, 2)) / positions.clamp(min=1), positions > 0)
