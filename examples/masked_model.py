"""The model of the examples: one linear layer that fills in what was masked, and its loss."""

import torch
from torch.nn import functional

from foldfeed.loader import StepBatch

NUM_MSA_CHANNELS, NUM_CLASSES = 49, 23


class MaskedModel(torch.nn.Module):
    """Predicts the true residue of every cell of the clustered alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Linear(NUM_MSA_CHANNELS, NUM_CLASSES)

    def loss(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the mean cross entropy over the masked cells of a batch of samples."""
        masked = features["bert_mask"] > 0
        logits = self.logits(features["msa_feat"][masked])
        summed = functional.cross_entropy(logits, features["true_msa"][masked], reduction="sum")
        return summed / masked.sum().clamp(min=1)

    def step_loss(self, batch: StepBatch) -> torch.Tensor:
        """Returns the mean loss over this rank's virtual shards."""
        return torch.stack([self.loss(shard.features) for shard in batch.shards]).mean()
