"""What needs a GPU: the reducer's side stream, and equal bits of a run on the device."""

from __future__ import annotations

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
from test_trainer_cli import TINY
from trainer_ranks import train_synthetic

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer import prove
from foldfeed.trainer.elastic import Launcher, Plan
from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.groups.ranks import Ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def alone() -> Ranks:
    return Ranks(rank=0, world=1, device=torch.device("cuda", 0))


def test_the_side_stream_waits_for_every_gradient() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(12)])
    flat = FlatParameters(model, "cuda")
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=2 * 2**20)
    reducer = TreeReducer(flat, buckets, alone(), 4)
    inputs = torch.randn(4, 256, 512, device="cuda")
    for _ in range(20):
        reducer.begin()
        for v in range(4):
            # Forward on another stream: autograd runs each backward operation on its forward's stream.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with reducer.shard(v), torch.cuda.stream(stream):
                model(inputs[v]).square().mean().backward()
            torch.cuda.current_stream().wait_stream(stream)
        reducer.finish([])
        summed = reducer.gradient.clone()
        flat.zero_gradients()
        parts = []
        for v in range(4):
            flat.zero_gradients()
            model(inputs[v]).square().mean().backward()
            parts.append(flat.grads.clone())
        assert torch.equal(summed, (parts[0] + parts[1]) + (parts[2] + parts[3]))
    reducer.close()


def test_a_step_is_committed_only_when_its_exchange_is_done() -> None:
    """Calls of NCCL return early; here the side stream itself is late."""
    flat = FlatParameters(model := torch.nn.Linear(64, 64), "cuda")
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=2**20)
    late: list[bool] = []

    def on_event(name: str, _: int) -> None:
        if name == "exchange":
            with torch.cuda.stream(reducer._side):
                torch.cuda._sleep(200_000_000)
        if name == "arrived":
            late.append(not reducer._side.query())  # type: ignore[union-attr]

    reducer = TreeReducer(flat, buckets, alone(), 1, on_event=on_event)
    reducer.begin()
    with reducer.shard(0):
        model(torch.ones(2, 64, device="cuda")).sum().backward()
    reducer.finish([])
    assert any(late), "the exchange was not late: this test has tested nothing"
    assert reducer._side is not None
    assert reducer._side.query()
    assert torch.equal(reducer.gradient, flat.grads)
    reducer.close()


def test_the_time_of_an_exchange_is_that_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = FlatParameters(model := torch.nn.Linear(64, 64), "cuda")
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=2**20)
    reducer = TreeReducer(flat, buckets, alone(), 1)
    reduce = reducer._exchange.reduce

    def slowly(*arguments: Any) -> None:
        # 0.1 s at 2 GHz; the call itself returns at once.
        torch.cuda._sleep(200_000_000)
        reduce(*arguments)

    monkeypatch.setattr(reducer._exchange, "reduce", slowly)
    reducer.begin()
    with reducer.shard(0):
        model(torch.ones(2, 64, device="cuda")).sum().backward()
    reducer.finish([])
    assert reducer.times["total"] > 0.05 * len(buckets)
    reducer.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": False},
        {"compile": False, "precision": "bf16", "wire": "bf16", "optimizer": {"ema_decay": 0.9}},
        {"compile": True},
        {"compile": True, "precision": "bf16", "model": {"recompute": True}},
    ],
    ids=["plain", "bf16", "compiled", "compiled-bf16-recomputed"],
)
def test_a_run_on_the_device_repeats_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    outcomes = [train_synthetic(alone(), tmp_path / name, device="cuda", **changes) for name in ("a", "b")]
    assert outcomes[0].weights_digest == outcomes[1].weights_digest


def test_a_new_run_decides_by_itself_whether_it_compiles(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever the trial finds, the run does it, says it, records it, and goes on with it."""
    train_synthetic(alone(), tmp_path, device="cuda", steps=2)
    compiled = "blocks are compiled: two compilations gave equal bits" in capfd.readouterr().out
    identity = json.loads((tmp_path / "run.json").read_text())["identity"]
    assert identity.get("compile", False) is compiled
    outcome = train_synthetic(alone(), tmp_path, device="cuda", steps=4)
    assert "blocks are" not in capfd.readouterr().out
    told = train_synthetic(alone(), tmp_path.with_name("told"), device="cuda", steps=4, compile=compiled)
    assert outcome.weights_digest == told.weights_digest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit_on_the_device(tmp_path: Path, precision: str) -> None:
    digests = set()
    for recompute in (False, True):
        changes = {"compile": False, "precision": precision, "model": {"recompute": recompute}}
        folder = tmp_path / f"{recompute}"
        digests.add(train_synthetic(alone(), folder, device="cuda", **changes).weights_digest)
    assert len(digests) == 1


def test_a_run_goes_on_from_a_snapshot_to_the_same_bits(tmp_path: Path) -> None:
    """What is copied from the device beside the next step is the state between two steps."""
    options: dict[str, Any] = {"device": "cuda", "compile": False, "snapshots": {"every": 1}}
    whole = train_synthetic(alone(), tmp_path / "whole", **options)
    train_synthetic(alone(), tmp_path / "parts", **options, steps=3)
    parts = train_synthetic(alone(), tmp_path / "parts", **options)
    assert parts.weights_digest == whole.weights_digest
    host = train_synthetic(alone(), tmp_path / "filled", **options, fill_memory=True)
    assert host.weights_digest == whole.weights_digest


def arguments_of(store: FeatureStore, output: Path, device: str) -> list[str]:
    arguments = ["--store", store.url, "--output", str(output), *TINY, "--no-tensorboard", "--no-compile"]
    return [*arguments, "--steps", "60", "--device", device]


def digest_of(output: Path) -> str:
    return str(json.loads((output / "result.json").read_text())["weights_digest"])


def elastic_digest(store: FeatureStore, output: Path, device: str, *, ranks: int, kill: bool = False) -> str:
    """Trains, maybe with a rank that is killed amid its steps and replaced; returns the weights' digest."""
    arguments = arguments_of(store, output, device)
    launcher = Launcher(Plan(ranks=ranks), arguments, ranks=ranks, respawns=1)
    killed = False
    try:
        launcher.start()
        deadline = time.monotonic() + 240
        while (code := launcher.poll()) is None:
            assert time.monotonic() < deadline
            if kill and not killed and prove._last_step(output) >= 5:
                os.kill(int(prove.members_of(output)[-1].identity["pid"]), signal.SIGKILL)
                killed = True
            time.sleep(0.02)
    finally:
        launcher.kill()
    assert code == 0
    assert killed == kill, "the run was over before a rank was killed: this test has tested nothing"
    return digest_of(output)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank, two of them")
@pytest.mark.timeout(300)
def test_a_rank_dies_and_nccl_is_made_anew(tmp_path: Path, small_store: FeatureStore) -> None:
    """Two GPUs; one rank is killed amid its steps and replaced. Equal weights, and nothing hangs."""
    whole = elastic_digest(small_store, tmp_path / "whole", "cuda", ranks=2)
    assert elastic_digest(small_store, tmp_path / "disturbed", "cuda", ranks=2, kill=True) == whole


@pytest.mark.timeout(300)
def test_ranks_share_one_card_and_one_dies(tmp_path: Path, small_store: FeatureStore) -> None:
    """Gradients go over the host; weights are those of one rank, whoever dies."""
    whole = elastic_digest(small_store, tmp_path / "whole", "cuda", ranks=1)
    disturbed = elastic_digest(small_store, tmp_path / "disturbed", "cuda-shared", ranks=2, kill=True)
    assert disturbed == whole


@pytest.mark.timeout(300)
def test_ranks_of_torchrun_share_one_card(tmp_path: Path, small_store: FeatureStore) -> None:
    """gloo carries tensors that lie on the card."""
    digests = set()
    for ranks, device in ((1, "cuda"), (2, "cuda-shared")):
        output = tmp_path / str(ranks)
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *words, "-m", "foldfeed.trainer"]
        command += arguments_of(small_store, output, device)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=140)
        assert done.returncode == 0, done.stdout + done.stderr
        digests.add(digest_of(output))
    assert len(digests) == 1
