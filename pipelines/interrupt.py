"""Ctrl-C and SIGTERM: the searches of this process die first, then the build ends with one typed exception.

Owns the signal handlers while a build runs. Does not own the searches
(`foldfeed.pipelines.subprocess_runner`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from foldfeed.pipelines.subprocess_runner import allow_all, cancel_all


class StoppedBySignal(KeyboardInterrupt):
    """A signal ended the build; its searches are dead.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@contextlib.contextmanager
def stop_searches_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM kill the running searches first; the block then raises `StoppedBySignal`.

    Without it the interpreter would wait at its end for worker threads, and these for searches of hours.
    """
    allow_all()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        cancel_all()
        raise StoppedBySignal(signum)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
