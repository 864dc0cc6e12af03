"""How long the consumer's work stood still for lack of a batch.

On the CPU that is the time inside of ``next()``. A GPU works behind the program: the program may wait while
the GPU still computes, and the GPU may wait for kernels that make features after the program went on. So two
events on the consumer's stream frame the wait: one when the consumer asks, which happens on the device once
all earlier work is done, and one behind the point where the batch may be used. What lies between them is time
in which the consumer's stream had nothing to do. Events are read when they have happened; nothing here waits.

One thread consumes; any thread may ask for the sum.
"""

from __future__ import annotations

import collections
import threading

import torch

# A program this many steps ahead of its device waits for the device here; events would pile up otherwise.
MAX_PENDING = 4096


class DeviceStall:
    """Sums up the gaps on the stream of a consumer on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: torch.cuda.Event | None = None
        self._pending: collections.deque[tuple[torch.cuda.Event, torch.cuda.Event]] = collections.deque()
        self._seconds = 0.0
        self._lock = threading.Lock()

    def asked(self) -> None:
        """Says that the consumer has given all work that it has and asks for a batch."""
        self._asked = self._event()

    def arrived(self) -> None:
        """Says that the consumer's stream has been told to wait for the batch."""
        assert self._asked is not None
        with self._lock:
            self._pending.append((self._asked, self._event()))
            self._asked = None
            if len(self._pending) > MAX_PENDING:
                self._pending[0][1].synchronize()
            self._collect()

    @property
    def seconds(self) -> float:
        """Seconds so far, of those waits that are over on the device."""
        with self._lock:
            self._collect()
            return self._seconds

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _collect(self) -> None:
        while self._pending and self._pending[0][1].query():
            asked, arrived = self._pending.popleft()
            self._seconds += asked.elapsed_time(arrived) / 1000
