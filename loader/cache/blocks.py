"""What is cached: blocks, equal stretches of the files of parts, each with a checksum outside of memory.

A part is immutable and named by what it says, so a block of one of its files never changes and needs no date:
its name is (part, file, number). What a folder or a server holds is sealed: a head that names format, size
and a crc32c over name and bytes. Bytes that were cut, changed or put under another name are found out.

Pure functions.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import google_crc32c

# Of the sealed form. A change of it is another name, in the folder as on the server.
FORMAT = 1
_HEAD = struct.Struct("<4sIQ")
_MAGIC = b"ffb1"
HEAD_BYTES = _HEAD.size


class Block(NamedTuple):
    """Names a block.

    Attributes:
      part_id: of the part.
      file: path of the file within the part.
      number: which stretch of ``block_bytes`` of it, from 0.
    """

    part_id: str
    file: str
    number: int

    @property
    def name(self) -> str:
        """The name as text."""
        return f"{self.part_id}/{self.file}/{self.number}"


def seal(block: Block, data: bytes) -> bytes:
    """Returns the head of a sealed block; the bytes follow it."""
    return _HEAD.pack(_MAGIC, _checksum(block, data), len(data))


def opened(block: Block, sealed: bytes) -> bytes | None:
    """Returns the bytes of a sealed block, None when they are damaged or another block's."""
    if len(sealed) < HEAD_BYTES:
        return None
    magic, checksum, size = _HEAD.unpack_from(sealed)
    data = sealed[HEAD_BYTES:]
    if magic != _MAGIC or len(data) != size or _checksum(block, data) != checksum:
        return None
    return data


def _checksum(block: Block, data: bytes) -> int:
    return google_crc32c.extend(google_crc32c.value(block.name.encode()), data)
