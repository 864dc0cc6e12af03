"""What one process of a run holds, and what it does with the run's folder: claim it, go on from it, conclude.

A folder belongs to one run. Starting again in it continues that run (``--resume auto``), also with another
number of ranks; other settings are refused. See launch.py for what lies in it.

Does not own: who the ranks are (launch.py, members/rank.py), the step (loop.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foldfeed.feature_store.storage import LocalBlobs
from foldfeed.loader.meters.reports import table
from foldfeed.trainer.config import RunConfig, digest_of
from foldfeed.trainer.errors import (
    InvalidSnapshotError,
    SnapshotMismatchError,
    TrainerConfigError,
    TrainerError,
)
from foldfeed.trainer.goodput import Ledger
from foldfeed.trainer.groups import nccl
from foldfeed.trainer.groups.ranks import SHARED, Ranks
from foldfeed.trainer.models.task import Task, identity
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
from foldfeed.trainer.training.loop import Outcome, Trainer
from foldfeed.trainer.training.metrics import Metrics
from foldfeed.trainer.training.source import Source
from foldfeed.trainer.training.watch import StackWatch

RESULT_FILE = "result.json"
# What a folder's run must have in common with a start in it.
BOUND = ("config_digest", "layout_hash", "store_fingerprint")

# The run id in run.json is also in the manifest of every snapshot, so a new run.json cannot take its place.
_REPAIR = (
    "Restore it from a copy; or start in another --output, with --resume OUTPUT/snapshots/step-N to go on "
    "from a snapshot of this one."
)


class Process:
    """What one process of a run holds, whoever its peers are.

    Attributes:
      output: the run's folder.
      header: manifest entries of this run (run id, digests, environment).
      metrics, trainer, lease, ledger: of this process.
      saver: writes snapshots among the present ranks; None before they met.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        ranks: Ranks,
        source: Source,
        ledger: Ledger,
        *,
        may_lead: bool = False,
    ) -> None:
        """Builds model and buffers, after the ranks have compared their settings. A collective.

        Args:
          config: settings.
          task: what is trained.
          ranks: the joined groups.
          source: of batches.
          ledger: that has counted the time since the process started; the rank that writes it writes metrics.
          may_lead: it may have to write metrics later.
        """
        self.output = Path(config.output)
        self.config, self.ledger = config, ledger
        settings = identity(config, task)
        self.header: dict[str, Any] = {
            "run_id": "",
            "config_digest": digest_of(settings),
            "identity": settings,
            "store_fingerprint": source.fingerprint,
            "environment": environment(
                ranks.device, torch.get_num_threads(), config.deterministic, config.compile
            ),
        }
        own = json.dumps([self.header["config_digest"], source.fingerprint])
        ranks.require_equal(own.encode(), "settings and store")
        if config.deterministic:
            _require_one_environment(self.header["environment"], ranks)
        self.metrics = Metrics(config, active=ledger.active, may_lead=may_lead)
        self.trainer = Trainer(config, ranks, source, self.metrics, task)
        self.header |= {"layout_hash": self.trainer.flat.layout_hash, "network": network_of(self.trainer)}
        self.lease = Lease(self.output, config.lease_s, self.metrics.say)
        self.saver: Saver | None = None
        url, keep = config.snapshots.mirror, config.snapshots.keep
        self._mirror = Mirror(url, keep, self.metrics.say) if url else None
        self._meters = source.meters

    def may_write(self, *, first: bool = True) -> None:
        """Checks that this process may write a snapshot for the run.

        Args:
          first: what the first rank alone writes; otherwise what each machine does.
        Raises:
          LeaseLostError: another run has taken the folder over.
        """
        if self.trainer.ranks.is_first:
            self.lease.require()

    def _folders(self) -> tuple[SnapshotFolder, SnapshotFolder | None]:
        """Returns where snapshots lie: on disk, and in this machine's memory."""
        config = self.config.snapshots
        folder = SnapshotFolder(self.output / SNAPSHOTS, config.keep, self.may_write)
        may_write = functools.partial(self.may_write, first=False)
        return folder, memory_folder(config.memory, self.header["run_id"], may_write)

    def renew_saver(self, ranks: Ranks) -> None:
        """Writes snapshots among these ranks from now on. A collective."""
        self.saver = Saver(
            *self._folders(), ranks, self.config.snapshots, self.metrics.say, self.saver, self._mirror
        )

    def claim(self) -> str:
        """Makes the folder this run's, or checks that it is; returns the run id. First rank only.

        An empty folder gets what the run's URL of copies holds.

        Raises:
          LeaseHeldError: another run lives there.
          NoValidSnapshotError: there are copies, and none is valid.
        """
        self.lease.take(wait=_is_restart())
        if self.config.snapshots.mirror:
            fetch(self.config.snapshots.mirror, self.output, self.metrics.say)
        run_id = self.run_there()
        snapshots = SnapshotFolder(self.output / SNAPSHOTS, self.config.snapshots.keep)
        if not run_id and snapshots.steps():
            raise TrainerError(
                f"{self.output} holds snapshots but no {RUN_FILE}: not a run's folder. Use another --output."
            )
        run_id = run_id or secrets.token_hex(8)
        record = {
            "run_id": run_id,
            **{name: self.header[name] for name in (*BOUND, "identity", "environment", "network")},
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": dataclasses.asdict(self.config),
        }
        snapshots.sweep()
        _write_json(self.output, RUN_FILE, record)
        return run_id

    def run_there(self) -> str:
        """Returns the id of the run whose folder it is, if this start goes on with it; "" where none is.

        Raises:
          SnapshotMismatchError: it has other settings, another store or other parameters.
          TrainerError: its file is damaged.
        """
        path, header = self.output / RUN_FILE, self.header
        if not path.exists():
            return ""
        found = _read_claim(path, ("run_id", "identity", *BOUND))
        differences = [
            f"{name} {found[name]} there, {header[name]} now" for name in BOUND if found[name] != header[name]
        ]
        if differences:
            raise SnapshotMismatchError(
                str(self.output),
                differences + changed_settings(found["identity"], header["identity"], "there"),
                "Use the settings of the run that lives there, or another --output.",
            )
        return str(found["run_id"])

    def restore(self, *, begun: bool = False) -> None:
        """Restores the newest valid snapshot, or the named one, if there is any.

        Args:
          begun: the run goes on by itself: from its own snapshots, whatever it was told to start from.
        """
        config, trainer, header, say = self.config, self.trainer, self.header, self.metrics.say
        ranks = trainer.ranks
        folder, memory = self._folders()
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
        made_by = f"made by {generation.manifest['world']} ranks"
        say(f"resumed: step {trainer.step}  {generation.path}  ({made_by})")
        if trainer.step > config.steps:
            say(
                f"warning: --steps {config.steps} is less than the {trainer.step} that are done; none is left"
            )

    def work(self, ranks: Ranks) -> Outcome:
        """Trains to the end, and writes and prints the result; raises as `Trainer.run`."""
        assert self.saver is not None, "the ranks have met"
        watch = StackWatch(self.output, ranks.rank, ranks.world, self.config.timeout_s, self.metrics.say)
        watch.start()
        try:
            outcome = self.trainer.run(self.saver, self.header, self.ledger, watch)
        finally:
            watch.stop()
            # A snapshot that an error has overtaken: what comes next may change the state.
            self.saver.drop_snapshot()
        ranks.first_does(lambda: self._conclude(outcome), "writing the result")
        self._report(outcome)
        return outcome

    def describe(self) -> None:
        """Tells the person at the terminal what is trained."""
        config, trainer, ranks = self.config, self.trainer, self.trainer.ranks
        sizes = [4 * bucket.numel for bucket in trainer.messages]
        plural = "" if len(sizes) == 1 else "s"
        other = {"precision": config.precision, "wire": config.wire, "compiled": config.compile and "yes"}
        told = {name: value for name, value in other.items() if value not in ("fp32", False)}
        further = "".join(f", {name} {value}" for name, value in told.items())
        self.metrics.say(
            f"run {self.header['run_id']}: {ranks.world} x {ranks.device.type}, "
            f"{sum(s.numel for s in trainer.flat.segments):,} parameters in {len(sizes)} bucket{plural} "
            f"(largest {max(sizes) / 2**20:.2f} MiB), reducer {config.reducer}{further}, "
            f"{config.data.global_batch} samples in {config.data.num_shards} virtual shards per step"
        )

    def _conclude(self, outcome: Outcome) -> None:
        """Writes the result of a finished run; a stopped one has none. First rank only."""
        if outcome.stopped:
            return
        names = ("run_id", "config_digest", "store_fingerprint", "environment")
        result = {
            **{name: self.header[name] for name in names},
            "steps": outcome.step,
            "num_skipped": outcome.num_skipped,
            "weights_digest": outcome.weights_digest,
        }
        _write_json(self.output, RESULT_FILE, result)

    def fail(self) -> None:
        """Ends what writes, after an error that is on its way already."""
        if self.saver is not None:
            self.saver.close()
        # A full disk, or a ledger that was removed, must not hide that error.
        with contextlib.suppress(OSError, TrainerError):
            self._report_goodput("failed")

    def _report_goodput(self, reason: str) -> None:
        """Closes the ledger and prints where the time went, on the rank that keeps it."""
        found = self.ledger.end(reason)
        for line in found.lines() if found is not None else []:
            self.metrics.say(line)

    def _report(self, outcome: Outcome) -> None:
        """Prints how the run ended."""
        self._report_goodput("stopped" if outcome.stopped else "finished")
        for line in table(self._meters()) if self._meters is not None else []:
            self.metrics.say(line)
        if outcome.stopped:
            self.metrics.say(f"stopped by SIGTERM after step {outcome.step}; the same command continues")
        self.metrics.say(f"weights_digest: {outcome.weights_digest}  step: {outcome.step}")


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


def network_of(trainer: Trainer) -> dict[str, str]:
    """Returns how a run's gradients travel, for its records: transport, preset, variables, NCCL's version."""
    uses_nccl = (
        trainer.ranks.device.type == "cuda" and trainer.config.device != SHARED and trainer.ranks.world > 1
    )
    version = ".".join(map(str, torch.cuda.nccl.version())) if uses_nccl else ""
    return nccl.record(trainer.transport, version)


def has_finished(output: Path, config: RunConfig) -> bool:
    """Returns whether a run's result is there, of as many steps as it is to have now."""
    path = output / RESULT_FILE
    try:
        return path.exists() and int(json.loads(path.read_text(encoding="utf-8"))["steps"]) >= config.steps
    except (ValueError, TypeError, KeyError) as error:
        raise TrainerError(
            f"{path} is damaged ({error!r}). Remove it; a start without --join writes it anew."
        ) from error


def _write_json(folder: Path, name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    LocalBlobs(folder).write_atomic(name, text.encode())
