"""Statistics of alignments and stores: effective number of rows, information content, counts of a window.

Owns arithmetic only: arrays in, arrays out, and reading a record in bounded pieces. Draws nothing. Every
number comes from integer counts and one rounding, so it is the same on every machine and for any block size.
"""

from __future__ import annotations

import dataclasses
import fractions
import math
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store import alphabet
from foldfeed.feature_store.sidecars import token_counts
from foldfeed.feature_store.source import RecordSource
from foldfeed.feature_store.store import Record

NUM_RESIDUES = len(alphabet.RESIDUES)
# Jumper et al. 2021 count rows apart below this identity; HH-suite and MetaPSICOV use 0.62.
DEFAULT_IDENTITY = 0.8
WORD_BITS = 64
CODE_BITS = 5
# Pairs are compared in squares of this side, so that the buffers (4 x 0.5 MiB) stay in a core's cache.
# Measured on 15,953 x 166 cells: 64: 2.0 s, 128: 1.3 s, 256: 1.4 s, 512: 1.6 s, 1024: 2.3 s.
BLOCK_ROWS = 256
# Rows read at a time: a multiple of the usual tile height, so that no tile is read twice.
READ_ROWS = 8192


def read_msa(record: Record) -> NDArray[np.uint8]:
    """Returns uint8 (depth, length) without ever holding the deletions of more than some rows."""
    out = np.empty((record.depth, record.length), dtype=np.uint8)
    for rows, block in row_blocks(record, slice(0, record.length)):
        out[rows] = block
    return out


def row_blocks(record: Record, window: slice) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Yields (rows, uint8 (rows, residues)) of a window, from the first row to the last."""
    for start in range(0, record.depth, READ_ROWS):
        rows = slice(start, min(start + READ_ROWS, record.depth))
        yield rows, record.crop(residues=window, rows=rows).msa


def window_counts(record: Record, window: slice) -> NDArray[np.int64]:
    """Returns int64 (residues, 22): how often each token stands in each column of a window, over all rows."""
    return sum(
        (token_counts(block) for _, block in row_blocks(record, window)),
        start=np.zeros((window.stop - window.start, alphabet.NUM_TOKENS), dtype=np.int64),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """What a sequence logo shows.

    Attributes:
      bits: float64 (length,), information content of each column, 0 to log2(20).
      share: float64 (length, 20), share of each residue among the residues of the column.
      occupancy: float64 (length,), share of rows with a residue.
    """

    bits: NDArray[np.float64]
    share: NDArray[np.float64]
    occupancy: NDArray[np.float64]


def information(counts: NDArray[np.int64]) -> Information:
    """Returns the information content of columns, corrected for small samples.

    With n residues in a column, R = log2(20) - (H + e(n)) and e(n) = (20 - 1) / (2 n ln 2), not below zero.
    Gaps and X are left out of the sample, so a column of few residues has little information: five equal
    residues give 4.32 - 2.74 = 1.58 bits, a thousand give 4.31.

    Args:
      counts: int64 (length, 22), tokens by column.
    Source: T. D. Schneider and R. M. Stephens, "Sequence logos", Nucleic Acids Res. 18 (1990); T. D.
      Schneider et al., J. Mol. Biol. 188 (1986), appendix, for e(n).
    """
    residues = counts[:, :NUM_RESIDUES].astype(np.float64)
    total = residues.sum(axis=1)
    some = np.maximum(total, 1.0)
    share = residues / some[:, None]
    entropy = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=1)
    correction = (NUM_RESIDUES - 1) / (2 * math.log(2) * some)
    bits = np.where(total > 0, np.maximum(math.log2(NUM_RESIDUES) - entropy - correction, 0.0), 0.0)
    return Information(bits=bits, share=share, occupancy=total / counts.sum(axis=1))


def row_weights(msa: NDArray[np.uint8], identity: float = DEFAULT_IDENTITY) -> NDArray[np.float64]:
    """Returns float64 (depth,): for each row, 1 / (number of rows that are so identical to it, or more).

    A row counts itself. Identity of two rows is the number of columns in which both have the same residue,
    divided by the number of columns in which at least one has a residue. X is a residue like any other. The
    comparison is exact: integer counts against the identity as a fraction of decimals, 0.8 = 4/5.

    All pairs are compared, 64 columns at a time as bit planes: 15,953 rows of 166 columns (127 million pairs)
    take 1.3 s on one core. Memory: 6/8 byte per cell, and a few MiB.

    Args:
      msa: uint8 (depth, length), codes of `alphabet`.
      identity: above 0, up to 1.
    Raises:
      ValueError: identity is not in that range.
    Source: J. Jumper et al., Nature 596 (2021), Methods, "MSA depth analysis": "a threshold of 80% sequence
      identity measured on the region that is non-gap in either sequence".
    """
    if not 0 < identity <= 1:
        raise ValueError(f"identity {identity} must be above 0 and at most 1")
    unique, place, copies = np.unique(msa, axis=0, return_inverse=True, return_counts=True)
    num_residues = (unique != alphabet.GAP).sum(axis=1)
    # In order of length, the rows that can be similar to a block of rows at all are one range.
    order = np.argsort(num_residues, kind="stable")
    similar = _similar_rows(
        _bit_planes(unique[order]),
        num_residues[order],
        copies[order].astype(np.int64),
        fractions.Fraction(str(identity)),
    )
    back = np.empty_like(similar)
    back[order] = similar
    return 1.0 / back[place.ravel()]


def effective_rows(msa: NDArray[np.uint8], identity: float = DEFAULT_IDENTITY) -> float:
    """Returns N_eff, the sum of `row_weights`: how many rows the alignment is worth; 1 to depth."""
    return math.fsum(row_weights(msa, identity))


def store_effective_rows(
    source: RecordSource[Record],
    *,
    identity: float = DEFAULT_IDENTITY,
    max_records: int | None = None,
    on_record: Callable[[], None] = lambda: None,
) -> pa.Table:
    """Returns N_eff of the records of a store: record_id, length, depth, neff.

    Args:
      source: a store or a view.
      identity: see `row_weights`.
      max_records: takes that many, evenly spaced in the order of ids, when there are more.
      on_record: called after each.
    """
    found = []
    for position in sample_positions(len(source), max_records):
        record = source.at(position)
        neff = effective_rows(read_msa(record), identity)
        found.append((record.record_id, record.length, record.depth, neff))
        on_record()
    names, types = (
        ("record_id", "length", "depth", "neff"),
        (pa.string(), pa.int32(), pa.int32(), pa.float64()),
    )
    columns = [[row[at] for row in found] for at in range(len(names))]
    return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, types, strict=True)})


def sample_positions(size: int, wanted: int | None) -> list[int]:
    """Returns up to ``wanted`` of ``range(size)``, evenly spaced, the first one included."""
    if wanted is None or wanted >= size:
        return list(range(size))
    return [number * size // wanted for number in range(wanted)]


def _bit_planes(msa: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Returns uint64 (6, words, rows): five bits of each code, and one that says gap; 64 columns per word.

    Columns that fill the last word are gaps in every row, which counts neither as a match nor as a column.
    """
    depth, length = msa.shape
    words = -(-length // WORD_BITS)
    padded = np.full((depth, words * WORD_BITS), alphabet.GAP, dtype=np.uint8)
    padded[:, :length] = msa
    planes = np.empty((CODE_BITS + 1, words, depth), dtype=np.uint64)
    for bit in range(CODE_BITS):
        planes[bit] = np.packbits((padded >> bit) & 1, axis=1).view(np.uint64).T
    planes[CODE_BITS] = np.packbits(padded == alphabet.GAP, axis=1).view(np.uint64).T
    return planes


def _similar_rows(
    planes: NDArray[np.uint64],
    num_residues: NDArray[np.int64],
    copies: NDArray[np.int64],
    identity: fractions.Fraction,
) -> NDArray[np.int64]:
    """Returns int64 (rows,): the rows, copies included, that are similar to each.

    Args:
      planes: of `_bit_planes`, rows in increasing number of residues.
      num_residues: (rows,).
      copies: (rows,), how often each row occurs.
      identity: the limit.
    """
    num_rows = planes.shape[2]
    similar = np.zeros(num_rows, dtype=np.int64)
    for top in range(0, num_rows, BLOCK_ROWS):
        bottom = min(top + BLOCK_ROWS, num_rows)
        # Identity is at most the shorter over the longer number of residues.
        longest = int(num_residues[bottom - 1]) * identity.denominator // identity.numerator
        end = int(np.searchsorted(num_residues, longest, side="right"))
        for left in range(top, end, BLOCK_ROWS):
            right = min(left + BLOCK_ROWS, end)
            matches, columns = _compare(planes[:, :, top:bottom], planes[:, :, left:right])
            near = matches * identity.denominator >= columns * identity.numerator
            similar[top:bottom] += near @ copies[left:right]
            if left > top:
                similar[left:right] += copies[top:bottom] @ near
    return similar


def _compare(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns int64 (rows of a, rows of b) twice: columns with the same residue, columns with any residue."""
    shape = (a.shape[2], b.shape[2])
    differ, gaps = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    word, other = np.empty(shape, dtype=np.uint64), np.empty(shape, dtype=np.uint64)
    for at in range(a.shape[1]):
        np.bitwise_xor(a[0, at, :, None], b[0, at], out=word)
        for bit in range(1, CODE_BITS):
            np.bitwise_xor(a[bit, at, :, None], b[bit, at], out=other)
            word |= other
        differ += _count_bits(word)
        np.bitwise_and(a[CODE_BITS, at, :, None], b[CODE_BITS, at], out=word)
        gaps += _count_bits(word)
    columns = a.shape[1] * WORD_BITS - gaps
    return columns - differ, columns


def _count_bits(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Returns the number of ones in each word."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    # NumPy 1: add up bits in pairs, fours, bytes; the product adds the bytes (Hacker's Delight, section 5-1).
    words = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    words = (words & pairs) + ((words >> np.uint64(2)) & pairs)
    words = (words + (words >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((words * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)
