"""Attention over an MSA: along a row with a bias from the pair representation, along a column, and global.

Shape suffixes
    b  samples          s  MSA rows         r, i, j  residues
    h  heads            d  channels per head
    m  MSA channels (c_m, or c_e in the extra stack)    z  pair channels

Masks are float, 1 where there is data. A masked key gets -1e9 before the softmax, which makes its weight
exactly zero in fp32, so padding cannot reach a real position. Rows that are masked entirely hold finite
numbers without meaning; whoever mixes rows masks them.

Source: AlphaFold 2 supplementary information, algorithms 7, 8, 19.
"""

from __future__ import annotations

import math

import torch
from torch import nn

MASKED = -1e9


def _attend(
    query_bxhqd: torch.Tensor, key_bxhkd: torch.Tensor, value_bxhkd: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Returns softmax(q k^T / sqrt(d) + bias) v; the bias broadcasts to (b, x, h, q, k)."""
    scale = 1.0 / math.sqrt(query_bxhqd.shape[-1])
    logits = torch.matmul(query_bxhqd * scale, key_bxhkd.transpose(-1, -2)) + bias
    return torch.matmul(torch.softmax(logits, dim=-1), value_bxhkd)


class GatedAttention(nn.Module):
    """Multi-head attention over the second last axis of (b, x, n, c), with a sigmoid gate on its output."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.gate = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_bxnc: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Returns (b, x, n, c)."""
        query, key, value = (self._split(part) for part in self.qkv(x_bxnc).chunk(3, dim=-1))
        mixed = _attend(query, key, value, bias).transpose(-2, -3).flatten(-2)
        return self.out(torch.sigmoid(self.gate(x_bxnc)) * mixed)

    def _split(self, x_bxnc: torch.Tensor) -> torch.Tensor:
        return x_bxnc.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


class RowAttentionWithPairBias(nn.Module):
    """MSA row-wise gated self-attention with pair bias (algorithm 7)."""

    def __init__(self, c_m: int, c_z: int, num_heads: int) -> None:
        super().__init__()
        self.norm_m = nn.LayerNorm(c_m)
        self.norm_z = nn.LayerNorm(c_z)
        self.pair_bias = nn.Linear(c_z, num_heads, bias=False)
        self.attention = GatedAttention(c_m, num_heads)

    def forward(
        self, msa_bsrm: torch.Tensor, pair_bijz: torch.Tensor, mask_bsr: torch.Tensor
    ) -> torch.Tensor:
        """Returns the update of the MSA representation, (b, s, r, m)."""
        pair_b1hij = self.pair_bias(self.norm_z(pair_bijz)).permute(0, 3, 1, 2).unsqueeze(1)
        keys_bs11r = MASKED * (1.0 - mask_bsr)[:, :, None, None, :]
        return self.attention(self.norm_m(msa_bsrm), pair_b1hij + keys_bs11r)


class ColumnAttention(nn.Module):
    """MSA column-wise gated self-attention (algorithm 8)."""

    def __init__(self, c_m: int, num_heads: int) -> None:
        super().__init__()
        self.norm_m = nn.LayerNorm(c_m)
        self.attention = GatedAttention(c_m, num_heads)

    def forward(self, msa_bsrm: torch.Tensor, mask_bsr: torch.Tensor) -> torch.Tensor:
        """Returns the update of the MSA representation, (b, s, r, m)."""
        keys_br11s = MASKED * (1.0 - mask_bsr.transpose(1, 2))[:, :, None, None, :]
        return self.attention(self.norm_m(msa_bsrm).transpose(1, 2), keys_br11s).transpose(1, 2)


class GlobalColumnAttention(nn.Module):
    """MSA column-wise global self-attention (algorithm 19): one query per column, the mean over its rows.

    Linear in the number of rows, so the extra stack can take a thousand of them.
    """

    def __init__(self, c_m: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_m = nn.LayerNorm(c_m)
        self.query = nn.Linear(c_m, c_m, bias=False)
        # One key and one value head are shared by all query heads, as in the source.
        self.key_value = nn.Linear(c_m, 2 * (c_m // num_heads), bias=False)
        self.gate = nn.Linear(c_m, c_m)
        self.out = nn.Linear(c_m, c_m)

    def forward(self, msa_bsrm: torch.Tensor, mask_bsr: torch.Tensor) -> torch.Tensor:
        """Returns the update of the MSA representation, (b, s, r, m)."""
        msa = self.norm_m(msa_bsrm).transpose(1, 2)
        mask_brs1 = mask_bsr.transpose(1, 2).unsqueeze(-1)
        mean_brm = (msa * mask_brs1).sum(2) / (mask_brs1.sum(2) + 1e-10)
        query_brhd = self.query(mean_brm).unflatten(-1, (self.num_heads, -1))
        key_brsd, value_brsd = self.key_value(msa).chunk(2, dim=-1)
        bias_br1s = MASKED * (1.0 - mask_brs1.transpose(-1, -2))
        mixed_brhd = _attend(query_brhd, key_brsd, value_brsd, bias_br1s)
        gated = torch.sigmoid(self.gate(msa)) * mixed_brhd.flatten(-2).unsqueeze(2)
        return self.out(gated).transpose(1, 2)
