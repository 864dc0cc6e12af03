"""A text as numbered lines, from a whole text or from blocks of one, without holding it.

Owns line breaks, the byte order mark at the beginning and the limit on one line. Does not own what lines
mean. Generators: each belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.bounded_files import without_mark

# A whole text, or its bytes in blocks of any size.
Text = str | bytes | Iterable[bytes]

# A row of 100,000 residues with all its insertions, or a header that lists a thousand proteins, is far
# shorter.
MAX_LINE_BYTES = 16 << 20


def blocks_of(text: Text) -> Iterator[bytes]:
    """Yields the bytes of a text, in the blocks that it comes in."""
    if isinstance(text, str):
        yield text.encode("utf-8")
    elif isinstance(text, bytes):
        yield text
    else:
        yield from text


def lines_of(text: Text) -> Iterator[tuple[int, bytes]]:
    """Yields 1-based number and bytes of each line, without line feed and without a byte order mark.

    Raises:
      AlignmentParseError: a line of more than `MAX_LINE_BYTES`.
    """
    number, rest, is_first = 0, b"", True
    for block in blocks_of(text):
        pieces = (rest + block).split(b"\n")
        rest = pieces.pop()
        for line in pieces:
            number += 1
            yield number, without_mark(line) if is_first else line
            is_first = False
        if len(rest) > MAX_LINE_BYTES:
            raise AlignmentParseError(f"a line of more than {MAX_LINE_BYTES} bytes", number + 1)
    if rest:
        yield number + 1, without_mark(rest) if is_first else rest
