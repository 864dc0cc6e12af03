"""Statistics of alignments and stores: effective number of rows, information content, counts of a window.

Owns arithmetic only: arrays in, arrays out, and reading a record in bounded pieces. Draws nothing. Every
number comes from integer counts and one rounding, so it is the same on every machine and for any block size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.effective_rows import DEFAULT_IDENTITY, effective_rows
from foldfeed.feature_store.format.sidecars import token_counts
from foldfeed.feature_store.store.feature_store import Record
from foldfeed.feature_store.store.questions import RecordSource

NUM_RESIDUES = len(alphabet.RESIDUES)
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
      identity: see `effective_rows.row_weights`.
      max_records: takes that many, evenly spaced in the order of ids, when there are more.
      on_record: called after each.
    """
    found = []
    for position in sample_positions(len(source), max_records):
        record = source.at(position)
        stored = record.neff if identity == DEFAULT_IDENTITY else None
        neff = effective_rows(read_msa(record), identity) if stored is None else stored
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
