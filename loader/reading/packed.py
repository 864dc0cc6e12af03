"""How some samples lie in one stretch of memory, so that one copy moves them all: rows of a header and data.

    row | row | ... | sample | sample | ...       each sample: its arrays end to end

A row is int64 (`HEADER`): for each array of a sample where it begins, counted in its own elements from a
first byte that all rows share, and the sample's sizes. So samples that lie somewhere else are found by adding
one number to the places in their rows. A reading process packs what is read together (`reading.process`);
the samples of a step are joined on their way to a device (`step_block`).

Owns the layout. Does not own whose memory it is. Knows no torch. Pure functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.structure import NUM_ATOMS
from foldfeed.loader.reading.fetch import ARRAYS, DTYPES, SampleArrays
from foldfeed.loader.reading.ring import ALIGNMENT
from foldfeed.loader.reading.slots import Memory, place

# Sizes of a sample, in its row behind the places of its arrays.
SIZES = (
    *("columns", "residues", "centres", "extras", "members", "replaced"),
    *("with_atoms", "crop_start", "first_residue", "with_means", "with_labels"),
)
HEADER = (*ARRAYS, *SIZES)
ROW_BYTES = 8 * len(HEADER)
# How many bytes a place in a row counts; a shift leaves sizes alone.
_ITEM_BYTES = np.array([DTYPES[name].itemsize for name in ARRAYS], dtype=np.int64)


def padded(size: int) -> int:
    """Returns bytes up to the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def row_of(arrays: SampleArrays, start: int) -> list[int]:
    """Returns a sample's row.

    Args:
      arrays: the sample.
      start: first byte of it, a multiple of `ALIGNMENT`.
    """
    places = []
    for name in ARRAYS:
        places.append(start // DTYPES[name].itemsize)
        start += padded(getattr(arrays, name).nbytes)
    return [
        *places,
        *(arrays.msa.shape[1], len(arrays.aatype), len(arrays.centre_at), len(arrays.extra_at)),
        *(len(arrays.member_at), len(arrays.profile_at), len(arrays.atom_mask)),
        *(arrays.crop_in_columns[0], arrays.first_residue),
        *(len(arrays.deletion_mean), len(arrays.resolution)),
    ]


def shift(rows: NDArray[np.int64], num_bytes: int) -> None:
    """Moves the places in rows, in place.

    Args:
      rows: int64 (n, `HEADER`).
      num_bytes: by which their samples lie further on, a multiple of `ALIGNMENT`; may be negative.
    """
    rows[:, : len(ARRAYS)] += num_bytes // _ITEM_BYTES


def rows_in(memory: Memory, start: int, num_samples: int) -> NDArray[np.int64]:
    """Returns the rows that begin at a byte, int64 (num_samples, `HEADER`), a view of the memory."""
    return np.ndarray((num_samples, len(HEADER)), np.int64, np.frombuffer(memory, dtype=np.uint8), start)


def sample_at(memory: Memory, row: NDArray[np.int64], origin: int = 0) -> SampleArrays:
    """Returns a sample as views of the memory.

    Args:
      memory: that it lies in.
      row: its own, int64 (`HEADER`,).
      origin: the byte that places are counted from.
    """
    found: dict[str, int] = dict(zip(HEADER, row.tolist(), strict=True))
    size = {name: found[name] for name in SIZES}
    residues, centres, labels = size["residues"], size["centres"], size["with_labels"]
    num_rows = centres + size["members"]
    shapes: dict[str, tuple[int, ...]] = {
        "msa": (num_rows, size["columns"]),
        "deletions": (num_rows, residues),
        "aatype": (residues,),
        "profile": (size["columns"], alphabet.NUM_TOKENS),
        "centre_at": (centres,),
        "extra_at": (size["extras"],),
        "member_at": (size["members"],),
        "action": (centres, size["columns"]),
        "profile_at": (size["replaced"],),
        "profile_u": (size["replaced"],),
        "deletion_mean": (size["with_means"],),
        "atom_positions": (size["with_atoms"], NUM_ATOMS, 3),
        "atom_mask": (size["with_atoms"], NUM_ATOMS),
        "resolution": (labels,),
        "clamped": (labels,),
    }
    # Codes are single bytes, so the place of the first array is the first byte.
    arrays: dict[str, Any] = place(memory, origin + found["msa"], shapes)
    crop = (size["crop_start"], size["crop_start"] + residues)
    return SampleArrays(**arrays, crop_in_columns=crop, first_residue=size["first_residue"])
