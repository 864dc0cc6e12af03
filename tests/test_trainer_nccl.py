"""Presets of NCCL: chosen by topology, never against the user, recorded; and the sweep that measures them."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from foldfeed.trainer.config import DataConfig, RunConfig
from foldfeed.trainer.errors import CommunicationError, TrainerConfigError
from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.groups import nccl
from foldfeed.trainer.groups.nccl import PRESETS
from foldfeed.trainer.groups.ranks import Ranks, TorchGroup, pick_device
from foldfeed.trainer.state.resume import network_warning

BENCH = Path(__file__).parents[1] / "bench" / "trainer_nccl.py"


def test_a_preset_follows_from_nodes_and_adapters(tmp_path: Path) -> None:
    assert nccl.choose("auto", several_nodes=False, infiniband=True) == "nvlink"
    assert nccl.choose("auto", several_nodes=True, infiniband=False) == "ethernet"
    assert nccl.choose("auto", several_nodes=True, infiniband=True) == "infiniband"
    assert nccl.choose("none", several_nodes=True, infiniband=True) == "none"
    assert nccl.choose("nvlink-lean", several_nodes=True, infiniband=False) == "nvlink-lean"
    assert not nccl.has_infiniband(tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    assert nccl.has_infiniband(tmp_path)
    assert not nccl.has_infiniband(tmp_path / "none")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_to_the_limits_of_the_manual(name: str) -> None:
    found = nccl.variables(name)
    # The only algorithm that also all-gathers; the only protocol that is safe on every link.
    assert (found["NCCL_ALGO"], found["NCCL_PROTO"]) == ("Ring", "Simple")
    threads, each = (int(found.get(f"NCCL_{key}", 1)) for key in ("SOCKET_NTHREADS", "NSOCKS_PERTHREAD"))
    assert 1 <= threads <= 16
    assert threads * each <= 64
    assert "NCCL_ALGO" not in nccl.variables(name, pins=False)


def test_what_is_set_stays_and_both_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    environment = {"NCCL_SOCKET_NTHREADS": "2", "NCCL_ALGO": "Tree", "HOME": "/root"}
    monkeypatch.setattr(os, "environ", environment)
    nccl.apply("ethernet", said.append, pins=False)
    assert environment["NCCL_SOCKET_NTHREADS"] == "2"
    assert environment["NCCL_NSOCKS_PERTHREAD"] == "4"
    assert environment["NCCL_ALGO"] == "Tree"
    assert said == [
        "NCCL preset ethernet: NCCL_SOCKET_NTHREADS stays 2, as it was set; the preset has 4",
        "NCCL preset ethernet: NCCL_NSOCKS_PERTHREAD=4",
    ]
    # NCCL has read them: another one comes too late.
    before = dict(environment)
    nccl.apply("nvlink-lean", said.append)
    assert environment == before
    assert nccl.applied() == "ethernet"
    assert nccl.record("tree", "2.27.3") == {
        **{"NCCL_SOCKET_NTHREADS": "2", "NCCL_NSOCKS_PERTHREAD": "4", "NCCL_ALGO": "Tree"},
        **{"transport": "tree", "nccl": "2.27.3", "preset": "ethernet"},
    }
    monkeypatch.setattr(os, "environ", {})
    nccl.apply("none", said.append)
    assert nccl.record("ring", "") == {"transport": "ring", "preset": "none"}
    assert len(said) == 2


def test_a_change_names_each_value_and_whether_it_matters() -> None:
    before = {"NCCL_ALGO": "Ring", "preset": "nvlink", "nccl": "2.26.2", "transport": "tree"}
    now = {"NCCL_PROTO": "Simple", "preset": "ethernet", "nccl": "2.26.2", "transport": "hierarchical"}
    ours, theirs = (network_warning(before, now, reducer) for reducer in ("tree", "ring"))
    for text in (
        "NCCL_ALGO 'Ring' before, 'unset' now",
        "NCCL_PROTO 'unset' before, 'Simple' now",
        "preset 'nvlink' before, 'ethernet' now",
    ):
        assert text in ours
        assert text in theirs
    assert "2.26.2" not in ours
    assert ours.endswith(
        "the weights do not depend on them, because the sums of tree are made in our own order"
    )
    assert theirs.endswith(
        "the sums of ring are made in the backend's order, so bits may differ from here on"
    )
    assert network_warning(before, {**before, "transport": "hierarchical"}, "tree") == ""


def test_a_preset_that_can_have_no_effect_is_refused() -> None:
    with pytest.raises(TrainerConfigError, match="--nccl-preset nvlink has no effect on device cpu"):
        pick_device("cpu", 0, "nvlink")
    with pytest.raises(TrainerConfigError, match="nccl_preset is 'nvlonk'; choose one of auto, none, nvlink"):
        RunConfig(output="o", data=DataConfig(store="s"), nccl_preset="nvlonk")
    for wish in ("auto", "none"):
        assert pick_device("cpu", 0, wish) == torch.device("cpu")


def sweep(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def check_sweep(tmp_path: Path, backend: str) -> dict[str, Any]:
    output = tmp_path / "rows.jsonl"
    done = sweep(
        *("--backend", backend, "--ranks", "2", "--mb", "0.01,0.5", "--repeats", "3"),
        *("--presets", "none,ethernet", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    (line,) = output.read_text().splitlines()
    row: dict[str, Any] = json.loads(line)
    assert re.search(r"ethernet +0\.5 +[\d.]+ +[\d.]+ +[\d.]+  (as the first|others)", done.stdout)
    assert "NCCL preset ethernet: NCCL_ALGO=Ring NCCL_PROTO=Simple NCCL_SOCKET_NTHREADS=4" in done.stdout
    none, ethernet = row["results"]["presets"]
    assert (none["preset"], ethernet["preset"]) == ("none", "ethernet")
    assert "NCCL_SOCKET_NTHREADS" not in none["variables"]
    assert ethernet["variables"]["NCCL_SOCKET_NTHREADS"] == "4"
    for found in (none, ethernet):
        assert [size["mb"] for size in found["sizes"]] == [0.01, 0.5]
        for size in found["sizes"]:
            assert size["ms"] > 0
            # Two ranks: a ring sends the whole once.
            numel = int(size["mb"] * 2**20 / 4)
            assert size["bus_gb_per_s"] == pytest.approx(
                4e-9 * numel / (1e-3 * size["ms"]), rel=0.02, abs=1e-3
            )
    return row


@pytest.mark.slow
def test_the_sweep_measures_each_preset_in_processes_of_its_own(tmp_path: Path) -> None:
    row = check_sweep(tmp_path, "gloo")
    none, ethernet = row["results"]["presets"]
    # gloo reads none of them: the same sums.
    assert [size["bits"] for size in none["sizes"]] == [size["bits"] for size in ethernet["sizes"]]
    assert row["config"]["backend"] == "gloo"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpus_nothing_is_measured_and_it_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(BENCH), "--output", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCH), run_name="__main__")
    assert left.value.code == 69
    assert "NCCL needs a GPU for each of the 2 ranks of this node, and 0 are here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank, two of them")
def test_the_sweep_measures_nccl(tmp_path: Path) -> None:
    row = check_sweep(tmp_path, "nccl")
    assert all(found["variables"]["nccl"] for found in row["results"]["presets"])


def test_ranks_may_share_gpus_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [pick_device("cuda-shared", rank).index for rank in range(5)] == [0, 1, 0, 1, 0]
    with pytest.raises(TrainerConfigError, match=r"local rank 2 has no CUDA device .2 visible.*cuda-shared"):
        pick_device("cuda", 2)
    with pytest.raises(TrainerConfigError, match="no effect on device cuda-shared"):
        pick_device("cuda-shared", 0, "nvlink")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainerConfigError, match="no CUDA device"):
        pick_device("cuda-shared", 0)


def test_a_step_whose_groups_were_given_up_is_not_committed() -> None:
    """As with NCCL: the calls have returned, and a peer was lost before their work was done."""
    group = TorchGroup(dist.ProcessGroupGloo(dist.HashStore(), 0, 1))  # type: ignore[attr-defined]
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"), scatter=group, gather=group)
    model = torch.nn.Linear(3, 2)
    flat = FlatParameters(model)
    reducer = TreeReducer(flat, plan_buckets([s.padded for s in flat.segments], bucket_bytes=64), ranks, 2)
    for lost in (False, True):
        reducer.begin()
        for v in range(2):
            with reducer.shard(v):
                model(torch.ones(3)).sum().backward()
        if not lost:
            assert reducer.finish([1.0]) == [[1.0]]
            continue
        group.abort("rank 1: closed by the other side")
        with pytest.raises(CommunicationError, match=r"exchange of gradients.*rank 1: closed"):
            reducer.finish([1.0])
    reducer.close()
    group.close()


class Communicator:
    """Ends only when its peer is aborted, too, as a kernel that waits for another communicator's."""

    def __init__(self, mine: threading.Event, theirs: threading.Event) -> None:
        self._mine, self._theirs, self.ended = mine, theirs, False

    def abort(self) -> None:
        self._mine.set()
        self.ended = self._theirs.wait(20)

    def shutdown(self) -> None:
        assert self.ended


def test_groups_are_aborted_beside_one_another() -> None:
    events = [threading.Event() for _ in range(3)]
    scatter, part, gather = (Communicator(events[n], events[(n + 1) % 3]) for n in range(3))
    groups = [TorchGroup(scatter, lambda members: part), TorchGroup(gather)]
    groups[0].part([0])
    for group in groups:
        group.abort("the ranks part")
        group.abort("")
    for group in groups:
        assert group.aborted == "the ranks part"
        group.close()
