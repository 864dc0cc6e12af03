"""Elastic runs of real processes: whatever strikes, the weights are those of one rank that was left alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elastic_ranks import Nursery, ledger_error
from test_trainer_cli import TINY

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import cli, elastic
from foldfeed.trainer.elastic import Plan
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.network import namespaces

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
STEPS = 12


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery) -> str:
    found = nursery.run(ranks=1, steps=STEPS)
    assert found["codes"] == [0]
    return str(found["digest"])


def fault(rank: int, step: int, phase: str, name: str = "KILL", **further: int) -> dict[str, Any]:
    return {"rank": rank, "step": step, "phase": phase, "signal": name, **further}


def shards(found: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns how many virtual shards of each broken step were kept, and computed again."""
    return [(line["shards_kept"], line["shards_again"]) for line in found["ledger"] if "shards_kept" in line]


def check(
    found: dict[str, Any], digest: str, codes: list[int], *, goes_back: bool = False
) -> list[list[int]]:
    """Checks what must hold for every run; returns who trained, by generation and rank."""
    assert found["codes"] == codes, found["said"]
    assert found["digest"] == digest, found["said"]
    # Every step is in the metrics once, whoever was first.
    assert found["steps"] == list(range(1, STEPS + 1))
    assert f"step-{STEPS:08d}" in found["snapshots"]
    generations = found["generations"]
    assert [view["generation"] for view in generations] == list(range(len(generations)))
    if not goes_back:
        assert all(before["step"] <= after["step"] for before, after in itertools.pairwise(generations))
    assert ledger_error(found["ledger"]) < 0.005
    return list(found["members"])


def test_the_first_rank_dies_amid_a_collective_and_is_replaced(nursery: Nursery, undisturbed: str) -> None:
    found = nursery.run(
        ranks=4, steps=STEPS, respawns=1, faults=[fault(0, 3, "mid-stream")], nodes=[0, 0, 1, 1, 1]
    )
    members = check(found, undisturbed, [-9, 0, 0, 0, 0])
    assert members[0] == [0]
    assert sorted(members[1]) == [0, 1, 2, 3]
    # The three that are left go on as they are, in their order; then the new one comes last, or with them.
    left = members[1][1:]
    assert members[2:] in ([left, [*left, 4]], [[*left, 4]])
    assert found["generations"][-1]["step"] < STEPS
    # It got the state from a rank behind the same switch.
    gave = dict(re.findall(r"rank (\d+) got the state of step \d+ from rank (\d+)", found["said"]))
    assert members[-1][int(gave["3"])] in (2, 3)
    # The link is measured once; who comes later plans by it as the others do.
    assert found["said"].count("gradients travel by tree: measured ") == 1


def test_a_rank_that_dies_while_the_link_is_measured_is_left_out(nursery: Nursery, undisturbed: str) -> None:
    found = nursery.run(ranks=3, steps=STEPS, faults=[fault(0, -1, "measure"), fault(2, 3, "hook")])
    members = check(found, undisturbed, [-9, 0, -9])
    assert [len(view) for view in members] == [1, 3, 2, 1]
    # Those that are left measure it; the last one knows it.
    assert found["said"].count("gradients travel by tree: measured ") == 1


def test_two_of_four_die_at_once_and_nobody_comes(nursery: Nursery, undisturbed: str) -> None:
    faults = [fault(0, 5, "commit"), fault(2, 5, "optimizer")]
    members = check(nursery.run(ranks=4, steps=STEPS, faults=faults), undisturbed, [-9, 0, -9, 0])
    assert sorted(members[-1]) == [1, 3]


def test_only_shards_that_nobody_has_are_computed_again(nursery: Nursery, undisturbed: str) -> None:
    """One dies when all sums are there, before the commit; another one when they are there again."""
    faults = [fault(1, 5, "arrived"), fault(2, 5, "arrived", generation=2)]
    found = nursery.run(ranks=4, steps=STEPS, faults=faults)
    check(found, undisturbed, [0, -9, -9, 0])
    # Two shards of the first, by two of the three that are left; then two and one of the second.
    assert shards(found) == [(6, 2), (5, 3)]
    assert "virtual shards of broken steps: 11 kept, 5 computed again" in found["said"]
    assert "go on from step 5 (5 of its virtual shards are there)" in found["said"]


@pytest.mark.parametrize("phase", ["agree", "agreed", "connect", "transfer"])
def test_the_first_rank_dies_while_the_ranks_recover(nursery: Nursery, undisturbed: str, phase: str) -> None:
    """One of three dies, and then the one that leads the recovery; the last one goes on alone."""
    faults = [fault(1, 4, "hook"), fault(0, 4, phase)]
    found = nursery.run(ranks=3, steps=STEPS, faults=faults)
    members = check(found, undisturbed, [-9, -9, 0])
    assert members[-1] == [2]
    # What was kept for a meeting that failed is kept for the next one.
    assert all(kept + again == 8 for kept, again in shards(found))


def test_a_writer_that_was_stopped_publishes_nothing_and_comes_back(
    nursery: Nursery, undisturbed: str
) -> None:
    """SIGSTOP just before a snapshot of the first rank is published; the others go on with another first."""
    found = nursery.run(
        ranks=3,
        steps=STEPS,
        pause_s=0.7,
        silent_s=2.0,
        away_s=4.2,
        faults=[fault(0, 4, "snapshot", "STOP")],
    )
    members = check(found, undisturbed, [0, 0, 0])
    assert members[2] == members[1][1:]
    # Under another name, at the end of the ranks, and with the state of the others.
    assert members[-1] == [*members[1][1:], 0]
    assert "joining again" in found["said"]
    lost = [line for line in found["ledger"] if line["event"] == "regroup" and line.get("detect_s", 0) >= 2.0]
    assert len(lost) == 1


def test_a_first_rank_that_was_stopped_in_the_first_meeting_takes_no_file_back(
    nursery: Nursery, undisturbed: str
) -> None:
    """It wakes up before it took metrics and ledger, which are another one's by then."""
    faults = [fault(0, -1, "transferred", "STOP")]
    found = nursery.run(ranks=3, steps=STEPS, pause_s=0.7, silent_s=2.0, away_s=4.2, faults=faults)
    members = check(found, undisturbed, [0, 0, 0])
    assert members[2] == members[1][1:]
    assert sorted(members[-1]) == [0, 1, 2]
    assert members[-1][0] != 0
    assert {line["step"] for line in found["ledger"] if line["event"] == "step"} == set(range(1, STEPS + 1))


def test_a_writer_that_was_left_out_begins_again_when_the_others_are_gone(
    nursery: Nursery, undisturbed: str
) -> None:
    """It waits for none of the first ranks, nor for a lease of its own, and its ledger has no hole."""
    faults = [fault(0, 4, "forward", "STOP"), fault(1, 5, "forward", generation=2)]
    found = nursery.run(ranks=2, steps=STEPS, pause_s=0.3, silent_s=1.0, faults=faults)
    members = check(found, undisturbed, [0, -9])
    assert members[-1] == [0]
    assert [line["event"] for line in found["ledger"]].count("start") == 2
    assert "1 of 2 ranks came within 5 s" in found["said"]


def test_a_new_rank_goes_on_alone_when_the_one_that_took_it_in_is_stopped(
    nursery: Nursery, undisturbed: str
) -> None:
    """It has neither state nor lease, and who has them lives, but is not to be waited for."""
    faults = [fault(0, 2, "agreed", "STOP")]
    found = nursery.run(ranks=1, steps=STEPS, joins=[2], pause_s=0.5, silent_s=2.0, away_s=7.0, faults=faults)
    members = check(found, undisturbed, [0, 0], goes_back=True)
    assert members[2:4] == [[0, 1], [1]]


def test_a_rank_that_slept_through_the_end_of_its_session_joins_the_next_one(
    nursery: Nursery, undisturbed: str
) -> None:
    faults = [fault(1, 2, "mid-stream", "STOP"), fault(0, 4, "hook")]
    found = nursery.run(
        ranks=2, steps=STEPS, respawns=1, pause_s=0.4, silent_s=2.0, away_s=6.0, faults=faults
    )
    members = check(found, undisturbed, [-9, 0, 0], goes_back=True)
    assert members[0] == [2]
    assert sorted(members[-1]) == [1, 2]


def test_a_rank_whose_link_is_cut_is_left_out_and_comes_back(nursery: Nursery, undisturbed: str) -> None:
    """Every rank is a machine of its own; no connection of the one that is cut off closes."""
    try:
        with namespaces(1):
            pass
    except TrainerConfigError as error:
        pytest.skip(str(error))
    with namespaces(3) as network:
        places = [network.names(slot) for slot in range(3)]
        found = nursery.run(
            ranks=3,
            steps=STEPS,
            places=places,
            pause_s=0.7,
            silent_s=2.0,
            away_s=4.2,
            faults=[fault(0, 3, "commit", "CUT")],
        )
    members = check(found, undisturbed, [0, 0, 0])
    assert members[2] == members[1][1:]
    assert "joining again" in found["said"]


def test_all_ranks_die_and_their_replacements_go_on_from_the_snapshot(
    nursery: Nursery, undisturbed: str
) -> None:
    faults = [fault(number, 7, "forward") for number in range(2)]
    found = nursery.run(ranks=2, steps=STEPS, respawns=2, faults=faults)
    members = check(found, undisturbed, [-9, -9, 0, 0])
    assert {number for view in members for number in view} <= {2, 3}
    assert "resumed: step 4" in found["said"]
    assert [line["event"] for line in found["ledger"]].count("start") == 2


@pytest.mark.parametrize("deaf", [(), (1, 2)])
def test_a_rank_whose_memory_went_bad_is_named_and_all_go_back(
    nursery: Nursery, undisturbed: str, deaf: tuple[int, ...]
) -> None:
    """The bit is in all sums since step 5; at step 8 the ranks compare. The second time the rank leaves.

    So it does where the first rank alone saw what the votes said and left before the others did.
    """
    faults = [fault(1, 5, "forward", "FLIP"), fault(1, 9, "optimizer", "FLIP")]
    faults += [fault(process, step, "vote", "DEAF") for process in deaf for step in (8, 12)]
    # What a run was told to start from does not hold when it goes back by itself.
    config = {"snapshots": {"resume": "none"}}
    found = nursery.run(ranks=3, steps=STEPS, faults=faults, config=config)
    members = check(found, undisturbed, [0, 1, 0], goes_back=True)
    odd = members[1].index(1)
    for step in (8, 12):
        assert f"rank {odd} differs in parameters and moments after step {step}" in found["said"]
    # A rank that is cut off before it counts the votes does not hear them either, without being struck.
    assert [one["signal"] for one in found["struck"]].count("FLIP") == 2
    assert [found["said"].count(f"resumed: step {step} ") for step in (4, 8, 12)] == [1, 1, 0]
    assert members[1] == members[2] == members[3]
    assert sorted(members[-1]) == [0, 2]


def test_without_a_snapshot_or_a_majority_ranks_that_differ_begin_again(
    nursery: Nursery, undisturbed: str
) -> None:
    found = nursery.run(ranks=2, steps=STEPS, faults=[fault(1, 2, "applied", "FLIP")])
    check(found, undisturbed, [0, 0], goes_back=True)
    assert "ranks [0, 1] differ in parameters and moments after step 4" in found["said"]
    assert "resumed" not in found["said"]


def test_after_the_loss_of_a_node_its_successor_gets_the_snapshot_from_a_peer(
    nursery: Nursery, undisturbed: str
) -> None:
    """Nodes of two and of three ranks, snapshots in memory alone; all die, one node is made anew."""
    run = {"ranks": 5, "steps": STEPS, "nodes": [0, 0, 1, 1, 1]}
    run["config"] = {"snapshots": {"every": 0, "memory_every": 1}}
    # Amid a step, when all have written the one before.
    faults = [fault(number, 6, "forward") for number in range(5)]
    found = nursery.run(**run, faults=faults)
    assert found["codes"] == [-9] * 5, found["said"]
    assert found["snapshots"] == []
    found = nursery.run(**run, folder=found["folder"], lost=[0])
    check(found, undisturbed, [0] * 5)
    assert "2 of 5 ranks got it from the memory of rank" in found["said"]
    # Who dies while the newest one is being written leaves the one before.
    assert re.search("resumed: step [456] ", found["said"])


def test_other_settings_in_a_runs_folder_end_every_rank_at_once(nursery: Nursery, undisturbed: str) -> None:
    """Also where the run has finished, or those who wait for the first rank would take its end for theirs."""
    first = nursery.run(ranks=1, steps=STEPS)
    check(first, undisturbed, [0])
    other = {"optimizer": {"lr": 0.5}}
    began = time.monotonic()
    found = nursery.run(ranks=2, steps=STEPS, config=other, folder=first["folder"])
    assert time.monotonic() - began < 25.0
    assert found["codes"] == [1, 1], found["said"]
    assert found["said"].count("optimizer.lr 0.001 there, 0.5 now") == 2
    assert found["digest"] == first["digest"]


def test_ranks_join_as_there_are_shards_for_them(nursery: Nursery, undisturbed: str) -> None:
    found = nursery.run(ranks=2, steps=STEPS, joins=[2, 4, 4], max_ranks=4, pause_s=0.1)
    members = check(found, undisturbed, [0, 0, 0, 0, 0])
    assert len(members[-1]) == 4
    # The fifth one waited as a spare, and learnt that it was not needed.
    assert len({number for view in members for number in view}) == 4


def test_ranks_of_another_launcher_do_not_join(nursery: Nursery, undisturbed: str) -> None:
    """Nor do they begin a run of their own while that one lives."""
    found = nursery.run(ranks=2, steps=STEPS, joins=[2, 2], launches="aaab", wait_s=4.0, pause_s=0.5)
    members = check(found, undisturbed, [0, 0, 0, 1])
    assert {number for view in members for number in view} == {0, 1, 2}
    assert "process 3 ends with TrainerError: no run lives in" in found["said"]


def test_a_second_launcher_in_a_live_folder_is_refused_as_a_whole(
    tmp_path: Path, small_store: FeatureStore
) -> None:
    """Its first rank says why; the others, which would wait for long, are ended at once."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "foldfeed.trainer.elastic", "--ranks", "2", "--wait-s", "200", "--"]
    command += ["--store", small_store.url, "--output", str(output), *TINY, "--no-tensorboard"]
    with subprocess.Popen([*command, "--steps", "100000"], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            for line in first.stdout:
                if line.startswith("step:"):
                    break
            second = subprocess.run(
                [*command, "--steps", "3"], capture_output=True, text=True, check=False, timeout=150
            )
            first.send_signal(signal.SIGTERM)
            said = first.stdout.read()
        finally:
            first.terminate()
    assert first.returncode == 0, said
    assert second.returncode == 1
    assert "a run lives in this --output" in second.stderr
    assert "the run did not begin, because its first rank failed" in second.stderr
    generations = [json.loads(path.read_text()) for path in output.glob("elastic/*/generation-*.json")]
    assert max(len(view["members"]) for view in generations) == 2
    assert len({member["uid"] for view in generations for member in view["members"]}) == 2


def test_under_torchrun_whoever_comes_first_begins_and_who_is_asked_to_stop_leaves(
    nursery: Nursery, undisturbed: str
) -> None:
    """SIGTERM is what torchrun sends to the neighbours of a rank that died; the rest of the run goes on."""
    faults = [fault(0, 3, "forward", "TERM"), fault(1, 6, "hook")]
    found = nursery.run(ranks=3, steps=STEPS, respawns=1, faults=faults, torchrun=True, pause_s=0.1)
    members = check(found, undisturbed, [0, -9, 0, 0])
    assert sorted(members[1]) == [0, 1, 2]
    assert sorted(members[2]) == [1, 2]
    assert "leaving after step 4, as asked" in found["said"]
    assert [line["event"] for line in found["ledger"]].count("start") == 1


def test_groups_of_nodes_are_formed_anew_of_those_who_are_left(nursery: Nursery, undisturbed: str) -> None:
    """Nodes of 2, 2 and 1 ranks, which came in any order; one dies, and its successor joins its node."""
    found = nursery.run(
        ranks=5,
        steps=STEPS,
        respawns=1,
        hosts="ababca",
        faults=[fault(2, 4, "mid-collective")],
        config={"reducer": "hierarchical"},
    )
    members = check(found, undisturbed, [0, 0, -9, 0, 0, 0])
    hosts = ["".join("ababca"[number] for number in view) for view in members]
    assert hosts[1] in ("aabbc", "aacbb")
    # What the others had computed of that step goes through the new groups, too.
    assert "of its virtual shards are there" in found["said"]
    # Its successor stands behind the one that was left on its node, not last.
    assert hosts[-1] == hosts[1]
    assert members[-1][:2] == [0, 5]
    sizes = {"b": "2+2+1", "c": "2+1+2"}[hosts[1][2]]
    assert f"gradients travel by hierarchical: 3 nodes have {sizes} ranks" in found["said"]
    if len(members) > 3:
        assert hosts[2] == hosts[1][1:]
        assert f"gradients travel by hierarchical: 3 nodes have 1{sizes[1:]} ranks" in found["said"]


def test_kills_at_many_places_one_after_another(nursery: Nursery, undisturbed: str) -> None:
    phases = ("forward", "hook", "collective", "commit", "optimizer", "applied", "publish", "transferred")
    faults = [fault(rank, 1 + rank, phase) for rank, phase in enumerate(phases)]
    # Of its second shard, which is its last one.
    faults[0]["skip"] = 1
    found = nursery.run(ranks=4, steps=STEPS, respawns=8, faults=faults, pause_s=0.1)
    assert found["codes"].count(-9) >= 5
    check(found, undisturbed, [code if code == -9 else 0 for code in found["codes"]])


TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


def test_torchrun_starts_ranks_that_take_its_word(tmp_path: Path) -> None:
    """The command becomes the trainer's, in the same process; here a script stands for the interpreter."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$FOLDFEED_ELASTIC"\necho "$@"\n')
    script.chmod(0o755)
    code = f"import sys; sys.executable = {str(script)!r}; from foldfeed.trainer.elastic import main; main()"
    for count, refounds in (("0", False), ("3", True)):
        ended = subprocess.run(
            [sys.executable, "-c", code, "--wait-for", "4", "--host", "h", "--", "--steps", "3"],
            env={**os.environ, **TORCHRUN, "TORCHELASTIC_RESTART_COUNT": count},
            capture_output=True,
            text=True,
            check=True,
        )
        plan, arguments = ended.stdout.splitlines()
        wanted = Plan(founds=False, refounds=refounds, ranks=4, host="h", local_rank=1, torchrun=True)
        assert Plan(**json.loads(plan)) == wanted
        assert (wanted.may_found, wanted.is_start) == (True, not refounds)
        assert arguments == "-m foldfeed.trainer --steps 3"


@pytest.mark.parametrize(
    ("options", "world", "text"),
    [
        (["--respawn", "1"], "2", "instead of --ranks, --respawn, --spares and --join give torchrun"),
        (["--join"], "2", "instead of --ranks, --respawn, --spares and --join give torchrun"),
        ([], "4", "torchrun has 4 ranks on several machines"),
    ],
)
def test_what_torchrun_does_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    world: str,
    text: str,
) -> None:
    for name, value in {**TORCHRUN, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, value)
    assert elastic.main([*options, "--", "--steps", "3"]) == 2
    assert text in capsys.readouterr().err


def test_ctrl_c_in_a_terminal_leaves_ranks_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the whole process group; the launcher answers it with SIGTERM, and so a snapshot."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for plan, expected in ((Plan(ranks=1, torchrun=True), before), (Plan(ranks=1), signal.SIG_IGN)):
            monkeypatch.setenv(elastic.VARIABLE, json.dumps(dataclasses.asdict(plan)))
            cli._runner()
            assert signal.getsignal(signal.SIGINT) == expected
    finally:
        signal.signal(signal.SIGINT, before)


def test_plans_that_cannot_work_are_refused() -> None:
    with pytest.raises(TrainerConfigError, match="max_ranks is 2, but the run begins with 3"):
        Plan(ranks=3, max_ranks=2)
    with pytest.raises(TrainerConfigError, match="max_ranks is -1, but the run begins with 3"):
        Plan(ranks=3, max_ranks=-1)
    with pytest.raises(TrainerConfigError, match="silent_s is 0; it must be positive"):
        Plan(ranks=3, silent_s=0)
