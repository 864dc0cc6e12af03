"""How gradients travel: every transport sums the same, those of the tree to the bit; the plan from a link."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_ranks import launch

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer.buckets import MAX_AUTO_BYTES, MIN_AUTO_BYTES, TAIL_SHARE, plan_buckets
from foldfeed.trainer.cli import main
from foldfeed.trainer.config import DataConfig, RunConfig
from foldfeed.trainer.dyadic import Block, aligned_blocks, blocks_of_ranks, subtree_sum, tree_sum
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.exchange import TreeExchange, elements_sent
from foldfeed.trainer.probe import Link
from foldfeed.trainer.ranks import Ranks
from foldfeed.trainer.transports import _candidates
from foldfeed.trainer.two_level import node_blocks

# The world 6 has nodes of 3 or of 2 ranks; 7 and 11 shards divide by neither.
WORLD, NODES, SHARDS = 6, [2, 3], [6, 7, 8, 11]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("transports")
    return launch("transports", WORLD, folder, ranks_per_node=NODES, num_shards=SHARDS)


@pytest.mark.slow
@pytest.mark.parametrize("local", NODES)
@pytest.mark.parametrize("num_shards", SHARDS)
def test_two_levels_give_the_bits_of_one(sums: list[dict[str, Any]], num_shards: int, local: int) -> None:
    key = f"{num_shards} {local}"
    wanted = sums[0][f"tree {key}"]
    assert wanted == pytest.approx(sums[0][f"exact {key}"], rel=1e-5, abs=1e-5)
    for found in sums:
        assert found[f"tree {key}"] == wanted
        assert found[f"two_level {key}"] == wanted
        assert found[f"ring {key}"] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    # Nodes of another size change nothing.
    assert sums[0][f"two_level {num_shards} {NODES[0]}"] == sums[0][f"two_level {num_shards} {NODES[1]}"]


@pytest.mark.slow
def test_a_link_is_measured_alike_on_all_ranks(sums: list[dict[str, Any]]) -> None:
    assert len({tuple(found["link"]) for found in sums}) == 1
    latency_s, bytes_per_s = sums[0]["link"]
    assert 0 < latency_s < 10
    assert bytes_per_s > 0


worlds = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 40)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[0] * drawn[1] + drawn[2])
)


@given(worlds)
def test_a_node_merges_its_ranks_blocks_in_the_tree(drawn: tuple[int, int, int]) -> None:
    nodes, local, num_shards = drawn
    world = nodes * local
    ranks = blocks_of_ranks(num_shards, world)
    leaves = {Block(v, 1): str(v) for v in range(num_shards)}

    def add(left: str, right: str) -> str:
        return f"({left}+{right})"

    whole: dict[Block, str] = {}
    for node in range(nodes):
        mine = [block for found in ranks[node * local : (node + 1) * local] for block in found]
        known = {block: subtree_sum(leaves, block, num_shards, add) for block in mine}
        for block in node_blocks(num_shards, world, local, node):
            whole[block] = subtree_sum(known, block, num_shards, add)
    assert tree_sum(whole, num_shards, add) == tree_sum(leaves, num_shards, add)
    start, stop = mine[0].start, mine[-1].start + mine[-1].size
    assert list(node_blocks(num_shards, world, local, nodes - 1)) == aligned_blocks(start, stop)


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e11), st.integers(1, 2**32))
def test_the_plan_of_a_link_leaves_least_to_wait_for(
    latency_s: float, bytes_per_s: float, total: int
) -> None:
    link = Link(latency_s=latency_s, bytes_per_s=bytes_per_s)
    chosen = link.bucket_bytes(total)
    assert MIN_AUTO_BYTES <= chosen <= MAX_AUTO_BYTES

    def waiting(bucket_bytes: float) -> float:
        count = max(4.0, total / bucket_bytes)
        return count * latency_s + total / (bytes_per_s * count * TAIL_SHARE)

    for other in (MIN_AUTO_BYTES, MAX_AUTO_BYTES, chosen / 2, chosen * 2):
        if MIN_AUTO_BYTES <= other <= MAX_AUTO_BYTES:
            assert waiting(chosen) <= waiting(other) * (1 + 1e-4)  # whole bytes


def test_slow_links_get_large_buckets_and_long_latencies_few() -> None:
    total = 64 * 2**20
    near, far = Link(latency_s=2e-5, bytes_per_s=1e10), Link(latency_s=5e-3, bytes_per_s=1e10)
    assert near.bucket_bytes(total) < far.bucket_bytes(total)
    sizes = [4096] * 4096
    plans = [plan_buckets(sizes, bucket_bytes=link.bucket_bytes(total)) for link in (near, far)]
    assert len(plans[0]) > len(plans[1])


@pytest.mark.parametrize("num_shards", [4096, 8192, 5000])
def test_thousands_of_ranks_send_and_hold_what_the_formulae_say(num_shards: int) -> None:
    world, numel = 4096, 1_000_003
    sent = elements_sent(num_shards, world, numel)
    blocks = [len(found) for found in blocks_of_ranks(num_shards, world)]
    chunk = -(-numel // world)
    assert sent == [(world - 1) * chunk * (count + 1) for count in blocks]
    if num_shards % world == 0:
        # One aligned block a rank: the bytes of a ring, but for the rounding of the chunk.
        assert set(sent) == {2 * (world - 1) * chunk}
        assert sent[0] == pytest.approx(2 * (world - 1) / world * numel, rel=0.01)
    # At most two blocks of one or two shards.
    assert max(blocks) <= 2
    rank = 1234
    ranks = Ranks(rank=rank, world=world, device=torch.device("cpu"))
    exchange = TreeExchange(ranks, num_shards, numel, torch.zeros(numel))
    held = sum(value.numel() for value in vars(exchange).values() if isinstance(value, torch.Tensor)) - numel
    assert held == world * blocks[rank] * chunk + sum(blocks) * chunk + chunk + world * chunk
    # What is sent is kept once, what is received once: never more than a few buckets.
    assert held <= 6 * world * chunk


def test_transports_of_the_same_tree_are_one_run() -> None:
    def digest(reducer: Any) -> str:
        return RunConfig(output="o", data=DataConfig(store="s"), reducer=reducer).digest()

    assert digest("tree") == digest("hierarchical") == digest("auto")
    assert len({digest("tree"), digest("ring"), digest("ddp")}) == 3


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_may_change_its_transport_and_says_why(small_store: FeatureStore, tmp_path: Path) -> None:
    """Four ranks that believe to be on two nodes, then four on one; the weights are those of one rank."""
    sizes = ["--crop-residues", "16", "--num-clusters", "4", "--num-extra", "8", "--no-tensorboard"]
    given = ["--store", small_store.url, "--global-batch", "4", "--device", "cpu", *sizes]

    def train(ranks: int, per_node: int, *options: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / f"node_of_{per_node}.py"
        script.write_text(
            f"import os, runpy\nos.environ['LOCAL_WORLD_SIZE'] = '{per_node}'\n"
            "runpy.run_module('foldfeed.trainer', run_name='__main__')\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return subprocess.run(
            [*command, str(script), *given, *options],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def digest(output: Path) -> str:
        return str(json.loads((output / "result.json").read_text())["weights_digest"])

    alone, changing = tmp_path / "alone", tmp_path / "changing"
    assert main([*given, "--output", str(alone), "--steps", "4"]) == 0
    done = train(4, 2, "--output", str(changing), "--steps", "2", "--reducer", "hierarchical")
    assert done.returncode == 0, done.stderr
    assert "gradients travel by hierarchical" in done.stdout
    assert "Gbit/s of gradients" in done.stdout
    done = train(4, 2, "--output", str(changing), "--steps", "4", "--reducer", "auto")
    assert done.returncode == 0, done.stderr
    assert "would take" in done.stdout
    assert digest(alone) == digest(changing)


def test_a_hierarchy_needs_several_nodes_of_several_ranks() -> None:
    config = RunConfig(output="o", data=DataConfig(store="s"), reducer="hierarchical")
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"))
    with pytest.raises(TrainerConfigError, match=r"nodes have \[1\] ranks of 1; it needs several nodes"):
        _candidates(config, alone, 8, 1)
