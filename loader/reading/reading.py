"""Where a loader's samples come from: read in its own threads, or in processes of their own.

`OwnThreads` reads where it is asked. `ReadingProcesses` keeps one or more processes (`reading.process`)
that read ahead, in the order asked for, into shared memory; a sample is a view of that memory until it is
released. The interpreter of the training process then takes part with one small message for some samples that
are needed together (`pieces`): each time that a thread wakes here, it takes the lock from the trainer.

Invariants: `get` gives the sample that was asked for or raises; it never hangs: a process that died is
started again and reads what it owed, and after `MAX_DEATHS` deaths without a sample between them the error
says so. Room that is free again is told to a process with the next message to it, or when somebody waits for
that process, or when it is much; so it never lacks room for what somebody waits for. Shared memory has no
name, so nothing can be left behind, and every process ends with this one.

Thread safe.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.errors import LoaderConfigError, ReadingProcessError, SampleError
from foldfeed.loader.meters.meters import FETCH, PLAN, PREPARE, Meters, clock
from foldfeed.loader.notes import PieceNote
from foldfeed.loader.reading import wire
from foldfeed.loader.reading.cached_reader import CachedReader
from foldfeed.loader.reading.pieces import Group, Piece
from foldfeed.loader.reading.process import ASIDE
from foldfeed.loader.reading.reader import SampleRead, SampleReader
from foldfeed.loader.reading.supply import ReadSample
from foldfeed.loader.unreadable import Substitution

MAX_DEATHS = 3
# A process that was told to end gets this long before it is killed.
END_S = 5.0
# Samples that are asked for, read and told of together, at most. More would save little, and a step of many
# samples is shared among the processes in such groups.
GROUP_SAMPLES = 8
# Of its memory a process is told late, at most, that it is free again.
LATE_SHARE = 8
# Socket, memory, bytes, threads and this process's id follow.
_PROGRAM = ("-m", "foldfeed.loader.reading.process")


class OwnThreads:
    """Reads a sample in the thread that asks for it."""

    def __init__(self, reader: SampleReader | CachedReader, meters: Meters) -> None:
        self._reader = reader
        self._meters = meters

    def ask(self, samples: Sequence[int], together: int = 1) -> None:
        """Lets a cache bring the samples nearer."""
        if isinstance(self._reader, CachedReader):
            self._reader.ask(samples)

    def get(self, sample: int) -> ReadSample:
        """Reads it."""
        reader, stage = self._reader, self._meters.stage(PREPARE)
        of_sample = sample // reader.recipe.num_draws
        started = clock()
        try:
            with stage.doing(PLAN, sample=of_sample):
                planned = reader.planned(sample)
            with stage.doing(FETCH, sample=of_sample):
                read = SampleRead(*reader.fetch(planned), planned, None)
        except SampleError as error:
            if not reader.may_replace(error, 0):
                raise
            with stage.doing(FETCH, sample=of_sample):
                read = reader.read_from(sample, 1, error.reason)
        read_s = clock() - started
        self._meters.read(read_s, read.sizes)
        return ReadSample(
            arrays=read.arrays, read_s=read_s, release=lambda: None, substitution=read.substitution
        )

    def queued(self) -> dict[str, int]:
        """Returns nothing: no sample waits here."""
        return {}

    def counters(self) -> dict[str, float]:
        """Returns what the cache counted so far."""
        return self._reader.counters() if isinstance(self._reader, CachedReader) else {}

    def close(self) -> None:
        """Ends the cache's threads."""
        if isinstance(self._reader, CachedReader):
            self._reader.close()


class ReadingProcesses:
    """Some processes that take turns: the n-th group asked for goes to process n modulo their number."""

    def __init__(
        self,
        reader: SampleReader,
        num_processes: int,
        num_threads: int,
        num_bytes: int,
        meters: Meters,
        cache: tuple[CacheConfig, Sequence[int]] | None = None,
    ) -> None:
        """Starts the processes.

        Args:
          reader: what they read with.
          num_processes: how many.
          num_threads: of each, for reading.
          num_bytes: shared memory of all of them together.
          meters: that hear what they did.
          cache: of each process, and the virtual shards of this rank.
        Raises:
          LoaderConfigError: this system cannot share memory in that way.
        """
        if not hasattr(os, "memfd_create"):
            raise LoaderConfigError(
                "num_processes", num_processes, "needs memory without a name (Linux); use 0: threads"
            )
        content = pickle.dumps((reader, cache))
        share = max(mmap.PAGESIZE, num_bytes // num_processes)
        self._processes: list[_Process] = []
        with contextlib.ExitStack() as unless_all_begin:
            unless_all_begin.callback(self.close)
            for _ in range(num_processes):
                self._processes.append(_Process(content, num_threads, share, meters, cache is not None))
            unless_all_begin.pop_all()
        self._groups: dict[int, tuple[_Process, Group]] = {}
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that run now."""
        return [process.pid for process in self._processes]

    def ask(self, samples: Sequence[int], together: int = 1) -> None:
        """Says which samples will be taken next, in that order."""
        size = max(1, GROUP_SAMPLES // together) * together
        shares: list[list[Group]] = [[] for _ in self._processes]
        with self._lock:
            for first in range(0, len(samples), size):
                turn = self._turn % len(self._processes)
                process = self._processes[turn]
                self._turn += 1
                group = Group(samples[first : first + size], process.waiting)
                self._groups.update(dict.fromkeys(group.numbers, (process, group)))
                shares[turn].append(group)
        for process, share in zip(self._processes, shares, strict=True):
            if share:
                process.ask(share)

    def get(self, sample: int) -> ReadSample:
        """Returns a sample that was asked for; waits for it."""
        with self._lock:
            process, group = self._groups.pop(sample)
        try:
            piece = group.piece_of(sample)
        finally:
            process.taken(1)
        return ReadSample(
            arrays=piece.sample(sample),
            read_s=piece.read_s[piece.numbers.index(sample)],
            release=piece.give_back,
            substitution=piece.substitution,
        )

    def take(self, sample: int) -> tuple[Sequence[int], Iterator[Piece]]:
        """Returns the group that begins with a sample, and its pieces as they come, see `Group.pieces`."""
        with self._lock:
            process, group = self._groups[sample]
            assert group.numbers[0] == sample, (sample, group.numbers)
            for number in group.numbers:
                del self._groups[number]
        return group.numbers, _pieces_of(group, process)

    def queued(self) -> dict[str, int]:
        """Returns samples that were asked for and not taken, and how many of them have been read."""
        found = [process.queued() for process in self._processes]
        return {"samples_asked": sum(a for a, _ in found), "samples_read_ahead": sum(b for _, b in found)}

    def counters(self) -> dict[str, float]:
        """Returns what the caches of all processes counted so far."""
        total: Counter[str] = Counter()
        for process in self._processes:
            total.update(process.counted())
        return dict(total)

    def close(self) -> None:
        """Ends the processes. Idempotent."""
        for process in self._processes:
            process.close()


def _pieces_of(group: Group, process: _Process) -> Iterator[Piece]:
    try:
        yield from group.pieces()
    finally:
        process.taken(len(group.numbers))


class _Process:
    """One process and what it owes; started again when it dies."""

    def __init__(
        self, content: bytes, num_threads: int, capacity: int, meters: Meters, has_cache: bool
    ) -> None:
        self.meters = meters
        self.has_cache = has_cache
        self._content = content
        self._num_threads = num_threads
        self._capacity = capacity
        self._lock = threading.Lock()
        # Held while orders are sent, so that they arrive in order: room is given in that order.
        self._asking = threading.Lock()
        # The groups of samples that were asked for and have not come, in order.
        self._owed: dict[int, Group] = {}
        self._num_asked = self._num_arrived = self._num_taken = 0
        self._num_deaths = 0
        # Why nobody will read any more what is asked for.
        self._given_up: ReadingProcessError | None = None
        # Of its cache; of all its lives.
        self._counters: Counter[str] = Counter()
        self._closed = False
        # Threads that wait for it, and what is free again and was not told, in frames and in bytes.
        self._sending = threading.Lock()
        self._num_waiting = 0
        self._freed: list[bytes] = []
        self._freed_bytes = 0
        # Held, because a child that dies at once is heard before its life has its place here.
        with self._lock:
            self._life = _Life(self, content, num_threads, capacity)

    @property
    def pid(self) -> int:
        return self._life.child.pid

    def ask(self, groups: Sequence[Group]) -> None:
        with self._asking:
            with self._lock:
                for group in groups:
                    self._owed.update(dict.fromkeys(group.numbers, group))
                    self._num_asked += len(group.numbers)
                life, given_up = self._life, self._given_up
            if given_up is None:
                self._order(life, [group.numbers for group in groups])
            else:
                self._fail([(number, group) for group in groups for number in group.numbers], given_up)

    def taken(self, num_samples: int) -> None:
        """Counts samples that somebody takes."""
        with self._lock:
            self._num_taken += num_samples

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which somebody waits for it, so that it must know at once what is free."""
        with self._sending:
            self._num_waiting += 1
            self._tell(self._life, b"")
        try:
            yield
        finally:
            with self._sending:
                self._num_waiting -= 1

    def give_back(self, life: _Life, number: int, size: int) -> None:
        """Takes back a piece of a life."""
        with self._sending:
            if life is not self._life:
                # With it went its memory, and whoever waited for room there.
                return
            self._freed.append(wire.encoded(wire.Frame(wire.RELEASE, number, b"")))
            self._freed_bytes += size
            if self._num_waiting or self._freed_bytes * LATE_SHARE > self._capacity:
                self._tell(life, b"")

    def queued(self) -> tuple[int, int]:
        with self._lock:
            return self._num_asked - self._num_taken, max(0, self._num_arrived - self._num_taken)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._life.end()
        with self._lock:
            owed = list(self._owed.items())
        self._fail(owed, ReadingProcessError(self.pid, "the loader was closed"))

    def count(self, fresh: Mapping[str, float]) -> None:
        """Takes what the cache of the process counted since the last piece."""
        with self._lock:
            self._counters.update(fresh)

    def counted(self) -> Counter[str]:
        """Returns what the caches of all its lives counted."""
        with self._lock:
            return Counter(self._counters)

    def arrived(self, piece: Piece) -> None:
        """Takes what a life has read; called by its thread."""
        with self._lock:
            self._num_deaths = 0
            self._num_arrived += len(piece.numbers)
            # All of one group.
            groups = [self._owed.pop(number) for number in piece.numbers]
        groups[0].put(piece)

    def failed(self, number: int, error: Exception) -> None:
        """Takes what a life could not read; called by its thread."""
        with self._lock:
            self._num_deaths = 0
            self._num_arrived += 1
            group = self._owed.pop(number)
        group.fail(number, error)

    def died(self, life: _Life, how: str) -> None:
        """Starts the process again, or gives up; called by the thread of the life that ended."""
        with self._asking:
            with self._lock:
                if self._closed or life is not self._life:
                    return
                self._num_deaths += 1
                owed = dict(self._owed)
                fresh = self._again(life, how)
            if fresh is None:
                assert self._given_up is not None
                self._fail(list(owed.items()), self._given_up)
                return
            groups: dict[int, list[int]] = {}
            for number, group in owed.items():
                groups.setdefault(id(group), []).append(number)
            self._order(fresh, list(groups.values()))

    def _again(self, life: _Life, how: str) -> _Life | None:
        """Starts the process again; None where it gives up. Called with the lock."""
        why = f"it {how}, for the {self._num_deaths}th time without a sample between"
        if self._num_deaths < MAX_DEATHS:
            try:
                fresh = _Life(self, self._content, self._num_threads, self._capacity)
            except OSError as error:
                # No memory for another, for instance: nobody reads what is owed, and somebody waits for it.
                why = f"it {how}, and could not be started again ({error})"
            else:
                with self._sending:
                    self._life = fresh
                    self._freed.clear()
                    self._freed_bytes = 0
                return fresh
        self._given_up = ReadingProcessError(life.child.pid, why)
        return None

    def _fail(self, owed: Sequence[tuple[int, Group]], error: ReadingProcessError) -> None:
        for number, group in owed:
            group.fail(number, error)

    def _order(self, life: _Life, groups: Sequence[Sequence[int]]) -> None:
        """Sends what is to be read, and what is free."""
        frames = [wire.Frame(wire.READ, 0, np.array(numbers, dtype="<i8").tobytes()) for numbers in groups]
        with self._sending:
            self._tell(life, b"".join(map(wire.encoded, frames)))

    def _tell(self, life: _Life, orders: bytes) -> None:
        """Sends orders and what is free; called with the lock."""
        if life is self._life:
            orders = b"".join((*self._freed, orders))
            self._freed.clear()
            self._freed_bytes = 0
        if orders:
            life.send(orders)


class _Life:
    """One run of the program: a child, its memory and the thread that hears it."""

    def __init__(self, owner: _Process, content: bytes, num_threads: int, capacity: int) -> None:
        ours, theirs = socket.socketpair()
        descriptor = os.memfd_create("foldfeed-ring", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, capacity)
            self._memory = mmap.mmap(descriptor, capacity)
            numbers = (theirs.fileno(), descriptor, capacity, num_threads, os.getpid())
            self.child = subprocess.Popen(
                [sys.executable, *_PROGRAM, *map(str, numbers)],
                pass_fds=(theirs.fileno(), descriptor),
                stdin=subprocess.DEVNULL,
                # The same packages as here, wherever this process found them.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        finally:
            os.close(descriptor)
            theirs.close()
        self._owner = owner
        self._connection = ours
        self.send(wire.encoded(wire.Frame(0, 0, content)))
        self._thread = threading.Thread(target=self._listen, name="foldfeed-ring", daemon=True)
        self._thread.start()

    def send(self, frames: bytes) -> None:
        """Sends frames, one behind the other; one thread at a time."""
        # A child that is gone needs no message; the thread that hears it sees that and acts.
        with contextlib.suppress(OSError):
            self._connection.sendall(frames)

    def end(self) -> None:
        """Ends the child and waits for it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self.child.wait(END_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _listen(self) -> None:
        receiver = wire.Receiver(self._connection)
        try:
            while (frame := receiver.next()) is not None:
                if frame.kind == wire.FAILED:
                    # From the child that this process started, over a socket that nobody else has.
                    self._owner.failed(frame.number, pickle.loads(frame.payload))
                else:
                    self._owner.arrived(self._open(frame, receiver))
        except OSError:
            # The connection broke: the child is gone, as at the end of the connection.
            pass
        for descriptor in receiver.descriptors:
            os.close(descriptor)
        try:
            status = self.child.wait(END_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            status = self.child.wait()
        self._connection.close()
        self._owner.meters.process_ended(self.child.pid)
        self._owner.died(self, _how(status))

    def _open(self, frame: wire.Frame, receiver: wire.Receiver) -> Piece:
        note = PieceNote.unpack(frame.payload)
        self._owner.meters.heard(self.child.pid, note)
        memory, number, replaced = self._memory, note.start, None
        if frame.kind == wire.READY_ALONE:
            descriptor = receiver.descriptors.popleft()
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            os.close(descriptor)
            number = frame.number
        if self._owner.has_cache or frame.number == ASIDE:
            facts = json.loads(note.facts)
            self._owner.count(facts.get("counters", {}))
            replaced = facts.get("substitution")
        return Piece(
            note,
            memory,
            lambda: self._owner.give_back(self, number, note.size),
            None if replaced is None else Substitution(**replaced),
        )


def _how(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
