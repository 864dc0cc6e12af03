"""Threads for requests to a store far away, and second requests where the first one is late.

`RequestThreads` is a pool whose threads die with the process, not the process with them: a request that hangs
must not hold up an end. `Hedge` watches reads: one that takes longer than 95 % of those before it is asked a
second time, and whichever answer comes first is taken; that costs a bounded share of extra requests.

Thread safe.

Source: J. Dean, L. Barroso, "The tail at scale", Communications of the ACM 56, 2013 (hedged requests).
"""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable

# Answers that say how long an answer takes.
_RECENT = 256
# Before so many nobody knows what is late.
_LEAST_ANSWERS = 20
LATE_SHARE = 0.95
# Second requests per request.
EXTRA_SHARE = 0.05
END_S = 5.0


class RequestThreads:
    """Runs calls on some daemon threads, the first asked first."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._changed = threading.Condition()
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, call: Callable[[], None]) -> bool:
        """Runs a call, which must not raise, when a thread is free; returns False after `close`.

        Raises:
          RuntimeError: the system starts no thread, and there is none.
        """
        with self._changed:
            if self._closed:
                return False
            if self._idle <= len(self._waiting) and len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    # With fewer threads it goes on, more slowly.
                    if not self._threads:
                        raise
                else:
                    self._threads.append(thread)
            self._waiting.append(call)
            self._changed.notify()
        return True

    def stop(self) -> None:
        """Takes nothing more and drops what has not begun."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads; waits up to `END_S` for what has begun."""
        self.stop()
        stop = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, stop - time.monotonic()))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if self._closed:
                    return
                call = self._waiting.popleft()
            call()


class Answer:
    """What one or two requests for the same thing bring: the first answer, or the last error."""

    def __init__(self, fetch: Callable[[], bytes], done: Callable[[bytes | BaseException], None]) -> None:
        """Asks nothing yet.

        Args:
          fetch: one request.
          done: gets the answer or the error, once; what it raises for an answer it gets as an error.
        """
        self._fetch = fetch
        self._done = done
        self._lock = threading.Lock()
        self._asked = 0
        self._over = False

    @property
    def over(self) -> bool:
        """Whether the answer is there."""
        return self._over

    def ask(self) -> bool:
        """Makes one request and waits for it; returns whether its answer was the first."""
        with self._lock:
            if self._over:
                return False
            self._asked += 1
        found: bytes | BaseException
        try:
            found = self._fetch()
        except BaseException as error:  # noqa: BLE001  handed on whole to whoever waits
            found = error
        with self._lock:
            self._asked -= 1
            # An error counts only when no other request can still bring the answer.
            if self._over or (self._asked and isinstance(found, BaseException)):
                return False
            self._over = True
        try:
            self._done(found)
        except BaseException as error:  # noqa: BLE001  whoever waits must not wait for ever
            self._done(error)
        return True


class Hedge:
    """Asks again where an answer is late.

    Attributes:
      asked: first requests.
      extra: second requests.
      won: second requests that answered first.
    """

    def __init__(self, num_threads: int) -> None:
        self.asked = self.extra = self.won = 0
        self._changed = threading.Condition()
        self._threads = RequestThreads(num_threads, "foldfeed-hedge")
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        # Requests under way with the time when they began, oldest first.
        self._open: dict[Answer, float] = {}
        self._watcher: threading.Thread | None = None
        self._closed = False

    def run(self, answer: Answer) -> None:
        """Makes the first request of an answer here; others may be made meanwhile."""
        started = time.monotonic()
        with self._changed:
            self.asked += 1
            self._open[answer] = started
            if self._watcher is None and len(self._recent) >= _LEAST_ANSWERS:
                self._watcher = threading.Thread(target=self._watch, name="foldfeed-hedge", daemon=True)
                self._watcher.start()
            if len(self._open) == 1:
                self._changed.notify()
        answer.ask()
        with self._changed:
            self._open.pop(answer, None)
            self._recent.append(time.monotonic() - started)

    def late_s(self) -> float | None:
        """Returns after how long an answer is late; None while too few are known."""
        with self._changed:
            recent = sorted(self._recent)
        return recent[int(LATE_SHARE * (len(recent) - 1))] if len(recent) >= _LEAST_ANSWERS else None

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.join(END_S)
        self._threads.close()

    def _watch(self) -> None:
        while True:
            late_s = self.late_s() or 0.0
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                late = [answer for answer, began in self._open.items() if now - began >= late_s]
                for answer in late:
                    # Asked again at most once, also where there is no budget for it.
                    del self._open[answer]
                    if self.extra < EXTRA_SHARE * self.asked and not answer.over:
                        self.extra += 1
                        self._threads.submit(functools.partial(self._again, answer))
                oldest = next(iter(self._open.values()), None)
                wait_s = None if oldest is None else max(0.0, oldest + late_s - now)
                self._changed.wait(wait_s)

    def _again(self, answer: Answer) -> None:
        if answer.ask():
            with self._changed:
                self.won += 1
