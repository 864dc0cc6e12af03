"""``python -m foldfeed.trainer.prove``: a training left alone and one disturbed end in equal weights.

    undisturbed: 9e70846a...          torchrun with so many ranks, left alone
    disturbed: 9e70846a...            the same, while ranks are killed (SIGKILL) and stopped (SIGSTOP)
    recovery_s: p50 14.2 max 19.8     from each fault to the next step that was not done before

Which rank meets which fault before which step is drawn from the seed. A killed rank's torchrun restarts all
ranks; a stopped one is noticed by the collectives' timeout of the others. All processes are children of this
one and end with it. Exit codes: 0 equal, 1 different or failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from foldfeed.trainer.errors import TrainerConfigError, TrainerError
from foldfeed.trainer.exit_code import exit_code

KINDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# A small model and small crops: what is proved does not depend on the size.
SETTINGS = (
    *("--recipe", "crop_first", "--crop-residues", "32", "--num-clusters", "8", "--num-extra", "16"),
    *("--global-batch", "8", "--warmup-steps", "3", "--lr", "0.003", "--num-blocks", "1"),
    *("--snapshot-every", "5", "--device", "cpu", "--no-tensorboard"),
)
POLL_S = 0.02


@dataclasses.dataclass(frozen=True, order=True)
class Fault:
    """One thing that happens to the disturbed run.

    Attributes:
      after_step: as soon as so many steps are completed.
      rank: to whom.
      kind: ``kill`` or ``stop``.
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
        if kind not in KINDS or not number.isdigit():
            raise TrainerConfigError(
                f"chaos {part!r} is not one of {', '.join(f'{name}=NUMBER' for name in KINDS)}; links that "
                "are cut and ranks that join need a trainer that changes its ranks while it runs."
            )
        counts[kind] = counts.get(kind, 0) + int(number)
    total = sum(counts.values())
    if total == 0:
        raise TrainerConfigError("chaos asks for no fault, which proves nothing; give for example kill=2.")
    if total > steps - 2:
        raise TrainerConfigError(f"{total} faults need at least {total + 2} steps, not {steps}.")
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
      store: of the feature store.
      ranks: processes.
      steps: of each run.
      timeout_s: of the collectives.
      limit_s: after which a run counts as hanging.
      options: more options of the trainer.
    """

    store: str
    ranks: int
    steps: int
    timeout_s: float
    limit_s: float
    options: Sequence[str] = ()

    def command(self, output: Path, restarts: int) -> list[str]:
        """Returns the torchrun command of a run."""
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={self.ranks}", f"--max-restarts={restarts}", "-m", "foldfeed.trainer"),
            *("--store", self.store, "--output", str(output), "--steps", str(self.steps)),
            *("--timeout-s", str(self.timeout_s), *SETTINGS, *self.options),
        ]


def run_disturbed(launch: Launch, output: Path, faults: Sequence[Fault]) -> list[float]:
    """Runs torchrun to its end while the faults happen; returns the seconds until each was made good.

    Raises:
      TrainerError: the run failed, or hangs.
    """
    recoveries: list[float] = []
    waiting = list(faults)
    pending: tuple[float, int] | None = None
    log = output.with_name(f"{output.name}.log")
    command = launch.command(output, restarts=len(faults))
    deadline = time.monotonic() + launch.limit_s
    with _running(command, log) as torchrun:
        while (code := torchrun.poll()) is None:
            step = _last_step(output)
            if pending is not None and step > pending[1]:
                recoveries.append(time.monotonic() - pending[0])
                pending = None
            if pending is None and waiting and step >= waiting[0].after_step:
                fault = waiting.pop(0)
                time.sleep(fault.delay_s)
                # The steps that were completed meanwhile are not the recovery.
                pid = ranks_of(torchrun.pid).get(fault.rank)
                if pid is None:
                    waiting.insert(0, fault)
                else:
                    os.kill(pid, KINDS[fault.kind])
                    pending = (time.monotonic(), _last_step(output))
                    click.echo(f"  {fault.kind}: rank {fault.rank} after step {pending[1]}")
            if time.monotonic() > deadline:
                raise TrainerError(f"{output} hangs: not done after {launch.limit_s:.0f} s; see {log}")
            time.sleep(POLL_S)
    if code != 0:
        raise TrainerError(f"the run in {output} ended with code {code}; see {log}")
    if waiting or pending is not None:
        raise TrainerError(
            f"{len(waiting) + (pending is not None)} faults did not happen or came too late in {output}; "
            "give more --steps"
        )
    return recoveries


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        try:
            yield process
        finally:
            if process.poll() is None:
                # torchrun first, or it would start them again; then its ranks, stopped ones too.
                ranks = list(ranks_of(process.pid).values())
                process.kill()
                for pid in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def ranks_of(torchrun: int) -> dict[int, int]:
    """Returns the pid of each rank that a torchrun of ours is running."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                values = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
                if b"TORCHELASTIC_RUN_ID" in values:
                    found[int(values[b"RANK"])] = int(pid)
    return found


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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--store", required=True, help="Folder or URL of the feature store.")
@click.option("--ranks", default=4, show_default=True, help="Processes; 4 or an odd number prove most.")
@click.option("--steps", default=60, show_default=True, help="Steps of each run.")
@click.option("--chaos", default="kill=6,stop=1", show_default=True, help="How many of which faults.")
@click.option("--seed", default=11, show_default=True, help="Draws steps, ranks and order of the faults.")
@click.option("--timeout-s", default=20.0, show_default=True, help="Of the collectives: notices a stop.")
@click.option("--limit-s", default=1800.0, show_default=True, help="After which a run counts as hanging.")
@click.option("--output", default="", help="Keep both runs there; a temporary folder otherwise.")
@click.argument("options", nargs=-1)
def command(
    store: str,
    ranks: int,
    steps: int,
    chaos: str,
    seed: int,
    timeout_s: float,
    limit_s: float,
    output: str,
    options: tuple[str, ...],
) -> bool:
    """Train twice, once disturbed, and compare the weights; OPTIONS after `--` go to the trainer."""
    faults = plan_faults(chaos, ranks, steps, seed)
    launch = Launch(
        store=store, ranks=ranks, steps=steps, timeout_s=timeout_s, limit_s=limit_s, options=options
    )
    folder = Path(output or tempfile.mkdtemp(prefix="foldfeed-prove-"))
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    for run in (undisturbed, disturbed):
        if run.exists():
            raise TrainerConfigError(f"{run} exists; give another --output.")
    run_disturbed(launch, undisturbed, [])
    click.echo(f"undisturbed: {weights_digest(undisturbed)}")
    recoveries = run_disturbed(launch, disturbed, faults)
    click.echo(f"disturbed: {weights_digest(disturbed)}")
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
