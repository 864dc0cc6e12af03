"""Residue codes: one alphabet for every array of the store.

Codes are AlphaFold 2's: ``ARNDCQEGHILKMFPSTWYV`` = 0..19, X = 20, gap = 21, and 22 for a masked position
(only ever made by a loader, never stored). Ambiguity codes follow HH-suite's table as AlphaFold 2 uses it:
B -> D, Z -> E, U -> C, J and O -> X. Lower case is not a residue here: in A3M it marks an insertion, so a
parser must take it out before it encodes.

Source: AlphaFold 2 ``residue_constants.restypes``, ``HHBLITS_AA_TO_ID`` and
``MAP_HHBLITS_AATYPE_TO_OUR_AATYPE``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESIDUES = "ARNDCQEGHILKMFPSTWYV"
UNKNOWN = 20
GAP = 21
MASK = 22
# 20 residues, X and gap: the width of a stored profile. A masked position adds one more in a loader.
NUM_TOKENS = 22
TOKENS = RESIDUES + "X-"

# What a stored alignment or sequence may hold besides the twenty residues.
AMBIGUOUS = {"B": "D", "Z": "E", "U": "C", "J": "X", "O": "X", "X": "X"}

# A byte that is no residue encodes to this; no code of the alphabet reaches it.
INVALID = 255
# Cells of a tile outside the alignment (the last rows and columns of a tile) hold this value.
PADDING = 255


def _encode_table() -> NDArray[np.uint8]:
    table = np.full(256, INVALID, dtype=np.uint8)
    for code, letter in enumerate(TOKENS):
        table[ord(letter)] = code
    for letter, meant in AMBIGUOUS.items():
        table[ord(letter)] = TOKENS.index(meant)
    return table


ENCODE = _encode_table()
DECODE = np.frombuffer((TOKENS + "#").encode(), dtype=np.uint8)


def encode(text: str | bytes) -> NDArray[np.uint8]:
    """Returns the codes of aligned residues.

    ``encode("AXB-")`` is ``[0, 20, 3, 21]``. A character that is no residue (lower case, ``.``, ``*``, a
    digit) gives ``INVALID``: callers decide what that means, because only they can name record and column.

    Args:
      text: upper-case one-letter residues and ``-``.
    Returns: uint8 (length,), a fresh array.
    """
    raw = text.encode("latin-1", errors="replace") if isinstance(text, str) else text
    return ENCODE[np.frombuffer(raw, dtype=np.uint8)]


def decode(codes: NDArray[np.uint8]) -> str:
    """Returns residues as text, the inverse of `encode` for stored codes (B, Z, U, J, O do not come back).

    Args:
      codes: uint8 (length,), each 0..22; 22 (masked) prints as ``#``.
    Raises:
      ValueError: a code above 22.
    """
    if codes.size and int(codes.max()) > MASK:
        raise ValueError(f"residue code {int(codes.max())} is not in 0..{MASK}")
    return DECODE[codes].tobytes().decode("ascii")
