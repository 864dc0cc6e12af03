"""Stragglers, hanging ranks and what is not finite are named."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer_snapshot import ALONE
from trainer_ranks import launch, toy_model, toy_shard

from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.training.watch import STACKS_FILE, StackWatch, Stragglers


def test_a_straggler_is_named_once_with_its_phase() -> None:
    # Three ranks share 8 virtual shards: the first has fewer, and computes for less.
    watch = Stragglers([2, 3, 3], window_steps=5)
    fair = ([0.01, 0.01, 0.01], [0.2, 0.3, 0.3], 0.4)
    assert [watch.feed(*fair) for _ in range(10)] == [""] * 10
    slow = ([0.01, 0.01, 0.01], [0.4, 0.3, 0.3], 0.5)
    said = [watch.feed(*slow) for _ in range(15)]
    assert said.count("") == 14
    assert said[4] == (
        "straggler: rank 0 computes 2.0 times as long as the others "
        "(0.400 s a step against 0.200 s, over 5 steps)"
    )
    starved = ([0.0, 0.0, 0.3], [0.2, 0.3, 0.3], 0.7)
    said = [watch.feed(*starved) for _ in range(5)]
    assert said[4].startswith("straggler: rank 2 waits for data unlike the others (0.300 s")
    # Many times the others, and nobody would notice.
    tiny = ([0.0001, 0.001, 0.0001], [0.2, 0.3, 0.3], 0.4)
    assert [watch.feed(*tiny) for _ in range(5)] == [""] * 5
    assert [Stragglers([8], 1).feed([1.0], [0.1], 1.1) for _ in range(3)] == [""] * 3


def stuck_here(done: Callable[[], bool]) -> None:
    """Blocks its thread until what is waited for happened; it has to, within half a minute."""
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def holds(path: Path, words: str) -> bool:
    return path.exists() and words in path.read_text()


def test_stacks_are_written_on_silence_once_and_on_the_signal(tmp_path: Path) -> None:
    said: list[str] = []
    before, running = signal.getsignal(signal.SIGUSR1), set(threading.enumerate())
    watch = StackWatch(tmp_path, 1, 3, 2.0, said.append)
    path = tmp_path / STACKS_FILE
    watch.start()
    for step in range(10):
        watch.beat(step)
        time.sleep(0.2)
    assert not path.exists()
    watch.beat(17)
    stuck_here(lambda: holds(path, "==== rank 1 of 3"))
    # As long again, and it is written no more.
    time.sleep(1.8)
    assert path.read_text().count("==== rank 1 of 3") == 1
    assert re.search("step 17 began [1-9] s ago and has not ended", path.read_text())
    assert "in stuck_here" in path.read_text()
    assert len(said) == 1
    os.kill(os.getpid(), signal.SIGUSR1)
    stuck_here(lambda: holds(path, ": SIGUSR1\n"))
    assert path.read_text().count("====") == 2
    watch.stop()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert set(threading.enumerate()) <= running


def test_the_main_thread_leads_however_many_others_there_are(tmp_path: Path) -> None:
    end = threading.Event()
    others = [threading.Thread(target=end.wait, name=f"other-{number}") for number in range(150)]
    for thread in others:
        thread.start()
    watch = StackWatch(tmp_path, 0, 2, 0.5, lambda line: None)
    watch.start()
    stuck_here(lambda: holds(tmp_path / STACKS_FILE, "MainThread"))
    watch.stop()
    end.set()
    for thread in others:
        thread.join()
    text = (tmp_path / STACKS_FILE).read_text()
    stacks = text.split("\nThread ")[1:]
    assert stacks[0].startswith("MainThread")
    assert "in stuck_here" in stacks[0]
    assert len(stacks) >= 152
    assert all(f"\nThread other-{number} (" in text for number in range(150))


def test_a_folder_that_is_gone_is_said_and_the_watch_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run").mkdir()
    watch = StackWatch(tmp_path / "run", 0, 2, 0.5, said.append)
    (tmp_path / "run").rmdir()
    watch.start()
    stuck_here(lambda: len(said) == 2)
    assert "step 0 began" in said[0]
    assert "the stacks cannot be written" in said[1]
    (tmp_path / "run").mkdir()
    os.kill(os.getpid(), signal.SIGUSR1)
    stuck_here((tmp_path / "run" / STACKS_FILE).exists)
    watch.stop()
    assert ": SIGUSR1\n" in (tmp_path / "run" / STACKS_FILE).read_text()


def test_the_block_and_the_parameter_that_are_not_finite_are_named() -> None:
    model = toy_model()
    flat = FlatParameters(model)
    reducer = TreeReducer(flat, plan_buckets([s.padded for s in flat.segments], bucket_bytes=6000), ALONE, 6)
    for bad in (None, 1, 5):
        reducer.begin()
        for v in range(6):
            with reducer.shard(v):
                x = toy_shard(0, v)
                loss = model(x).square().sum()
                if v == bad:
                    loss = loss + float("inf") * model.last.bias.sum()
                loss.backward()
        reducer.finish([])
        expected = {
            None: [],
            1: ["virtual shard 0..3, parameter last.bias"],
            5: ["virtual shard 5, parameter last.bias"],
        }
        assert reducer.not_finite() == expected[bad]
    reducer.close()
    assert torch.isinf(reducer.gradient).any()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_real_ranks_that_are_slow_hang_or_bring_a_nan_are_named(tmp_path: Path) -> None:
    """One run: rank 2 is slow, a sample of rank 1 is NaN, then rank 1 hangs for most of the timeout."""
    # The groups wait for 30 s, as launch joins them; the watch believes 10 s and speaks after 8.
    run = {
        "steps": 23,
        "timeout_s": 10.0,
        "nan_at": [3, 4],
        "slow": [[2, 0, 0.5], [1, -21, 15.0]],
        "usr1_at": [1, 0],
    }
    launch("train", 3, tmp_path, timeout_s=250, runs=[run])
    said = (tmp_path / "rank0.out").read_text()
    # Step 3 has samples 24 to 31, and rank 1 of 3 owns virtual shards 2 to 4 of 8.
    assert (
        "step 4 skipped on all ranks: the loss of virtual shards [4] is not finite (rank 1: samples [28])"
        in said
    )
    assert "straggler: rank 2 waits for data" in said
    stacks = (tmp_path / "run" / STACKS_FILE).read_text()
    assert f"where each rank stands is in {tmp_path}/run/{STACKS_FILE}" in said
    blocks = stacks.split("==== ")[1:]
    by_rank = {
        rank: [
            block for block in blocks if block.startswith(f"rank {rank} of 3") and "step 21 began" in block
        ]
        for rank in range(3)
    }
    assert all(len(found) == 1 for found in by_rank.values()), stacks
    assert ".__iter__\n" in by_rank[1][0], "the culprit is still fetching its batch"
    for rank in (0, 2):
        assert "gather_floats\n" in by_rank[rank][0] or "_collect\n" in by_rank[rank][0]
    assert any(block.startswith("rank 0 of 3") and ": SIGUSR1" in block for block in blocks)
