"""Runs independent reads, a bounded number at a time.

Storage behind a network answers after milliseconds, and then what counts is how many questions are open. This
module owns the threads for that: one pool per bound, made when it is first needed and shared by everybody in
the process who asks for that bound, so that the bound holds for all of them together. Local files are read
without it.

Invariants: when `run_tasks` returns or raises, none of its tasks runs any more, so nobody writes to the
caller's arrays later; of several failures the first one in the order of the tasks is raised. A fork leaves
threads behind, so a child starts with no pools and makes its own.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Sequence

# Reads in flight for storage behind a network unless a caller says otherwise. At 60 ms and 64 in flight that
# is a thousand reads per second.
DEFAULT_IN_FLIGHT = 64
MAX_IN_FLIGHT = 1024
# Largest read behind a network: a deep alignment then comes in several, side by side.
REMOTE_READ_BYTES = 4 << 20
# Largest read of a local file. Crops of 384 x 5,120 took 7 % longer with 32 MB: such buffers are new memory
# every time, and from 64 KB to 1 MB made no difference.
LOCAL_READ_BYTES = 1 << 20

_lock = threading.Lock()
_pools: dict[int, concurrent.futures.ThreadPoolExecutor] = {}


def run_tasks(tasks: Sequence[Callable[[], object]], in_flight: int) -> None:
    """Runs all tasks and returns when they are done.

    Args:
      tasks: independent of each other; a task must not call this function.
      in_flight: how many run at once; with 1 they run here, one after the other.
    Raises:
      ValueError: in_flight is outside 1..1024.
      Exception: what the first failing task raised; tasks that had not begun are dropped.
    """
    if not isinstance(in_flight, int) or not 1 <= in_flight <= MAX_IN_FLIGHT:
        raise ValueError(
            f"in_flight {in_flight!r} is not possible; it is an integer from 1 to {MAX_IN_FLIGHT}"
        )
    if in_flight == 1 or len(tasks) < 2:
        for task in tasks:
            task()
        return
    pool = _pool(in_flight)
    futures: list[concurrent.futures.Future[object]] = []
    gate = _Gate()
    try:
        for task in tasks:
            # Fails when no thread can be started. Tasks before this one run already, and this one is queued.
            futures.append(pool.submit(gate.run, task))
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        gate.close()
        raise


class _Gate:
    """Lets tasks through until it is closed; then nothing that went through still runs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False

    def run(self, task: Callable[[], object]) -> None:
        with self._changed:
            if self._closed:
                return
            self._running += 1
        try:
            task()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._running)


def _pool(in_flight: int) -> concurrent.futures.ThreadPoolExecutor:
    with _lock:
        found = _pools.get(in_flight)
        if found is None:
            found = concurrent.futures.ThreadPoolExecutor(in_flight, thread_name_prefix="feature-store-read")
            _pools[in_flight] = found
        return found


def _forget_pools() -> None:
    global _lock
    # The fork may have happened while another thread held the lock.
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_pools)
