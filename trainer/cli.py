"""The command line: ``torchrun -m foldfeed.trainer`` or ``python -m foldfeed.trainer``.

It fills one `RunConfig` and calls `run`. Exit codes: 0 done (or stopped by SIGTERM after a snapshot),
2 wrong usage, 1 a run that failed. Errors take one or two lines; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click
from click.core import ParameterSource

from foldfeed.feature_store.errors import FoldfeedError, MissingExtraError
from foldfeed.trainer.config import (
    MODEL_SIZES,
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SnapshotConfig,
)
from foldfeed.trainer.elastic import Plan
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.options import options_of

EPILOG = """\b
Examples:
  One process, a small model on the CPU:
    python -m foldfeed.trainer --store demo/store --output runs/a --steps 50 --crop-residues 64
  Four ranks on one machine; a killed rank is restarted and continues from the last snapshot:
    torchrun --nproc-per-node 4 --max-restarts 3 -m foldfeed.trainer --store demo/store --output runs/b
  Continue the same run on two ranks (weights stay equal to the bit):
    torchrun --nproc-per-node 2 -m foldfeed.trainer --store demo/store --output runs/b --steps 200
"""


MODEL = [field.name for field in dataclasses.fields(ModelConfig)]
OPTIMIZER = [field.name for field in dataclasses.fields(OptimizerConfig)]
HELD_OUT = [field.name for field in dataclasses.fields(HeldOutConfig)]
DATA = [field.name for field in dataclasses.fields(DataConfig) if field.name not in ("store", "recipe")]
SNAPSHOTS = {
    "every": "snapshot_every",
    "keep": "keep_snapshots",
    "resume": "resume",
    "memory": "memory_snapshots",
    "memory_every": "memory_every",
    "mirror": "mirror_snapshots",
    "mtbf_s": "mtbf",
}
GENERAL = ["output", "task", "steps", "seed"]
PARTS = ("data", "model", "optimizer", "snapshots", "held_out")
RUN = [field.name for field in dataclasses.fields(RunConfig) if field.name not in (*GENERAL, *PARTS)]


@click.command(
    name="foldfeed.trainer",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@options_of(DataConfig, ["store"])
@options_of(RunConfig, GENERAL[:2])
@options_of(DataConfig, ["recipe"])
@options_of(RunConfig, GENERAL[2:])
@options_of(DataConfig, DATA)
@options_of(OptimizerConfig, OPTIMIZER)
@options_of(SnapshotConfig, list(SNAPSHOTS), SNAPSHOTS)
@options_of(HeldOutConfig, HELD_OUT)
@options_of(RunConfig, RUN)
@click.option(
    "--size",
    default="tiny",
    type=click.Choice(list(MODEL_SIZES)),
    show_default=True,
    help="Size of the compact Evoformer; the options that follow change single values of it.",
)
@options_of(ModelConfig, MODEL)
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.version_option(package_name="foldfeed", prog_name="foldfeed.trainer")
@click.pass_context
def command(context: click.Context, **options: Any) -> RunConfig:
    """Train the compact Evoformer, or a model of your own, on random crops of a feature store.

    Runs are exact: the same settings give the same weights, bit for bit, on 1 to V ranks, after kills and
    restarts. Start it again with the same --output to continue; SIGTERM stops every rank after the next
    step, with a snapshot and exit code 0 (torchrun itself, when it gets the signal, then exits with 1).
    """
    given = [name for name in MODEL if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]

    def pick(names: Sequence[str]) -> dict[str, Any]:
        return {name: options[name] for name in names}

    return RunConfig(
        data=DataConfig(**pick(["store", "recipe", *DATA])),
        model=ModelConfig.sized(options["size"], **pick(given)),
        held_out=HeldOutConfig(**pick(HELD_OUT)),
        optimizer=OptimizerConfig(**pick(OPTIMIZER)),
        snapshots=SnapshotConfig(**pick(list(SNAPSHOTS))),
        **pick([*GENERAL, *RUN]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    config: Any = None
    try:
        config = command.main(args=given, prog_name="python -m foldfeed.trainer", standalone_mode=False)
        if not isinstance(config, RunConfig):
            return 0  # --help or --version
        _runner()(config)
    except click.ClickException as error:
        _complain(f"{error.format_message()} (--help lists the options)")
        return 2
    except (FoldfeedError, OSError, KeyboardInterrupt, click.Abort) as error:
        if "--debug" in given:
            traceback.print_exc()
        told = str(error) or "interrupted"
        # One that stops a snapshot says so itself; settings that are refused make no config.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full and config is not None and not isinstance(error, FoldfeedError):
            told += f" (for the run in {config.output}); free some space and run the same command again"
        _complain(told)
        return 2 if isinstance(error, TrainerConfigError) else 1
    return 0


def _runner() -> Callable[[RunConfig], object]:
    """Returns what trains; imported late, so that help and usage errors do not wait for torch."""
    plan = Plan.from_environment()
    if plan is not None and not plan.torchrun:
        # Ctrl-C in a terminal reaches ranks and launcher, which then asks them to stop with a snapshot.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from foldfeed.trainer.members import rank as elastic_rank
        from foldfeed.trainer.training.launch import run
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("torch", "train") from error
    return run if plan is None else functools.partial(elastic_rank.run, plan=plan)


def leave_with(work: Callable[[], int]) -> None:
    """Runs ``work``, which closes whatever it opened, and ends the process at once with its exit code.

    After a failure a thread may be stuck in a collective whose peers are gone, and a normal exit would wait
    for it. Leaving at once closes this rank's sockets, so the failure reaches the others in milliseconds. And
    libraries whose threads are still ending may abort a normal exit (seen twice: -6 instead of the code; once
    after the last step, and torchrun took the whole node's run for failed).
    """
    try:
        code = work()
    except BaseException:  # noqa: BLE001 - reported in full; the exit below must happen in every case
        # Also a `sys.exit` in somebody's task: with its 0 the run would count as finished.
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _complain(text: str) -> None:
    rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
    print(f"error{rank}: {text}", file=sys.stderr, flush=True)
