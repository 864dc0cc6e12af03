"""Copies of snapshots at a URL: a run whose machine is gone goes on from them."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from trainer_options import SMALL_CROPS, SMALL_MODEL

from foldfeed.feature_store import FeatureStore
from foldfeed.feature_store.storage import open_blobs
from foldfeed.trainer.cli import main
from foldfeed.trainer.errors import NoValidSnapshotError
from foldfeed.trainer.state.mirror import Mirror, fetch
from foldfeed.trainer.state.snapshot import read_generation

SIZES = [*SMALL_CROPS, "--global-batch", "3", *SMALL_MODEL]
FLAGS = ["--device", "cpu", "--no-tensorboard", "--memory-snapshots", "none", "--snapshot-every", "2"]


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for copies: a folder, and a bucket of a real server where there is one."""
    return str(tmp_path / "copies") if request.param == "folder" else f"{request.getfixturevalue('s3')}/run"


def train(store: FeatureStore, output: Path, url: str, steps: int, code: int = 0) -> str:
    """Trains in this process; returns the digest of the weights."""
    given = ["--store", store.url, "--output", str(output), "--steps", str(steps), *SIZES, *FLAGS]
    assert main([*given, "--mirror-snapshots", url] if url else given) == code
    result = output / "result.json"
    return str(json.loads(result.read_text())["weights_digest"]) if result.exists() else ""


@pytest.fixture
def uploads_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are too short for any network: without this, what is offered amid an upload may be left out."""
    offer = Mirror.offer

    def offer_in_time(mirror: Mirror, generation: Path) -> None:
        mirror.is_idle()
        offer(mirror, generation)

    monkeypatch.setattr(Mirror, "offer", offer_in_time)


def names(url: str) -> list[str]:
    return open_blobs(url).list("")


@pytest.mark.usefixtures("uploads_keep_up")
def test_a_run_goes_on_elsewhere_from_its_copies(
    small_store: FeatureStore, tmp_path: Path, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = train(small_store, tmp_path / "whole", "", 8)
    train(small_store, tmp_path / "first", url, 5)
    # As many as are kept on disk.
    assert names(url) == ["run.json", "step-00000004", "step-00000005"]
    shutil.rmtree(tmp_path / "first")
    capfd.readouterr()
    assert train(small_store, tmp_path / "second", url, 8) == whole
    said = capfd.readouterr().out
    assert f"fetched: step-00000005 from {url}" in said
    assert "resumed: step 5" in said
    assert names(url) == ["run.json", "step-00000006", "step-00000008"]
    # Where a run lives already, its own disk counts.
    assert train(small_store, tmp_path / "second", url, 8) == whole
    assert "fetched" not in capfd.readouterr().out
    assert not [thread.name for thread in threading.enumerate() if thread.name == "foldfeed-mirror"]


@pytest.mark.usefixtures("uploads_keep_up")
def test_a_copy_that_is_damaged_or_cut_is_told_and_an_older_one_taken(
    small_store: FeatureStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copies = tmp_path / "copies"
    whole = train(small_store, tmp_path / "first", str(copies), 5)
    damaged = copies / "step-00000005" / "params.f32"
    raw = bytearray(damaged.read_bytes())
    raw[100] ^= 1
    damaged.write_bytes(raw)
    # A copy that was cut before its manifest came is none.
    shutil.copytree(copies / "step-00000005", copies / "step-00000006")
    (copies / "step-00000006" / "manifest.json").unlink()
    capfd.readouterr()
    assert train(small_store, tmp_path / "second", str(copies), 5) == whole
    said = capfd.readouterr().out
    assert "warning: step-00000005" in said
    assert "fails its crc32c" in said
    assert "resumed: step 4" in said
    assert "step-00000006" not in said
    for path in copies.glob("step-*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(NoValidSnapshotError):
        fetch(str(copies), tmp_path / "third", lambda line: None)
    assert not (tmp_path / "third" / "run.json").exists()


def test_copies_that_give_no_run_leave_its_folder_to_another(
    small_store: FeatureStore, tmp_path: Path, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing says of which run they are, or none is whole: the folder must not look like a run's then."""
    whole = train(small_store, tmp_path / "first", url, 2)
    blobs, output = open_blobs(url), tmp_path / "second"
    run = blobs.read("run.json")
    blobs.delete("run.json")
    capfd.readouterr()
    train(small_store, output, url, 2, code=1)
    assert "holds snapshots of a run, but its run.json cannot be read" in capfd.readouterr().err
    blobs.write_atomic("run.json", run)
    blobs.write_atomic("step-00000002/params.f32", b"damaged")
    train(small_store, output, url, 2, code=1)
    assert "is valid on every rank" in capfd.readouterr().err
    assert train(small_store, output, "", 2) == whole


def test_a_newer_copy_that_is_damaged_does_not_push_the_next_one_out(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    train(small_store, tmp_path / "first", str(copies), 6)
    for step in (8, 9):
        shutil.copytree(copies / "step-00000006", copies / f"step-0000000{step}")
        (copies / f"step-0000000{step}" / "params.f32").write_bytes(b"")
    whole = train(small_store, tmp_path / "second", str(copies), 7)
    assert "step-00000007" in names(str(copies))
    assert train(small_store, tmp_path / "third", str(copies), 7) == whole


def test_a_place_that_cannot_be_written_costs_the_copies_alone(
    small_store: FeatureStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("no folder")
    assert train(small_store, tmp_path / "run", f"{blocked}/copies", 3) == train(
        small_store, tmp_path / "b", "", 3
    )
    said = capfd.readouterr().out
    assert f"warning: step-00000002 was not copied to {blocked}/copies" in said
    assert "warning: step-00000003 was not copied" in said


def test_a_place_that_was_full_gets_the_next_copy(small_store: FeatureStore, tmp_path: Path) -> None:
    """And what there was of the one that failed does not take its room."""
    train(small_store, tmp_path / "run", "", 4)
    snapshots, copies, said = tmp_path / "run" / "snapshots", tmp_path / "copies", list[str]()
    size = sum(path.stat().st_size for path in (snapshots / "step-00000004").iterdir())
    copies.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 4}", "tmpfs", str(copies)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        mirror = Mirror(str(copies), 2, said.append)
        mirror.offer(snapshots / "step-00000002")
        assert mirror.is_idle()
        assert "warning: step-00000002 was not copied" in said[0]
        assert "no space left" in said[0]
        assert names(str(copies)) == ["run.json"]
        subprocess.run([*mount[:3], "-o", "remount,size=64m", str(copies)], check=True)
        mirror.offer(snapshots / "step-00000004")
        assert mirror.is_idle()
        assert names(str(copies)) == ["run.json", "step-00000004"]
    finally:
        subprocess.run(["umount", "-l", str(copies)], check=True)


def test_what_waits_is_replaced_by_newer_and_survives_its_removal(
    small_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one generation is uploaded two are offered and removed from the disk: the last one is copied."""
    train(small_store, tmp_path / "run", "", 4)
    generations = tmp_path / "run" / "snapshots"
    for step in (6, 8):
        shutil.copytree(generations / "step-00000004", generations / f"step-0000000{step}")
    uploading, go_on = threading.Event(), threading.Event()
    copies = tmp_path / "copies"
    usual = type(open_blobs(str(copies))).write_atomic

    def slow(self, path, data):
        uploading.set()
        assert go_on.wait(60)
        usual(self, path, data)

    monkeypatch.setattr(type(open_blobs(str(copies))), "write_atomic", slow)
    mirror = Mirror(str(copies), keep=3, say=lambda line: None)
    mirror.offer(generations / "step-00000004")
    assert uploading.wait(60)
    for step in (6, 8):
        mirror.offer(generations / f"step-0000000{step}")
        shutil.rmtree(generations / f"step-0000000{step}")
    go_on.set()
    mirror.is_idle()
    assert names(str(copies)) == ["run.json", "step-00000004", "step-00000008"]
    assert read_generation(copies / "step-00000008").step == 4
