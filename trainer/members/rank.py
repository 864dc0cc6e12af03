"""One rank of an elastic run: ranks may die, stop, be cut off and come while the others keep what they have.

A rank that loses a peer drops its wires, not its process: memory, model, loader and device stay. The ranks
that are left agree on a generation (membership.py), connect, bring those that are behind or new to the
furthest one's step (raw bytes and crc32c, from live peers), and finish the broken step: sums of virtual
shards that somebody has stay where they are, only the others are computed. Equal bits follow from the
reducer, for whom it makes no difference which rank has what.

Where nobody has the state in memory, at a start above all, all of them choose a snapshot (resume.py). So they
do when the digests that they compare before each snapshot differ: what the odd rank computed is in all sums
since the last comparison, so all go back to that one. A rank that is odd for the second time leaves the run
when they have.

The first rank writes: metrics, ledger, snapshots. A new first rank takes all three over; a former one that
wakes up finds a later generation before it publishes anything (`Membership.require_current`), joins again as
a new rank and gets the state from the others.

Does not own: starting processes (elastic.py), who is a member, the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.elastic import Plan
from foldfeed.trainer.errors import (
    CommunicationError,
    ExcludedError,
    LeaseHeldError,
    RanksChangeError,
    ReplicaMismatchError,
    TrainerConfigError,
    TrainerError,
)
from foldfeed.trainer.goodput import Ledger, Part, process_start
from foldfeed.trainer.gradients.probe import Link
from foldfeed.trainer.groups.ranks import SHARED, Group, Ranks, pick_device, speaker
from foldfeed.trainer.groups.topology import own_place
from foldfeed.trainer.groups.wire import MeshGroup
from foldfeed.trainer.members.agreement import View
from foldfeed.trainer.members.membership import Limits, Membership
from foldfeed.trainer.members.session import Session, new_session, publish, read_session
from foldfeed.trainer.members.transfer import (
    divide_step,
    nccl_groups,
    require_equal_settings,
    settings_of,
    transfer,
)
from foldfeed.trainer.models.task import Task, load_task
from foldfeed.trainer.training import launch
from foldfeed.trainer.training.compiling import settle
from foldfeed.trainer.training.data import open_data
from foldfeed.trainer.training.loop import Outcome
from foldfeed.trainer.training.process import Process, has_finished, identity_before, network_of
from foldfeed.trainer.training.source import Source

CHANNELS = ("scatter", "gather", "scalars", "state")
# Changes of ranks in a row without a completed step, after which something must be wrong for good.
MAX_FRUITLESS = 20
# For others to come where all were lost: they may as well join later.
REFOUND_WAIT_S = 5.0


def run(config: RunConfig, plan: Plan) -> Outcome | None:
    """Trains as one rank of an elastic run; returns None when the run ended without needing this one.

    Raises:
      TrainerConfigError: the settings do not fit.
      TrainerError: this rank failed; the others go on without it if they can.
    """
    config.check_elastic(plan.ranks)
    task = load_task(config)
    recipe = task.recipe(config.data)
    ledger = Ledger(Path(config.output), active=plan.founds, began=process_start())
    ledger.mark(Part.STARTUP)
    launch.prepare_numerics(config)
    device = pick_device(config.device, plan.local_rank, config.nccl_preset)
    alone = Ranks(rank=0, world=1, device=device)
    if plan.standby >= 0 and alone.device.type != "cpu":
        raise TrainerConfigError(
            "--spares works on the CPU only: a spare cannot know whose GPU will be free."
        )
    ledger.mark(Part.INITIALIZATION)
    config = settle(config, task, alone, identity_before, speaker(plan.founds))
    # A rank's number may change, a process's not.
    trace = f"{config.loader_trace}.process{os.getpid()}" if config.loader_trace else ""
    with open_data(config, task, recipe, alone, plan.local_rank, trace) as source:
        return ElasticRank(config, plan, alone, source, task, ledger).train()


class ElasticRank(Process):
    """State of one rank over all generations; see the module docstring."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        alone: Ranks,
        source: Source,
        task: Task,
        ledger: Ledger,
    ) -> None:
        """Builds model and buffers; meets nobody yet.

        Args:
          config: settings.
          plan: how to begin.
          alone: this process without others.
          source: of batches.
          task: what is trained.
          ledger: that has counted the time since the process started.
        """
        super().__init__(config, task, alone, source, ledger, may_lead=True)
        self.plan, self.alone = plan, alone
        self.trainer.check_peers = self._check_peers
        self.trainer.leaves_alone = plan.torchrun
        self.trainer.invites = lambda: self.membership is not None and self.membership.invites()
        self.membership: Membership | None = None
        self._groups: list[Group] = []
        self._has_state = False
        self._begins = False
        # Why the states since the last snapshot are not to be trusted.
        self._doubt: dict[str, Any] | None = None
        # The votes in which this rank was odd, by generation and what was compared.
        self._odd_in: set[tuple[int, str]] = set()
        self._place = own_place()
        self._reason = "finished"
        self._fruitless = 0
        self._phases: dict[str, float] = {}

    def train(self) -> Outcome | None:
        """Runs until the last step, a stop that was asked for, or an error of this rank's own."""
        try:
            if self.plan.standby >= 0 and not self._is_needed():
                return None
            view = self._found() if self.plan.founds else self._join()
            if view is None:
                return None
            with launch.stop_on_sigterm(self.trainer):
                return self._train(view)
        except BaseException as error:
            self._reason = f"failed: {type(error).__name__}"
            self.fail()
            raise
        finally:
            if self.membership is not None:
                if self._reason != "finished" and len(self.membership.view.members) > 1:
                    # It is the others' as much, and they may go on at once.
                    self.lease.let_go()
                self.membership.leave(self._reason)
            self._part()
            self.lease.release()
            self.metrics.close()

    def _is_needed(self) -> bool:
        """Waits as a spare, with all built; returns False where the launcher, which would tell, is gone."""
        with socket.socket(fileno=self.plan.standby) as launcher:
            try:
                launcher.sendall(b".")
                return launcher.recv(1) != b""
            except ConnectionError:
                return False

    def _train(self, view: View | None) -> Outcome | None:
        while view is not None:
            step = self.trainer.step
            try:
                return self.work(self._meet(view))
            except (CommunicationError, ExcludedError, RanksChangeError, ReplicaMismatchError) as error:
                if isinstance(error, ReplicaMismatchError):
                    self._distrust(error)
                self._fruitless = 0 if self.trainer.step > step else self._fruitless + 1
                if self._fruitless > MAX_FRUITLESS:
                    raise CommunicationError(
                        self.trainer.ranks.rank, f"{MAX_FRUITLESS} meetings in a row", str(error)
                    ) from error
                if self.plan.torchrun and self.trainer.stop_requested:
                    self._leave()
                    return None
                view = self._regroup(error)
        return None

    def _leave(self) -> None:
        """Leaves the run to the ranks of other machines; those of this one are to stop."""
        self._reason = "asked to leave"
        print(f"leaving after step {self.trainer.step}, as asked; ranks of others may go on", flush=True)
        if self.saver is not None:
            self.saver.close()

    def _check_peers(self) -> None:
        """Ends a step that cannot be completed before its next shard is computed."""
        if self.membership is not None and (reason := self.membership.ending.reason):
            raise CommunicationError(self.trainer.ranks.rank, "a step", reason)

    def _distrust(self, error: ReplicaMismatchError) -> None:
        """Gives the states since the last snapshot up, after a vote on them that was not unanimous."""
        assert self.membership is not None
        view = self.membership.view
        self._doubt = {
            "generation": view.generation,
            "what": error.what,
            "error": str(error),
            "odd_uids": [view.uids[rank] for rank in error.odd_ranks],
        }
        self._has_state = False
        self.metrics.say(f"warning: {error}")

    def _require_sound(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Ends this rank if it was odd in two votes; every rank that was there learns of them all.

        A rank whose vote was cut off, because the first that saw its result had left, learns it here.

        Args:
          rows: what every rank said when it came.
        Raises:
          TrainerError: it was.
        """
        assert self.membership is not None
        for doubt in (row["doubt"] for row in rows):
            if doubt is not None and self.membership.me.uid in doubt["odd_uids"]:
                self._odd_in.add((doubt["generation"], doubt["what"]))
                if len(self._odd_in) > 1:
                    raise TrainerError(f"this rank leaves, having differed twice: {doubt['error']}")

    def _regroup(self, error: Exception) -> View | None:
        """Leaves the generation that is over; returns the next one of this rank, None if the run ended."""
        assert self.membership is not None, "only a member can lose the others"
        stopped = time.monotonic()
        self.ledger.mark(Part.OTHER if isinstance(error, RanksChangeError) else Part.WASTED)
        self._part()
        ending = self.membership.ending
        noticed = min(ending.noticed, stopped) if ending.reason else stopped
        # What the lost one was silent for before it was noticed, and what this rank did until it stopped.
        self._phases = {"detect_s": ending.silent_s, "stop_s": stopped - noticed}
        self.ledger.move(Part.WASTED, Part.DETECTION, ending.silent_s)
        print(f"generation {self.membership.view.generation} is over: {ending.reason or error}", flush=True)
        try:
            view: View | None = self.membership.regroup(self.trainer.step if self._has_state else -1)
        except ExcludedError as excluded:
            print(f"{excluded}; joining again", flush=True)
            view = self._come_back()
        self._phases["agree_s"] = time.monotonic() - stopped
        return view

    def _come_back(self) -> View | None:
        """Joins again after the others went on; what this rank holds may be behind and is not used."""
        assert self.membership is not None
        self.membership.leave("excluded")
        self._has_state = False
        # Writes under way end by themselves and publish nothing: this rank is not first any more.
        self.saver = None
        self._follow()
        self.ledger.follow()
        # If it begins the run again, then as a replacement does, not as one of the first ranks.
        self._begins = False
        self.plan = dataclasses.replace(self.plan, founds=False, refounds=True, launch="")
        return self._join()

    def _part(self) -> None:
        """Gives the wires of a generation back: first they are cut, so that no thread is left in them."""
        for group in self._groups:
            group.abort("the ranks part")
        self.trainer.reducer.close()
        for group in self._groups:
            group.close()
        self._groups = []

    def _found(self) -> View:
        """Opens the run's folder and waits for the others."""
        self.metrics.active = True
        self.header["run_id"] = self.claim()
        self._begins = True
        # Ranks of the launcher that began the run may still be on their way.
        launcher = self.plan.launch or read_session(self.output).launch
        session = new_session(self.output, launcher, self.lease.token)
        (membership := self._membership(session)).found()
        publish(self.output, session)
        if self.plan.begun >= 0:
            os.write(self.plan.begun, b".")
        ranks, wait_s = self.plan.ranks, self.plan.wait_s if self.plan.is_start else REFOUND_WAIT_S
        if (came := membership.gather(ranks, wait_s)) < ranks:
            self.metrics.say(f"{came} of {ranks} ranks came within {wait_s:g} s; the others may join later")
        self.ledger.mark(Part.INITIALIZATION)
        return membership.regroup(-1)

    def _restore(self, ranks: Ranks) -> None:
        """Goes to the newest valid snapshot, where nobody has the state in memory. A collective."""
        self.ledger.mark(Part.PREPARATION)
        self.metrics.active = ranks.is_first
        if self.saver is not None:
            self.saver.settle_memory()
        self.trainer.begin_again(ranks)
        self.header["network"] = network_of(self.trainer)
        begun = ranks.gather_json(self.plan.refounds or ranks.generation > 1, "the choice of a snapshot")[0]
        self.restore(begun=begun)
        self.ledger.mark(Part.RESTORE)
        self._has_state, self._doubt = True, None

    def _join(self) -> View | None:
        """Joins the session that lives in the folder, or begins the run again when all its ranks are gone.

        None when it finished without this rank.
        """
        deadline, tried = time.monotonic() + self.plan.wait_s, ""
        while True:
            session = read_session(self.output)
            run_id = self.run_there()
            if run_id and session.name not in ("", tried) and self.plan.launch in ("", session.launch):
                tried = session.name
                # Whoever of its ranks is left may have to write.
                self.header["run_id"], self.lease.token = run_id, session.lease
                membership = self._membership(session)
                try:
                    return membership.join(self.plan.wait_s)
                except ExcludedError:
                    membership.leave("nobody is there")
                    self.membership = None
                if has_finished(self.output, self.config) and read_session(self.output).name == tried:
                    print(f"the run in {self.output} has finished without this rank", flush=True)
                    return None
            if self.plan.may_found:
                # Of several that do, the lease lets one begin; the others find its session.
                with contextlib.suppress(LeaseHeldError):
                    return self._found()
            if time.monotonic() > deadline:
                raise TrainerError(
                    f"no run lives in {self.output}: none of its ranks could be reached for "
                    f"{self.plan.wait_s:g} s. Start it without --join, and look whether --host is right"
                )
            time.sleep(0.1)

    def _membership(self, session: Session) -> Membership:
        shards = self.config.data.num_shards
        limits = Limits(
            silent_s=self.plan.silent_s,
            timeout_s=self.config.timeout_s,
            max_members=min(self.plan.max_ranks or shards, shards),
        )
        self.membership = Membership(self.output, session, self.plan.host, self._place, limits)
        return self.membership

    def _meet(self, view: View) -> Ranks:
        """Connects the members, brings them to one step, and hands out what the first rank does."""
        assert self.membership is not None
        started = time.monotonic()
        ranks, state = self._connect(view)
        self._phases["form_s"] = time.monotonic() - started
        self.ledger.mark(Part.REFORM)
        rows = self._compare(ranks)
        if any(row["doubt"] for row in rows) or max(row["small"]["step"] for row in rows) < 0:
            # A start; or those who had the state are gone, and those who came for it are left.
            self._restore(ranks)
            found, rows = rows, self._compare(ranks)
            # Not before all have gone back: nobody else may know yet that they have to.
            self._require_sound(found)
        smalls, places = ([row[name] for row in rows] for name in ("small", "place"))
        row = transfer(state, self.trainer, smalls, places, ranks)
        donor = rows[row]
        self._has_state = True
        if ranks.is_first:
            # One that was stopped in this meeting may be left out by now, and its files another one's.
            self.membership.require_current()
            self.lease.hold()
            self.metrics.lead(self.trainer.step, (donor["last"][0], donor["last"][1]))
        else:
            self._follow()
        division, shards = divide_step(rows, self.config.data.num_shards)
        link = Link(**donor["link"]) if donor["link"] else None
        self.trainer.meet(ranks, donor["small"], division, link)
        self.header["network"] = network_of(self.trainer)
        # What a first rank that is gone was about to write may be missing: all write once more at the end.
        self.trainer.saved = donor["small"]["saved"] if view.generation == 1 else -1
        self._phases["transfer_s"] = time.monotonic() - started - self._phases["form_s"]
        self.ledger.mark(Part.TRANSFER)
        self._note(view, ranks, shards)
        self.renew_saver(ranks)
        if view.generation == 1:
            self.describe()
        return ranks

    def _follow(self) -> None:
        self.metrics.follow()
        self.lease.let_go()

    def may_write(self, *, first: bool = True) -> None:
        """Checks as well that the ranks have not gone on without this one; raises ExcludedError, too."""
        assert self.membership is not None
        self.lease.require()
        self.membership.require_current(first=first)

    def _connect(self, view: View) -> tuple[Ranks, MeshGroup]:
        """Makes the groups of a generation; returns them, and the one for states."""
        assert self.membership is not None
        self._phases.setdefault("agree_s", 0.0)
        scatter, gather, control, states = self.membership.connect(CHANNELS)
        self._groups = [scatter, gather, control, states]
        ranks = Ranks(
            rank=view.uids.index(self.membership.me.uid),
            world=len(view.members),
            device=self.alone.device,
            scatter=scatter,
            gather=gather,
            control=control,
            generation=view.generation,
        )
        if ranks.device.type == "cuda" and self.config.device != SHARED and ranks.world > 1:
            pair = nccl_groups(ranks, self.plan.host, self.config.timeout_s, self.config.nccl_preset)
            for group in pair:
                self.membership.attach(group)
            self._groups += pair
            ranks = dataclasses.replace(ranks, scatter=pair[0], gather=pair[1])
        return ranks, states

    def _compare(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Returns what every rank says of itself.

        Raises:
          TrainerConfigError: on a rank whose settings are not those of the first one with a state.
          CommunicationError: on the others; they meet again without it.
        """
        small = self.trainer.small_state()
        mine = {
            "settings": settings_of(self.header, self.config.deterministic),
            "small": small if self._has_state else {**small, "step": -1},
            "kept": self.trainer.kept() if self._has_state else None,
            "last": self.metrics.last,
            "doubt": self._doubt,
            "place": self._place,
            "link": dataclasses.asdict(self.trainer.link) if self.trainer.link else None,
        }
        rows = ranks.gather_json(mine, "the meeting of the ranks")
        require_equal_settings(rows, ranks.rank)
        return list(rows)

    def _note(self, view: View, ranks: Ranks, shards: dict[str, int]) -> None:
        """Tells ledger and person who trains now, and what the change cost."""
        budget = {name: round(seconds, 4) for name, seconds in self._phases.items()}
        self.ledger.mark(Part.REFORM)
        if self._begins:
            self.ledger.start(self.trainer.step, ranks.world)
        self._begins = False
        now = {"step": self.trainer.step, "world": ranks.world, "generation": view.generation}
        self.ledger.regroup(ranks.is_first, **now, **budget, **shards)
        costs = "  ".join(f"{name.removesuffix('_s')} {seconds:.3f} s" for name, seconds in budget.items())
        kept = f" ({shards['shards_kept']} of its virtual shards are there)" if shards else ""
        told = f"{ranks.world} ranks go on from step {self.trainer.step}{kept}"
        self.metrics.say(f"generation {view.generation}: {told}  {costs}")
