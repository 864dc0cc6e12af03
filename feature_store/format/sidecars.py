"""O(length) summaries of a whole alignment, stored beside it.

A loader that reads only a crop still needs statistics over the full depth (AlphaFold 2 takes its profile
before any sampling), so they are computed once, when the record is written. All of them come from exact
integer counts and one IEEE division, so they are the same bits on every machine.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet

# Rows are counted in blocks, so that the temporary index array stays small however deep the alignment is.
BLOCK_CELLS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sidecars:
    """Per-column summaries of one alignment.

    Attributes:
      profile: float32 (length, 22), share of each token over all rows: AlphaFold 2's ``hhblits_profile``.
      deletion_mean: float32 (length,), mean deletion count over all rows.
      gap_fraction: float32 (length,), share of rows with a gap.
      entropy: float32 (length,), Shannon entropy in bits of the 20 residues of each column, 0 to log2(20);
        gaps and X are left out, and a column without residues has 0.
      mean_gap_fraction: share of gap cells in the whole alignment.
    """

    profile: NDArray[np.float32]
    deletion_mean: NDArray[np.float32]
    gap_fraction: NDArray[np.float32]
    entropy: NDArray[np.float32]
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
        entropy=column_entropy(counts[:, : len(alphabet.RESIDUES)]).astype(np.float32),
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


def column_entropy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns float64 (length,): Shannon entropy of each column in bits, 0 for an empty column.

    (2, 1, 1) of a column of four give 0.5 * 1 + 0.25 * 2 + 0.25 * 2 = 1.5.

    Args:
      counts: int64 (length, kinds).
    Source: C. E. Shannon, Bell Syst. Tech. J. 27 (1948).
    """
    total = np.maximum(counts.sum(axis=1), 1).astype(np.float64)
    shares = counts / total[:, None]
    surprise = exact_log2(total)[:, None] - exact_log2(np.maximum(counts, 1).astype(np.float64))
    entropy = np.zeros(len(counts), dtype=np.float64)
    # Kind by kind, because the order in which NumPy adds along a row is not the same on every machine.
    for kind in range(counts.shape[1]):
        entropy += shares[:, kind] * surprise[:, kind]
    return entropy


def exact_log2(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the base-2 logarithm of positive numbers, the same bits on every machine.

    Libraries and processors disagree in the last bit of a logarithm. This one is made of IEEE operations in a
    fixed order; it is exact for powers of two and off by at most 3e-16 relative to 1 otherwise.

    Source: log(m) = 2 artanh((m - 1) / (m + 1)), by its power series, for m in sqrt(1/2)..sqrt(2).
    """
    mantissa, exponent = np.frexp(values)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2, mantissa)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    series = np.zeros_like(square)
    for odd in range(25, 0, -2):
        series = series * square + 1 / odd
    return (exponent - low) + ratio * series * (2 / math.log(2))
