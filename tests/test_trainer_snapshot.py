"""Snapshots on disk: what is written validates, what is damaged does not, a full disk publishes nothing."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.trainer.errors import (
    InvalidSnapshotError,
    LeaseLostError,
    NoValidSnapshotError,
    SnapshotError,
    SnapshotMismatchError,
)
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.state.resume import check_belongs, newest_valid
from foldfeed.trainer.state.snapshot import BUFFERS, SnapshotFolder, checksum, read_generation

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))
IDENTITY = {"seed": 1, "model": {"c_m": 32}}
HEADER = {"run_id": "aa", "config_digest": "cc", "layout_hash": "ll", "identity": IDENTITY}
ENVIRONMENT = {"torch": "2.x", "threads": 1}


def write(folder: SnapshotFolder, step: int, numel: int = 1001) -> Path:
    draw = torch.Generator().manual_seed(step)
    buffers = {name: torch.randn(numel, generator=draw) for name in BUFFERS}
    checksums = {name: checksum(buffer) for name, buffer in buffers.items()}
    return folder.write({**HEADER, "environment": ENVIRONMENT, "step": step}, buffers, checksums)


def test_a_generation_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path / "deep" / "snapshots", keep=2)
    path = write(folder, 7)
    found = read_generation(path)
    draw = torch.Generator().manual_seed(7)
    for name in BUFFERS:
        expected = torch.randn(1001, generator=draw)
        assert torch.equal(found.buffers[name], expected)
        # Plain little-endian floats: readable without foldfeed.
        assert (path / f"{name}.f32").read_bytes() == expected.numpy().astype("<f4").tobytes()
        crc = google_crc32c.value((path / f"{name}.f32").read_bytes())
        assert found.manifest["buffers"][name]["crc32c"] == f"{crc:08x}"
    assert found.step == 7
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        [*(f"{n}.f32" for n in BUFFERS), "manifest.json"]
    )


def test_only_the_newest_generations_are_kept(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, keep=2)
    for step in (2, 4, 6, 100_000_000):
        write(folder, step)
    assert folder.steps() == [6, 100_000_000]
    write(folder, 6)
    assert folder.steps() == [6, 100_000_000]
    (tmp_path / ".writing-step-00000008-1").mkdir()
    folder.sweep()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000006", "step-100000000"]


def flip(name: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        raw = bytearray((path / name).read_bytes())
        raw[len(raw) // 3] ^= 1
        (path / name).write_bytes(raw)

    return act


def edit_step(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["step"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in params": (flip("params.f32"), "params.f32 fails its crc32c"),
    "flipped bit in moments": (flip("exp_avg_sq.f32"), "exp_avg_sq.f32 fails its crc32c"),
    "cut": (
        lambda p: (p / "exp_avg.f32").write_bytes(b"1234"),
        "exp_avg.f32 has 4 bytes, the manifest says 4004",
    ),
    "longer": (lambda p: (p / "params.f32").open("ab").write(b"1234"), "params.f32 has 4008 bytes"),
    "missing": (lambda p: (p / "params.f32").unlink(), "cannot be read: No such file"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "cannot be read: No such file"),
    "cut manifest": (
        lambda p: (p / "manifest.json").write_text("{"),
        "manifest.json is not a sealed JSON object",
    ),
    "a list": (
        lambda p: (p / "manifest.json").write_text("[1]"),
        "manifest.json is not a sealed JSON object",
    ),
    "edited manifest": (edit_step, "manifest.json fails its own crc32c"),
}


@settings(max_examples=30, deadline=None)
@given(
    keep=st.integers(1, 3),
    newer=st.lists(st.integers(11, 30), min_size=1, max_size=4, unique=True),
    then=st.lists(st.integers(11, 30), min_size=1, max_size=5, unique=True),
)
def test_what_was_refused_pushes_nothing_out(keep: int, newer: list[int], then: list[int]) -> None:
    """Newer generations are damaged, the run goes on from step 10: its last snapshot is always there."""
    with tempfile.TemporaryDirectory() as place:
        folder = SnapshotFolder(Path(place), keep=keep)
        write(folder, 10, numel=8)
        for step in newer:
            damaged = folder.path / f"step-{step:08d}"
            shutil.copytree(folder.path / "step-00000010", damaged)
            flip("params.f32")(damaged)
        for step in sorted(then):
            write(folder, step, numel=8)
            found = newest_valid(folder, ALONE, lambda line: None)
            assert found is not None
            assert found.step == step


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_damage_is_found_and_an_older_generation_is_used(tmp_path: Path, damage: str) -> None:
    act, reason = DAMAGES[damage]
    folder = SnapshotFolder(tmp_path, keep=3)
    write(folder, 2)
    newest = write(folder, 4)
    act(newest)
    with pytest.raises(InvalidSnapshotError) as caught:
        read_generation(newest)
    assert reason in str(caught.value)
    said: list[str] = []
    found = newest_valid(folder, ALONE, said.append)
    assert found is not None
    assert found.step == 2
    assert len(said) == 1
    assert "step-00000004 refused by 1 of 1 ranks" in said[0]
    assert said[0].endswith("falling back to step 2")


def test_no_valid_generation_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path / "snapshots", keep=3)
    assert newest_valid(folder, ALONE, print) is None
    flip("params.f32")(write(folder, 2))
    with pytest.raises(NoValidSnapshotError, match=r"step-00000002 refused .*Restore one from a copy"):
        newest_valid(folder, ALONE, print)


def test_a_full_disk_publishes_nothing(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, keep=3)
    write(folder, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(SnapshotError, match=r"cannot write a snapshot in .*File too large"):
            write(folder, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]


def test_a_writer_that_may_not_publish_any_more_leaves_nothing(tmp_path: Path) -> None:
    """A former first rank that was stopped while it wrote, and wakes up when the run has ended."""

    def lost() -> None:
        raise LeaseLostError("run.lease", "another")

    for recycle in (False, True):
        folder = SnapshotFolder(tmp_path / f"{recycle}", keep=2, recycle=recycle)
        folder.path.mkdir()
        folder.before_write = lost
        with pytest.raises(LeaseLostError):
            write(folder, 3)
        assert list(folder.path.iterdir()) == []
    folder.path.rmdir()
    with pytest.raises(SnapshotError):
        write(folder, 3)
    assert not folder.path.exists()


def test_a_sound_snapshot_of_something_else_is_refused(tmp_path: Path) -> None:
    found = read_generation(write(SnapshotFolder(tmp_path, keep=1), 2))
    said: list[str] = []

    def check(expected: dict[str, object], environment: dict[str, object], *, strict: bool) -> None:
        check_belongs(found, expected, environment, strict=strict, report=said.append)

    check(HEADER, ENVIRONMENT, strict=True)
    with pytest.raises(SnapshotMismatchError, match="run_id 'aa' in the snapshot, 'bb' now"):
        check({**HEADER, "run_id": "bb"}, ENVIRONMENT, strict=True)
    other = {**HEADER, "config_digest": "dd", "identity": {"seed": 1, "model": {"c_m": 64}}}
    with pytest.raises(
        SnapshotMismatchError, match=r"model\.c_m 32 in the snapshot, 64 now\. Use the settings"
    ):
        check(other, ENVIRONMENT, strict=True)
    with pytest.raises(SnapshotMismatchError, match=r"threads 1 in the snapshot, 2 now.*--no-deterministic"):
        check(HEADER, {**ENVIRONMENT, "threads": 2}, strict=True)
    assert said == []
    check(HEADER, {**ENVIRONMENT, "threads": 2}, strict=False)
    assert "threads 1 in the snapshot, 2 now" in said[0]


def test_nothing_in_the_trainer_unpickles() -> None:
    folder = Path(sys.modules["foldfeed.trainer.state.snapshot"].__file__ or "").parent
    for source in folder.glob("*.py"):
        text = source.read_text()
        for word in ("import pickle", "torch.load", "torch.save", "_object(", "eval("):
            assert word not in text, f"{source.name} has {word}"
