"""One training run on one rank of a fixed number: environment, process groups, the order of a run's parts.

    OUTPUT/run.json         run id, digests, settings of the last start, and how gradients travel
    OUTPUT/snapshots/       generations (snapshot.py); more of them in memory while the run lives (tiers.py)
    OUTPUT/run.lease        while a run lives there (lease.py)
    OUTPUT/metrics.jsonl    one line per step, and one per look at held-out records;  OUTPUT/tb/  TensorBoard
    OUTPUT/goodput.jsonl    where the time went (goodput.py)
    OUTPUT/stacks.txt       stacks of the ranks, when they hung or got SIGUSR1 (watch.py)
    OUTPUT/result.json      only when the last step is done: weights digest, steps, digests

A folder belongs to one run (process.py). SIGTERM asks for a stop at the next commit point: a snapshot is
written and the exit code is 0.

Does not own: the step (loop.py), texts for the terminal beyond a few lines, exit codes (cli.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.goodput import Ledger, Part, process_start
from foldfeed.trainer.groups import nccl
from foldfeed.trainer.groups.ranks import SHARED, Ranks, joined, pick_device, speaker, world_from_environment
from foldfeed.trainer.models.task import Task, load_task
from foldfeed.trainer.training.compiling import settle
from foldfeed.trainer.training.data import open_data
from foldfeed.trainer.training.loop import Outcome, Trainer
from foldfeed.trainer.training.process import Process, identity_before
from foldfeed.trainer.training.source import Source


def run(config: RunConfig, task: Task | None = None) -> Outcome:
    """Trains on this rank; call it once per process that torchrun started (or once, without torchrun).

    Args:
      config: settings.
      task: what is trained; the one that the settings name when None.
    Raises:
      TrainerConfigError: the settings and the world do not fit.
      TrainerError: the run failed; the other ranks fail too.
    """
    rank, world, local_rank = world_from_environment()
    ledger = Ledger(Path(config.output), active=rank == 0, began=process_start())
    ledger.mark(Part.STARTUP)
    config.check_world(world)
    prepare_numerics(config)
    task = task or load_task(config)
    recipe = task.recipe(config.data)
    device = pick_device(config.device, local_rank, config.nccl_preset)
    with joined(
        rank=rank,
        world=world,
        device=device,
        timeout_s=config.timeout_s,
        shared=config.device == SHARED,
        always=config.reducer == "ddp",
        preset=config.nccl_preset,
        pins=config.reducer in nccl.ORDERED,
    ) as ranks:
        ledger.mark(Part.INITIALIZATION)
        with open_data(config, task, recipe, ranks, local_rank, config.loader_trace) as source:
            return train(config, task, ranks, source, ledger)


def prepare_numerics(config: RunConfig) -> None:
    """Fixes what would otherwise change sums from run to run: threads, kernels."""
    torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads this when it is first used; without it its workspaces make sums irreproducible.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # As torch.use_deterministic_algorithms, without the compiler that it imports; see `compile_blocks`.
        torch.set_deterministic_debug_mode("error")
        # Deterministic mode also fills every new tensor, 1,086 fills a shard instead of 87 on a GPU. It only
        # hides reads of memory that nobody wrote; a test compares the weights with and without it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def train(config: RunConfig, task: Task, ranks: Ranks, source: Source, ledger: Ledger) -> Outcome:
    """Runs (or continues) the run in ``config.output`` over any source of batches.

    Args:
      config: settings.
      task: what is trained.
      ranks: the joined groups.
      source: a loader, or anything that yields the same steps, and what is held out.
      ledger: that has counted the time since the process started.
    """
    config = settle(config, task, ranks, identity_before, speaker(ranks.is_first))
    process = Process(config, task, ranks, source, ledger)
    trainer = process.trainer
    try:
        opening = "opening the run's folder"
        process.header["run_id"] = ranks.first_does(process.claim, opening, lasts=True)
        process.renew_saver(ranks)
        ledger.mark(Part.PREPARATION)
        process.restore()
        process.metrics.start(trainer.step)
        ledger.mark(Part.RESTORE)
        ranks.first_does(lambda: ledger.start(trainer.step, ranks.world), "opening the ledger")
        process.describe()
        with stop_on_sigterm(trainer):
            outcome = process.work(ranks)
    except BaseException:
        trainer.reducer.close(wait=False)
        process.fail()
        raise
    finally:
        process.lease.release()
        process.metrics.close()
    trainer.reducer.close()
    return outcome


@contextlib.contextmanager
def stop_on_sigterm(trainer: Trainer) -> Iterator[None]:
    """Turns the first SIGTERM into a request to stop; a second one ends the process as usual."""

    def on_signal(number: int, _: object) -> None:
        trainer.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
