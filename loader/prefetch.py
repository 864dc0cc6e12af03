"""Makes steps ahead of their consumer, in order, with bounded memory.

`StepPrefetcher` knows nothing of proteins: a step is a list of independent tasks (one per sample) and a
function that puts their results together. Tasks run on ``num_threads`` threads in the order of the steps, one
more thread assembles steps. At most ``depth`` steps are finished or under way besides the one the consumer
holds.

Invariants: steps arrive in order whatever task is slow; an error in the background is raised to the consumer
at the step it belongs to, after all earlier steps, and never turns into a hang; `close` returns when every
thread has ended, and may be called at any time.

Threads share the interpreter's lock with the trainer: each time that one wakes, the trainer stands still for
it. A step without tasks costs one such time, of the thread that assembles, and its other threads never begin.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from foldfeed.loader.errors import LoaderConfigError, LoaderUseError

Part = TypeVar("Part")
Step = TypeVar("Step")


class StepPrefetcher(Generic[Part, Step]):
    """An endless sequence of steps, made in the background.

    Example:
      >>> with StepPrefetcher(
      ...     lambda step: [lambda: step, lambda: 10 * step], lambda step, parts: sum(parts),
      ...     first_step=2, depth=2, num_threads=2,
      ... ) as steps:
      ...     steps.next()
      22

    Attributes:
      wait_s: seconds that `next` has waited.
    """

    def __init__(
        self,
        tasks: Callable[[int], Sequence[Callable[[], Part]]],
        assemble: Callable[[int, list[Part]], Step],
        *,
        first_step: int,
        depth: int,
        num_threads: int,
        begin_worker: Callable[[], None] | None = None,
        begin_assembler: Callable[[], None] | None = None,
        costs: Callable[[int], Sequence[float]] | None = None,
    ) -> None:
        """Starts working at once.

        Args:
          tasks: returns the tasks of a step; called on the consumer's thread, so it should be quick.
          assemble: returns the step from the results of its tasks, in their order.
          first_step: the first one that `next` returns.
          depth: steps to keep ahead, at least 1.
          num_threads: threads for tasks, at least 1.
          begin_worker: called first by every thread for tasks.
          begin_assembler: called first by the thread that assembles.
          costs: returns what each task of a step is expected to cost, in any unit: the dearest begin first.
            In their order when None. What comes out is the same.
        Raises:
          LoaderConfigError: depth or num_threads is below 1.
        """
        for field, value in (("prefetch_steps", depth), ("num_threads", num_threads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LoaderConfigError(field, value, "must be an integer of at least 1")
        self.wait_s = 0.0
        self._tasks = tasks
        self._costs = costs
        self._assemble = assemble
        self._next_step = first_step
        self._workers = ThreadPoolExecutor(num_threads, "foldfeed-sample", initializer=begin_worker)
        self._assembler = ThreadPoolExecutor(1, "foldfeed-step", initializer=begin_assembler)
        self._ahead: collections.deque[Future[Step]] = collections.deque()
        self._closed = False
        for _ in range(depth):
            self._start_one()

    def next(self) -> Step:
        """Returns the next step; waits for it if need be.

        Raises:
          LoaderUseError: after `close`.
          Exception: whatever a task or `assemble` of this step raised. The prefetcher is closed then.
        """
        if self._closed:
            raise LoaderUseError("this prefetcher is closed; make a new one")
        started = time.perf_counter()
        try:
            step = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_s += time.perf_counter() - started
        self._start_one()
        return step

    def num_ready(self) -> int:
        """Returns how many of the steps ahead are finished."""
        # A copy, because the consumer's thread may take one while another asks.
        return sum(step.done() for step in tuple(self._ahead))

    def close(self) -> None:
        """Stops: drops what has not begun, waits for what has, ends all threads. Idempotent."""
        self._closed = True
        self._ahead.clear()
        # Both lose their queues before either is waited for: the assembler may be waiting for a task that
        # will now never run, and learns so from its cancelled future.
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._assembler.shutdown(wait=False, cancel_futures=True)
        self._workers.shutdown(wait=True)
        self._assembler.shutdown(wait=True)

    def __enter__(self) -> StepPrefetcher[Part, Step]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start_one(self) -> None:
        step = self._next_step
        self._next_step += 1
        tasks = self._tasks(step)
        turns: Sequence[int] = range(len(tasks))
        if self._costs is not None:
            costs = self._costs(step)
            turns = sorted(turns, key=lambda number: -costs[number])
        begun = {number: self._workers.submit(tasks[number]) for number in turns}
        parts = [begun[number] for number in range(len(tasks))]
        self._ahead.append(self._assembler.submit(self._gather, step, parts))

    def _gather(self, step: int, parts: list[Future[Part]]) -> Step:
        return self._assemble(step, [part.result() for part in parts])
