"""One training run on one rank: environment, folder, resume, loop, result.

    OUTPUT/run.json         run id, digests, settings of the last start, and how gradients travel
    OUTPUT/snapshots/       generations (snapshot.py); more of them in memory while the run lives (tiers.py)
    OUTPUT/run.lease        while a run lives there (lease.py)
    OUTPUT/metrics.jsonl    one line per step, and one per look at held-out records;  OUTPUT/tb/  TensorBoard
    OUTPUT/goodput.jsonl    where the time went (goodput.py)
    OUTPUT/stacks.txt       stacks of the ranks, when they hung or got SIGUSR1 (watch.py)
    OUTPUT/result.json      only when the last step is done: weights digest, steps, digests

A folder belongs to one run. Starting again in it continues that run (``--resume auto``), also with another
number of ranks; other settings are refused. SIGTERM asks for a stop at the next commit point: a snapshot is
written and the exit code is 0.

Does not own: the step (loop.py), texts for the terminal beyond a few lines, exit codes (cli.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from foldfeed.trainer.config import RunConfig, digest_of
from foldfeed.trainer.errors import (
    InvalidSnapshotError,
    SnapshotMismatchError,
    TrainerConfigError,
    TrainerError,
)
from foldfeed.trainer.goodput import INITIALIZATION, PREPARATION, RESTORE, STARTUP, Ledger, process_start
from foldfeed.trainer.groups import nccl
from foldfeed.trainer.groups.ranks import Ranks, joined, pick_device, speaker, world_from_environment
from foldfeed.trainer.models.task import Task, identity, load_task
from foldfeed.trainer.state.lease import Lease
from foldfeed.trainer.state.mirror import Mirror, fetch
from foldfeed.trainer.state.resume import (
    changed_settings,
    check_belongs,
    environment,
    named_generation,
    network_warning,
    newest_valid,
)
from foldfeed.trainer.state.snapshot import RUN_FILE, SNAPSHOTS, SnapshotFolder, read_manifest
from foldfeed.trainer.state.tiers import Saver, memory_folder
from foldfeed.trainer.training.compiling import settle
from foldfeed.trainer.training.data import LoaderMeters, open_held_out, open_loader, serving
from foldfeed.trainer.training.held_out import HeldOut
from foldfeed.trainer.training.loop import Outcome, Trainer
from foldfeed.trainer.training.metrics import Metrics
from foldfeed.trainer.training.source import BatchSource, SourceMeters
from foldfeed.trainer.training.watch import StackWatch

RESULT_FILE = "result.json"
# What a folder's run must have in common with a start in it.
BOUND = ("config_digest", "layout_hash", "store_fingerprint")

# The run id in run.json is also in the manifest of every snapshot, so a new run.json cannot take its place.
_REPAIR = (
    "Restore it from a copy; or start in another --output, with --resume OUTPUT/snapshots/step-N to go on "
    "from a snapshot of this one."
)


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
    ledger.mark(STARTUP)
    config.check_world(world)
    prepare_numerics(config)
    task = task or load_task(config)
    recipe = task.recipe(config.data)
    device = pick_device(config.device, local_rank, config.nccl_preset)
    with (
        joined(
            rank=rank,
            world=world,
            device=device,
            timeout_s=config.timeout_s,
            always=config.reducer == "ddp",
            preset=config.nccl_preset,
            pins=config.reducer in nccl.ORDERED,
        ) as ranks,
        _marked(ledger, INITIALIZATION),
        open_loader(config.data, recipe, config.seed, ranks, trace=config.loader_trace) as (
            loader,
            fingerprint,
        ),
        open_held_out(config, task, recipe, ranks) as held_out,
        serving(loader, config.metrics_port, ranks, local_rank),
    ):
        meters = LoaderMeters(loader)
        return train(config, ranks, loader, fingerprint, ledger, meters, task=task, held_out=held_out)


@contextlib.contextmanager
def _marked(ledger: Ledger, name: str) -> Iterator[None]:
    """Marks on the way in: the time belongs to what was entered before."""
    ledger.mark(name)
    yield


def prepare_numerics(config: RunConfig) -> None:
    """Fixes what would otherwise change sums from run to run: threads, kernels."""
    torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads this when it is first used; without it its workspaces make sums irreproducible.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Deterministic mode also fills every new tensor, 1,086 fills a shard instead of 87 on a GPU. It only
        # hides reads of memory that nobody wrote; a test compares the weights with and without it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def train(
    config: RunConfig,
    ranks: Ranks,
    source: BatchSource,
    fingerprint: str,
    ledger: Ledger | None = None,
    meters: SourceMeters | None = None,
    *,
    task: Task | None = None,
    held_out: HeldOut | None = None,
) -> Outcome:
    """Runs (or continues) the run in ``config.output`` over any source of batches.

    Args:
      config: settings.
      ranks: the joined groups.
      source: a loader, or anything that yields the same steps.
      fingerprint: identity of the data behind the source.
      ledger: that has counted the time since the process started; a new one when None.
      meters: of the source, for metrics and the table at the end.
      task: what is trained; the one that the settings name when None.
      held_out: whose loss is looked at now and then.
    """
    task = task or load_task(config)
    config = settle(config, task, ranks, identity_before, speaker(ranks.is_first))
    settings = identity(config, task)
    config_digest = digest_of(settings)
    numerics = environment(ranks.device, torch.get_num_threads(), config.deterministic, config.compile)
    ranks.require_equal(json.dumps([config_digest, fingerprint]).encode(), "settings and store")
    if config.deterministic:
        _require_one_environment(numerics, ranks)
    output = Path(config.output)
    ledger = ledger or Ledger(output, active=ranks.is_first)
    metrics = Metrics(
        output, active=ranks.is_first, tensorboard=config.tensorboard, log_every=config.log_every
    )
    trainer = Trainer(config, ranks, source, metrics, task, held_out, meters)
    lease = Lease(output, config.lease_s, metrics.say)
    saver: Saver | None = None
    try:
        header = {
            "run_id": "",
            "config_digest": config_digest,
            "identity": settings,
            "layout_hash": trainer.flat.layout_hash,
            "store_fingerprint": fingerprint,
            "environment": numerics,
            "network": network_of(trainer),
        }
        header["run_id"] = ranks.first_does(
            lambda: claim(output, config, header, lease, metrics.say), "opening the run's folder", lasts=True
        )
        folder = SnapshotFolder(output / SNAPSHOTS, config.snapshots.keep, before_write=lease.require)
        memory = memory_folder(config.snapshots.memory, str(header["run_id"]))
        if memory is not None and ranks.is_first:
            memory.before_write = lease.require
        mirror = mirror_of(config, metrics.say)
        saver = Saver(folder, memory, ranks, config.snapshots, metrics.say, mirror=mirror)
        ledger.mark(PREPARATION)
        continue_run(trainer, folder, memory, header)
        metrics.start(trainer.step)
        ledger.mark(RESTORE)
        ranks.first_does(lambda: ledger.start(trainer.step, ranks.world), "opening the ledger")
        describe(trainer, header)
        watch = StackWatch(output, ranks.rank, ranks.world, config.timeout_s, metrics.say)
        with stop_on_sigterm(trainer), watching(watch):
            outcome = trainer.run(saver, header, ledger, watch)
        ranks.first_does(lambda: conclude(output, header, outcome), "writing the result")
        report(metrics, outcome, ledger, meters)
    except BaseException:
        trainer.reducer.close(wait=False)
        if saver is not None:
            saver.close()
        # A full disk must not hide the error that ends the run.
        with contextlib.suppress(OSError):
            report_goodput(metrics, ledger, "failed")
        metrics.close()
        raise
    finally:
        lease.release()
    trainer.reducer.close()
    metrics.close()
    return outcome


def _is_restart() -> bool:
    """Returns whether torchrun started this process again after one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _require_one_environment(numerics: dict[str, Any], ranks: Ranks) -> None:
    found = ranks.gather_json(numerics, "the comparison of environments")
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise TrainerConfigError(
            f"rank {odd[0]} computes with {found[odd[0]]}, rank 0 with {found[0]}; equal bits need equal "
            "software and processors. Use one kind of node, or --no-deterministic."
        )


def mirror_of(config: RunConfig, say: Callable[[str], None]) -> Mirror | None:
    """Returns what copies the snapshots of a run to a URL; None where none is given."""
    url = config.snapshots.mirror
    return Mirror(url, config.snapshots.keep, say) if url else None


def claim(
    output: Path, config: RunConfig, header: dict[str, Any], lease: Lease, say: Callable[[str], None]
) -> str:
    """Makes the folder this run's, or checks that it is; returns the run id. First rank only.

    An empty folder gets what the run's URL of copies holds.

    Raises:
      LeaseHeldError: another run lives there.
      NoValidSnapshotError: there are copies, and none is valid.
    """
    lease.take(wait=_is_restart())
    if config.snapshots.mirror:
        fetch(config.snapshots.mirror, output, say)
    run_id = run_there(output, header)
    if not run_id and (output / SNAPSHOTS).exists():
        raise TrainerError(
            f"{output} holds snapshots but no {RUN_FILE}: not a run's folder. Use another --output."
        )
    run_id = run_id or secrets.token_hex(8)
    record = {
        "run_id": run_id,
        **{name: header[name] for name in (*BOUND, "identity", "environment", "network")},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": dataclasses.asdict(config),
    }
    SnapshotFolder(output / SNAPSHOTS, config.snapshots.keep).sweep()
    _write_json(output / RUN_FILE, record)
    return run_id


def run_there(output: Path, header: dict[str, Any]) -> str:
    """Returns the id of the run whose folder it is, if this start goes on with it; "" where there is none.

    Raises:
      SnapshotMismatchError: it has other settings, another store or other parameters.
      TrainerError: its file is damaged.
    """
    if not (output / RUN_FILE).exists():
        return ""
    found = _read_claim(output / RUN_FILE, ("run_id", "identity", *BOUND))
    differences = [
        f"{name} {found[name]} there, {header[name]} now" for name in BOUND if found[name] != header[name]
    ]
    if differences:
        raise SnapshotMismatchError(
            str(output),
            differences + changed_settings(found["identity"], header["identity"], "there"),
            "Use the settings of the run that lives there, or another --output.",
        )
    return str(found["run_id"])


def identity_before(config: RunConfig) -> dict[str, Any] | None:
    """Returns the identity of the run that a start goes on with, in its folder or from a snapshot elsewhere.

    None for a new one, or one whose folder is still to be fetched.
    """
    output, resume = Path(config.output), config.snapshots.resume
    if (path := output / RUN_FILE).exists():
        return dict(_read_claim(path, ("run_id", "identity"))["identity"])
    # One that is damaged is refused where all ranks look at it.
    with contextlib.suppress(InvalidSnapshotError):
        return dict(read_manifest(Path(resume))["identity"]) if resume not in ("auto", "none") else None
    return None


def _read_claim(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Returns what a run's folder says about itself."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in names if name not in found]
    except (ValueError, TypeError) as error:
        raise TrainerError(f"{path} is damaged ({error}). {_REPAIR}") from error
    if missing:
        raise TrainerError(f"{path} is damaged (it has no {missing[0]!r}). {_REPAIR}")
    return dict(found)


def continue_run(
    trainer: Trainer,
    folder: SnapshotFolder,
    memory: SnapshotFolder | None,
    header: dict[str, Any],
    *,
    begun: bool = False,
) -> None:
    """Restores the newest valid snapshot, or the named one, if there is any.

    Args:
      trainer: goes there.
      folder: on disk.
      memory: in memory.
      header: of the run.
      begun: the run goes on by itself: from its own snapshots, whatever it was told to start from.
    """
    config, ranks, say = trainer.config, trainer.ranks, trainer.metrics.say
    resume = config.snapshots.resume
    named = resume not in ("auto", "none")
    # So does a restart by torchrun.
    begun = begun or _is_restart()
    if resume == "none" and not begun and folder.steps():
        raise TrainerConfigError(
            f"--resume none, but {folder.path} holds snapshots. Use another --output, or remove them."
        )
    expected = {name: value for name, value in header.items() if name not in ("environment", "network")}
    own = newest_valid(folder, ranks, say, memory, header["run_id"]) if begun or not named else None
    if own is None and not named:
        return
    generation = own or named_generation(Path(resume), ranks)
    if own is None:
        # The user names it on purpose, so another run's id is fine; everything else must agree.
        del expected["run_id"]
    check_belongs(generation, expected, header["environment"], strict=config.deterministic, report=say)
    network = generation.manifest.get("network", header["network"])
    if warning := network_warning(network, header["network"], config.reducer):
        say(warning)
    trainer.restore(generation, on_disk=generation.path.parent == folder.path)
    say(f"resumed: step {trainer.step}  {generation.path}  (made by {generation.manifest['world']} ranks)")
    if trainer.step > config.steps:
        say(f"warning: --steps {config.steps} is less than the {trainer.step} that are done; none is left")


def network_of(trainer: Trainer) -> dict[str, str]:
    """Returns how a run's gradients travel, for its records: transport, preset, variables, NCCL's version."""
    uses_nccl = trainer.ranks.device.type == "cuda" and trainer.ranks.world > 1
    version = ".".join(map(str, torch.cuda.nccl.version())) if uses_nccl else ""
    return nccl.record(trainer.transport, version)


def describe(trainer: Trainer, header: dict[str, Any]) -> None:
    """Tells the person at the terminal what is trained."""
    config, ranks = trainer.config, trainer.ranks
    sizes = [4 * bucket.numel for bucket in trainer.messages]
    plural = "" if len(sizes) == 1 else "s"
    other = {"precision": config.precision, "wire": config.wire, "compiled": config.compile and "yes"}
    further = "".join(f", {name} {value}" for name, value in other.items() if value not in ("fp32", False))
    trainer.metrics.say(
        f"run {header['run_id']}: {ranks.world} x {ranks.device.type}, "
        f"{sum(s.numel for s in trainer.flat.segments):,} parameters in {len(sizes)} bucket{plural} "
        f"(largest {max(sizes) / 2**20:.2f} MiB), reducer {config.reducer}{further}, "
        f"{config.data.global_batch} samples in {config.data.num_shards} virtual shards per step"
    )


def conclude(output: Path, header: dict[str, Any], outcome: Outcome) -> None:
    """Writes the result of a finished run; a stopped one has none. First rank only."""
    if outcome.stopped:
        return
    names = ("run_id", "config_digest", "store_fingerprint", "environment")
    result = {
        **{name: header[name] for name in names},
        "steps": outcome.step,
        "num_skipped": outcome.num_skipped,
        "weights_digest": outcome.weights_digest,
    }
    _write_json(output / RESULT_FILE, result)


def has_finished(output: Path, config: RunConfig) -> bool:
    """Returns whether a run's result is there, of as many steps as it is to have now."""
    path = output / RESULT_FILE
    return path.exists() and int(json.loads(path.read_text(encoding="utf-8"))["steps"]) >= config.steps


def report_goodput(metrics: Metrics, ledger: Ledger, reason: str) -> None:
    """Closes the ledger and prints where the time went, on the rank that keeps it."""
    found = ledger.end(reason)
    for line in found.lines() if found is not None else []:
        metrics.say(line)


def report(metrics: Metrics, outcome: Outcome, ledger: Ledger, meters: SourceMeters | None = None) -> None:
    """Prints how the run ended."""
    report_goodput(metrics, ledger, "stopped" if outcome.stopped else "finished")
    for line in meters.lines() if meters is not None else []:
        metrics.say(line)
    if outcome.stopped:
        metrics.say(f"stopped by SIGTERM after step {outcome.step}; the same command continues")
    metrics.say(f"weights_digest: {outcome.weights_digest}  step: {outcome.step}")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def watching(watch: StackWatch) -> Iterator[None]:
    """Watches while the block runs."""
    watch.start()
    try:
        yield
    finally:
        watch.stop()


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
