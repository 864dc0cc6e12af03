"""`Tracer`: what each thread and reading process did when, as a file that Perfetto and Chrome open.

Events are written as they come, one a line, as a JSON array of Chrome's trace event format: complete events
(``"ph": "X"``) with ``ts`` and ``dur`` in microseconds since the trace began, and metadata events that name
processes and threads. The format allows the closing bracket to be missing, so what a killed run leaves can be
opened as well. After so many events no more are written, and the last line says how many were left out.

A disk that is full does not stop what is traced: nothing more is written then, and `Tracer.close` raises.

Thread safe. Owns the file; knows nothing of loaders.

Source: "Trace Event Format" (Google, 2016), JSON Array Format; Perfetto reads it at ui.perfetto.dev.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# About 130 bytes an event.
MAX_EVENTS = 1_000_000


class Tracer:
    """Writes one trace."""

    def __init__(self, path: str | os.PathLike[str], max_events: int = MAX_EVENTS) -> None:
        """Creates the file; one that is there is replaced.

        Raises:
          OSError: it cannot be written.
        """
        self.path = Path(path)
        self._file = self.path.open("w", encoding="utf-8")
        self._began = time.perf_counter()
        self._max_events = max_events
        self._num_events = self._left_out = 0
        self._named: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._error: OSError | None = None
        self._before = "[\n"
        self._name("process_name", os.getpid(), 0, "loader")

    def event(
        self,
        name: str,
        started: float,
        seconds: float,
        facts: Mapping[str, int],
        process: int | None = None,
        thread: int | None = None,
    ) -> None:
        """Writes that something took so long; of what began before the trace the rest, nothing after `close`.

        Args:
          name: of what was done.
          started: by `time.perf_counter`.
          seconds: it took.
          facts: shown beside it.
          process: that did it, this one when None.
          thread: its native id, the calling one when None.
        """
        with self._lock:
            ended, started = started + seconds, max(started, self._began)
            if self._closed or self._error is not None or ended < started:
                return
            if self._num_events >= self._max_events:
                self._left_out += 1
                return
            self._num_events += 1
            pid = os.getpid() if process is None else process
            tid = threading.get_native_id() if thread is None else thread
            if (pid, tid) not in self._named:
                self._named.add((pid, tid))
                if process is not None:
                    self._name("process_name", pid, 0, f"reading process {pid}")
                label = name if process is not None else threading.current_thread().name
                self._name("thread_name", pid, tid, label)
            micro = {"ts": round(1e6 * (started - self._began), 3), "dur": round(1e6 * (ended - started), 3)}
            where = {"ph": "X", "pid": pid, "tid": tid}
            self._line({"name": name, "cat": "loader", **where, **micro, "args": dict(facts)})

    def close(self) -> None:
        """Completes the file. Idempotent.

        Raises:
          OSError: an event could not be written; the file holds those before it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            end = {"ph": "i", "s": "g", "pid": os.getpid(), "tid": 0}
            moment = {"ts": round(1e6 * (time.perf_counter() - self._began), 3)}
            self._line(
                {"name": "end", "cat": "loader", **end, **moment, "args": {"left_out": self._left_out}}
            )
            self._write("\n]\n")
            with contextlib.suppress(OSError):
                # What could not be written is tried once more here.
                self._file.close()
            if self._error is not None:
                raise OSError(
                    self._error.errno, f"the trace is cut short ({self._error.strerror})", str(self.path)
                ) from self._error

    def _name(self, what: str, process: int, thread: int, name: str) -> None:
        self._line({"name": what, "ph": "M", "pid": process, "tid": thread, "ts": 0, "args": {"name": name}})

    def _line(self, event: Mapping[str, Any]) -> None:
        self._write(self._before + json.dumps(event, separators=(",", ":")))
        self._before = ",\n"

    def _write(self, text: str) -> None:
        if self._error is None:
            try:
                self._file.write(text)
                # So that a killed run leaves what it did, and a forked child does not write it again.
                self._file.flush()
            except OSError as error:
                self._error = error
