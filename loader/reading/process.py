"""The program of a process that reads samples for a loader: ``python -m foldfeed.loader.reading.process``.

It gets a `SampleReader` and sample numbers over a socket, and one stretch of shared memory. Samples are asked
for in groups, those of a step. It plans them in the order asked for, finds room for a group in the memory
(`ring`), reads its samples straight into that room on some threads, side by side as the loader takes them
(`packed`), and says so once when all of them are there. Room that the loader gives back is used again. A
group that would take more than a half of the memory comes in several pieces.

Its life: it ends when the socket ends, so with the loader's process however that dies, and never before. It
imports no torch. Owns the child's side; `reading.reading` owns the parent's.
"""

from __future__ import annotations

import contextlib
import functools
import json
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from foldfeed.feature_store.lazy_names import LateModule
from foldfeed.loader.errors import SampleError
from foldfeed.loader.meters.meters import FETCH, PLAN, Doing, Meters, clock
from foldfeed.loader.notes import MISSING, PieceNote
from foldfeed.loader.reading import wire
from foldfeed.loader.reading.early_start import SlowFirst
from foldfeed.loader.reading.fetch import ARRAYS, shapes_of
from foldfeed.loader.reading.packed import ROW_BYTES, padded, row_of, rows_in
from foldfeed.loader.reading.reader import PlannedSample, SampleReader
from foldfeed.loader.reading.ring import RingClosedError, RingSpace
from foldfeed.loader.reading.slots import Memory, place, slot_bytes

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
# What was done, by which thread, when, for how many seconds, and for which sample.
Span: TypeAlias = "tuple[str, int, float, float, int]"
# A sample that was planned, the bytes that it takes, and the time that the plan took.
Sized: TypeAlias = "tuple[PlannedSample, int, Span]"
SIZES = ("stored_bytes", "decoded_bytes", "used_bytes")


class _Piece:
    """Some samples on their way into one stretch of memory.

    Attributes:
      start: its first byte.
      size: its bytes.
      numbers: of its samples that are there, `MISSING` for the others.
    """

    def __init__(self, samples: Sequence[Sized], memory: Memory, start: int) -> None:
        self.start = start
        self.size = piece_bytes(samples)
        self._samples = samples
        self._memory = memory
        self._rows = rows_in(memory, start, len(samples))
        self.numbers = [MISSING] * len(samples)
        self._read_s = [0.0] * len(samples)
        self._num_bytes = 0
        self._totals = [0, 0, 0]
        self._spans: list[Span] = []
        self._left = len(samples)
        self._lock = threading.Lock()
        behind = padded(ROW_BYTES * len(samples))
        self._offsets = []
        for _, size, _ in samples:
            self._offsets.append(behind)
            behind += size

    def read(self, index: int, reader: SampleReader | CachedReader, doing: Doing) -> None:
        """Reads one of its samples into its place."""
        planned, _, span = self._samples[index]
        with doing:
            room = place(self._memory, self.start + self._offsets[index], shapes_of(planned.plan))
            arrays, sizes = reader.fetch(planned, room)
            self._rows[index] = row_of(arrays, self._offsets[index])
        with self._lock:
            self.numbers[index] = planned.number
            self._read_s[index] = span[3] + doing.seconds
            self._num_bytes += arrays.num_bytes
            self._totals = [total + sizes[name] for total, name in zip(self._totals, SIZES, strict=True)]
            self._spans += [span, span_of(FETCH, doing, planned.sample)]

    def is_last(self) -> bool:
        """Returns whether all others of its samples are finished; to be called when one is, once for each."""
        with self._lock:
            self._left -= 1
            return not self._left

    def note(self, facts: Callable[..., dict[str, Any]]) -> PieceNote | None:
        """Returns what to say about it; None where none of its samples could be read."""
        if all(number == MISSING for number in self.numbers):
            return None
        stored, decoded, used = self._totals
        text = json.dumps(facts(spans=self._spans)).encode()
        sizes = (stored, decoded, used)
        return PieceNote(
            *(self.start, self.size, self.numbers, self._read_s),
            *(self._num_bytes, sizes, clock(), text),
        )


def piece_bytes(samples: Sequence[Sized]) -> int:
    """Returns how much room some samples take together."""
    return padded(ROW_BYTES * len(samples)) + sum(size for _, size, _ in samples)


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
        self._wanted: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        # More than one piece has room, so that one is filled while another is taken.
        self._piece_bytes = capacity // 2
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
                    self._wanted.put(samples)
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
            try:
                while True:
                    groups = self._next_wanted()
                    # All of them first, see `PLANNED_TOGETHER`.
                    planned = [[self._planned(number) for number in group] for group in groups]
                    for group in planned:
                        for samples in self._pieces(group, tasks):
                            self._begin(samples, tasks)
            except RingClosedError:
                return

    def _next_wanted(self) -> list[list[int]]:
        """Returns the groups to plan next, at least one; waits for it."""
        found = [self._wanted.get()]
        with contextlib.suppress(queue.Empty):
            while sum(map(len, found)) < PLANNED_TOGETHER:
                found.append(self._wanted.get_nowait())
        return found

    def _planned(self, number: int) -> tuple[int, PlannedSample | Exception, Span]:
        """Returns a sample's number, its plan or what went wrong, and the time that took."""
        planned: PlannedSample | Exception
        with self._meters.stage(PLAN).doing(PLAN) as doing:
            try:
                planned = self._reader.planned(number)
            except Exception as error:  # noqa: BLE001  passed on whole, as in `_guarded`
                planned = error
        return number, planned, span_of(PLAN, doing, number // self._reader.recipe.num_draws)

    def _pieces(
        self, group: list[tuple[int, PlannedSample | Exception, Span]], tasks: SlowFirst
    ) -> Iterator[list[Sized]]:
        """Yields the samples of a group that have a plan, by pieces; sees to the others."""
        piece: list[Sized] = []
        for number, planned, span in group:
            if isinstance(planned, SampleError):
                # No plan, so no size: if another record takes its place, then aside.
                unplanned = functools.partial(_raise, planned)
                tasks.submit(0.0, functools.partial(self._guarded, number, unplanned))
            elif isinstance(planned, Exception):
                self._failed(number, planned)
            else:
                sized = (planned, slot_bytes(shapes_of(planned.plan)), span)
                if piece and piece_bytes([*piece, sized]) > self._piece_bytes:
                    yield piece
                    piece = []
                piece.append(sized)
        if piece:
            yield piece

    def _begin(self, samples: list[Sized], tasks: SlowFirst) -> None:
        """Finds room for a piece and lets it be read; waits for the room."""
        size = piece_bytes(samples)
        if size > self._space.capacity:
            ((planned, *_),) = samples
            self._alone_free.acquire()
            task = functools.partial(self._read_alone, samples)
            tasks.submit(planned.plan.num_cells, functools.partial(self._guarded, planned.number, task))
            return
        piece = _Piece(samples, self._memory, self._space.take(size))
        for index, (planned, *_) in enumerate(samples):
            task = functools.partial(self._read, piece, index, planned.number)
            tasks.submit(planned.plan.num_cells, task)

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

    def _read(self, piece: _Piece, index: int, number: int) -> None:
        """Reads a sample of a piece; who reads the last one sends the piece."""
        self._guarded(number, lambda: piece.read(index, self._reader, self._meters.stage(FETCH).doing(FETCH)))
        if piece.is_last():
            self._tell(piece)

    def _tell(self, piece: _Piece) -> None:
        """Sends a piece of which all samples are finished."""
        try:
            note = piece.note(self._facts)
            if note is None:
                self._space.give_back(piece.start)
            else:
                self._send(wire.Frame(wire.READY, 0, note.pack()))
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001  passed on whole, as in `_guarded`
            for number in filter(lambda number: number != MISSING, piece.numbers):
                self._failed(number, error)

    def _read_alone(self, samples: list[Sized]) -> None:
        with _fresh_memory(piece_bytes(samples)) as (descriptor, memory):
            piece = _Piece(samples, memory, 0)
            try:
                piece.read(0, self._reader, self._meters.stage(FETCH).doing(FETCH))
            except Exception:
                self._alone_free.release()
                raise
            note = piece.note(self._facts)
            assert note is not None
            self._send(wire.Frame(wire.READY_ALONE, ALONE, note.pack()), descriptor)

    def _replace(self, number: int, error: SampleError) -> None:
        """Makes a sample from another record, where the run wants that; raises the error where not."""
        if not self._reader.may_replace(error, 0):
            raise error
        with self._meters.stage(FETCH).doing(FETCH) as doing:
            found, sizes, planned, substitution = self._reader.read_from(number, 1, error.reason)
        assert substitution is not None
        shapes = {name: getattr(found, name).shape for name in ARRAYS}
        behind = padded(ROW_BYTES)
        size = behind + slot_bytes(shapes)
        facts = self._facts(spans=[span_of(FETCH, doing, planned.sample)])
        facts["substitution"] = substitution.to_dict()
        text = json.dumps(facts).encode()
        stored, decoded, used = (sizes[name] for name in SIZES)
        read = (stored, decoded, used)
        note = PieceNote(0, size, [number], [doing.seconds], found.num_bytes, read, clock(), text)
        with _fresh_memory(size) as (descriptor, memory):
            rows_in(memory, 0, 1)[0] = row_of(found, behind)
            for name, array in place(memory, behind, shapes).items():
                array[...] = getattr(found, name)
            self._send(wire.Frame(wire.READY_ALONE, ASIDE, note.pack()), descriptor)

    def _facts(self, spans: Sequence[Span]) -> dict[str, Any]:
        """Returns the facts of a note."""
        facts = {"spans": spans, "times": self._meters.times()}
        return facts | ({} if self._cached is None else {"counters": self._freshly_counted()})

    def _freshly_counted(self) -> dict[str, float]:
        assert self._cached is not None
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


def span_of(activity: str, doing: Doing, sample: int) -> Span:
    """Returns what the calling thread did for a sample."""
    return activity, threading.get_native_id(), doing.started, doing.seconds, sample


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
