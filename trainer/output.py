"""What a process says when nobody reads it any more: it goes on.

Ctrl-C ends the ``tee`` of a pipeline first, and a lost login ends pipe or terminal. A rank that failed at its
next line would lose the snapshot that it was asked for, and an elastic run one first rank after another.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

STDOUT = 1


class Output(io.FileIO):
    """A standard stream that outlives its reader; what comes after goes to /dev/null."""

    def write(self, data: Any, /) -> int:
        """See `io.RawIOBase`."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        # The descriptor itself, for whoever else writes to it.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == STDOUT:
            print("warning: nobody reads what this process prints any more; it goes on", file=sys.stderr)
        return super().write(data)


def outlive_readers() -> None:
    """Lets this process go on when its standard output or error has lost its reader."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            stream.flush()
            raw = io.BufferedWriter(Output(stream.fileno(), "wb", closefd=False))
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, text)
