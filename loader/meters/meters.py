"""`Meters`: what every thread and process of a loader did with its time, and what went through their hands.

The threads that do the same part of the work are a *stage*. A thread of a stage is busy with something or
waits (for work, for memory, for what another stage makes), and a clock of its own is switched from one to the
other, so busy and waiting add up to the thread's life, however it went:

  ``plan``      the one thread of a reading process that plans samples; waits for orders, or for room
  ``fetch``     its threads that read; wait for planned samples
  ``prepare``   threads here that make features; wait for samples. Without reading processes they also plan
                and fetch, which is told apart by what they were busy with (``activities``)
  ``assemble``  the thread that puts steps together; waits for their samples
  ``train``     the consumer: busy outside of the loader, waiting inside of ``next()``

Reading processes send their numbers along with every piece (`notes`), so what is known of
them is what it was at their last one; it is looked at when somebody asks. Durations go into histograms of
fixed size. Everything outlives the threads that it is about: a loader that stops and goes on, goes on
counting.

Owns the counting; `meters.reports` owns the words and formats, `meters.trace` single
events. Knows no torch, so that reading processes can count. Thread safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from foldfeed.loader.errors import LoaderUseError
from foldfeed.loader.meters.histogram import LatencyHistogram
from foldfeed.loader.meters.trace import Tracer
from foldfeed.loader.notes import MISSING, PieceNote

PLAN, FETCH, PREPARE, ASSEMBLE, TRAIN, WAIT = "plan", "fetch", "prepare", "assemble", "train", "wait"
STAGES = (PLAN, FETCH, PREPARE, ASSEMBLE, TRAIN)
# What histograms are kept of.
LATENCIES = ("sample_read", "sample_prepare", "step_wait")
# Seconds since some moment, the same for all processes of this machine on Linux (CLOCK_MONOTONIC).
clock = time.perf_counter


@dataclasses.dataclass(slots=True)
class StageTime:
    """Where the time of a stage went.

    Attributes:
      num_workers: threads that work for it now.
      lifetime_s: of all its threads, those that have ended included.
      busy: by activity, seconds and how often.
      waiting_s: seconds.
    """

    num_workers: int = 0
    lifetime_s: float = 0.0
    busy: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    waiting_s: float = 0.0

    def add(self, other: StageTime) -> None:
        """Adds what other threads did."""
        self.num_workers += other.num_workers
        self.lifetime_s += other.lifetime_s
        self.waiting_s += other.waiting_s
        for name, (seconds, count) in other.busy.items():
            total = self.busy.setdefault(name, [0.0, 0])
            total[0] += seconds
            total[1] += count

    def report(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "num_workers": self.num_workers,
            "lifetime_s": self.lifetime_s,
            "busy_s": sum(seconds for seconds, _ in self.busy.values()),
            "waiting_s": self.waiting_s,
            "activities": {
                name: {"seconds": seconds, "count": int(count)}
                for name, (seconds, count) in self.busy.items()
            },
        }


class Worker:
    """The clock of one thread; it waits at first."""

    __slots__ = ("_activity", "_began", "_lock", "_marked", "_time")

    def __init__(self, now: float) -> None:
        self._began = self._marked = now
        self._activity = ""
        self._time = StageTime(num_workers=1)
        self._lock = threading.Lock()

    def mark(self, activity: str) -> float:
        """Gives the time since the last mark to what the thread did, and says what it does now.

        Args:
          activity: what it is busy with from now on; "" when it waits.
        Returns: now.
        """
        now = clock()
        with self._lock:
            _spend(self._time, self._activity, now - self._marked)
            self._activity, self._marked = activity, now
        return now

    def time(self) -> StageTime:
        """Returns where its time went up to now, as a copy."""
        with self._lock:
            now = clock()
            found = StageTime(lifetime_s=now - self._began)
            found.add(self._time)
            # What it is at counts as time and not yet as done.
            _spend(found, self._activity, now - self._marked, done=0)
        return found


def _spend(time: StageTime, activity: str, seconds: float, done: int = 1) -> None:
    if not activity:
        time.waiting_s += seconds
        return
    total = time.busy.setdefault(activity, [0.0, 0])
    total[0] += seconds
    total[1] += done


class Doing:
    """A context in which the calling thread is busy; made by `Stage.doing`."""

    __slots__ = ("_activity", "_facts", "_stage", "_worker", "seconds", "started")

    def __init__(self, stage: Stage, activity: str, facts: Mapping[str, int]) -> None:
        self._stage = stage
        self._activity = activity
        self._facts = facts
        self._worker = stage.worker()
        self.started = self.seconds = 0.0

    def __enter__(self) -> Doing:
        self.started = self._worker.mark(self._activity)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = self._worker.mark("") - self.started
        self._stage.meters.event(self._activity, self.started, self.seconds, self._facts)


class Stage:
    """The threads of one process that do one part of the work.

    Attributes:
      name: one of `STAGES`.
      meters: that it belongs to.
    """

    def __init__(self, name: str, meters: Meters) -> None:
        self.name = name
        self.meters = meters
        self._lock = threading.Lock()
        self._workers: dict[int, Worker] = {}
        self._ended = StageTime()

    def worker(self) -> Worker:
        """Returns the clock of the calling thread, which begins now if it was not here yet."""
        thread = threading.get_ident()
        found = self._workers.get(thread)
        if found is None:
            with self._lock:
                found = self._workers.setdefault(thread, Worker(clock()))
        return found

    def join(self) -> None:
        """Counts the calling thread from now on: for the beginning of a thread's life."""
        self.worker()

    def doing(self, activity: str, **facts: int) -> Doing:
        """Returns a context in which the calling thread is busy.

        Args:
          activity: with what.
          facts: numbers for the trace.
        """
        return Doing(self, activity, facts)

    def leave(self) -> None:
        """Ends the clocks of all its threads; they may come again."""
        # In one go, so that nobody who asks meanwhile misses or counts them twice.
        with self._lock:
            workers, self._workers = self._workers, {}
            for worker in workers.values():
                time = worker.time()
                time.num_workers = 0
                self._ended.add(time)

    def time(self) -> StageTime:
        """Returns where the time of all its threads went."""
        with self._lock:
            workers = list(self._workers.values())
            found = StageTime()
            found.add(self._ended)
        for worker in workers:
            found.add(worker.time())
        return found


class Meters:
    """All meters of a loader, or of one reading process."""

    def __init__(self) -> None:
        self.tracer: Tracer | None = None
        self._lock = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._histograms = {name: LatencyHistogram() for name in LATENCIES}
        # What reading processes that live said last: (when, facts of a note); and those that ended, by stage.
        self._processes: dict[int, tuple[float, bytes]] = {}
        self._ended: dict[str, StageTime] = {}

    def stage(self, name: str) -> Stage:
        """Returns a stage of this process."""
        with self._lock:
            found = self._stages.get(name)
            if found is None:
                found = self._stages[name] = Stage(name, self)
            return found

    def count(self, **amounts: int) -> None:
        """Adds to counters, see `report`."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def took(self, latency: str, seconds: float, times: int = 1) -> None:
        """Adds a duration to one of `LATENCIES`, so many times."""
        with self._lock:
            self._histograms[latency].add(seconds, times)

    def read(self, seconds: float, sizes: Mapping[str, int]) -> None:
        """Counts a sample that was read.

        Args:
          seconds: that planning and reading took.
          sizes: of `reading.fetch.Fetched`.
        """
        with self._lock:
            self._histograms["sample_read"].add(seconds)
            self._counts["samples_read"] += 1
            for name in _SIZES:
                self._counts[name] += sizes[name]

    def event(self, name: str, started: float, seconds: float, facts: Mapping[str, int]) -> None:
        """Gives an event of the calling thread to the trace, if one is written."""
        if (tracer := self.tracer) is not None:
            tracer.event(name, started, seconds, facts)

    def begin_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes events to a file from now on, see `Tracer`.

        Raises:
          LoaderUseError: a trace is written already.
          OSError: the file cannot be written.
        """
        if self.tracer is not None:
            raise LoaderUseError(
                f"a trace is written to {self.tracer.path} already; end that one before another begins"
            )
        self.tracer = Tracer(path)

    def end_trace(self) -> None:
        """Completes the file, if there is one."""
        tracer, self.tracer = self.tracer, None
        if tracer is not None:
            tracer.close()

    @contextlib.contextmanager
    def tracing(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Writes events while the context lasts; errors as for `begin_trace`."""
        self.begin_trace(path)
        try:
            yield
        finally:
            self.end_trace()

    def times(self) -> dict[str, Any]:
        """Returns where the time of this process went, for `heard` in another one."""
        with self._lock:
            stages = list(self._stages.values())
        return {stage.name: dataclasses.asdict(stage.time()) for stage in stages}

    def heard(self, process: int, note: PieceNote) -> None:
        """Takes what a reading process says beside a piece.

        Args:
          process: its id.
          note: with ``times`` of `times`, and ``spans`` of [activity, thread, start, seconds, sample].
        """
        with self._lock:
            sample_read = self._histograms["sample_read"]
            for number, seconds in zip(note.numbers, note.read_s, strict=True):
                if number != MISSING:
                    sample_read.add(seconds)
                    self._counts["samples_read"] += 1
            for name, size in zip(_SIZES, note.sizes, strict=True):
                self._counts[name] += size
            # Threads of a process may overtake each other on the way here.
            if process not in self._processes or self._processes[process][0] < note.now:
                self._processes[process] = (note.now, note.facts)
        if (tracer := self.tracer) is not None:
            for name, thread, started, seconds, sample in json.loads(note.facts)["spans"]:
                tracer.event(name, started, seconds, {"sample": sample}, process, thread)

    def process_ended(self, process: int) -> None:
        """Keeps what a reading process said last."""
        with self._lock:
            if process not in self._processes:
                return
            for name, time in _times_in(self._processes.pop(process)[1]).items():
                time.num_workers = 0
                self._ended.setdefault(name, StageTime()).add(time)

    def leave(self) -> None:
        """Ends the clocks of all threads of this process: its loader has stopped."""
        with self._lock:
            stages = list(self._stages.values())
        for stage in stages:
            stage.leave()

    def report(self) -> dict[str, Any]:
        """Returns plain data, JSON-able.

        ``steps`` and ``samples`` received; ``samples_read`` and, of their alignments, ``stored_bytes``,
        ``decoded_bytes`` and ``used_bytes`` (`reading.fetch.Fetched`), samples read ahead
        included; ``reading_processes`` now; ``stages``, see `StageTime.report`; ``latencies``, see
        `LatencyHistogram.summary`.
        """
        with self._lock:
            stages = list(self._stages.values())
            together: dict[str, StageTime] = {}
            for times in (self._ended, *(_times_in(facts) for _, facts in self._processes.values())):
                for name, time in times.items():
                    together.setdefault(name, StageTime()).add(time)
            counts = dict(self._counts)
            latencies = {name: histogram.summary() for name, histogram in self._histograms.items()}
            num_processes = len(self._processes)
        for stage in stages:
            together.setdefault(stage.name, StageTime()).add(stage.time())
        return {
            **counts,
            "reading_processes": num_processes,
            "stages": {name: together[name].report() for name in STAGES if name in together},
            "latencies": latencies,
        }


def _times_in(facts: bytes) -> dict[str, StageTime]:
    return {name: StageTime(**values) for name, values in json.loads(facts)["times"].items()}


_SIZES = ("stored_bytes", "decoded_bytes", "used_bytes")
_COUNTS = ("steps", "samples", "samples_read", *_SIZES)
