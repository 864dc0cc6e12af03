"""Nearest-neighbour clusters of alignment rows, and what each cluster says about a column.

AlphaFold 2 gives every row that is no cluster centre to the centre it agrees with most, and describes each
cluster by its mean one-hot residue and mean deletion count per column, the centre included.

Everything here is counted in whole numbers (agreement in float32 that holds whole numbers exactly, below
2**24), so the result is the same for any number of threads, any blocking of a matrix product and any device;
only the last division rounds, once.

Shape legend: C centres, M member rows, W columns read, R columns of the crop. Pure functions of tensors.

Source: AlphaFold 2 ``nearest_neighbor_clusters`` and ``summarize_clusters``; Jumper et al. 2021,
supplementary section 1.2.7.
"""

from __future__ import annotations

import torch

from foldfeed.feature_store import alphabet

NUM_CLASSES = 23  # 20 residues, X, gap, mask
# Agreement on a gap or a mask has weight 0, so those two classes are left out of the matrix product.
NUM_COUNTED = alphabet.GAP
# Rows are one-hot encoded in blocks, so that a 50,000-row alignment costs no more memory than a small one.
BLOCK_BYTES = 32 << 20


def agreement(members: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Returns in how many columns each member and each centre hold the same residue.

    ``AX-`` against ``AX-`` is 2: X agrees with X, a gap with nothing.

    Args:
      members: uint8 (M, W), codes 0..22.
      centres: uint8 (C, W), codes 0..22; masked positions hold 22.
    Returns: float32 (M, C) of whole numbers.
    """
    num_members, width = members.shape
    centres_kc = _one_hot_counted(centres).T
    out = torch.empty((num_members, centres.shape[0]), dtype=torch.float32, device=members.device)
    block = max(1, BLOCK_BYTES // (4 * NUM_COUNTED * width))
    for first in range(0, num_members, block):
        rows = slice(first, first + block)
        torch.matmul(_one_hot_counted(members[rows]), centres_kc, out=out[rows])
    return out


def assign(members: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Returns the centre that each member agrees with most, the first of equals.

    Args:
      members: uint8 (M, W).
      centres: uint8 (C, W), C >= 1.
    Returns: int64 (M,), 0..C-1.
    """
    if members.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=members.device)
    return torch.argmax(agreement(members, centres), dim=1)


def summarise(
    centres: torch.Tensor,
    centre_deletions: torch.Tensor,
    members: torch.Tensor,
    member_deletions: torch.Tensor,
    assignment: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the profile and the mean deletion count of every cluster and column.

    Args:
      centres: uint8 (C, R), with masked and replaced positions.
      centre_deletions: int32 (C, R).
      members: uint8 (M, R).
      member_deletions: int32 (M, R).
      assignment: int64 (M,), from `assign` (over all columns read).
    Returns: float32 (C, R, 23) mean one-hot, and float32 (C, R) mean deletions, over centre and members.
    """
    num_centres, width = centres.shape
    cell_mr = assignment[:, None] * width + torch.arange(width, device=centres.device)
    counts = _count(cell_mr * NUM_CLASSES + members, num_centres * width * NUM_CLASSES)
    counts_crk = counts.view(num_centres, width, NUM_CLASSES)
    counts_crk.scatter_add_(2, centres.long()[:, :, None], torch.ones_like(counts_crk[:, :, :1]))
    sums = torch.zeros(num_centres * width, dtype=torch.int64, device=centres.device)
    sums.scatter_add_(0, cell_mr.reshape(-1), member_deletions.reshape(-1).long())
    sums_cr = sums.view(num_centres, width) + centre_deletions
    # The order of additions is AlphaFold 2's, so that float32 gives its bits: (1e-6 + 1) + members.
    size_c = torch.tensor(1e-6, dtype=torch.float32, device=centres.device) + 1.0
    size_c = size_c + _count(assignment, num_centres).to(torch.float32)
    return counts_crk.to(torch.float32) / size_c[:, None, None], sums_cr.to(torch.float32) / size_c[:, None]


def _one_hot_counted(codes: torch.Tensor) -> torch.Tensor:
    """Returns float32 (rows, W * 21): one-hot over the classes whose agreement counts."""
    classes = torch.arange(NUM_COUNTED, dtype=torch.uint8, device=codes.device)
    return (codes[:, :, None] == classes).to(torch.float32).flatten(1)


def _count(values: torch.Tensor, size: int) -> torch.Tensor:
    """Returns int64 (size,): how often each of 0..size-1 occurs."""
    return torch.bincount(values.reshape(-1), minlength=size)
