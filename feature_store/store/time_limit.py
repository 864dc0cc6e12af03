"""A limit on the time of a question: a clock that whoever reads asks, and a thread that interrupts DuckDB."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from foldfeed.feature_store.errors import QueryError, QueryTimeoutError

if TYPE_CHECKING:
    import duckdb

# DuckDB forgets an interrupt that comes while it is between two statements, so it gets another one.
_REPEAT_S = 0.02


class TimeLimit:
    """Starts when it is made.

    Attributes:
      timeout_s: seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        """Raises QueryError unless the limit is above 0 and finite."""
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise QueryError(f"timeout_s {timeout_s!r} must be above 0 and finite; leave it out for no limit")
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    def check(self) -> None:
        """Raises QueryTimeoutError when the time is up."""
        if self.is_over:
            raise QueryTimeoutError(self.timeout_s)

    @contextlib.contextmanager
    def interrupting(self, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """Interrupts a connection when the time is up, for as long as the block runs; no thread is left."""
        finished = threading.Event()

        def watch() -> None:
            wait_s = max(self._end - time.monotonic(), 0)
            while not finished.wait(min(wait_s, threading.TIMEOUT_MAX)):
                if self.is_over:
                    connection.interrupt()
                wait_s = _REPEAT_S

        watcher = threading.Thread(target=watch, name="foldfeed-query-timeout", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
