"""Ctrl-C and SIGTERM: the searches of this process die first, then the build ends with one typed exception.

Owns the signal handlers while a build runs. Does not own the searches
(`programs.subprocess_runner`), nor how a job elsewhere is cancelled (`beam.engine`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from foldfeed.pipelines.programs.subprocess_runner import allow_all, cancel_all


class StoppedBySignal(KeyboardInterrupt):
    """A signal ended the build; its searches are dead.

    Attributes:
      number: of the signal.
      problem: why the job may run on elsewhere, "" where it does not.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.problem = ""
        super().__init__(number)


_lock_depth = 0
_held_back: list[int] = []


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
        if _lock_depth:
            _held_back.append(signum)
            return
        raise StoppedBySignal(signum)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_back_interrupts() -> Iterator[None]:
    """Lets the block come to its end before a signal ends the build.

    For steps that leave something running elsewhere whose name is known only after them. Only while
    `stop_searches_on_interrupt` is in force, whose handler runs in the main thread alone.
    """
    global _lock_depth
    _lock_depth += 1
    try:
        yield
    finally:
        _lock_depth -= 1
        if not _lock_depth and _held_back:
            number = _held_back[0]
            _held_back.clear()
            raise StoppedBySignal(number)
