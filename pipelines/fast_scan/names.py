"""Records of a FASTA file by their names, copied without holding the interpreter's lock.

Owns how the candidates of a shard get out of it. Does not own which names are candidates
(`sharded_jackhmmer`). The file is read in blocks; a compiled function finds the records, or, where foldfeed
was installed without a C compiler, the same in Python, with the lock held. Invariant: records are HMMER's:
one begins at any '>' that stands behind the end of a header, which is the first line feed or carriage return.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import BinaryIO

from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.programs.subprocess_runner import raise_if_cancelled

# Read at a time; also how long a cancellation waits.
BLOCK_BYTES = 16 << 20


def copy_named(
    path: str, names: Collection[bytes], out: BinaryIO, *, block_bytes: int = BLOCK_BYTES
) -> set[bytes]:
    """Writes the records of a FASTA file that have one of some names, in the file's order.

    Of records that share a name all are written: more candidates than needed change nothing.

    Args:
      path: of the file.
      names: first words of headers.
      out: open for writing.
      block_bytes: read at a time; a record may be longer.
    Returns: the names that were found.

    Raises:
      CancelledError: the run was stopped.
    """
    wanted = sorted(names)
    find = scan_kernels.find_named if scan_kernels.is_usable() else find_named_in_python
    found: set[bytes] = set()
    rest, ended = b"", not wanted
    with open(path, "rb") as file:
        while not ended:
            raise_if_cancelled("the copy of candidates")
            more = file.read(block_bytes)
            text, ended = rest + more, not more
            records, end_of_whole = find(text, wanted, ended)
            for start, end, number in records:
                record = text[start:end]
                out.write(record if record.endswith((b"\n", b"\r")) else record + b"\n")
                found.add(wanted[number])
            rest = text[end_of_whole:]
    return found


def find_named_in_python(
    text: bytes, wanted: Sequence[bytes], ended: bool
) -> tuple[list[tuple[int, int, int]], int]:
    """Returns what `scan_kernels.find_named` does, without a compiled function."""
    places = {name: number for number, name in enumerate(wanted)}
    found: list[tuple[int, int, int]] = []
    start = text.find(b">")
    while start >= 0:
        line_end = text.find(b"\n", start)
        header_end = line_end if line_end >= 0 else len(text)
        # Looked for in the header alone: in a file without carriage returns it would be far.
        carriage = text.find(b"\r", start, header_end)
        header_end = carriage if carriage >= 0 else header_end
        following = text.find(b">", header_end)
        if following < 0 and not ended:
            return found, start
        header = text[start + 1 : header_end].split(maxsplit=1)
        if header and header[0] in places:
            found.append((start, following if following >= 0 else len(text), places[header[0]]))
        start = following
    return found, len(text)
