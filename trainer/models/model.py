"""The reference model: a compact Evoformer with a masked-MSA head and, by choice, a distogram head.

It learns to fill in the MSA positions that the loader masked (BERT's task over alignments), which exercises
every feature of a batch: the clustered MSA, the extra MSA, the target sequence and all masks. Where the store
has structures it can learn the distances between residues, too.

Shape suffixes
    b  samples          s  clustered rows   e  extra rows        r, i, j  residues
    m  MSA channels     z  pair channels    t  the 23 MSA tokens (20 residues, X, gap, mask)
    d  bins of distances

Does not own: what is learned (losses.py, task.py).

Source: AlphaFold 2 supplementary information, algorithms 3 (input embedder), 4 (relative positions), 6 and 18
(stacks), sections 1.9.8 (distogram) and 1.9.9 (masked MSA). Left out: templates, recycling, triangle
attention, structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foldfeed.trainer.config import ModelConfig
from foldfeed.trainer.models.evoformer import EvoformerBlock
from foldfeed.trainer.models.losses import NUM_DISTANCE_BINS

NUM_TOKENS = 23
TARGET_CHANNELS = 22
MSA_CHANNELS = 49
# One-hot token, has_deletion, deletion_value (SI table 1).
EXTRA_CHANNELS = NUM_TOKENS + 2


class Predictions(NamedTuple):
    """What the model says of a batch.

    Attributes:
      msa: logits (b, s, r, t) of the clustered MSA.
      distogram: logits (b, i, j, d) of the distances between residues, symmetric; None without that head.
    """

    msa: torch.Tensor
    distogram: torch.Tensor | None


class InputEmbedder(nn.Module):
    """First MSA and pair representations (algorithms 3 and 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.max_relative = config.max_relative
        self.left = nn.Linear(TARGET_CHANNELS, config.c_z)
        self.right = nn.Linear(TARGET_CHANNELS, config.c_z)
        self.relative = nn.Embedding(2 * config.max_relative + 1, config.c_z)
        self.target = nn.Linear(TARGET_CHANNELS, config.c_m)
        self.msa = nn.Linear(MSA_CHANNELS, config.c_m)

    def forward(self, features: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (msa (b, s, r, m), pair (b, i, j, z))."""
        target = features["target_feat"]
        index = features["residue_index"]
        offset_bij = (index[:, :, None] - index[:, None, :]).clamp(-self.max_relative, self.max_relative)
        pair = self.left(target)[:, :, None] + self.right(target)[:, None, :]
        pair = pair + self.relative(offset_bij + self.max_relative)
        # What blocks add to stays in float32, whatever they compute in.
        msa = self.msa(features["msa_feat"]).float() + self.target(target)[:, None]
        return msa, pair


class CompactEvoformer(nn.Module):
    """Input embedder, extra MSA stack, Evoformer stack, heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.embedder = InputEmbedder(config)
        self.extra_msa = nn.Linear(EXTRA_CHANNELS, config.c_e)
        self.extra_blocks = nn.ModuleList(
            EvoformerBlock(config, extra=True) for _ in range(config.num_extra_blocks)
        )
        self.blocks = nn.ModuleList(EvoformerBlock(config, extra=False) for _ in range(config.num_blocks))
        self.head_norm = nn.LayerNorm(config.c_m)
        self.head = nn.Linear(config.c_m, NUM_TOKENS)
        # Last, so that the weights before it are drawn alike with and without it.
        self.distogram = nn.Linear(config.c_z, NUM_DISTANCE_BINS) if config.distogram_weight else None

    def forward(self, features: Mapping[str, torch.Tensor]) -> Predictions:
        """Returns the logits of the clustered MSA and of distances.

        Args:
          features: one batch of the loader; leading axis b, fixed shapes, zero padded, with masks.
        """
        msa, pair = self.embedder(features)
        mask_bij = features["seq_mask"][:, :, None] * features["seq_mask"][:, None, :]
        extra = self._embed_extra(features)
        for block in self.extra_blocks:
            # The last extra block's MSA output is not used; its pair output is what it leaves behind.
            extra, pair = self._run(block, extra, pair, features["extra_msa_mask"], mask_bij)
        for block in self.blocks:
            msa, pair = self._run(block, msa, pair, features["msa_mask"], mask_bij)
        return Predictions(self.head(self.head_norm(msa)), self._distances(pair))

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.recompute and torch.is_grad_enabled():
            # It brings the random numbers back, too, so that dropout drops the same again.
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _distances(self, pair_bijz: torch.Tensor) -> torch.Tensor | None:
        if self.distogram is None:
            return None
        logits_bijd: torch.Tensor = self.distogram(pair_bijz)
        return logits_bijd + logits_bijd.transpose(1, 2)

    def _embed_extra(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        one_hot = nn.functional.one_hot(features["extra_msa"], NUM_TOKENS).to(torch.float32)
        deletions = torch.stack((features["extra_has_deletion"], features["extra_deletion_value"]), dim=-1)
        return self.extra_msa(torch.cat((one_hot, deletions), dim=-1)).float()
