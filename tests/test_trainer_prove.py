"""The proof that faults change no bit: what it plans, what it finds, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import prove
from foldfeed.trainer.errors import TrainerConfigError


def test_faults_are_drawn_from_the_seed() -> None:
    faults = prove.plan_faults("kill=6,stop=1", 4, 60, 11)
    assert faults == prove.plan_faults("kill=6,stop=1", 4, 60, 11)
    assert faults != prove.plan_faults("kill=6,stop=1", 4, 60, 12)
    assert sorted(fault.kind for fault in faults) == ["kill"] * 6 + ["stop"]
    steps = [fault.after_step for fault in faults]
    assert steps == sorted(set(steps))
    assert all(1 <= step < 59 for step in steps)
    assert {fault.rank for fault in faults} <= set(range(4))


@pytest.mark.parametrize(
    ("chaos", "text"),
    [
        ("burn=1", "chaos 'burn=1' is not one of kill=NUMBER, stop=NUMBER, cut=NUMBER, join=NUMBER."),
        ("kill", "chaos 'kill' is not one of"),
        ("kill=\u00b2", "chaos 'kill=\u00b2' is not one of"),
        ("kill=0", "proves nothing"),
        ("", "proves nothing"),
        ("kill=59", "59 faults need at least 61 steps"),
    ],
)
def test_chaos_that_cannot_be_is_refused(chaos: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainerConfigError):
        prove.plan_faults(chaos, 4, 60, 1)
    assert prove.main(["--store", "s", "--chaos", chaos]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ranks", "9"], "9 ranks share 8 virtual shards; every rank needs one"),
        (["--ranks", "7", "--chaos", "join=3"], "10 ranks share 8 virtual shards; every rank needs one"),
        (["--", "--reducer", "ring"], "--reducer ring cannot change its ranks"),
        (["--", "--lr", "much"], "'--lr': 'much' is not a valid float"),
    ],
)
def test_ranks_and_options_that_cannot_be_are_refused_before_any_process_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    output = tmp_path / "proof"
    assert prove.main(["--store", "s", "--output", str(output), *arguments]) == 2
    assert text in capsys.readouterr().err
    assert not output.exists()


def test_a_machine_without_namespaces_refuses_cuts_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "ip"
    tool.write_text("#!/bin/sh\necho 'RTNETLINK answers: Operation not permitted' >&2\nexit 2\n")
    tool.chmod(0o755)
    for path, text in (
        (str(tmp_path), "Operation not permitted"),
        (str(tmp_path / "none"), "needs the command ip"),
    ):
        monkeypatch.setenv("PATH", path)
        output = str(tmp_path / "proof")
        assert prove.main(["--store", "s", "--chaos", "cut=1", "--output", output]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_disturbed_run_ends_with_the_same_weights(
    tmp_path: Path, small_store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes, started by the launcher: one is killed, a spare takes its place, another one joins."""
    arguments = ["--store", small_store.url, "--ranks", "2", "--steps", "14", "--chaos", "kill=1,join=1"]
    arguments += ["--seed", "4", "--limit-s", "240", "--output", str(tmp_path / "proof")]
    assert prove.main(arguments) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    digests = re.findall(r"(?:un)?disturbed: ([0-9a-f]{64})\n", said)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert re.search(r"recovery_s: p50 (\d+\.\d) max \1\n", said)
    assert re.search(r"virtual shards of broken steps: \d+ kept, \d+ computed again\n", said)
    assert (said.count("kill: rank"), said.count("join: after")) == (1, 1)
    ledger = (tmp_path / "proof" / "disturbed" / "goodput.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in ledger]
    assert events.count("start") == 1
    # The beginning, the death, the spare and the one that joined (two of them may come together).
    assert events.count("regroup") in (3, 4)
    worlds = [json.loads(line)["world"] for line in ledger if '"regroup"' in line]
    assert (worlds[0], worlds[-1]) == (2, 3)
    assert prove.main(arguments) == 2
    assert "exists; give another --output" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_different_weights_and_a_failing_run_are_no_proof(
    tmp_path: Path,
    small_store: FeatureStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "proof"

    def finish(launch: object, output: Path, faults: list[object]) -> list[float]:
        output.mkdir(parents=True)
        (output / "result.json").write_text(json.dumps({"weights_digest": output.name}))
        return [1.0]

    arguments = ["--store", small_store.url, "--steps", "4", "--chaos", "kill=1", "--output", str(folder)]
    with monkeypatch.context() as patched:
        patched.setattr(prove, "run_disturbed", finish)
        assert prove.main(arguments) == 1
    assert "the weights differ; both runs are in" in capsys.readouterr().err
    broken = ["--store", str(tmp_path / "nowhere"), "--ranks", "2", "--steps", "4", "--chaos", "kill=1"]
    assert prove.main([*broken, "--output", str(tmp_path / "other")]) == 1
    assert "ended with code 1; see" in capsys.readouterr().err
