"""Evoformer blocks: the communication between an MSA representation and a pair representation.

Shape suffixes
    b  samples          s  MSA rows         r, i, j, k  residues
    m  MSA channels     z  pair channels    c  hidden channels

Left out of AlphaFold 2's block, to stay compact: triangle self-attention (algorithms 13, 14). One block type
serves both stacks. In the extra stack (algorithm 18) it updates the MSA and then the pairs, which are all
that the stack leaves behind. In the main stack the pairs come first (AlphaFold-Multimer and AlphaFold 3 also
moved the outer product to the front): the masked-MSA loss reads the MSA only, and in the published order the
last block's pair update would never receive a gradient.

Source: AlphaFold 2 supplementary information, algorithms 6, 9, 10, 11, 12, 15, 18.
"""

from __future__ import annotations

import torch
from torch import nn

from foldfeed.trainer.config import ModelConfig
from foldfeed.trainer.models.attention import ColumnAttention, GlobalColumnAttention, RowAttentionWithPairBias


class SharedDropout(nn.Module):
    """Dropout whose mask is shared along one axis (SI 1.11.6): row-wise for 1, column-wise for 2."""

    def __init__(self, rate: float, shared_dim: int) -> None:
        super().__init__()
        self.rate = rate
        self.shared_dim = shared_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``x`` with whole lines along the shared axis dropped, scaled to keep the mean."""
        if not self.training or self.rate == 0.0:
            return x
        shape = list(x.shape)
        shape[self.shared_dim] = 1
        return x * nn.functional.dropout(x.new_ones(shape), self.rate)


class Transition(nn.Module):
    """A two-layer network per position (algorithms 9 and 15)."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, factor * channels)
        self.narrow = nn.Linear(factor * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the update, same shape."""
        return self.narrow(torch.relu(self.widen(self.norm(x))))


class OuterProductMean(nn.Module):
    """Mean over the rows of outer products of two projections (algorithm 10): MSA to pair."""

    def __init__(self, c_m: int, c_z: int, c_hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.left_right = nn.Linear(c_m, 2 * c_hidden)
        self.out = nn.Linear(c_hidden * c_hidden, c_z)

    def forward(self, msa_bsrm: torch.Tensor, mask_bsr: torch.Tensor) -> torch.Tensor:
        """Returns the update of the pair representation, (b, i, j, z)."""
        projected = self.left_right(self.norm(msa_bsrm)) * mask_bsr.unsqueeze(-1)
        left_bsic, right_bsjc = projected.chunk(2, dim=-1)
        outer = torch.einsum("bsic,bsjd->bijcd", left_bsic, right_bsjc).flatten(-2)
        # A count of rows: bfloat16 has no 257.
        with torch.autocast(mask_bsr.device.type, enabled=False):
            pairs_bij1 = torch.einsum("bsi,bsj->bij", mask_bsr, mask_bsr).unsqueeze(-1)
        return self.out(outer / (pairs_bij1 + 1e-3))


class TriangleMultiplication(nn.Module):
    """Triangular multiplicative update with outgoing (algorithm 11) or incoming edges (algorithm 12)."""

    def __init__(self, c_z: int, c_hidden: int, *, outgoing: bool) -> None:
        super().__init__()
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
        self.norm_in = nn.LayerNorm(c_z)
        self.left_right = nn.Linear(c_z, 2 * c_hidden)
        self.left_right_gate = nn.Linear(c_z, 2 * c_hidden)
        self.norm_out = nn.LayerNorm(c_hidden)
        self.out = nn.Linear(c_hidden, c_z)
        self.gate = nn.Linear(c_z, c_z)

    def forward(self, pair_bijz: torch.Tensor, mask_bij: torch.Tensor) -> torch.Tensor:
        """Returns the update of the pair representation, (b, i, j, z)."""
        pair = self.norm_in(pair_bijz)
        edges = torch.sigmoid(self.left_right_gate(pair)) * self.left_right(pair) * mask_bij.unsqueeze(-1)
        left, right = edges.chunk(2, dim=-1)
        triangles = torch.einsum(self.equation, left, right)
        return torch.sigmoid(self.gate(pair)) * self.out(self.norm_out(triangles))


class EvoformerBlock(nn.Module):
    """One block (algorithm 6), or one of the extra MSA stack (algorithm 18)."""

    def __init__(self, config: ModelConfig, *, extra: bool) -> None:
        super().__init__()
        self.extra = extra
        c_m = config.c_e if extra else config.c_m
        self.row_attention = RowAttentionWithPairBias(c_m, config.c_z, config.num_heads)
        self.row_dropout = SharedDropout(config.dropout_msa, shared_dim=1)
        columns = GlobalColumnAttention if extra else ColumnAttention
        self.column_attention: nn.Module = columns(c_m, config.num_heads)
        self.msa_transition = Transition(c_m, config.transition_factor)
        self.outer_product_mean = OuterProductMean(c_m, config.c_z, config.c_opm)
        self.triangle_outgoing = TriangleMultiplication(config.c_z, config.c_tri, outgoing=True)
        self.triangle_incoming = TriangleMultiplication(config.c_z, config.c_tri, outgoing=False)
        self.pair_dropout = SharedDropout(config.dropout_pair, shared_dim=1)
        self.pair_transition = Transition(config.c_z, config.transition_factor)

    def forward(
        self, msa_bsrm: torch.Tensor, pair_bijz: torch.Tensor, mask_bsr: torch.Tensor, mask_bij: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the new MSA and pair representations."""
        if self.extra:
            msa_bsrm = self._update_msa(msa_bsrm, pair_bijz, mask_bsr)
            return msa_bsrm, self._update_pair(msa_bsrm, pair_bijz, mask_bsr, mask_bij)
        pair_bijz = self._update_pair(msa_bsrm, pair_bijz, mask_bsr, mask_bij)
        return self._update_msa(msa_bsrm, pair_bijz, mask_bsr), pair_bijz

    def _update_msa(
        self, msa_bsrm: torch.Tensor, pair_bijz: torch.Tensor, mask_bsr: torch.Tensor
    ) -> torch.Tensor:
        msa_bsrm = msa_bsrm + self.row_dropout(self.row_attention(msa_bsrm, pair_bijz, mask_bsr))
        msa_bsrm = msa_bsrm + self.column_attention(msa_bsrm, mask_bsr)
        return msa_bsrm + self.msa_transition(msa_bsrm)

    def _update_pair(
        self, msa_bsrm: torch.Tensor, pair_bijz: torch.Tensor, mask_bsr: torch.Tensor, mask_bij: torch.Tensor
    ) -> torch.Tensor:
        pair_bijz = pair_bijz + self.outer_product_mean(msa_bsrm, mask_bsr)
        pair_bijz = pair_bijz + self.pair_dropout(self.triangle_outgoing(pair_bijz, mask_bij))
        pair_bijz = pair_bijz + self.pair_dropout(self.triangle_incoming(pair_bijz, mask_bij))
        return pair_bijz + self.pair_transition(pair_bijz)
