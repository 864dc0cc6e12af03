"""Watching a run: which rank holds the others up, and where every rank stands when nothing moves.

*Stragglers*: at every commit point each rank says how long it waited for data and how long it computed. Over
a window of steps, a rank that takes much longer than the median of the others is named, with its phase.

*Stacks*: a thread of each rank appends the stacks of all its threads to OUTPUT/stacks.txt when no step began
for most of the collectives' timeout (before they fail and the processes end), or on SIGUSR1. It does not need
the main thread, which may be stuck in a collective: the signal arrives through a pipe.

*Skipped steps*: why one was skipped, and whose samples or parameters are not finite.

Does not own: the decision to end a run that hangs; the collectives' timeout makes it.
"""

from __future__ import annotations

import datetime
import os
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.training.commit import Commit, ShardResult

STACKS_FILE = "stacks.txt"
# Of the timeout: late enough not to cry wolf, early enough for a slow disk.
DUMP_SHARE = 0.8

WINDOW_STEPS = 20
# A straggler takes this many times as long as the median of the others ...
SLOW_RATIO = 1.5
# ... and the difference is at least this share of a step, or nobody would notice.
SLOW_SHARE = 0.05
PHASES = ("waits for data", "computes")


class Stragglers:
    """Names the rank that holds the others up. All ranks may feed it the same numbers; it says the same."""

    def __init__(self, num_shards: Sequence[int], window_steps: int = WINDOW_STEPS) -> None:
        """Starts an empty window.

        Args:
          num_shards: virtual shards of each rank; who has more of them may compute for longer.
          window_steps: how many steps make up a judgement.
        """
        self._num_shards = list(num_shards)
        self._window_steps = window_steps
        # Of the window: seconds of each rank in each phase, and of the whole step.
        self._steps: list[tuple[tuple[Sequence[float], Sequence[float]], float]] = []
        self._named: tuple[int, int] | None = None

    def feed(self, data_s: Sequence[float], compute_s: Sequence[float], step_s: float) -> str:
        """Takes one step; returns a line when a window ends with a straggler that was not named before.

        Args:
          data_s: seconds each rank waited for its batch.
          compute_s: seconds each rank ran forward and backward.
          step_s: of the whole step.
        """
        if len(self._num_shards) < 2:
            return ""
        self._steps.append(((data_s, compute_s), step_s))
        if len(self._steps) < self._window_steps:
            return ""
        found = self._judge()
        line = ""
        if found is not None and found[:2] != self._named:
            phase, rank, mine, others = found
            ratio = f"{mine / others:.1f} times as long as" if others > 1e-3 * mine else "unlike"
            line = (
                f"straggler: rank {rank} {PHASES[phase]} {ratio} the others "
                f"({mine:.3f} s a step against {others:.3f} s, over {self._window_steps} steps)"
            )
        self._named = None if found is None else found[:2]
        self._steps = []
        return line

    def _judge(self) -> tuple[int, int, float, float] | None:
        """Returns (phase, rank, its seconds, the others' median for as much work) of the worst one."""
        worst: tuple[int, int, float, float] | None = None
        step_s = statistics.fmean(step_s for _, step_s in self._steps)
        # Waiting does not depend on how many virtual shards there are.
        for phase, work in enumerate(([1] * len(self._num_shards), self._num_shards)):
            by_rank = zip(*(phases[phase] for phases, _ in self._steps), strict=True)
            rates = [statistics.fmean(found) / units for found, units in zip(by_rank, work, strict=True)]
            rank = max(range(len(rates)), key=rates.__getitem__)
            others = statistics.median(rates[:rank] + rates[rank + 1 :])
            excess_s = (rates[rank] - others) * work[rank]
            if rates[rank] < SLOW_RATIO * others or excess_s < SLOW_SHARE * step_s:
                continue
            if worst is None or excess_s > worst[2] - worst[3]:
                worst = (phase, rank, rates[rank] * work[rank], others * work[rank])
        return worst


def explain_skip(
    commit: Commit, results: Mapping[int, ShardResult], ranks: Ranks, not_finite: Callable[[], list[str]]
) -> str:
    """Returns why a step was skipped, and who brought what was not finite. A collective.

    Args:
      commit: of the step.
      results: of this rank's virtual shards.
      ranks: that trained.
      not_finite: returns this rank's own gradients that are not, one phrase each.
    """
    if commit.num_samples == 0:
        return "no sample of it counts for the loss"
    samples = [
        sample
        for _, result in sorted(results.items())
        for sample, finite in zip(result.samples, result.finite.tolist(), strict=True)
        if not finite
    ]
    found = ranks.gather_json([samples, not_finite()], "the search for what is not finite")
    if commit.bad_shards:
        why = f"the loss of virtual shards {commit.bad_shards} is not finite"
        who = [f"rank {rank}: samples {numbers}" for rank, (numbers, _) in enumerate(found) if numbers]
    else:
        why = "the gradient is not finite although every loss is"
        who = [f"rank {rank}: {text}" for rank, (_, texts) in enumerate(found) for text in texts]
    return why + (f" ({'; '.join(who)})" if who else "")


class StackWatch:
    """Writes this rank's stacks when it is asked to, or when nothing moves. Use from the main thread."""

    def __init__(
        self, folder: Path, rank: int, world: int, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        """Keeps the settings; `start` begins to watch.

        Args:
          folder: of the run; all ranks append to one file there.
          rank: of this process.
          world: number of ranks; a single one has nobody to wait for, and only answers the signal.
          timeout_s: of the collectives.
          say: prints a line on the first rank.
        """
        self.path = folder / STACKS_FILE
        self._who = f"rank {rank} of {world}"
        self._silence_s = DUMP_SHARE * timeout_s if world > 1 else None
        self._timeout_s = timeout_s
        self._say = say
        self._beat = time.monotonic()
        self._step = 0
        self._dumped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread and takes SIGUSR1."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # The interpreter writes a signal's number to the pipe at once, whatever the main thread is doing; the
        # handler itself only keeps SIGUSR1 from ending the process.
        self._handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="foldfeed-watch", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """Notes that step number ``step`` begins."""
        self._step = step
        self._beat = time.monotonic()
        self._dumped = False

    def stop(self) -> None:
        """Ends the thread and gives the signal back."""
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGUSR1, self._handler)
        os.write(self._write, b"\0")
        self._thread.join()
        self._thread = None
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        while True:
            left_s = None
            if self._silence_s is not None:
                left_s = max(0.0, self._beat + self._silence_s - time.monotonic())
                if self._dumped:
                    left_s = self._silence_s
            ready, _, _ = select.select([self._read], [], [], left_s)
            numbers = os.read(self._read, 512) if ready else b""
            if 0 in numbers:
                return
            if signal.SIGUSR1 in numbers:
                self._dump("SIGUSR1")
            silent_s = time.monotonic() - self._beat
            if self._silence_s is not None and silent_s >= self._silence_s and not self._dumped:
                self._dumped = True
                why = f"step {self._step} began {silent_s:.0f} s ago and has not ended"
                self._say(
                    f"{why} (a collective fails after {self._timeout_s:.0f} s): where each rank stands is in "
                    f"{self.path}; a rank that is missing there is stopped or gone"
                )
                self._dump(why)

    def _dump(self, why: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        head = f"==== {self._who}, process {os.getpid()} on {socket.gethostname()}, {now}: {why}\n"
        # One write keeps the ranks' texts apart.
        text = (head + _stacks() + "\n").encode(errors="backslashreplace")
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(text)
        except OSError as error:
            # The watch goes on: the next signal may find the folder again.
            self._say(f"the stacks cannot be written to {self.path}: {error}")


def _stacks() -> str:
    """Returns the stack of every thread, innermost call first; the main thread, which runs the steps, leads.

    faulthandler would stop after a hundred threads and leave out the oldest, of which the main one is first.
    Source lines are not looked up: the file system may be what hangs.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    frames = sys._current_frames()
    for ident in sorted(frames, key=lambda ident: ident != threading.main_thread().ident):
        lines.append(f"Thread {names.get(ident, 'not of Python')} ({ident:#x}):")
        frame: FrameType | None = frames[ident]
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_qualname}')
            frame = frame.f_back
    return "".join(line + "\n" for line in lines)
