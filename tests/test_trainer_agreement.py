"""The rules of who trains, without processes: any order of losses, doubts, crashes, joins and late messages.

Nodes here are the main threads of ranks: they contribute to a step, apply it once all members contributed
(some may crash in between), leave a generation for good when they lose sight of somebody, and go on by what
`propose` and the register say. What they believe of each other may be wrong in every way but one: nobody
takes a living process for one that is known to have ended.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foldfeed.trainer.errors import TrainerError
from foldfeed.trainer.members.agreement import (
    FolderRegister,
    Member,
    Report,
    View,
    may_propose,
    propose,
)

TIMEOUT_S = 100.0
PATIENCE_S = 10.0
MAX_MEMBERS = 5


def member(uid: str) -> Member:
    return Member(uid=uid, host="h", port=1, identity={})


def view_of(uids: str, generation: int = 3, step: int = 7) -> View:
    return View(generation=generation, step=step, members=tuple(map(member, uids)))


class MemoryRegister:
    """Claims in memory: what link(2) does in a folder."""

    def __init__(self) -> None:
        self.views: dict[int, View] = {}

    def latest(self) -> View | None:
        return self.views[max(self.views)] if self.views else None

    def claim(self, view: View) -> bool:
        return self.views.setdefault(view.generation, view) is view


@dataclasses.dataclass
class Node:
    uid: str
    view: View
    step: int
    # trains, or has left its generation (and then reports), or met but waits for the others
    phase: str = "met"
    doubts: set[str] = dataclasses.field(default_factory=set)
    reports: dict[tuple[int, str], Report] = dataclasses.field(default_factory=dict)
    joiners: list[str] = dataclasses.field(default_factory=list)


class Agreement(RuleBasedStateMachine):
    """Invariants are checked by every rule; the end must find all who live in one generation."""

    def __init__(self) -> None:
        super().__init__()
        self.register = MemoryRegister()
        self.nodes: dict[str, Node] = {}
        self.joining: list[str] = []
        self.claims: list[View] = []
        self.mail: list[tuple[str, str, tuple[int, Report]]] = []
        self.offers: dict[int, dict[str, int]] = {}
        self.gave: dict[tuple[int, int], set[str]] = {}
        self.newest_completed = -1
        self.count = 0

    def new_uid(self) -> str:
        self.count += 1
        return f"n{self.count:03d}"

    @initialize(world=st.integers(1, 5))
    def begin(self, world: int) -> None:
        uids = [self.new_uid() for _ in range(world)]
        first = View(generation=0, step=0, members=tuple(map(member, uids)))
        assert self.register.claim(first)
        self.nodes = {uid: Node(uid, first, 0) for uid in uids}
        self.offers[0] = dict.fromkeys(uids, 0)

    def pick(self, number: int, phases: tuple[str, ...]) -> Node | None:
        found = [node for node in self.nodes.values() if node.phase in phases]
        return found[number % len(found)] if found else None

    # ---- training

    @rule(number=st.integers(0, 9))
    def start(self, number: int) -> None:
        """All members have met and said how far they are: those behind get the state of one who is not."""
        node = self.pick(number, ("met",))
        if node is None:
            return
        offers = self.offers.get(node.view.generation, {})
        if all(uid in offers for uid in node.view.uids):
            furthest = max(offers.values())
            assert furthest == node.view.step >= node.step
            node.step, node.phase = furthest, "trains"

    @rule(number=st.integers(0, 9))
    def contribute(self, number: int) -> None:
        node = self.pick(number, ("trains",))
        if node is None:
            return
        key = (node.view.generation, node.step)
        before = self.gave.setdefault(key, set())
        if node.uid not in before:
            before.add(node.uid)
            if before == set(node.view.uids):
                # A step completed: never again one of an earlier generation.
                assert node.view.generation >= self.newest_completed
                self.newest_completed = node.view.generation

    @rule(number=st.integers(0, 9))
    def apply(self, number: int) -> None:
        node = self.pick(number, ("trains",))
        if node is not None:
            key = (node.view.generation, node.step)
            if self.gave.get(key, set()) == set(node.view.uids):
                node.step += 1

    # ---- faults

    @rule(number=st.integers(0, 9))
    def crash(self, number: int) -> None:
        node = self.pick(number, ("met", "trains", "left"))
        if node is not None and len(self.nodes) > 1:
            del self.nodes[node.uid]

    @rule(number=st.integers(0, 9), other=st.integers(0, 9))
    def doubt(self, number: int, other: int) -> None:
        """A loses sight of B: for a reason, or for none."""
        node = self.pick(number, ("met", "trains", "left"))
        if node is not None:
            uid = node.view.uids[other % len(node.view.uids)]
            if uid != node.uid:
                node.doubts.add(uid)
                self.leave(node)

    def leave(self, node: Node) -> None:
        node.phase = "left"
        self.tell(node)

    def tell(self, node: Node) -> None:
        sees = frozenset({*node.view.uids, *node.joiners} - node.doubts)
        report = Report(step=node.step, sees=sees)
        node.reports[node.view.generation, node.uid] = report
        self.mail += [(node.uid, uid, (node.view.generation, report)) for uid in node.view.uids]

    @precondition(lambda self: self.mail)
    @rule(number=st.integers(0, 99), lost=st.booleans())
    def deliver(self, number: int, lost: bool) -> None:
        """Any message, in any order; or never."""
        sender, receiver, (generation, report) = self.mail.pop(number % len(self.mail))
        node = self.nodes.get(receiver)
        if node is not None and not lost and sender not in node.doubts:
            node.reports[generation, sender] = report
            if generation == node.view.generation and node.phase != "left":
                self.leave(node)

    @rule()
    def join(self) -> None:
        if len(self.joining) < 2:
            uid = self.new_uid()
            self.joining.append(uid)
            for node in self.nodes.values():
                node.joiners.append(uid)

    # ---- agreeing

    @rule(number=st.integers(0, 9), waited_s=st.sampled_from([0.0, PATIENCE_S + 1, TIMEOUT_S + 1]))
    def turn(self, number: int, waited_s: float) -> None:
        node = self.pick(number, ("left",))
        if node is not None:
            self.take_turn(node, waited_s)

    def take_turn(self, node: Node, waited_s: float) -> None:
        """What `Membership.regroup` does in one turn."""
        latest = self.register.latest()
        assert latest is not None
        if latest.generation > node.view.generation:
            if node.uid in latest.uids:
                self.install(node, latest)
            else:
                # Excluded: it comes back as somebody new, without a state.
                del self.nodes[node.uid]
                self.joining.append(self.new_uid())
            return
        live = {node.uid, *node.view.uids, *node.joiners} - node.doubts
        reports = {
            uid: r for (generation, uid), r in node.reports.items() if generation == node.view.generation
        }
        proposal = propose(
            node.view,
            node.uid,
            reports,
            live=live,
            gone={uid for uid in node.view.uids if uid not in self.nodes and uid in node.doubts},
            joiners=[member(uid) for uid in node.joiners if uid in self.joining],
            waited_s=waited_s,
            timeout_s=TIMEOUT_S,
            patience_s=PATIENCE_S,
            max_members=MAX_MEMBERS,
        )
        if proposal is not None:
            stay = [uid for uid in proposal.uids if uid in node.view.uids]
            # Nobody who goes on goes back, and all who stay have stopped training in this generation.
            assert proposal.step == max(reports[uid].step for uid in stay)
            assert stay == [uid for uid in node.view.uids if uid in stay]
            if proposal.step < node.view.step:
                # A step is lost only with all who had it, or when they were silent for long.
                assert waited_s > PATIENCE_S or not set(node.view.uids) - set(stay) & set(self.nodes)
            for uid in stay:
                assert uid not in self.nodes or self.nodes[uid].phase == "left"
            self.claims.append(proposal)

    @precondition(lambda self: self.claims)
    @rule(number=st.integers(0, 9))
    def claim(self, number: int) -> None:
        """Between the decision to claim and the claim, others may claim."""
        self.register.claim(self.claims.pop(number % len(self.claims)))

    def install(self, node: Node, view: View) -> None:
        assert self.register.views[view.generation] == view
        node.view, node.phase, node.doubts = view, "met", set()
        self.offers.setdefault(view.generation, {})[node.uid] = node.step
        node.joiners = list(self.joining)

    @rule(number=st.integers(0, 9))
    def come_in(self, number: int) -> None:
        """One that joins finds itself in the newest generation."""
        latest = self.register.latest()
        assert latest is not None
        for uid in [uid for uid in self.joining if uid in latest.uids]:
            self.joining.remove(uid)
            self.nodes[uid] = Node(uid, latest, -1)
            self.install(self.nodes[uid], latest)

    @invariant()
    def no_generation_is_decided_twice(self) -> None:
        for node in self.nodes.values():
            assert self.register.views[node.view.generation] == node.view

    def teardown(self) -> None:
        """The faults end: who lives finds together in few rounds, and completes a step."""
        for _ in range(40):
            self.come_in(0)
            if max((node.step for node in self.nodes.values()), default=-1) < 0:
                return  # who had the state is gone: the first one goes back to a snapshot
            alive = list(self.nodes.values())
            for node in alive:
                node.doubts = {uid for uid in node.view.uids if uid not in self.nodes}
                node.joiners = list(self.joining)
                if node.phase != "left":
                    self.start_node(node)
                elif (node.view.generation, node.uid) in node.reports:
                    self.tell(node)
            while self.mail:
                self.deliver(0, lost=False)
            for node in [node for node in self.nodes.values() if node.phase == "left"]:
                self.take_turn(node, TIMEOUT_S + 1)
            while self.claims:
                self.claim(0)
            views = {node.view.generation for node in self.nodes.values()}
            if len(views) == 1 and all(node.phase == "trains" for node in self.nodes.values()):
                return
        raise AssertionError(f"they do not find together: {self.nodes}")

    def start_node(self, node: Node) -> None:
        latest = self.register.latest()
        assert latest is not None
        missing = [uid for uid in node.view.uids if uid not in self.nodes]
        if missing or latest.generation > node.view.generation:
            self.leave(node)
            return
        offers = self.offers.get(node.view.generation, {})
        if node.phase == "met" and all(uid in offers for uid in node.view.uids):
            node.step, node.phase = max(offers.values()), "trains"


TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize(
    ("group", "gone", "patient", "may"),
    [
        ("bcd", "", True, True),  # three of four
        ("ab", "", True, True),  # half of them, with the first
        ("cd", "", True, False),  # the other half
        ("cd", "ab", True, True),  # which is known to be alone
        ("cd", "a", True, False),
        ("d", "abc", True, True),
        ("d", "", True, False),
        ("d", "", False, True),  # nobody decided: the claim is what keeps halves apart
    ],
)
def test_who_may_go_on_without_the_others(group: str, gone: str, patient: bool, may: bool) -> None:
    assert may_propose(view_of("abcd"), list(group), set(gone), patient=patient) is may


def test_new_ranks_without_the_state_do_not_leave_those_behind_who_have_it() -> None:
    view = view_of("abcd", step=7)
    reports = {uid: Report(step=-1, sees=frozenset("bcd")) for uid in "bcd"}
    assert proposal(view, "b", reports, live=set("bcd")) is None
    found = proposal(view, "b", reports, live=set("bcd"), gone={"a"})
    assert found is not None
    assert found.step == -1


def proposal(view: View, me: str, reports: dict[str, Report], **changes: object) -> View | None:
    options: dict[str, object] = {
        "live": set(view.uids),
        "gone": set(),
        "joiners": [],
        "waited_s": 0.0,
        "timeout_s": TIMEOUT_S,
        "patience_s": PATIENCE_S,
        "max_members": 8,
        **changes,
    }
    return propose(view, me, reports, **options)  # type: ignore[arg-type]


def test_a_link_that_is_cut_between_two_ranks_leaves_the_later_one_out() -> None:
    sees = {"a": "abd", "b": "abcd", "c": "bcd", "d": "abcd"}  # a and c cannot reach each other
    reports = {uid: Report(step=7, sees=frozenset(seen)) for uid, seen in sees.items()}
    found = proposal(view_of("abcd"), "a", reports, live={"a", "b", "d"})
    assert found is not None
    assert (found.uids, found.generation, found.step) == (["a", "b", "d"], 4, 7)
    assert proposal(view_of("abcd"), "c", reports, live={"b", "c", "d"}) is None


def test_a_living_rank_is_waited_for_and_then_not() -> None:
    reports = {uid: Report(step=step, sees=frozenset("abcj")) for uid, step in (("a", 7), ("b", 8))}
    assert proposal(view_of("abc"), "a", reports) is None
    found = proposal(view_of("abc"), "a", reports, waited_s=TIMEOUT_S + 1)
    assert found is not None
    assert (found.uids, found.step) == (["a", "b"], 8)


def test_who_joins_comes_last_if_all_see_it_and_there_is_room() -> None:
    reports = {
        "a": Report(step=7, sees=frozenset("abjkl")),
        "b": Report(step=7, sees=frozenset("abkl")),
    }
    joiners = [member(uid) for uid in "jkl"]
    found = proposal(view_of("ab"), "a", reports, joiners=joiners, max_members=3)
    assert found is not None
    assert found.uids == ["a", "b", "k"]


def claimed_at_once(folder: Path, generation: int) -> list[str]:
    won: list[str] = []
    barrier = threading.Barrier(8)

    def claim(uid: str) -> None:
        barrier.wait()
        if FolderRegister(folder).claim(view_of(uid, generation=generation)):
            won.append(uid)

    threads = [threading.Thread(target=claim, args=(uid,)) for uid in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_a_folder_decides_between_many_that_claim_at_once(tmp_path: Path) -> None:
    register = FolderRegister(tmp_path)
    assert register.latest() is None
    for generation in range(3):
        won = claimed_at_once(tmp_path, generation)
        assert len(won) == 1
        assert register.latest() == view_of(won[0], generation=generation)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_generation_is_named(tmp_path: Path) -> None:
    register = FolderRegister(tmp_path)
    assert register.claim(view_of("ab"))
    path = next(tmp_path.iterdir())
    path.write_text(json.dumps({"generation": 3}))
    with pytest.raises(TrainerError, match=r"generations in .* cannot be read: KeyError"):
        register.latest()
