"""Where a loader's samples come from: read in its own threads, or in processes of their own.

`OwnThreads` reads where it is asked. `ReadingProcesses` keeps one or more processes (`reading.process`)
that read ahead, in the order asked for, into shared memory; a sample is a view of that memory until it is
released. The interpreter of the training process then takes part in a sample with one small message.

Invariants: `get` gives the sample that was asked for or raises; it never hangs: a process that died is
started again and reads what it owed, and after `MAX_DEATHS` deaths without a sample between them the error
says so. Shared memory has no name, so nothing can be left behind, and every process ends with this one.

Thread safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.errors import LoaderConfigError, ReadingProcessError, SampleError
from foldfeed.loader.meters.meters import FETCH, PLAN, PREPARE, Meters, clock
from foldfeed.loader.reading import wire
from foldfeed.loader.reading.cached_reader import CachedReader
from foldfeed.loader.reading.fetch import SampleArrays
from foldfeed.loader.reading.process import ALONE, ASIDE
from foldfeed.loader.reading.reader import SampleRead, SampleReader
from foldfeed.loader.reading.slots import open_note
from foldfeed.loader.unreadable import Substitution

MAX_DEATHS = 3
# A process that was told to end gets this long before it is killed.
END_S = 5.0
# Socket, memory, bytes, threads and this process's id follow.
_PROGRAM = ("-m", "foldfeed.loader.reading.process")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadSample:
    """A sample that was read.

    Attributes:
      arrays: what was read; views of shared memory, valid until `release`.
      read_s: seconds that planning and reading took.
      release: gives the memory back; to be called once.
      substitution: which record took the place of which, None where none did.
    """

    arrays: SampleArrays
    read_s: float
    release: Callable[[], None]
    substitution: Substitution | None = None


class SampleSupply(Protocol):
    """What a loader needs of a source of samples."""

    def ask(self, samples: Sequence[int]) -> None:
        """Says which samples will be taken next, in that order."""
        ...

    def get(self, sample: int) -> ReadSample:
        """Returns a sample that was asked for; waits for it.

        Raises:
          SampleError: it could not be read.
          ReadingProcessError: no process can read it.
        """
        ...

    def queued(self) -> dict[str, int]:
        """Returns how many samples wait where, by a name for people."""
        ...

    def counters(self) -> dict[str, float]:
        """Returns what the cache counted so far; nothing without one."""
        ...

    def close(self) -> None:
        """Ends everything that was started. Idempotent."""
        ...


class OwnThreads:
    """Reads a sample in the thread that asks for it."""

    def __init__(self, reader: SampleReader | CachedReader, meters: Meters) -> None:
        self._reader = reader
        self._meters = meters

    def ask(self, samples: Sequence[int]) -> None:
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
    """Some processes that take turns: the n-th sample asked for goes to process n modulo their number."""

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
        self._processes = [_Process(content, num_threads, share, meters) for _ in range(num_processes)]
        self._owner: dict[int, _Process] = {}
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that run now."""
        return [process.pid for process in self._processes]

    def ask(self, samples: Sequence[int]) -> None:
        """Says which samples will be taken next, in that order."""
        with self._lock:
            shares: list[list[int]] = [[] for _ in self._processes]
            for sample in samples:
                process = self._turn % len(self._processes)
                self._turn += 1
                self._owner[sample] = self._processes[process]
                shares[process].append(sample)
        for process_, share in zip(self._processes, shares, strict=True):
            if share:
                process_.ask(share)

    def get(self, sample: int) -> ReadSample:
        """Returns a sample that was asked for; waits for it."""
        with self._lock:
            process = self._owner.pop(sample)
        return process.get(sample)

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


class _Process:
    """One process and what it owes; started again when it dies."""

    def __init__(self, content: bytes, num_threads: int, capacity: int, meters: Meters) -> None:
        self.meters = meters
        self._content = content
        self._num_threads = num_threads
        self._capacity = capacity
        self._lock = threading.Lock()
        # What was asked for and not taken, in order.
        self._owed: dict[int, Future[ReadSample]] = {}
        self._num_deaths = 0
        # Of its cache; of all its lives.
        self._counters: Counter[str] = Counter()
        self._closed = False
        # Held, because a child that dies at once is heard before its life has its place here.
        with self._lock:
            self._life = _Life(self, content, num_threads, capacity)

    @property
    def pid(self) -> int:
        return self._life.child.pid

    def ask(self, samples: Sequence[int]) -> None:
        with self._lock:
            for sample in samples:
                self._owed[sample] = Future()
            life = self._life
        life.ask(samples)

    def get(self, sample: int) -> ReadSample:
        with self._lock:
            future = self._owed[sample]
        try:
            return future.result()
        finally:
            with self._lock:
                self._owed.pop(sample, None)

    def queued(self) -> tuple[int, int]:
        with self._lock:
            return len(self._owed), sum(future.done() for future in self._owed.values())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            owed = list(self._owed.values())
        self._life.end()
        for future in owed:
            if not future.done():
                future.set_exception(ReadingProcessError(self.pid, "the loader was closed"))

    def count(self, fresh: Mapping[str, float]) -> None:
        """Takes what the cache of the process counted since the last sample."""
        with self._lock:
            self._counters.update(fresh)

    def counted(self) -> Counter[str]:
        """Returns what the caches of all its lives counted."""
        with self._lock:
            return Counter(self._counters)

    def arrived(self, sample: int, found: ReadSample | Exception) -> None:
        """Takes what a life has read; called by its thread."""
        with self._lock:
            self._num_deaths = 0
            future = self._owed.get(sample)
        if future is None or future.done():
            if isinstance(found, ReadSample):
                found.release()
        elif isinstance(found, ReadSample):
            future.set_result(found)
        else:
            future.set_exception(found)

    def died(self, life: _Life, how: str) -> None:
        """Starts the process again, or gives up; called by the thread of the life that ended."""
        with self._lock:
            if self._closed or life is not self._life:
                return
            self._num_deaths += 1
            owed = [sample for sample, future in self._owed.items() if not future.done()]
            if self._num_deaths < MAX_DEATHS:
                self._life = _Life(self, self._content, self._num_threads, self._capacity)
                fresh = self._life
            else:
                fresh = None
        if fresh is not None:
            fresh.ask(owed)
            return
        error = ReadingProcessError(
            life.child.pid, f"it {how}, for the {self._num_deaths}th time without a sample between"
        )
        for sample in owed:
            self._owed[sample].set_exception(error)


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
        self._sending = threading.Lock()
        self._send(wire.Frame(0, 0, content))
        self._thread = threading.Thread(target=self._listen, name="foldfeed-ring", daemon=True)
        self._thread.start()

    def ask(self, samples: Sequence[int]) -> None:
        self._send(wire.Frame(wire.READ, 0, np.array(samples, dtype="<i8").tobytes()))

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
                self._owner.arrived(frame.number, self._open(frame, receiver))
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

    def _open(self, frame: wire.Frame, receiver: wire.Receiver) -> ReadSample | Exception:
        if frame.kind == wire.FAILED:
            # From the child that this process started, over a socket that nobody else has.
            error: Exception = pickle.loads(frame.payload)
            return error
        memory = self._memory
        if frame.kind == wire.READY_ALONE:
            descriptor = receiver.descriptors.popleft()
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            os.close(descriptor)
        arrays, note = open_note(frame.payload, memory)
        self._owner.meters.heard(self.child.pid, note)
        self._owner.count(note["counters"])
        slot = note["start"] if frame.kind == wire.READY else ALONE
        replaced = note.get("substitution")
        if replaced is not None:
            slot = ASIDE
        return ReadSample(
            arrays=arrays,
            read_s=note["read_s"],
            release=lambda: self._send(wire.Frame(wire.RELEASE, slot, b"")),
            substitution=None if replaced is None else Substitution(**replaced),
        )

    def _send(self, frame: wire.Frame) -> None:
        # A child that is gone needs no message; the thread that hears it sees that and acts.
        with self._sending, contextlib.suppress(OSError):
            wire.send(self._connection, frame)


def _how(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
