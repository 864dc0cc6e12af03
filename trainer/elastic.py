"""``python -m foldfeed.trainer.elastic``: a run whose ranks may come and go.

    python -m foldfeed.trainer.elastic --ranks 4 --respawn 8 -- --store URL --output runs/a --steps 1000
    python -m foldfeed.trainer.elastic --ranks 4 --join --host 10.0.0.2 -- (the same)      on further machines

Each rank is a process of its own and fails alone: the others go on with what they have in memory. A dead one
is started again as a new rank, so many times. Ranks need neither this process nor each other to go on, only
the folder; that is why more of them can join from anywhere, and why the launcher itself may die.

    torchrun --nproc-per-node 2 --max-restarts 9 -m foldfeed.trainer.elastic --wait-for 4 --host HOST -- ...

A torchrun on each machine (none of them knows of the others) in place of this launcher makes the machine what
fails: torchrun ends and restarts all ranks of a machine when one dies, the ranks of other machines go on.

Does not own: what a rank does (members/rank.py). Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NoReturn

import click

from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.exit_code import exit_code
from foldfeed.trainer.options import options_of
from foldfeed.trainer.output import outlive_readers

VARIABLE = "FOLDFEED_ELASTIC"
POLL_S = 0.05
# For ranks that are not needed any more, after the run finished.
LEAVE_S = 30.0
NOT_BEGUN = (
    "the run did not begin, because its first rank failed (its error is above); the others that were to join "
    "it are ended. Ranks are added to a run that lives in --output with --join"
)
NONE_LEFT = (
    "all ranks of this launcher were killed, and none is replaced (any more); the same command goes on from "
    "the last snapshot, or with --join beside ranks that live elsewhere"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a rank begins.

    Attributes:
      founds: it begins the run; the others join it.
      refounds: it replaces a dead rank; when all are gone that it would join, it begins the run again, from
        its last snapshot.
      launch: of the launcher that begins the run: its ranks join a run that one of them began, no other. "":
        any.
      begun: descriptor of a file that a rank which begins the run writes to, for its launcher; -1 for none.
      standby: descriptor of a socket to its launcher: it builds everything, says so there, and waits until it
        is told that it is needed; it ends where the launcher is gone. -1 for a rank that is needed at once.
      ranks: to wait for at the beginning.
      max_ranks: ranks that train at once; more wait as spares. 0: all shards.
      host: address of this machine for the others.
      local_rank: number of its device.
      torchrun: one on each machine starts the ranks: whoever comes first begins the run, and SIGTERM asks the
        ranks of that machine to leave it; those of the last one stop it.
      silent_s: without a sign of life a rank counts as lost.
      wait_s: for ranks at the beginning, and for a run.
    """

    founds: bool = True
    refounds: bool = False
    launch: str = ""
    begun: int = -1
    standby: int = -1
    ranks: int
    max_ranks: int = 0
    host: str = "127.0.0.1"
    local_rank: int = 0
    torchrun: bool = False
    silent_s: float = 2.0
    wait_s: float = 60.0

    @property
    def may_found(self) -> bool:
        """Whether it begins the run where there is none, or none of its ranks is left."""
        return self.refounds or self.torchrun

    @property
    def begins(self) -> bool:
        """Whether the others wait for it where there is no run."""
        return self.founds or self.refounds

    @property
    def is_start(self) -> bool:
        """Whether it is one of the first ranks, which are worth waiting for."""
        return self.founds or (self.torchrun and not self.refounds)

    def __post_init__(self) -> None:
        for name in ("ranks", "silent_s", "wait_s"):
            if not getattr(self, name) > 0:
                raise TrainerConfigError(f"{name} is {getattr(self, name)}; it must be positive.")
        if self.max_ranks and self.max_ranks < self.ranks:
            raise TrainerConfigError(
                f"max_ranks is {self.max_ranks}, but the run begins with {self.ranks}; raise --max-ranks."
            )

    @classmethod
    def from_environment(cls) -> Plan | None:
        """Returns the plan that the launcher left; None outside an elastic run."""
        text = os.environ.get(VARIABLE)
        return None if text is None else cls(**json.loads(text))


class Launcher:
    """The ranks of one machine.

    Attributes:
      processes: by slot; a rank that takes a dead one's place has a slot of its own.
      respawns: how many more dead ranks are replaced.
    """

    def __init__(
        self,
        plan: Plan,
        arguments: Sequence[str],
        *,
        ranks: int,
        spares: int = 0,
        respawns: int = 0,
        log: IO[bytes] | None = None,
        place: Callable[[int], tuple[list[str], str]] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
          plan: of the first slot; the others join.
          arguments: of the trainer's command line.
          ranks: to start here.
          spares: processes that are kept ready, so that a replacement comes in at once.
          respawns: see the class.
          log: where ranks write; with this process's output when None.
          place: returns, for a slot, what comes before its command, and its host.
        """
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.respawns = respawns
        # Empty until one of these ranks has begun the run.
        self._begun = tempfile.TemporaryFile()  # noqa: SIM115 - `kill` closes it
        launch = secrets.token_hex(8) if plan.founds else ""
        self._plan = dataclasses.replace(plan, launch=launch, begun=self._begun.fileno())
        self._arguments = list(arguments)
        self._ranks = ranks
        self._spares = spares
        # The lines to spares that are not needed yet, by slot.
        self._standby: dict[int, socket.socket] = {}
        self._plans: list[Plan] = []
        self._codes: dict[int, int] = {}
        # Devices of dead ranks that are to be replaced, and of ranks to be added.
        self._missing: list[int] = []
        self._log = log
        self._place = place or (lambda slot: ([], plan.host))
        self._deadline: float | None = None

    def start(self) -> None:
        """Starts all ranks and spares."""
        for number in range(self._ranks):
            self._spawn(number, founds=self._plan.founds and number == 0)
        for _ in range(self._spares):
            self._spawn_spare()

    def _spawn_spare(self) -> None:
        here, there = socket.socketpair()
        with there:
            self._standby[self._spawn(0, standby=there.fileno())] = here

    def _spawn(self, device: int, *, founds: bool = False, standby: int = -1) -> int:
        slot = len(self.processes)
        prefix, host = self._place(slot)
        plan = dataclasses.replace(
            self._plan,
            founds=founds,
            refounds=self._plan.founds and (standby >= 0 or slot >= self._ranks),
            standby=standby,
            host=host,
            local_rank=device,
        )
        self._plans.append(plan)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, VARIABLE: json.dumps(dataclasses.asdict(plan))}
        self.processes[slot] = subprocess.Popen(
            [*prefix, sys.executable, "-m", "foldfeed.trainer", *self._arguments],
            env=environment,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[self._plan.begun, *([standby] if standby >= 0 else [])],
        )
        return slot

    def add(self) -> None:
        """Adds a rank to the run: a spare that is ready, or will be; a new process where there is none."""
        self._missing.append(self._ranks)
        self._fill()

    def _fill(self) -> None:
        while self._missing:
            ready, _, _ = select.select([*self._standby.values()], [], [], 0)
            slots = [slot for slot, line in self._standby.items() if line in ready]
            if not slots and self._standby:
                return
            device = self._missing.pop(0)
            if not slots:
                self._spawn(device)
                continue
            # One that has died just now is found, and replaced, like any other rank.
            with self._standby.pop(slots[0]) as line, contextlib.suppress(ConnectionError):
                line.sendall(b".")
            if self.respawns > len(self._standby):
                self._spawn_spare()

    def poll(self) -> int | None:
        """Looks after the ranks once; returns the exit code of the run when all have ended."""
        for slot, process in self.processes.items():
            code = process.poll()
            if code is not None and slot not in self._codes:
                self._codes[slot] = code
                if code > 0 and self._plans[slot].begins and not self._has_begun:
                    click.echo(NOT_BEGUN, err=True)
                    return code
                if slot in self._standby:
                    self._standby.pop(slot).close()
                elif code < 0:
                    click.echo(f"rank in slot {slot} died of {signal.Signals(-code).name}", err=True)
                    if self.respawns > 0:
                        self.respawns -= 1
                        self._missing.append(self._plans[slot].local_rank)
        running = [slot for slot in self.processes if slot not in self._codes and slot not in self._standby]
        if 0 in self._codes.values():
            return self._wind_down(running)
        if not running:
            return self._begin_again()
        self._fill()
        return None

    def _wind_down(self, running: Sequence[int]) -> int | None:
        """The run has ended for one rank, so for all; who is stopped or cut off is not waited for long."""
        if not running:
            return 0
        self._deadline = self._deadline or time.monotonic() + LEAVE_S
        if time.monotonic() > self._deadline:
            for slot in running:
                self.processes[slot].kill()
        return None

    def _begin_again(self) -> int | None:
        """All ranks of this machine are gone: if they were killed, and may be replaced, a new one comes.

        Others may live elsewhere, so it begins the run only where nobody is left, or has begun it yet.
        """
        codes = self._codes.values()
        if max(codes) > 0 or not self._missing:
            if max(codes) < 0:
                click.echo(NONE_LEFT, err=True)
            return max(1, *codes)
        elsewhere = "with ranks elsewhere, if there are any, or from its last snapshot"
        click.echo(f"all ranks of this launcher are gone; the run goes on {elsewhere}", err=True)
        self._spawn(self._missing.pop(0), founds=self._plan.founds and not self._has_begun)
        return None

    @property
    def _has_begun(self) -> bool:
        return os.fstat(self._begun.fileno()).st_size > 0

    def terminate(self) -> None:
        """Asks all ranks to stop after their step, with a snapshot."""
        self.respawns, self._missing = 0, []
        for slot, process in self.processes.items():
            if slot not in self._standby and process.poll() is None:
                process.terminate()

    def kill(self) -> None:
        """Ends all ranks, stopped ones too."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        for line in self._standby.values():
            line.close()
        self._begun.close()


def run_ranks(launcher: Launcher) -> int:
    """Runs the ranks to their end; SIGTERM and Ctrl-C stop them with a snapshot. Returns the exit code."""
    asked: list[int] = []

    def on_signal(number: int, _: object) -> None:
        asked.append(number)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        launcher.start()
        told = False
        while (code := launcher.poll()) is None:
            if asked and not told:
                told = True
                launcher.terminate()
            if len(asked) > 1:
                return 130
            time.sleep(POLL_S)
        return code
    finally:
        launcher.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def become_rank(plan: Plan, arguments: Sequence[str]) -> NoReturn:
    """Makes this process, which torchrun started, a rank of an elastic run.

    Args:
      plan: but for what torchrun says in the environment.
      arguments: of the trainer's command line.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    plan = dataclasses.replace(
        plan, founds=False, refounds=restarted, torchrun=True, local_rank=int(os.environ["LOCAL_RANK"])
    )
    os.environ[VARIABLE] = json.dumps(dataclasses.asdict(plan))
    # The same process, so that torchrun's signals and exit codes are the rank's.
    os.execv(sys.executable, [sys.executable, "-m", "foldfeed.trainer", *arguments])


def _count(name: str, text: str, least: int = 0) -> Any:
    """Returns a decorator that adds an option for a number of processes."""
    return click.option(f"--{name}", default=least, type=click.IntRange(least), show_default=True, help=text)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@_count("ranks", "Ranks to start on this machine.", least=1)
@click.option("--join", is_flag=True, help="Join the run that lives in --output, instead of beginning one.")
@click.option(
    "--wait-for",
    default=0,
    type=click.IntRange(0),
    help="Ranks to wait for before the first step; those of --ranks if 0.",
)
@options_of(Plan, ["max_ranks"])
@_count("respawn", "How many dead ranks are replaced.")
@_count("spares", "Processes kept ready to replace dead ranks.")
@options_of(Plan, ["host", "silent_s", "wait_s"])
@click.argument("trainer", nargs=-1, required=True)
def command(
    ranks: int, join: bool, wait_for: int, respawn: int, spares: int, trainer: tuple[str, ...], **limits: Any
) -> int:
    """Train with ranks that may die, stop and join; TRAINER are the trainer's own options, after `--`.

    Weights are the same to the bit as those of an undisturbed run with any number of ranks. Without --join
    the run begins, or goes on from its last snapshot.

    Under torchrun, one on each machine, --wait-for is the number of all ranks, and a machine's fail together.
    """
    local_world = int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    if local_world and (ranks > 1 or join or respawn or spares):
        raise TrainerConfigError(
            "torchrun starts and replaces the ranks, and the first one begins the run: instead of --ranks, "
            "--respawn, --spares and --join give torchrun --nproc-per-node and --max-restarts."
        )
    if local_world and int(os.environ["WORLD_SIZE"]) > local_world:
        raise TrainerConfigError(
            f"torchrun has {os.environ['WORLD_SIZE']} ranks on several machines and restarts all when one "
            "dies. Start one on each machine, without --nnodes; or plain -m foldfeed.trainer."
        )
    # How many join says nothing of how many the run begins with; whoever is more than it takes is a spare.
    plan = Plan(founds=not join, ranks=wait_for or local_world or (1 if join else ranks), **limits)
    if local_world:
        become_rank(plan, trainer)
    return run_ranks(Launcher(plan, trainer, ranks=ranks, spares=spares, respawns=respawn))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code(command, "foldfeed.trainer.elastic", arguments)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
