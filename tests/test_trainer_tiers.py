"""Snapshots in memory and on disk: what is left after a kill, damage, a full or absent memory; intervals."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer_snapshot import ALONE, flip, write
from thread_ranks import on_threads
from trainer_ranks import launch, tiny_config, train_synthetic

from foldfeed.trainer.config import SnapshotConfig
from foldfeed.trainer.errors import NoValidSnapshotError, SnapshotError, TrainerConfigError
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.model import CompactEvoformer
from foldfeed.trainer.state.interval import Interval, young_daly_s
from foldfeed.trainer.state.mirror import Mirror
from foldfeed.trainer.state.resume import newest_valid
from foldfeed.trainer.state.snapshot import BUFFERS, SnapshotFolder, read_generation
from foldfeed.trainer.state.tiers import Saver, memory_folder

RUN = "aa"


@pytest.fixture(autouse=True)
def usual_numerics() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def in_memory(tmp_path: Path) -> SnapshotFolder:
    (tmp_path / "shm").mkdir(exist_ok=True)
    folder = memory_folder(str(tmp_path / "shm"), RUN)
    assert folder is not None
    # As `prepare_memory` does.
    folder.path.mkdir(exist_ok=True)
    return folder


def save(saver: Saver, step: int, numel: int = 1001, *, memory: bool, disk: bool) -> dict[str, torch.Tensor]:
    """Returns the state, which may change again."""
    state = {name: torch.full((numel,), float(step)) for name in BUFFERS}
    saver.begin_snapshot({"step": step, "run_id": RUN}, lambda: state, 0.0, memory=memory, disk=disk)
    saver.end_snapshot()
    return state


def test_memory_is_a_double_buffer_whose_pages_are_written_over(tmp_path: Path) -> None:
    folder = in_memory(tmp_path)
    inodes = []
    for step in range(1, 7):
        path = write(folder, step)
        inodes.append((path / "params.f32").stat().st_ino)
        assert folder.steps() == [step - 1, step][-min(step, 2) :]
        for found in folder.steps():
            assert read_generation(folder.generation_path(found)).step == found
    assert inodes[2:] == inodes[:2] * 2
    # Shorter ones leave nothing of the longer ones behind.
    assert read_generation(write(folder, 9, numel=17)).buffers["params"].numel() == 17


def test_a_write_that_ends_early_leaves_the_other_generation(tmp_path: Path) -> None:
    folder = in_memory(tmp_path)
    write(folder, 1)
    write(folder, 2)

    def die() -> None:
        raise KeyboardInterrupt

    folder.before_write = die
    with pytest.raises(KeyboardInterrupt):
        write(folder, 3)
    assert folder.steps() == [2]
    read_generation(folder.generation_path(2))
    folder.sweep()
    assert [entry.name for entry in folder.path.iterdir()] == ["step-00000002"]


def other_run(path: Path) -> None:
    from foldfeed.trainer.state.snapshot import _seal

    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_bytes(_seal({**manifest, "run_id": "bb"}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip": (flip("exp_avg.f32"), "exp_avg.f32 fails its crc32c"),
    "flip in the manifest": (flip("manifest.json"), "manifest.json"),
    "cut": (lambda p: os.truncate(p / "params.f32", 40), "params.f32 has 40 bytes"),
    "gone": (lambda p: (p / "exp_avg_sq.f32").unlink(), "cannot be read"),
    "another run": (other_run, "it belongs to run bb"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_memory_falls_back_to_older_memory_then_to_disk(tmp_path: Path, damage: str) -> None:
    act, reason = DAMAGES[damage]
    disk, memory = SnapshotFolder(tmp_path / "disk", keep=3), in_memory(tmp_path)
    write(disk, 4)
    write(memory, 6)
    write(memory, 7)
    said: list[str] = []

    def found() -> Path:
        generation = newest_valid(disk, ALONE, said.append, memory, RUN)
        assert generation is not None
        return generation.path

    assert found() == memory.generation_path(7)
    assert said == []
    act(memory.generation_path(7))
    assert found() == memory.generation_path(6)
    assert reason in said[0]
    assert f"snapshot {memory.generation_path(7)} refused by 1 of 1 ranks" in said[0]
    assert said[0].endswith("falling back to step 6")
    act(memory.generation_path(6))
    assert found() == disk.generation_path(4)
    assert said[-1].endswith("falling back to step 4")
    act(disk.generation_path(4))
    if damage == "another run":
        return  # on disk that is an error of its own, see test_trainer_snapshot
    with pytest.raises(NoValidSnapshotError):
        found()


def test_of_one_step_memory_goes_before_disk(tmp_path: Path) -> None:
    disk, memory = SnapshotFolder(tmp_path / "disk", keep=3), in_memory(tmp_path)
    write(disk, 4)
    write(memory, 4)
    said: list[str] = []
    found = newest_valid(disk, ALONE, said.append, memory, RUN)
    assert found is not None
    assert found.path.is_relative_to(memory.path)
    flip("params.f32")(found.path)
    found = newest_valid(disk, ALONE, said.append, memory, RUN)
    assert found is not None
    assert found.path.is_relative_to(disk.path)
    assert said[0].endswith("falling back to step 4 on disk")


def test_only_damaged_memory_means_a_start_from_nothing(tmp_path: Path) -> None:
    disk, memory = SnapshotFolder(tmp_path / "disk", keep=3), in_memory(tmp_path)
    flip("params.f32")(write(memory, 3))
    said: list[str] = []
    assert newest_valid(disk, ALONE, said.append, memory, RUN) is None
    assert said[0].endswith("no older one is left")
    saver = Saver(disk, memory, ALONE, SnapshotConfig(memory=str(tmp_path / "shm")))
    saver.begin(0)
    assert memory.steps() == []
    saver.close()
    assert not memory.path.exists()


@pytest.mark.parametrize("place", ["memory", "another run"])
def test_a_last_step_that_came_from_elsewhere_is_written_to_the_runs_disk(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no further step, and memory is given back at the end: the weights would be nowhere."""
    output, shm = tmp_path / "run", tmp_path / "shm"
    shm.mkdir()
    whole = train_synthetic(ALONE, output, steps=6)
    last = output / "snapshots" / "step-00000006"
    if place == "memory":
        run_id = json.loads((output / "run.json").read_text())["run_id"]
        (shm / f"foldfeed-{run_id}").mkdir(mode=0o700)
        last.rename(shm / f"foldfeed-{run_id}" / last.name)
        snapshots = {"memory": str(shm)}
    else:
        output, snapshots = tmp_path / "second", {"resume": str(last)}
    again = train_synthetic(ALONE, output, steps=6, snapshots=snapshots)
    assert again.weights_digest == whole.weights_digest
    assert "warning" not in capsys.readouterr().out
    assert train_synthetic(ALONE, output, steps=5, snapshots=snapshots).step == 6
    assert "--steps 5 is less than the 6 that are done" in capsys.readouterr().out
    assert list(shm.iterdir()) == []
    assert read_generation(output / "snapshots" / last.name).step == 6


def test_disks_and_uploads_may_take_longer_than_a_collective_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective fails after a second; a write takes two, an upload, too."""
    uploaded: list[str] = []
    monkeypatch.setattr(
        Mirror, "_copy", lambda self, blobs, offer: (time.sleep(2.0), uploaded.append(offer.name))
    )
    (tmp_path / "run.json").write_text("{}")

    def work(ranks: Ranks) -> str:
        disk = SnapshotFolder(tmp_path / "snapshots", keep=9, before_write=lambda: time.sleep(2.0))
        mirror = Mirror(str(tmp_path / "copies"), 9, lambda line: None)
        saver = Saver(disk, None, ranks, SnapshotConfig(memory="none"), mirror=mirror)
        for step in (1, 2):
            save(saver, step, memory=False, disk=True)
        saver.finish()
        return str(ranks.first_does(lambda: time.sleep(2.0) or "done", "a fetch", lasts=True))

    assert on_threads(3, work, timeout_s=1.5) == ["done"] * 3
    assert uploaded[-1] == "step-00000002"


def test_the_loop_may_change_the_state_while_it_is_written(tmp_path: Path) -> None:
    disk, memory = SnapshotFolder(tmp_path / "disk", keep=9), in_memory(tmp_path)
    saver = Saver(disk, memory, ALONE, SnapshotConfig(memory=str(tmp_path / "shm")))
    saver.begin(0)
    for step in range(1, 6):
        state = save(saver, step, 300_000, memory=True, disk=step % 2 == 0)
        for buffer in state.values():
            buffer.fill_(math.nan)
    saver.close()
    assert memory.steps() == [4, 5]
    assert disk.steps() == [2, 4]
    for folder in (memory, disk):
        for step in folder.steps():
            buffers = read_generation(folder.generation_path(step)).buffers
            assert all((buffer == step).all() for buffer in buffers.values())


@pytest.mark.parametrize("place", ["absent", "full", "a file"])
def test_memory_that_cannot_be_used_costs_only_speed_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    root = tmp_path / "shm"
    mounted = False
    if place == "full":
        root.mkdir()
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], capture_output=True, check=False
        ).returncode
        if not mounted:
            pytest.skip("mounting a small tmpfs needs root")
    elif place == "a file":
        root.write_text("")
    try:
        disk = SnapshotFolder(tmp_path / "disk", keep=9)
        config = SnapshotConfig(memory=str(root))
        saver = Saver(disk, memory_folder(str(root), RUN), ALONE, config)
        saver.begin(0)
        for step in range(1, 5):
            save(saver, step, 30_000, memory=True, disk=step == 3)
        saver.finish()
        assert disk.steps() == [3]
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1
        assert "no snapshots in memory" in said[0]
        reasons = {"absent": "No such file", "full": "no space left", "a file": "Not a directory"}
        assert reasons[place] in said[0]
        assert not root.is_dir() or not list(root.iterdir()), "the space is given back"
    finally:
        if mounted:
            subprocess.run(["umount", root], check=True)


def test_a_disk_that_fails_in_the_background_is_seen_and_raised(tmp_path: Path) -> None:
    saver = Saver(SnapshotFolder(tmp_path, keep=2), None, ALONE, SnapshotConfig(memory="none"))
    saver.begin(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        save(saver, 1, memory=False, disk=True)
        saver._disk.is_idle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saver.failed
    with pytest.raises(SnapshotError, match="File too large"):
        saver.check()
    assert not saver.failed


@given(cost_s=st.floats(0.001, 100), ratio=st.floats(20, 1e6))
def test_the_interval_loses_the_least_time(cost_s: float, ratio: float) -> None:
    """Against a search over Daly's exact expectation of a run's time (his equation 20, no restart time)."""
    mtbf_s = cost_s * ratio

    def time_per_work(work_s: float) -> float:
        return mtbf_s * math.expm1((work_s + cost_s) / mtbf_s) / work_s

    best = min(time_per_work(mtbf_s * 10 ** (-4 * k / 2000)) for k in range(2001))
    assert time_per_work(young_daly_s(cost_s, mtbf_s)) <= best * 1.0005


def test_a_chosen_interval_follows_the_cost_and_a_fixed_one_the_step_number() -> None:
    cheap = Interval(-1)
    cheap.begin(10)
    assert [step for step in range(11, 14) if cheap.is_due(step)] == [12, 13]
    cheap.begin(12)
    cheap.learn(cost_s=0.1, step_s=0.5)
    assert cheap.steps == 200, "0.1 % of the time"
    busy = Interval(-1)
    busy.learn(cost_s=0.0, step_s=0.5, busy_s=2.0)
    assert busy.steps == 40, "10 % of the time in the background"
    failing = Interval(-1, mtbf_s=10_000)
    failing.learn(cost_s=2.0, step_s=1.0)
    assert failing.steps == 199
    fixed = Interval(4)
    fixed.begin(6)
    assert [step for step in range(7, 17) if fixed.is_due(step)] == [8, 12, 16]
    assert not any(Interval(0).is_due(step) for step in range(1, 50))
    with pytest.raises(TrainerConfigError, match="mtbf 3600 has no effect"):
        SnapshotConfig(every=5, memory="none", mtbf_s=3600)
    assert SnapshotConfig(mtbf_s=3600).disk_every == -1
    assert SnapshotConfig().disk_every == 10


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_ranks_go_on_from_memory_with_equal_weights(tmp_path: Path) -> None:
    """Nothing lies on disk: three ranks die, four go on from the memory of two nodes, in spite of damage."""
    whole = train_synthetic(ALONE, tmp_path / "whole").weights_digest
    roots = [tmp_path / f"memory{node}" for node in range(2)]
    for root in roots:
        root.mkdir()
    snapshots = {"every": 0, "memory": str(tmp_path / "memoryNODE"), "memory_every": 1}
    codes = launch(
        "fails", 3, tmp_path / "a", expect=None, timeout_s=130, kill_at=[6, 1], snapshots=snapshots
    )
    assert [code for code, _ in codes] == [1, -signal.SIGKILL, 1]
    output = tmp_path / "a" / "run"
    assert not (output / "snapshots").exists()
    folders = [folder for root in roots for folder in root.iterdir()]
    for folder, name in zip(folders, ("params.f32", "exp_avg.f32"), strict=True):
        # That after the step that was cut short was never voted on.
        assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000004", "step-00000005"]
        flip(name)(folder / "step-00000005")
    shutil.rmtree(folders[0] / "step-00000004")
    run = {"output": str(output), "snapshots": snapshots}
    for rank in launch("train", 4, tmp_path / "b", timeout_s=130, runs=[run]):
        assert rank[0]["weights_digest"] == whole
    said = (tmp_path / "b" / "rank0.out").read_text()
    assert f"snapshot {folders[0]}/step-00000005 refused by 4 of 4 ranks" in said
    assert "2 of 4 ranks got it from the memory of rank 2's machine (rank 0: cannot be read" in said
    assert f"resumed: step 4  {folders[0]}/step-00000004  (made by 3 ranks)" in said
    assert not any(list(root.iterdir()) for root in roots), "a run that ended gives the memory back"


def test_weights_leave_as_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="pip install 'foldfeed[export]'")
    from foldfeed.trainer.export import main

    outcome = train_synthetic(ALONE, tmp_path / "run", steps=2)
    target = tmp_path / "weights.safetensors"
    assert main([str(tmp_path / "run"), str(target)]) == 0
    found = safetensors.load_file(target)
    # The model loads them, and laid out flat they are the bytes that were trained.
    model = CompactEvoformer(tiny_config(tmp_path).model)
    model.load_state_dict(found, strict=True)
    trained = (tmp_path / "run" / "snapshots" / "step-00000002" / "params.f32").read_bytes()
    assert FlatParameters(model).params.numpy().tobytes() == trained
    header = json.loads(target.read_bytes()[8 : 8 + int.from_bytes(target.read_bytes()[:8], "little")])
    assert header["__metadata__"]["weights_digest"] == outcome.weights_digest
    assert main([str(tmp_path / "nowhere"), str(target)]) == 1
    flip("params.f32")(tmp_path / "run" / "snapshots" / "step-00000002")
    assert main([str(tmp_path / "run"), str(target)]) == 1
    assert safetensors.load_file(target).keys() == found.keys()
