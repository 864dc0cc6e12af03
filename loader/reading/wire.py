"""Frames between a loader and its reading processes, over a Unix socket.

A frame is kind, number, size and so many bytes. A descriptor may travel with a frame; it arrives with it or
before. Owns the framing; does not own what frames mean. One writer at a time on each side.
"""

from __future__ import annotations

import collections
import socket
import struct
from typing import NamedTuple

_HEAD = struct.Struct("<BQI")
_MAX_DESCRIPTORS = 16
_RECEIVE_BYTES = 1 << 16

# From the loader: numbers of samples (int64) that are read together, in order; a piece that is free again.
READ, RELEASE = 1, 2
# From the reader: a piece is in the memory that is shared; it is in memory of its own, whose descriptor comes
# along; a sample failed.
READY, READY_ALONE, FAILED = 3, 4, 5


class Frame(NamedTuple):
    """One message."""

    kind: int
    number: int
    payload: bytes


def encoded(frame: Frame) -> bytes:
    """Returns a frame as it is sent; several, one behind the other, may be sent at once."""
    return _HEAD.pack(frame.kind, frame.number, len(frame.payload)) + frame.payload


def send(connection: socket.socket, frame: Frame, descriptor: int | None = None) -> None:
    """Sends a frame, whole.

    Raises:
      OSError: the other side is gone.
    """
    data = encoded(frame)
    if descriptor is None:
        connection.sendall(data)
        return
    sent = socket.send_fds(connection, [data], [descriptor])
    connection.sendall(data[sent:])


class Receiver:
    """Reads frames of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.descriptors: collections.deque[int] = collections.deque()
        self._connection = connection
        self._data = bytearray()

    def next(self) -> Frame | None:
        """Returns the next frame, None at the end of the connection; waits for it.

        Raises:
          OSError: the connection broke.
        """
        if not self._fill(_HEAD.size):
            return None
        kind, number, size = _HEAD.unpack_from(self._data)
        if not self._fill(_HEAD.size + size):
            return None
        payload = bytes(self._data[_HEAD.size : _HEAD.size + size])
        del self._data[: _HEAD.size + size]
        return Frame(kind, number, payload)

    def _fill(self, size: int) -> bool:
        while len(self._data) < size:
            data, descriptors, _, _ = socket.recv_fds(self._connection, _RECEIVE_BYTES, _MAX_DESCRIPTORS)
            self.descriptors.extend(descriptors)
            if not data:
                return False
            self._data += data
        return True
