"""The goodput ledger: where every second of a run went, over all its restarts.

    OUTPUT/goodput.jsonl    one line per start, step and end, with the seconds since the line before
    python -m foldfeed.trainer.goodput OUTPUT

The first rank appends a line per step, so after a SIGKILL all is known but the step that was cut. What was
done after the snapshot that the next start went back to becomes *wasted* when the ledger is read. Time runs
from the start of the first process to the last line; one clock per process (monotonic, set once to the time
of day) divides it without gaps, and the time between two processes is a part of its own. So the parts sum to
the wall time, whatever happened.

Names are those of ml-goodput-measurement where it has one. Does not own: what is measured (loop.py).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click

from foldfeed.trainer.errors import TrainerError
from foldfeed.trainer.exit_code import exit_code
from foldfeed.trainer.processes import START_TICKS, stat_of

GOODPUT_FILE = "goodput.jsonl"


class Part(enum.StrEnum):
    """Where time goes: a name in the ledger, and what it means.

    Attributes:
      meaning: for people.
    """

    meaning: str
    PRODUCTIVE = "productive_step", "steps that the weights keep"
    SKIPPED = "skipped_step", "steps that changed nothing, because a gradient was not finite"
    DATA = "data_loading_sync", "waiting for batches"
    SAVE = "unproductive_checkpoint_save_time", "the loop held up by snapshots"
    RESTORE = "unproductive_checkpoint_restore_time", "reading and checking snapshots"
    STARTUP = "program_startup", "from the start of the process to this package: interpreter, imports"
    INITIALIZATION = "accelerator_initialization", "device, process groups"
    PREPARATION = "training_prep", "store, model, the run's folder"
    WASTED = "wasted_progress_from_disruption", "steps done again after a failure"
    RECOVERY = (
        "infrastructure_recovery_from_disruption",
        "from the last step before a failure to the next start",
    )
    EVALUATION = "evaluation", "looking at held-out records"
    DETECTION = "failure_detection", "ranks that were gone or stopped, until it was noticed (elastic runs)"
    REFORM = "membership_reform", "agreeing on who goes on, and connecting (elastic runs)"
    TRANSFER = "state_transfer", "bringing ranks that are new or behind to the others' step (elastic runs)"
    IDLE = "idle", "between a stop that was asked for and the next start"
    OTHER = "other", "the rest: metrics, the result"

    def __new__(cls, name: str, meaning: str) -> Part:
        """Returns the name, which its meaning hangs on."""
        part = str.__new__(cls, name)
        part._value_, part.meaning = name, meaning
        return part


# What a line of an event must have besides its time, and its parts.
NUMBERS = {"start": ("began", "step"), "regroup": ("began", "step", "generation"), "step": ("step",)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A ledger summed up.

    Attributes:
      parts: seconds by name, all of `Part`.
      wall_s: from the first process's start to the last line.
      starts: how often the run was started.
      failures: how many starts ended neither done nor by request, the present one left out.
      regroups: how often the ranks changed while they ran.
      shards_kept: virtual shards of steps that were broken off then, of which somebody had the gradient.
      shards_again: those that were computed after it.
    """

    parts: Mapping[str, float]
    wall_s: float
    starts: int
    failures: int
    regroups: int = 0
    shards_kept: int = 0
    shards_again: int = 0

    @property
    def goodput(self) -> float:
        """Share of the wall time that the weights keep, 0 to 1."""
        return self.parts[Part.PRODUCTIVE] / self.wall_s if self.wall_s else 0.0

    def lines(self) -> list[str]:
        """Returns the table that a run prints at its end."""
        times = "once" if self.starts == 1 else f"{self.starts} times"
        table = [
            f"goodput: {100 * self.goodput:.1f} % of {self.wall_s:.1f} s (started {times}, "
            f"{self.failures} failures" + (f", {self.regroups} changes of ranks)" if self.regroups else ")")
        ]
        for part in sorted(Part, key=lambda part: -self.parts[part]):
            if (seconds := self.parts[part]) >= 0.05:
                share = 100 * seconds / self.wall_s
                table.append(f"  {part:<40}{seconds:>10.1f} s {share:>5.1f} %  {part.meaning}")
        return [*table, self.shards_line()] if self.shards_kept + self.shards_again else table

    def shards_line(self) -> str:
        """Returns what became of steps that lost a rank."""
        return f"virtual shards of broken steps: {self.shards_kept} kept, {self.shards_again} computed again"


def account(path: Path) -> Account:
    """Sums a ledger up.

    Raises:
      TrainerError: there is none, or it is damaged before its last line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TrainerError(f"no ledger at {path} ({error.strerror}); give the --output of a run.") from error
    return _sum_up(_whole_lines(path, raw))


def _whole_lines(path: Path, raw: bytes, first: int = 1) -> list[dict[str, Any]]:
    """Returns the lines of a ledger, from its ``first`` on; a torn last line was cut by a kill."""
    found = []
    for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), first):
        try:
            entry = json.loads(line)
            _require_sound(entry, begins=number == 1)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrainerError(
                f"{path}, line {number} is damaged ({error!r}). Move the file away: the run goes on, and "
                "accounts from then on."
            ) from error
        found.append(entry)
    return found


def _require_sound(entry: Mapping[str, Any], *, begins: bool) -> None:
    event, parts = entry["event"], entry["parts"]
    needed = ["time", *NUMBERS.get(event, ()), *(["began"] if begins else [])]
    for number in (*(entry[name] for name in needed), *parts.values()):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{number!r} is no number")
    if unknown := parts.keys() - set(map(str, Part)):
        raise ValueError(f"{min(unknown)} is no part")
    if event == "end":
        entry["reason"]


def _sum_up(entries: Sequence[Mapping[str, Any]]) -> Account:
    parts = dict.fromkeys(map(str, Part), 0.0)
    steps: list[Mapping[str, Any]] = []
    last: Mapping[str, Any] | None = None
    starts = failures = regroups = shards_kept = shards_again = 0
    for entry in entries:
        # The first one is the beginning.
        regroups += entry["event"] == "regroup" and entry["generation"] > 1
        shards_kept += entry.get("shards_kept", 0)
        shards_again += entry.get("shards_again", 0)
        if entry["event"] in ("start", "regroup"):
            asked_for = last is not None and last["event"] == "end" and last["reason"] != "failed"
            if last is not None:
                parts[Part.IDLE if asked_for else Part.RECOVERY] += entry["began"] - last["time"]
            if entry["event"] == "start":
                starts += 1
                failures += last is not None and not asked_for
            # What was done after the snapshot that this start went back to is done again.
            lost = [done for done in steps if done["step"] > entry["step"]]
            steps = [done for done in steps if done["step"] <= entry["step"]]
            for done in lost:
                for name, seconds in done["parts"].items():
                    parts[name] -= seconds
                    parts[Part.WASTED] += seconds
        if entry["event"] == "step":
            steps.append(entry)
        for name, seconds in entry["parts"].items():
            parts[name] += seconds
        last = entry
    wall_s = last["time"] - entries[0]["began"] if last is not None else 0.0
    counts = {"starts": starts, "failures": failures, "regroups": regroups}
    return Account(parts=parts, wall_s=wall_s, **counts, shards_kept=shards_kept, shards_again=shards_again)


def process_start() -> float:
    """Returns when this process started, in seconds of the time of day; now, where /proc does not say."""
    uptime = Path("/proc/uptime")
    if not uptime.exists():
        return time.time()
    started_s = int(stat_of("self")[START_TICKS]) / os.sysconf("SC_CLK_TCK")
    return time.time() - float(uptime.read_text().split()[0]) + started_s


class Ledger:
    """Times one process; the first rank's also writes.

    Between two calls of `mark` every second belongs to the second call's name. Invariant: what is counted and
    not written yet is the time from the last line (or the start of the process) to the last mark, and the
    time of a line is never before that of the line above it, whichever process wrote that one.

    Attributes:
      active: whether this rank begins the run, and so writes at first.
    """

    def __init__(self, folder: Path, *, active: bool, began: float | None = None) -> None:
        """Starts to count; nothing is written before `start`.

        Args:
          folder: of the run.
          active: see the class.
          began: when the process started; now when None.
        """
        self.path = folder / GOODPUT_FILE
        self.active = active
        self._clock = time.time() - time.monotonic()
        self._marked = self._now() if began is None else began
        # Where the next line begins: when the last one was written, or would have been by the first rank.
        self._written = self._marked
        self._parts: dict[str, float] = {}
        self._file: BinaryIO | None = None

    def _now(self) -> float:
        return self._clock + time.monotonic()

    def mark(self, name: str) -> None:
        """Gives the time since the last mark to ``name``."""
        now = self._now()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._marked
        self._marked = now

    def move(self, source: str, target: str, seconds: float) -> None:
        """Moves some of what was marked since the last line from one name to another."""
        seconds = min(seconds, self._parts.get(source, 0.0))
        self._parts[source] = self._parts.get(source, 0.0) - seconds
        self._parts[target] = self._parts.get(target, 0.0) + seconds

    def start(self, step: int, world: int) -> None:
        """Opens the ledger of the run, after its folder was claimed. First rank only.

        Args:
          step: completed steps that the snapshot gave.
          world: number of ranks.
        """
        raw = self._read()
        _whole_lines(self.path, raw)
        self._open(raw)
        self._write("start", began=self._written, step=step, world=world)

    def regroup(self, first: bool, **values: Any) -> None:
        """Notes that the ranks of an elastic run changed, after the times for it were marked.

        Args:
          first: whether this rank writes from now on. The file is made anew by a new first rank, so that a
            former one that wakes up writes into one without a name.
          values: of the line: step, world, generation, why, and the budget of the recovery.
        """
        if not first:
            self.follow()
        elif self._file is None:
            self._open(self._read())
        self._write("regroup", began=self._written, **values)

    def follow(self) -> None:
        """Leaves the file to another rank; this one counts on."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _open(self, raw: bytes) -> None:
        """Opens a copy of the ledger without a torn last line, and goes on from its last one."""
        self.follow()
        stop = raw.rfind(b"\n") + 1
        if stop:
            begin = raw.rfind(b"\n", 0, stop - 1) + 1
            (last,) = _whole_lines(self.path, raw[begin:stop], 1 + raw.count(b"\n", 0, begin))
            self._begin_after(last["time"])
        temporary = self.path.with_suffix(".tmp")
        self._file = temporary.open("wb")
        self._file.write(raw[:stop])
        self._file.flush()
        temporary.replace(self.path)

    def _begin_after(self, last: float) -> None:
        """Takes what the ledger has counted up to ``last`` out of ours: no second counts twice."""
        for name, seconds in self._parts.items():
            taken = min(seconds, max(0.0, last - self._written))
            self._parts[name] -= taken
            self._written += taken
        # All was taken and it was not enough: the clock of whoever wrote it is ahead of ours, or ours was
        # set back. Ours follows it, since only differences matter.
        if (behind := last - self._written) > 0:
            self._clock += behind
            self._marked += behind
            self._written += behind

    def step(self, step: int) -> None:
        """Writes what went by up to the end of a step, ``step`` completed ones."""
        self._write("step", step=step)

    def end(self, reason: str) -> Account | None:
        """Writes the last line; returns the run's account where it is kept.

        Args:
          reason: ``finished``, ``stopped`` or ``failed``.
        """
        if self._file is None:
            return None
        # What a run that failed did last was to wait for somebody who was gone.
        self.mark(Part.RECOVERY if reason == "failed" else Part.OTHER)
        self._write("end", reason=reason)
        self.follow()
        return account(self.path)

    def _write(self, event: str, **values: Any) -> None:
        parts, self._parts = self._parts, {}
        self._written = self._marked
        if self._file is None:
            return
        line = {"event": event, "time": self._marked, **values, "parts": parts}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("output", type=click.Path(path_type=Path))
def command(output: Path) -> None:
    """Print where the time of the run in OUTPUT went; it may still be running."""
    for line in account(output / GOODPUT_FILE).lines():
        click.echo(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code(command, "foldfeed.trainer.goodput", arguments)


if __name__ == "__main__":
    sys.exit(main())
