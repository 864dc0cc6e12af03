"""The training loop: one step from top to bottom, the commit point, and what is saved there.

    batch -> virtual shards: forward, backward (buckets leave while it runs)
          -> commit point: all buckets, then scalars and flags
          -> optimizer (or a skip that all ranks decide alike)
          -> metrics, snapshot

Invariant: nothing is applied before every bucket of the step has arrived on this rank, and a snapshot is
taken only between steps, so it is labelled with a number of completed steps and nothing is half done.
Does not own: process groups, signals, exit codes (launch.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from foldfeed.loader.batch import StepBatch
from foldfeed.loader.meters.reports import scalars as loader_scalars
from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.errors import DivergedError, RanksChangeError
from foldfeed.trainer.goodput import Ledger, Part
from foldfeed.trainer.gradients.buckets import auto_bucket_bytes, plan_buckets
from foldfeed.trainer.gradients.ddp import DdpReducer
from foldfeed.trainer.gradients.dyadic import Block, Division, usual_division
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.optimizer import FlatAdamW, Update
from foldfeed.trainer.gradients.probe import Link
from foldfeed.trainer.gradients.reducer import Reducer, TreeReducer
from foldfeed.trainer.gradients.transports import choose, wire_dtype
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.task import Task
from foldfeed.trainer.rng import seed_initial_weights, seed_shard
from foldfeed.trainer.state.snapshot import BUFFERS, EMA, Generation, checksum, replica_digest
from foldfeed.trainer.state.tiers import Saver
from foldfeed.trainer.training.commit import Commit, ShardResult, combine, shard_scalars
from foldfeed.trainer.training.compiling import compile_blocks
from foldfeed.trainer.training.metrics import Metrics, commit_scalars, memory_scalars
from foldfeed.trainer.training.source import Source
from foldfeed.trainer.training.traces import StepTraces
from foldfeed.trainer.training.watch import StackWatch, Stragglers, explain_skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: completed steps.
      stopped: True when a signal ended it before its last step.
      weights_digest: sha256 (hex) of the flat parameters.
      num_skipped: steps that were skipped.
    """

    step: int
    stopped: bool
    weights_digest: str
    num_skipped: int


class Trainer:
    """Model, flat buffers, reducer and optimizer of one rank.

    Attributes:
      model: the plain model (also inside DDP's wrapper).
      task: what is trained.
      flat: its buffers.
      buckets: the order in which the gradient's norm is summed; never changes.
      messages, transport: the buckets that are exchanged at once, and how; planned anew for other ranks.
      link: between the ranks, as it was measured; None where it was not.
      step: completed steps.
      num_skipped: steps skipped so far.
      saved: completed steps of the newest snapshot on disk, as far as this rank knows.
      stop_requested: set it (from a signal handler) to stop at the next commit point.
      check_peers: called before each virtual shard; raises CommunicationError when the step is in vain.
      leaves_alone: a rank that is asked to stop leaves the others alone, who meet anew; the last ones stop.
      invites: asked at each commit point whether the ranks should meet anew.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        source: Source,
        metrics: Metrics,
        task: Task,
    ) -> None:
        """Builds the model with weights that depend on the seed alone.

        Args:
          config: settings.
          ranks: the joined groups.
          source: of batches, and who is looked at now and then.
          metrics: where numbers go.
          task: gives model and loss.
        Raises:
          TrainerConfigError: more ranks than virtual shards.
          ReplicaMismatchError: the ranks built different layouts or weights.
        """
        config.check_world(ranks.world)
        self.config = config
        self.ranks = ranks
        self.source = source.batches
        self.metrics = metrics
        self.task = task
        self.held_out = source.held_out
        # Only the first rank reports; the others need not add up.
        self._meters = source.meters if ranks.is_first else None
        self.step = 0
        self.num_skipped = 0
        self.saved = 0
        self.stop_requested = self.leaves_alone = False
        self.check_peers: Callable[[], None] = lambda: None
        self.invites: Callable[[], bool] = lambda: False
        # Of the last snapshot.
        self._saver: Saver | None = None
        self._stall_s = 0.0
        self._not_finite_since = 0
        # The last step that looked at held-out records; a snapshot is taken after its step's look.
        self._looked = 0
        # Of the step under way, by virtual shard; None between steps. What is there when a step is broken off
        # belongs to the reducer's finished blocks, and both to the state before that step.
        self._results: dict[int, ShardResult] | None = None
        self._division = usual_division(config.data.num_shards, ranks.world)
        seed_initial_weights(config.seed)
        self.model = task.build()
        self.flat = FlatParameters(self.model, ranks.device)
        total = 4 * self.flat.numel
        self._bucket_bytes = int(config.bucket_mb * 2**20) or auto_bucket_bytes(total)
        self.buckets = plan_buckets(
            [segment.padded for segment in self.flat.segments], bucket_bytes=self._bucket_bytes
        )
        self.optimizer = FlatAdamW(self.flat.params, self.buckets, config.optimizer)
        ranks.require_equal(self.flat.layout_hash.encode(), "the parameter layout at the start")
        sums = {name: checksum(buffer) for name, buffer in self.host_buffers().items()}
        ranks.require_equal(replica_digest(sums), "the initial weights")
        self.link: Link | None = None
        self.reducer = self._make_reducer()
        self._forward: nn.Module = self.reducer.wrap(self.model)
        if config.compile:
            compile_blocks(task.compiled(self.model))
        self._traces = StepTraces(Path(config.output), config.profile_step, ranks.device)

    def begin_again(self, ranks: Ranks) -> None:
        """Goes to the state before the first step, whatever was done since; `meet` or `run` come next.

        Args:
          ranks: among whom a snapshot is looked for.
        """
        self.ranks, self._results = ranks, None
        if self.step:
            seed_initial_weights(self.config.seed)
            initial = FlatParameters(self.task.build()).params
            buffers = {
                name: torch.zeros_like(initial) if name.startswith("exp_avg") else initial
                for name in self.host_buffers()
            }
            self.take_over(buffers, {"step": 0, "num_updates": 0})
            self.num_skipped = self.saved = self._looked = self._not_finite_since = 0

    def kept(self) -> list[Block] | None:
        """Returns what this rank has of a step that was broken off; None between steps."""
        if not self._results:
            return None if self._results is None else []
        # Its thread has ended by now: the wires were cut and it was closed (`members.rank`).
        assert isinstance(self.reducer, TreeReducer), "the ranks of others do not change"
        return [block for block, _ in self.reducer.finished()]

    def meet(self, ranks: Ranks, state: Mapping[str, Any], division: Division, link: Link | None) -> None:
        """Goes on among other ranks: fresh message buffers, the same model and loader. A collective.

        Args:
          ranks: the new ones.
          state: `small_state` of a rank that completed as many steps as this one.
          division: of the next step, equal on all ranks.
          link: that an earlier generation measured, equal on all ranks; None: it is measured now.
        """
        before = self.reducer
        before.close()
        self.ranks, self.link = ranks, link
        # First: should it lose a rank, nothing of a broken step is given up.
        reducer = self._make_reducer()
        kept = {shard for block in division.kept[ranks.rank] for shard in block.shards}
        results = self._results or {}
        self._results = {shard: results[shard] for shard in kept} if kept else None
        self.reducer, self._division = reducer, division
        self.num_skipped = int(state["num_skipped"])
        self._not_finite_since = int(state["not_finite_since"])
        self._looked = int(state["looked"])
        if division.repairs:
            assert isinstance(before, TreeReducer), before
            assert isinstance(reducer, TreeReducer), reducer
            reducer.resume(division, before.finished())
        self._forward = reducer.wrap(self.model)
        # What is left to be computed of the next step may be nothing here.
        mine = division.shards[ranks.rank]
        first = mine if division.repairs and mine else None
        self.source.redivide(self.step + (not mine), ranks.rank, ranks.world, first)
        if self.held_out is not None:
            self.held_out.redivide(ranks)

    def small_state(self) -> dict[str, int]:
        """Returns what belongs to the state besides the flat buffers."""
        return {
            "step": self.step,
            "num_updates": self.optimizer.num_updates,
            "num_skipped": self.num_skipped,
            "not_finite_since": self._not_finite_since,
            "saved": self.saved,
            "looked": self._looked,
        }

    def _make_reducer(self) -> Reducer:
        num_shards = self.config.data.num_shards
        self.messages, self.transport = self.buckets, str(self.config.reducer)
        if self.config.reducer == "ddp":
            return DdpReducer(self.flat, self.ranks, num_shards, self._bucket_bytes)
        found = choose(self.config, self.ranks, self.flat.segments, self.link)
        self.messages, self.transport, self.link = list(found.buckets), found.name, found.link
        if found.why:
            self.metrics.say(f"gradients travel by {found.name}: {found.why}")
        return TreeReducer(
            self.flat,
            found.buckets,
            self.ranks,
            num_shards,
            make_exchange=found.make,
            wire=wire_dtype(self.config),
        )

    def run(self, saver: Saver, header: Mapping[str, Any], ledger: Ledger, watch: StackWatch) -> Outcome:
        """Trains up to the configured number of steps, or until asked to stop.

        Args:
          saver: where and when snapshots go.
          header: manifest entries of this run (run id, digests, environment).
          ledger: counts where the time goes.
          watch: is told when steps begin.
        Raises:
          CommunicationError: a rank died or stalled.
          RanksChangeError: a rank wants to join or to leave.
          ReplicaMismatchError: a rank's parameters or moments differ.
        """
        saver.begin(self.step)
        # A look that lost a rank is taken again.
        self._look()
        ledger.mark(Part.EVALUATION)
        stopped = False
        usual = usual_division(self.config.data.num_shards, self.ranks.world)
        stragglers = Stragglers([len(shards) for shards in usual.shards])
        nothing = [] if self._division.shards[self.ranks.rank] else [StepBatch(step=self.step, shards=[])]
        steps = itertools.chain(nothing, self.source)
        while self.step < self.config.steps and not stopped:
            watch.beat(self.step)
            self._traces.begin(self.step, self.ranks.rank)
            started = time.perf_counter()
            batch = next(steps)
            data_s = time.perf_counter() - started
            ledger.mark(Part.DATA)
            commit, update = self.train_step(batch, data_s, saver.failed)
            seconds = time.perf_counter() - started
            kind = Part.SKIPPED if update.skipped else Part.PRODUCTIVE
            ledger.mark(kind)
            # While another rank still waited for its batch, this one waited for that rank.
            ledger.move(kind, Part.DATA, min(max(commit.data_s) - data_s, self.reducer.times["exposed"]))
            ledger.move(kind, Part.SAVE, self._stall_s)
            self._log(commit, update, seconds)
            repaired, self._division = self._division.repairs, usual
            if not repaired and (line := stragglers.feed(commit.data_s, commit.compute_s, seconds)):
                self.metrics.say(line)
            if commit.save_failed:
                saver.check()
            stopped = commit.all_stop if self.leaves_alone else commit.stop
            ledger.mark(Part.OTHER)
            self._look()
            ledger.mark(Part.EVALUATION)
            self._watch_divergence(commit, update, saver)
            # While steps are skipped nothing changes, and the snapshots that are kept stay the ones before.
            memory, disk = (False, False) if self._not_finite_since else saver.due(self.step)
            disk = disk or stopped
            if memory or disk:
                self._begin_snapshot(saver, header, seconds, memory=memory, disk=disk)
            ledger.mark(Part.SAVE)
            ledger.step(self.step)
            if (commit.regroup or commit.stop) and not stopped and self.step < self.config.steps:
                self._end_snapshot()
                # Nobody leaves before all have applied the step: it need not be brought to them.
                self.ranks.gather_floats([0.0], "the end of a generation")
                raise RanksChangeError(self.step)
        self._end_snapshot()
        if self.saved != self.step:
            self._begin_snapshot(saver, header, 0.0, memory=False, disk=True)
            self._end_snapshot()
        saver.finish()
        ledger.mark(Part.SAVE)
        self._traces.end(self.step, self.ranks.rank)
        digest = self.weights_digest()
        self.ranks.require_equal(bytes.fromhex(digest), f"the final weights of step {self.step}")
        finished = self.step >= self.config.steps
        return Outcome(
            step=self.step, stopped=not finished, weights_digest=digest, num_skipped=self.num_skipped
        )

    def train_step(self, batch: StepBatch, data_s: float, save_failed: bool = False) -> tuple[Commit, Update]:
        """Runs one step: shards, commit point, optimizer.

        Args:
          batch: this rank's virtual shards of the step.
          data_s: seconds this rank waited for it.
          save_failed: this rank could not write a snapshot; all ranks learn it.
        """
        assert batch.step == self.step, f"the loader gave step {batch.step}, the model is at {self.step}"
        num_shards = self.config.data.num_shards
        results = self._results = self._results or {}

        started = time.perf_counter()
        self.reducer.begin()
        for shard in batch.shards:
            self.check_peers()
            with self.reducer.shard(shard.v):
                seed_shard(self.config.seed, batch.step, shard.v)
                with self._arithmetic(), record_function(f"trainer::shard[{shard.v}]::forward"):
                    loss = self.task.loss(self._forward, shard.features)
                with record_function(f"trainer::shard[{shard.v}]::backward"):
                    loss.total.backward()
            results[shard.v] = ShardResult.of(shard, loss, self.task.parts)

        scalars = [
            float(self.stop_requested),
            float(save_failed),
            float(self.invites()),
            data_s,
            # After the last backward was issued: on a GPU each `item` waits for the device.
            sum(int(result.num_residues.item()) for result in results.values()),
            time.perf_counter() - started,
            *shard_scalars(results, num_shards, len(self.task.parts)),
        ]
        with record_function("trainer::commit"):
            rows = self.reducer.finish(scalars)
        commit = combine(rows, num_shards, self.task.parts)

        self._end_snapshot()
        with record_function("trainer::optimizer"):
            update = self.optimizer.step(self.reducer.gradient, commit.num_samples, batch.step)
        self.step += 1
        self._results = None
        self.num_skipped += update.skipped
        if update.skipped:
            why = explain_skip(commit, results, self.ranks, self.reducer.not_finite)
            self.metrics.say(f"step {self.step} skipped on all ranks: {why}")
        return commit, update

    def _arithmetic(self) -> torch.autocast:
        """Returns the context of forward passes: what is computed in bfloat16, if anything."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _look(self) -> None:
        """Says how held-out records fare where this step looks at them. All ranks decide alike."""
        every = self.config.held_out.eval_every
        due = self.step > self._looked and (self.step % every == 0 or self.step == self.config.steps)
        if self.held_out is None or not due:
            return
        averaged = self.optimizer.averaged if self.config.held_out.eval_ema else contextlib.nullcontext
        with self._arithmetic(), averaged():
            found = self.held_out.look(self.model)
        self._looked = self.step
        self.metrics.say(
            f"held out: step {self.step}  "
            + "  ".join(f"{name}: {value:.4f}" for name, value in found.items())
        )
        self.metrics.note(self.step, {f"eval/{name}": value for name, value in found.items()})

    def _watch_divergence(self, commit: Commit, update: Update, saver: Saver) -> None:
        """Ends a run whose steps are all skipped. All ranks decide alike, from what they agreed on."""
        if not update.skipped or commit.num_samples == 0:
            self._not_finite_since = 0
            return
        self._not_finite_since = self._not_finite_since or self.step
        count = self.step - self._not_finite_since + 1
        # A shorter run of which every step was skipped has diverged, too.
        if self.config.max_skipped and count >= min(self.config.max_skipped, self.config.steps):
            saver.check()
            before = [step for step in saver.disk.steps() if step < self._not_finite_since]
            snapshot = str(saver.disk.generation_path(max(before))) if before else ""
            raise DivergedError(self._not_finite_since, count, snapshot)

    def _log(self, commit: Commit, update: Update, seconds: float) -> None:
        exposed, total = self.reducer.times["exposed"], self.reducer.times["total"]
        scalars = {
            **commit_scalars(commit, self.config.data.global_batch, seconds),
            "grad_norm": update.norm,
            "lr": update.learning_rate,
            "comm/exposed_ms": 1e3 * exposed,
            "comm/total_ms": 1e3 * total,
            "comm/hidden_pct": 100.0 * max(0.0, 1.0 - exposed / total) if total else 0.0,
            "ckpt/stall_ms": 1e3 * self._stall_s,
            "ft/world_size": float(self.ranks.world),
            "ft/generation": float(self.ranks.generation),
            "train/skipped": float(update.skipped),
            "train/num_skipped": float(self.num_skipped),
            **memory_scalars(self.ranks.device),
            **({} if self._meters is None else loader_scalars(self._meters())),
        }
        self.metrics.log(self.step, scalars)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the flat buffers that make up the state, by name: parameters, moments, average if any."""
        tensors = (self.flat.params, self.optimizer.exp_avg, self.optimizer.exp_avg_sq)
        average = {} if self.optimizer.ema is None else {EMA: self.optimizer.ema}
        return dict(zip(BUFFERS, tensors, strict=True)) | average

    def host_buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers of the state on the CPU, by name; there they alias the live ones."""
        return {name: tensor.cpu() for name, tensor in self.state().items()}

    def _begin_snapshot(
        self, saver: Saver, header: Mapping[str, Any], step_s: float, *, memory: bool, disk: bool
    ) -> None:
        """Has the state after this step summed up and copied while the next one computes."""
        manifest = {
            **header,
            "step": self.step,
            "num_updates": self.optimizer.num_updates,
            "num_skipped": self.num_skipped,
            "world": self.ranks.world,
            "loader": self.source.state_dict(),
        }
        self._saver, device = saver, self.ranks.device
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def state() -> dict[str, torch.Tensor]:
            if ready is None:
                return self.host_buffers()
            # On a stream of its own, or every kernel of the next step would wait for the copy.
            with torch.cuda.stream(torch.cuda.Stream(device)):
                torch.cuda.current_stream(device).wait_event(ready)
                return self.host_buffers()

        saver.begin_snapshot(manifest, state, step_s, memory=memory, disk=disk)

    def _end_snapshot(self) -> None:
        """Ends the snapshot under way, before the state may change. A collective.

        Raises:
          ReplicaMismatchError: a rank's parameters or moments differ; nothing is written.
        """
        self._stall_s, on_disk = self._saver.end_snapshot() if self._saver is not None else (0.0, False)
        self.saved = self.step if on_disk else self.saved

    def restore(self, generation: Generation, *, on_disk: bool = True) -> None:
        """Continues from a validated generation; one that is not on the run's disk is to be written there."""
        self.take_over(generation.buffers, generation.manifest)
        self.num_skipped = int(generation.manifest["num_skipped"])
        self._looked = self.step
        self.saved = self.step if on_disk else -1
        self.source.load_state_dict(generation.manifest["loader"])

    def take_over(self, buffers: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Sets buffers and counts to those of a snapshot or of another rank.

        Args:
          buffers: fp32 (numel,) on the CPU, by name.
          state: ``step`` and ``num_updates``.
        """
        for name, tensor in self.state().items():
            tensor.copy_(buffers[name])
        self.optimizer.num_updates = int(state["num_updates"])
        self.step = int(state["step"])
        self._results = None

    def weights_digest(self) -> str:
        """Returns the sha256 (hex) of the flat parameters."""
        return hashlib.sha256(self.flat.params.cpu().numpy().data.cast("B")).hexdigest()
