"""The program of a process that reads samples for a loader: ``python -m foldfeed.loader.reading.process``.

It gets a `SampleReader` and sample numbers over a socket, and one stretch of shared memory. It plans the
samples in the order asked for, finds room for each in the memory (`ring`), reads it straight into that room
on some threads, and says so. Room that the loader gives back is used again.

Its life: it ends when the socket ends, so with the loader's process however that dies, and never before. It
imports no torch. Owns the child's side; `reading.reading` owns the parent's.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from foldfeed.feature_store import FoldfeedError
from foldfeed.feature_store.lazy_names import LateModule
from foldfeed.loader.errors import SampleError
from foldfeed.loader.meters.meters import FETCH, PLAN, Doing, Meters, clock
from foldfeed.loader.reading import wire
from foldfeed.loader.reading.early_start import SlowFirst
from foldfeed.loader.reading.fetch import ARRAYS, shapes_of
from foldfeed.loader.reading.reader import PlannedSample, SampleReader
from foldfeed.loader.reading.ring import RingClosedError, RingSpace
from foldfeed.loader.reading.slots import note_of, place, slot_bytes

if TYPE_CHECKING:
    from foldfeed.loader.reading import cached_reader
    from foldfeed.loader.reading.cached_reader import CachedReader
else:
    # Most processes have no cache, and start sooner without its code.
    cached_reader = LateModule("foldfeed.loader.reading.cached_reader")

# A sample that is larger than the ring gets memory of its own under this number; only one at a time does.
ALONE = 2**64 - 1
# One made from another record than its own has memory of its own, too: its room in the ring was another's
# size. There is no limit on these, for the samples behind it may hold all other room until it is there.
ASIDE = 2**64 - 2
PARENT_CHECK_S = 1.0
# Plans made one behind the other: between two readings a plan finds neither its code nor its data in the
# processor's caches, and takes half as long again.
PLANNED_TOGETHER = 8
# What was done, by which thread, when and for how many seconds.
Span: TypeAlias = "tuple[str, int, float, float]"


def main(arguments: list[str]) -> None:
    """Runs until the connection ends.

    Args:
      arguments: descriptors of socket and memory, bytes of the memory, threads, the loader's process id.
    """
    # Ctrl-C goes to all processes of a terminal; this one ends when the loader lets it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, memory_descriptor, capacity, num_threads, parent = map(int, arguments)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with socket.socket(fileno=descriptor) as connection, mmap.mmap(memory_descriptor, capacity) as memory:
        os.close(memory_descriptor)
        receiver = wire.Receiver(connection)
        first = receiver.next()
        if first is None:
            return
        # From the process that started this one, over a socket that nobody else has.
        plain, cache = pickle.loads(first.payload)
        cached = None if cache is None else cached_reader.CachedReader(plain, *cache)
        _ReadingProcess(plain, cached, connection, receiver, memory, capacity, num_threads).run()
        # Threads may still hold views of the memory; the process ends here and takes all with it.
        os._exit(0)


def _end_with(parent: int) -> None:
    """Ends this process with its parent, also where a fork of that one still holds the socket."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(0)


class _ReadingProcess:
    def __init__(
        self,
        reader: SampleReader,
        cached: CachedReader | None,
        connection: socket.socket,
        receiver: wire.Receiver,
        memory: mmap.mmap,
        capacity: int,
        num_threads: int,
    ) -> None:
        self._reader: SampleReader | CachedReader = reader if cached is None else cached
        self._cached = cached
        self._connection = connection
        self._receiver = receiver
        self._memory = memory
        self._space = RingSpace(capacity)
        self._num_threads = num_threads
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._counted: Counter[str] = Counter()
        self._alone_free = threading.Semaphore(1)
        self._meters = Meters()

    def run(self) -> None:
        dispatcher = threading.Thread(target=self._dispatch, name="foldfeed-dispatch", daemon=True)
        dispatcher.start()
        try:
            while (frame := self._receiver.next()) is not None:
                if frame.kind == wire.READ:
                    samples = np.frombuffer(frame.payload, dtype="<i8").tolist()
                    if self._cached is not None:
                        self._cached.ask(samples)
                    for sample in samples:
                        self._wanted.put(sample)
                elif frame.number == ALONE:
                    self._alone_free.release()
                elif frame.number != ASIDE:
                    self._space.give_back(frame.number)
        except ConnectionError:
            # The loader's process is gone; so is the reason to go on.
            pass
        self._space.close()

    def _dispatch(self) -> None:
        """Plans and finds room in the order asked for, so that no sample waits for a later one."""
        join = self._meters.stage(FETCH).join
        with ThreadPoolExecutor(self._num_threads, "foldfeed-read", initializer=join) as threads:
            tasks = SlowFirst(threads)
            self._meters.stage(PLAN).join()
            while True:
                for number, planned, span in [self._planned(number) for number in self._next_wanted()]:
                    if isinstance(planned, SampleError):
                        # No plan, so no size: if another record takes its place, then aside.
                        unplanned = functools.partial(_raise, planned)
                        tasks.submit(0.0, functools.partial(self._guarded, number, unplanned))
                        continue
                    if isinstance(planned, FoldfeedError):
                        self._failed(number, planned)
                        continue
                    size = slot_bytes(shapes_of(planned.plan))
                    if size > self._space.capacity:
                        self._alone_free.acquire()
                        task = functools.partial(self._read_alone, planned, size, span)
                    else:
                        try:
                            start = self._space.take(size)
                        except RingClosedError:
                            return
                        task = functools.partial(self._read, planned, start, span)
                    tasks.submit(planned.plan.num_cells, functools.partial(self._guarded, number, task))

    def _next_wanted(self) -> list[int]:
        """Returns the numbers to plan next, at least one; waits for it."""
        found = [self._wanted.get()]
        with contextlib.suppress(queue.Empty):
            while len(found) < PLANNED_TOGETHER:
                found.append(self._wanted.get_nowait())
        return found

    def _planned(self, number: int) -> tuple[int, PlannedSample | FoldfeedError, Span]:
        """Returns a sample's number, its plan or what went wrong, and the time that took."""
        planned: PlannedSample | FoldfeedError
        with self._meters.stage(PLAN).doing(PLAN) as doing:
            try:
                planned = self._reader.planned(number)
            except FoldfeedError as error:
                planned = error
        return number, planned, _span(PLAN, doing)

    def _guarded(self, number: int, read: Callable[[], None]) -> None:
        """Runs one reading and tells the loader what goes wrong: it would wait for ever otherwise."""
        try:
            try:
                read()
            except SampleError as error:
                self._replace(number, error)
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001  passed on whole, see above
            self._failed(number, error)

    def _read(self, planned: PlannedSample, start: int, span: Span) -> None:
        try:
            with self._meters.stage(FETCH).doing(FETCH) as doing:
                room = place(self._memory, start, shapes_of(planned.plan))
                arrays, sizes = self._reader.fetch(planned, room)
        except Exception:
            self._space.give_back(start)
            raise
        note = note_of(arrays, start, **self._facts(planned, sizes, span, _span(FETCH, doing)))
        self._send(wire.Frame(wire.READY, planned.number, note))

    def _read_alone(self, planned: PlannedSample, size: int, span: Span) -> None:
        with _fresh_memory(size) as (descriptor, memory):
            try:
                with self._meters.stage(FETCH).doing(FETCH) as doing:
                    room = place(memory, 0, shapes_of(planned.plan))
                    arrays, sizes = self._reader.fetch(planned, room)
            except Exception:
                self._alone_free.release()
                raise
            note = note_of(arrays, 0, **self._facts(planned, sizes, span, _span(FETCH, doing)))
            self._send(wire.Frame(wire.READY_ALONE, planned.number, note), descriptor)

    def _replace(self, number: int, error: SampleError) -> None:
        """Makes a sample from another record, where the run wants that; raises the error where not."""
        if not self._reader.may_replace(error, 0):
            raise error
        with self._meters.stage(FETCH).doing(FETCH) as doing:
            found, sizes, planned, substitution = self._reader.read_from(number, 1, error.reason)
        assert substitution is not None
        shapes = {name: getattr(found, name).shape for name in ARRAYS}
        with _fresh_memory(slot_bytes(shapes)) as (descriptor, memory):
            for name, array in place(memory, 0, shapes).items():
                array[...] = getattr(found, name)
            facts = self._facts(planned, sizes, _span(FETCH, doing))
            facts["substitution"] = substitution.to_dict()
            self._send(wire.Frame(wire.READY_ALONE, number, note_of(found, 0, **facts)), descriptor)

    def _facts(self, planned: PlannedSample, sizes: dict[str, int], *spans: Span) -> dict[str, Any]:
        """Returns what `Meters.heard` takes on the other side, and what the cache counted since the last."""
        return {
            "of_sample": planned.sample,
            "read_s": sum(seconds for *_, seconds in spans),
            "sizes": sizes,
            "spans": spans,
            "times": self._meters.times(),
            "now": clock(),
            "counters": self._freshly_counted(),
        }

    def _freshly_counted(self) -> dict[str, float]:
        if self._cached is None:
            return {}
        with self._sending:
            now = self._cached.counters()
            fresh = {name: value - self._counted[name] for name, value in now.items()}
            self._counted.update(fresh)
        return {name: value for name, value in fresh.items() if value}

    def _failed(self, number: int, error: Exception) -> None:
        if not isinstance(error, SampleError):
            sample = number // self._reader.recipe.num_draws
            error = SampleError(sample, "", f"{type(error).__name__}: {error}")
        self._send(wire.Frame(wire.FAILED, number, pickle.dumps(error)))

    def _send(self, frame: wire.Frame, descriptor: int | None = None) -> None:
        with self._sending:
            wire.send(self._connection, frame, descriptor)


def _span(activity: str, doing: Doing) -> Span:
    return activity, threading.get_native_id(), doing.started, doing.seconds


def _raise(error: Exception) -> None:
    raise error


@contextlib.contextmanager
def _fresh_memory(size: int) -> Iterator[tuple[int, mmap.mmap]]:
    """Yields the descriptor of fresh memory without a name, and the memory."""
    descriptor = os.memfd_create("foldfeed-sample", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor, mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])
