"""``python -m foldfeed.trainer.prove``: a training left alone and one disturbed end in equal weights.

    undisturbed: 9e70846a...          so many ranks, left alone
    virtual shards of broken steps: 41 kept, 15 computed again
    disturbed: 9e70846a...            the same, while ranks are killed, stopped, cut off and added
    recovery_s: p50 0.4 max 3.1       from each fault to the next step that was not done before

Which rank meets which fault after which step is drawn from the seed. Both runs are elastic (elastic.py): each
rank fails alone, dead ones are replaced by spares that stand by. A stopped rank (SIGSTOP) goes on after the
others did without it, a rank that was cut off gets its link back: both must find that they were left out, and
come back. For cuts every rank lives in a network namespace of its own (network.py, which needs root). All
processes are children of this one and end with it. Exit codes: 0 equal, 1 different or failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from foldfeed.trainer import cli
from foldfeed.trainer.elastic import Launcher, Plan
from foldfeed.trainer.errors import TrainerConfigError, TrainerError
from foldfeed.trainer.exit_code import exit_code
from foldfeed.trainer.goodput import GOODPUT_FILE, account
from foldfeed.trainer.members.agreement import FolderRegister, Member
from foldfeed.trainer.members.session import folder_of, read_session
from foldfeed.trainer.network import Network, namespaces
from foldfeed.trainer.options import options_of

KINDS = ("kill", "stop", "cut", "join")
# A small model and small crops: what is proved does not depend on the size.
SETTINGS = (
    *("--recipe", "crop_first", "--crop-residues", "32", "--num-clusters", "8", "--num-extra", "16"),
    *("--global-batch", "8", "--warmup-steps", "3", "--lr", "0.003", "--num-blocks", "1"),
    *("--snapshot-every", "5", "--device", "cpu", "--no-tensorboard"),
)
POLL_S = 0.01
# For which a rank stays stopped or cut off after the others went on.
AWAY_S = 0.5


@dataclasses.dataclass(frozen=True, order=True)
class Fault:
    """One thing that happens to the disturbed run.

    Attributes:
      after_step: as soon as so many steps are completed.
      rank: to whom.
      kind: of `KINDS`.
      delay_s: after that step was written, so that faults meet every phase of a step.
    """

    after_step: int
    rank: int
    kind: str
    delay_s: float


def plan_faults(chaos: str, ranks: int, steps: int, seed: int) -> list[Fault]:
    """Returns the faults that a text like ``kill=6,stop=1`` asks for, in order of their steps.

    Raises:
      TrainerConfigError: the text names something else, or the run is too short for so many.
    """
    counts: dict[str, int] = {}
    for part in chaos.split(",") if chaos else []:
        kind, _, number = part.partition("=")
        if kind not in KINDS or not number.isdecimal():
            raise TrainerConfigError(
                f"chaos {part!r} is not one of {', '.join(f'{name}=NUMBER' for name in KINDS)}."
            )
        counts[kind] = counts.get(kind, 0) + int(number)
    total = sum(counts.values())
    if total == 0:
        raise TrainerConfigError("chaos asks for no fault, which proves nothing; give for example kill=2.")
    if total > steps - 2:
        raise TrainerConfigError(f"{total} faults need at least {total + 2} steps, not {steps}.")
    if ranks < 2:
        raise TrainerConfigError(f"{ranks} ranks: the only rank of a run has nobody to go on without it.")
    draw = random.Random(seed)
    kinds = [kind for kind, count in sorted(counts.items()) for _ in range(count)]
    draw.shuffle(kinds)
    after = sorted(draw.sample(range(1, steps - 1), total))
    return [
        Fault(step, draw.randrange(ranks), kind, draw.uniform(0.0, 0.3))
        for step, kind in zip(after, kinds, strict=True)
    ]


@dataclasses.dataclass(kw_only=True)
class Launch:
    """How a run is started: what both of them share.

    Attributes:
      store: folder or URL of the feature store.
      ranks: processes; 4 or an odd number prove most.
      steps: steps of each run.
      limit_s: after which a run counts as hanging.
      options: more options of the trainer.
    """

    store: str
    ranks: int = 4
    steps: int = 60
    limit_s: float = 1800.0
    options: Sequence[str] = ()

    def arguments(self, output: Path) -> list[str]:
        """Returns the trainer's options for a run."""
        return [
            *("--store", self.store, "--output", str(output), "--steps", str(self.steps)),
            *SETTINGS,
            *self.options,
        ]


def run_disturbed(launch: Launch, output: Path, faults: Sequence[Fault]) -> list[float]:
    """Runs ranks to their end while the faults happen; returns the seconds until each was made good.

    Raises:
      TrainerError: the run failed, or hangs.
    """
    kinds = [fault.kind for fault in faults]
    kills, joins = kinds.count("kill"), kinds.count("join")
    log = output.with_name(f"{output.name}.log")
    recoveries: list[float] = []
    with contextlib.ExitStack() as stack:
        network = None
        if "cut" in kinds:
            network = stack.enter_context(namespaces(launch.ranks + kills + joins))
        launcher = Launcher(
            Plan(ranks=launch.ranks, max_ranks=launch.ranks + joins),
            launch.arguments(output),
            ranks=launch.ranks,
            spares=kills + joins,
            respawns=kills,
            log=stack.enter_context(log.open("wb")),
            place=network.place if network is not None else None,
        )
        stack.callback(launcher.kill)
        disturbance = disturb(faults, launcher, output, network, recoveries)
        deadline, num_left = time.monotonic() + launch.limit_s, len(faults)
        launcher.start()
        while (code := launcher.poll()) is None:
            num_left = next(disturbance)
            if time.monotonic() > deadline:
                raise TrainerError(f"{output} hangs: not done after {launch.limit_s:.0f} s; see {log}")
            time.sleep(POLL_S)
    if code != 0:
        raise TrainerError(f"the run in {output} ended with code {code}; see {log}")
    if num_left:
        raise TrainerError(
            f"{num_left} faults did not happen or came too late in {output}; give more --steps"
        )
    if faults:
        click.echo(account(output / GOODPUT_FILE).shards_line())
    return recoveries


def disturb(
    faults: Sequence[Fault],
    launcher: Launcher,
    output: Path,
    network: Network | None,
    recoveries: list[float],
) -> Iterator[int]:
    """Makes one fault after another happen; yields how many are left to be made good while it has to wait.

    Args:
      faults: in their order; the next one waits until the last was made good.
      launcher: of the run's ranks.
      output: the run's folder.
      network: of the ranks, where there are cuts.
      recoveries: gets the seconds until each fault but a join was made good.
    """
    for number, fault in enumerate(faults):
        num_left = len(faults) - number
        while _last_step(output) < fault.after_step:
            yield num_left
        time.sleep(fault.delay_s)
        while (hit := _hit(fault, launcher, output, network)) is None:
            yield num_left
        happened = time.monotonic()
        while not hit.made_good():
            yield num_left
        recovered = time.monotonic()
        if fault.kind != "join":
            recoveries.append(recovered - happened)
        if hit.amend is not None:
            while time.monotonic() < recovered + AWAY_S:
                yield num_left - 1
            hit.amend()
    while True:
        yield 0


class Hit(NamedTuple):
    """A fault that has happened.

    Attributes:
      made_good: whether the run has got over it.
      amend: takes it back, where that can be done.
    """

    made_good: Callable[[], bool]
    amend: Callable[[], None] | None = None


def _hit(fault: Fault, launcher: Launcher, output: Path, network: Network | None) -> Hit | None:
    """Makes a fault happen; returns None where it would end the run, or nobody is there for it."""
    members = members_of(output)
    if fault.kind == "join":
        launcher.add()
        there = {member.uid for member in members}
        click.echo(f"  join: after step {_last_step(output)}")
        return Hit(lambda: any(member.uid not in there for member in members_of(output)))
    slots = {process.pid: slot for slot, process in launcher.processes.items()}
    pids = [int(member.identity["pid"]) for member in members]
    if len(pids) < 2 or any(launcher.processes[slots[pid]].poll() is not None for pid in pids):
        return None
    pid = pids[fault.rank % len(pids)]
    amend = None
    if fault.kind == "cut":
        assert network is not None
        network.cut(slots[pid])
        amend = functools.partial(network.heal, slots[pid])
    elif fault.kind == "stop":
        os.kill(pid, signal.SIGSTOP)
        amend = functools.partial(os.kill, pid, signal.SIGCONT)
    else:
        os.kill(pid, signal.SIGKILL)
    # The steps that were completed meanwhile are not the recovery.
    step = _last_step(output)
    click.echo(f"  {fault.kind}: rank {pids.index(pid)} of {len(pids)} after step {step}")
    return Hit(lambda: _last_step(output) > step, amend)


def members_of(output: Path) -> tuple[Member, ...]:
    """Returns the ranks of the newest generation of an elastic run."""
    session = read_session(output)
    latest = FolderRegister(folder_of(output, session)).latest() if session.name else None
    return () if latest is None else latest.members


def _last_step(output: Path) -> int:
    """Returns the highest step that a run's metrics name; 0 when there are none yet."""
    try:
        text = (output / "metrics.jsonl").read_bytes()[-4096:]
    except FileNotFoundError:
        return 0
    return max((int(number) for number in re.findall(rb'"step": (\d+)', text)), default=0)


def weights_digest(output: Path) -> str:
    """Returns the digest of a finished run.

    Raises:
      TrainerError: it did not finish.
    """
    path = output / "result.json"
    if not path.exists():
        raise TrainerError(f"{output} has no result.json: the run stopped before its last step")
    return str(json.loads(path.read_text(encoding="utf-8"))["weights_digest"])


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Lets SIGTERM end this process like Ctrl-C, so that its ranks end with it."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options_of(Launch, ["store", "ranks", "steps"])
@click.option("--chaos", default="kill=6,stop=1", show_default=True, help="How many of which faults.")
@click.option("--seed", default=11, show_default=True, help="Draws steps, ranks and order of the faults.")
@options_of(Launch, ["limit_s"])
@click.option("--output", default="", help="Keep both runs there; a temporary folder otherwise.")
@click.argument("options", nargs=-1)
def command(chaos: str, seed: int, output: str, **options: Any) -> bool:
    """Train twice, once disturbed, and compare the weights; OPTIONS after `--` go to the trainer."""
    launch = Launch(**options)
    faults = plan_faults(chaos, launch.ranks, launch.steps, seed)
    folder = Path(output or tempfile.mkdtemp(prefix="foldfeed-prove-"))
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    for run in (undisturbed, disturbed):
        if run.exists():
            raise TrainerConfigError(f"{run} exists; give another --output.")
    config = cli.command.invoke(cli.command.make_context("foldfeed.trainer", launch.arguments(undisturbed)))
    config.check_elastic(launch.ranks + sum(fault.kind == "join" for fault in faults))
    folder.mkdir(parents=True, exist_ok=True)
    if any(fault.kind == "cut" for fault in faults):
        with namespaces(1):
            pass  # or it raises, before the first run
    with _ended_by_signal():
        run_disturbed(launch, undisturbed, [])
        click.echo(f"undisturbed: {weights_digest(undisturbed)}")
        recoveries = run_disturbed(launch, disturbed, faults)
    click.echo(f"disturbed: {weights_digest(disturbed)}")
    if recoveries:
        click.echo(f"recovery_s: p50 {statistics.median(recoveries):.1f} max {max(recoveries):.1f}")
    equal = weights_digest(undisturbed) == weights_digest(disturbed)
    if equal and not output:
        shutil.rmtree(folder)
    elif not equal:
        click.echo(f"error: the weights differ; both runs are in {folder}", err=True)
    return equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code(command, "foldfeed.trainer.prove", arguments)


if __name__ == "__main__":
    sys.exit(main())
