"""What a search will cost, and threads that take the costliest of their common work first.

Owns the prediction and the order. Does not own searches. The local runner deals its work out to its threads
before any of it is done, by number and in any order: a thread with the giant of all queries, or with the
longer half, would work on alone at the end. Here the threads lay what they were given together, the costliest
search is taken first, and a thread whose own work is all begun helps the others. So they end at most one
small search apart, unless one search takes longer than all others together.

Invariant: every piece of work is done once, by a thread that brought some; whoever brought it gets its answer
or its error. No thread is started. Safe from any thread.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from foldfeed.pipelines.searches.search import ShardUnit, WorkUnit
from foldfeed.pipelines.tools.search_tool import SearchedDatabase
from foldfeed.pipelines.tools.sharded_jackhmmer import ShardedJackhmmer

T = TypeVar("T")

# What a search costs whatever its query, in residues of the query: jackhmmer 3.3.2 took 0.037, 0.085, 0.28
# and 0.86 CPU seconds for queries of 60, 250, 1,000 and 3,000 random residues in 20,000 random targets.
RESIDUES_OF_A_SCAN = 75


def predicted_cost(num_residues: int, num_bytes: int) -> int:
    """Returns what a search takes, in units that only compare with each other.

    Args:
      num_residues: of the query.
      num_bytes: of what is searched; a file without any costs something, too.
    """
    return (num_residues + RESIDUES_OF_A_SCAN) * max(1, num_bytes)


def cost_of_unit(unit: WorkUnit, databases: Sequence[SearchedDatabase]) -> int:
    """Returns the predicted cost of a search; where its shards were searched before, of the small rest."""
    database = databases[unit.database_index]
    files = () if isinstance(database.tool, ShardedJackhmmer) else database.files
    return predicted_cost(len(unit.sequence), sum(map(_num_bytes, files)))


def cost_of_scan(parts: Sequence[ShardUnit], databases: Sequence[SearchedDatabase]) -> int:
    """Returns the predicted cost of searching one shard for some queries."""
    tool = databases[parts[0].unit.database_index].tool
    assert isinstance(tool, ShardedJackhmmer), tool
    num_bytes = _num_bytes(tool.shards[parts[0].number].path)
    return sum(predicted_cost(len(part.unit.sequence), num_bytes) for part in parts)


def _num_bytes(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        # The search itself says what is wrong with a file.
        return 0


class _Batch(Generic[T]):
    """What one thread brought: its answers, how many are still to come, and the first error."""

    def __init__(self, size: int) -> None:
        self.answers: list[T | None] = [None] * size
        self.num_left = size
        self.error: BaseException | None = None


class CommonWork(Generic[T]):
    """Work that several threads bring and do together, the costliest first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # (minus cost, serial number, whose, place there, what to call)
        self._heap: list[tuple[int, int, _Batch[T], int, Callable[[], T]]] = []
        self._serials = itertools.count()

    def do(self, work: Sequence[tuple[int, Callable[[], T]]]) -> list[T]:
        """Returns the answers to some work, in its order, after doing it with whoever else is in here.

        Args:
          work: (predicted cost, what to call) of each piece.
        Raises:
          BaseException: that of the first piece that failed; those that nobody has begun are dropped.
        """
        mine: _Batch[T] = _Batch(len(work))
        with self._changed:
            for place, (cost, call) in enumerate(work):
                heapq.heappush(self._heap, (-cost, next(self._serials), mine, place, call))
            self._changed.notify_all()
        while self._do_next(mine):
            pass
        if mine.error is not None:
            with self._changed:
                self._heap = [entry for entry in self._heap if entry[2] is not mine]
                heapq.heapify(self._heap)
            raise mine.error
        return mine.answers  # type: ignore[return-value]

    def _do_next(self, mine: _Batch[T]) -> bool:
        """Does the costliest piece that is left, anybody's; returns False when there is none or mine failed.

        A thread whose own are done stays while there is something to begin; it does not wait for others.
        """
        with self._changed:
            while not self._heap and mine.num_left and mine.error is None:
                self._changed.wait()
            if not self._heap or mine.error is not None:
                return False
            _, _, batch, place, call = heapq.heappop(self._heap)
        try:
            answer = call()
        except BaseException as error:  # noqa: BLE001 - raised by its owner, whichever thread that is
            with self._changed:
                batch.error = batch.error or error
                self._changed.notify_all()
            return batch is not mine
        with self._changed:
            batch.answers[place] = answer
            batch.num_left -= 1
            self._changed.notify_all()
        return True
