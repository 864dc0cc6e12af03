"""Text that came from a store or a file, made fit for a terminal.

Headers of alignments are other people's text and may hold control sequences that move the cursor, recolour or
hide what is shown. They are stored as they are and escaped where they are printed for a person; csv, json and
parquet carry them unchanged.
"""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, C1, and the marks that reorder or hide text (Unicode, "Bidi_Control").
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """Returns text with every character that a terminal would obey as an escape: ``\\x1b``."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
