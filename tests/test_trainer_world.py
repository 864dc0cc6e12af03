"""Real ranks over gloo: equal bits for every world size, across kills and resumes; failures are loud.

Worlds of two hide mistakes in the summation order (a + b = b + a), so 3 and 4 are the ones that count.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_ranks
from ports import free_port
from processes import children_of
from trainer_ranks import NUM_TOY_STEPS, launch, toy_model, toy_shard

WORLDS = (1, 2, 3, 4)
pytestmark = [pytest.mark.timeout(280), pytest.mark.slow]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    folder = tmp_path_factory.mktemp("gradients")
    return {world: launch("gradients", world, folder / str(world)) for world in WORLDS}


def test_own_reducer_gives_equal_bits_for_every_world(gradients: dict[int, list[Any]]) -> None:
    found = {
        name: {rank[name]["digest"] for ranks in gradients.values() for rank in ranks}
        for name in ("tree8", "tree6", "bf16", "late16")
    }
    assert [len(digests) for digests in found.values()] == [1, 1, 1, 1]
    assert found["bf16"] == found["late16"] != found["tree6"]
    assert gradients[4][0]["tree8"]["buckets"] >= 4


def reference_gradients(num_shards: int) -> list[list[float]]:
    """One process, one loss over all shards, torch's plain autograd: no buffers, hooks or trees."""
    from foldfeed.trainer.rng import seed_shard

    model = toy_model()
    steps = []
    for step in range(NUM_TOY_STEPS):
        losses = []
        for v in range(num_shards):
            seed_shard(1, step, v)
            losses.append(model(toy_shard(step, v)).square().mean())
        model.zero_grad()
        torch.stack(losses).mean().backward()
        flat: list[float] = []
        for param in reversed(list(model.parameters())):
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            flat += grad.flatten().tolist() + [0.0] * (-param.numel() % 16)
            with torch.no_grad():
                param.sub_(grad, alpha=0.1)
        steps.append(flat)
    return steps


@pytest.mark.parametrize("world", WORLDS)
def test_own_reducer_equals_ddp_and_a_single_process(gradients: dict[int, list[Any]], world: int) -> None:
    ours = torch.tensor(gradients[world][0]["tree8"]["gradients"], dtype=torch.float64)
    ddp = torch.tensor(gradients[world][0]["ddp8"]["gradients"], dtype=torch.float64)
    alone = torch.tensor(reference_gradients(8), dtype=torch.float64)
    scale = alone.abs().max()
    assert ours.shape == alone.shape
    assert (ours - ddp).abs().max() / scale < 1e-6
    assert (ours - alone).abs().max() / scale < 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_a_gradient_that_comes_twice_is_exchanged_again(gradients: dict[int, list[Any]], world: int) -> None:
    for rank in gradients[world]:
        assert rank["late8"]["digest"] == rank["tree8"]["digest"]


@pytest.mark.parametrize("world", WORLDS)
def test_exchange_starts_while_backward_runs_in_bucket_order(
    gradients: dict[int, list[Any]], world: int
) -> None:
    for rank in gradients[world]:
        events = [tuple(event) for event in rank["events"]]
        num_buckets = len([name for name, _ in events if name == "launch"])
        assert num_buckets >= 8
        end = events.index(("backward_end", -1))
        assert events.index(("exchange", 0)) < end
        # All but the small tail leave before backward has ended.
        assert events.index(("launch", num_buckets - 2)) < end
        for name in ("launch", "exchange", "arrived"):
            assert [index for event, index in events if event == name] == list(range(num_buckets))


def test_a_replaced_gradient_is_raised_at_the_commit_point(gradients: dict[int, list[Any]]) -> None:
    assert {rank["replaced"] for ranks in gradients.values() for rank in ranks} == {"last.weight"}


def test_a_rank_with_a_flipped_bit_is_named_and_nothing_is_written(gradients: dict[int, list[Any]]) -> None:
    assert [rank["mismatch"] for rank in gradients[4]] == [[[1], []]] * 4
    # Two ranks that differ cannot say who is right.
    assert [rank["mismatch"] for rank in gradients[2]] == [[[0, 1], []]] * 2
    assert gradients[1][0]["mismatch"] == [[], [1]]


def test_other_layouts_and_models_inside_ddp_are_refused(gradients: dict[int, list[Any]]) -> None:
    for world in (2, 3, 4):
        for rank in gradients[world]:
            assert "the parameter layout at the start" in rank["refused"][0]
            assert "module '1' is inside DistributedDataParallel" in rank["refused"][1]


# All that changes numbers, in one run; and a model that computes twice what it does not keep.
MODERN = {
    "precision": "bf16",
    "wire": "bf16",
    "optimizer": {"ema_decay": 0.9, "schedule": "cosine", "decay_steps": 8},
    "model": {"recompute": True},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """Per world: a whole run, one with a NaN, one stopped at step 6 (whose folders the next test damages)."""
    folder = tmp_path_factory.mktemp("trained")
    results = {}
    for world in WORLDS:
        here = folder / str(world)
        runs = [
            {"output": str(here / "whole")},
            {"output": str(here / "nan"), "nan_at": [2, 5]},
            {"output": str(here / "six"), "steps": 6},
            {"output": str(here / "ddp"), "reducer": "ddp"},
            {"output": str(here / "term"), "term_at": [4, world - 1]},
        ]
        if world in (1, 3):
            # An odd world is enough here, and costs less.
            runs += [{"output": str(here / "filled"), "fill_memory": True}]
            # Stopped, and gone on with among as many.
            modern = {"output": str(here / "modern"), **MODERN}
            runs += [{**modern, "steps": 5}, modern]
        results[world] = launch("train", world, here, runs=runs)
    return results


def test_weights_are_equal_for_every_world(trained: dict[int, list[Any]]) -> None:
    for run in (0, 1, 2):
        assert len({rank[run]["weights_digest"] for ranks in trained.values() for rank in ranks}) == 1
    losses = [line["loss_metrics/global_avg_loss"] for line in trained[1][0][0]["metrics"]]
    assert losses[-1] < losses[0] - 0.3
    for world in WORLDS:
        assert [line["loss_metrics/global_avg_loss"] for line in trained[world][0][0]["metrics"]] == losses


def test_filling_new_tensors_changes_no_bit(trained: dict[int, list[Any]]) -> None:
    """It is off for speed: nothing here reads memory that nobody wrote."""
    for world in (1, 3):
        digests = {rank[5]["weights_digest"] for rank in trained[world]}
        assert digests == {trained[1][0][0]["weights_digest"]}


def test_short_numbers_averages_and_schedules_are_equal_for_every_world(
    trained: dict[int, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / "trained0"
    (digest,) = {rank[7]["weights_digest"] for world in (1, 3) for rank in trained[world]}
    assert digest != trained[1][0][0]["weights_digest"]
    plain, modern = (trained[1][0][run]["metrics"][-1] for run in (0, 7))
    assert modern["loss_metrics/global_avg_loss"] == pytest.approx(
        plain["loss_metrics/global_avg_loss"], abs=0.2
    )
    assert modern["lr"] < plain["lr"] / 5
    average, weights, other = (
        (base / world / "modern" / "snapshots" / "step-00000008" / name).read_bytes()
        for world, name in (("1", "ema.f32"), ("1", "params.f32"), ("3", "ema.f32"))
    )
    assert average == other != weights


def test_a_run_with_ddp_agrees_to_rounding(trained: dict[int, list[Any]]) -> None:
    for world in WORLDS:
        ours, ddp = (trained[world][0][run]["metrics"] for run in (0, 3))
        for a, b in zip(ours, ddp, strict=True):
            for name in ("loss_metrics/global_avg_loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_a_nan_step_is_skipped_on_all_ranks(trained: dict[int, list[Any]]) -> None:
    for ranks in trained.values():
        assert [rank[1]["num_skipped"] for rank in ranks] == [1] * len(ranks)
        lines = ranks[0][1]["metrics"]
        assert [line["train/skipped"] for line in lines] == [0, 0, 1, 0, 0, 0, 0, 0]
        assert lines[2]["grad_norm"] is None
        assert lines[7]["loss_metrics/global_avg_loss"] is not None


def test_sigterm_on_one_rank_stops_all_after_a_snapshot(trained: dict[int, list[Any]]) -> None:
    for ranks in trained.values():
        for rank in ranks:
            assert (rank[4]["step"], rank[4]["stopped"]) == (5, True)


def test_resume_on_another_world_and_after_damage_gives_equal_bits(
    trained: dict[int, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = trained[1][0][0]["weights_digest"]
    base = tmp_path_factory.getbasetemp() / "trained0"
    newest = "snapshots/step-00000006"
    cases = {
        1: [{"output": str(base / "4" / "six")}],
        3: [
            {"output": str(base / "1" / "six"), "damage": {f"{newest}/exp_avg.f32": "flip"}},
            {"output": str(base / "2" / "six"), "damage": {f"{newest}/params.f32": "truncate"}},
            {"output": str(base / "4" / "term")},
        ],
        4: [
            {"output": str(base / "3" / "six")},
            {
                "output": str(base / "3" / "term"),
                "damage": {"snapshots/step-00000005/manifest.json": "truncate"},
            },
            {"output": str(base / "1" / "term")},
        ],
    }
    for world, runs in cases.items():
        folder = base / f"resumed{world}"
        for rank in launch("train", world, folder, runs=runs):
            assert [run["weights_digest"] for run in rank] == [whole] * len(runs)
            assert [len(run["metrics"]) for run in rank] == [8] * len(runs), (
                "every step once in metrics.jsonl"
            )
        said = (folder / "rank0.out").read_text()
        assert said.count("resumed: step") == len(runs)
        assert said.count("falling back to step 4") == len([run for run in runs if "damage" in run])


def test_a_dead_rank_fails_the_others_soon(tmp_path: Path) -> None:
    ranks = launch("fails", 4, tmp_path, expect=None, kill_at=[2, 2])
    assert ranks[2][0] == -signal.SIGKILL
    for rank in (0, 1, 3):
        code, text = ranks[rank]
        assert code == 1
        seconds, name = text.split()[:2]
        assert name == "CommunicationError:"
        assert float(seconds) < 20, "the process group's timeout is 30 s; a dead peer must show earlier"
        assert f"rank {rank} lost its peers during" in text


def workers_by_rank(torchrun: subprocess.Popen[bytes]) -> dict[int, int]:
    """Returns the pid of each rank that this torchrun started."""
    found = {}
    for pid in children_of(torchrun.pid):
        try:
            entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if "TORCHELASTIC_RUN_ID" in environment:
            found[int(environment["RANK"])] = pid
    return found


def end(torchrun: subprocess.Popen[bytes]) -> None:
    """Kills a torchrun that runs, and its ranks."""
    if torchrun.poll() is None:
        for pid in children_of(torchrun.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        torchrun.kill()
    torchrun.wait()


def test_torchrun_restarts_a_killed_rank_and_the_weights_are_equal(
    trained: dict[int, list[Any]], tmp_path: Path
) -> None:
    options = {"runs": [{"output": str(tmp_path / "run"), "pause_s": 0.25}]}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "--max-restarts=2",
    ]
    command += [trainer_ranks.__file__, "train", str(tmp_path), json.dumps(options)]
    snapshot = tmp_path / "run" / "snapshots" / "step-00000004"
    with (tmp_path / "log").open("wb") as log:
        torchrun = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            deadline = time.monotonic() + 200
            while not snapshot.exists() and torchrun.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(workers_by_rank(torchrun)[2], signal.SIGKILL)
            code = torchrun.wait(max(1.0, deadline - time.monotonic()))
        finally:
            end(torchrun)
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    assert "resumed: step 4" in said
    result = json.loads((tmp_path / "rank0.json").read_text())[0]
    assert result["weights_digest"] == trained[1][0][0]["weights_digest"]
    assert [line["step"] for line in result["metrics"]] == list(range(1, 9))


def test_one_torchrun_per_node_makes_one_run(trained: dict[int, list[Any]], tmp_path: Path) -> None:
    """Two nodes of two ranks, each with a torchrun of its own, that meet at the first one's port."""
    options = {"runs": [{"output": str(tmp_path / "run")}]}
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = []
    try:
        for node in range(2):
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"),
                *("--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *(trainer_ranks.__file__, "train", str(tmp_path), json.dumps(options)),
            ]
            with (tmp_path / f"log{node}").open("wb") as log:
                nodes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        codes = [node.wait(150) for node in nodes]
    finally:
        for node in nodes:
            end(node)
    assert codes == [0, 0], "".join((tmp_path / f"log{node}").read_text() for node in range(2))
    for rank in range(4):
        (result,) = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["weights_digest"] == trained[1][0][0]["weights_digest"]
