"""O(length) summaries of a whole alignment, stored beside it.

A loader that reads only a crop still needs statistics over the full depth (AlphaFold 2 takes its profile
before any sampling), so they are computed once, when the record is written. All of them come from exact
integer counts and one IEEE division, so they are the same bits on every machine.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store import alphabet

# Rows are counted in blocks, so that the temporary index array stays small however deep the alignment is.
BLOCK_CELLS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sidecars:
    """Per-column summaries of one alignment.

    Attributes:
      profile: float32 (length, 22), share of each token over all rows: AlphaFold 2's ``hhblits_profile``.
      deletion_mean: float32 (length,), mean deletion count over all rows.
      gap_fraction: float32 (length,), share of rows with a gap.
      mean_gap_fraction: share of gap cells in the whole alignment.
    """

    profile: NDArray[np.float32]
    deletion_mean: NDArray[np.float32]
    gap_fraction: NDArray[np.float32]
    mean_gap_fraction: float


def summarise(msa: NDArray[np.uint8], deletions: NDArray[np.int32]) -> Sidecars:
    """Returns the sidecars of an alignment.

    Args:
      msa: uint8 (depth, length), codes 0..21.
      deletions: int32 (depth, length).
    Source: AlphaFold 2 ``make_hhblits_profile`` (mean one-hot over 22 tokens).
    """
    depth, length = msa.shape
    counts = token_counts(msa)
    gaps = counts[:, alphabet.GAP]
    return Sidecars(
        profile=(counts / depth).astype(np.float32),
        deletion_mean=(deletions.sum(axis=0, dtype=np.int64) / depth).astype(np.float32),
        gap_fraction=(gaps / depth).astype(np.float32),
        mean_gap_fraction=int(gaps.sum()) / (depth * length),
    )


def token_counts(msa: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Returns int64 (length, 22): how often each token stands in each column."""
    depth, length = msa.shape
    counts = np.zeros(length * alphabet.NUM_TOKENS, dtype=np.int64)
    offsets = np.arange(length, dtype=np.int32) * alphabet.NUM_TOKENS
    block = max(1, BLOCK_CELLS // length)
    for start in range(0, depth, block):
        cells = (msa[start : start + block] + offsets).ravel()
        counts += np.bincount(cells, minlength=counts.size)
    return counts.reshape(length, alphabet.NUM_TOKENS)
