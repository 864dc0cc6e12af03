"""How gradients travel: every transport sums the same, those of the tree to the bit; the plan from a link."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ports import free_port
from thread_ranks import on_threads
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainer_options import SMALL_CROPS
from trainer_ranks import launch, rank_environment
from transport_sums import reduce_plan
from warm_python import Program, run_programs

from foldfeed.feature_store import FeatureStore
from foldfeed.trainer.cli import main
from foldfeed.trainer.config import DataConfig, RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.gradients.buckets import RAMP, Bucket, plan_buckets, plan_ramp
from foldfeed.trainer.gradients.dyadic import (
    Block,
    blocks_of_ranks,
    merged,
    stacked,
    tree_sum,
)
from foldfeed.trainer.gradients.exchange import TreeExchange, elements_sent, sum_rows
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.probe import Link
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.gradients.transports import _candidates, choose, find_nodes, plan_for
from foldfeed.trainer.gradients.two_level import TwoLevelExchange, node_groups
from foldfeed.trainer.groups.ranks import Ranks, TorchGroup
from foldfeed.trainer.groups.topology import nodes_of

# The world 6 has nodes of 2, of 3, or of 3, 2 and 1 ranks by no order; 7 and 11 shards divide by none.
WORLD, NODES, SHARDS = 6, ["aabbcc", "aaabbb", "abbcab"], [6, 7, 8, 11]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("transports")
    return launch("transports", WORLD, folder, nodes=NODES, num_shards=SHARDS)


@pytest.mark.slow
@pytest.mark.parametrize("local", NODES)
@pytest.mark.parametrize("num_shards", SHARDS)
def test_two_levels_give_the_bits_of_one(sums: list[dict[str, Any]], num_shards: int, local: str) -> None:
    key = f"{num_shards} {local}"
    wanted = sums[0][f"tree {key}"]
    assert wanted == pytest.approx(sums[0][f"exact {key}"], rel=1e-5, abs=1e-5)
    assert sums[0][f"tree bf16 {key}"] == pytest.approx(wanted, rel=0.02, abs=0.1)
    for found in sums:
        assert found[f"tree {key}"] == wanted
        assert found[f"two_level {key}"] == wanted
        assert found[f"tree bf16 {key}"] == found[f"two_level bf16 {key}"] == sums[0][f"tree bf16 {key}"]
        assert found[f"two_level bf16 {key}"] == found[f"two_level bf16-between {key}"]
        assert found[f"ring {key}"] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    # Nodes of another size change nothing.
    assert sums[0][f"two_level {num_shards} {NODES[0]}"] == sums[0][f"two_level {num_shards} {NODES[1]}"]
    assert found[f"two_level {num_shards} {NODES[0]}"] == found[f"two_level {num_shards} {NODES[2]}"]


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
        known = [merged([(Block(v, 1), leaves[Block(v, 1)]) for v in block.shards], add) for block in mine]
        found = merged([known_block for (known_block,) in known], add)
        assert [block for block, _ in found] == stacked(sorted(mine))
        whole |= found
    assert tree_sum(whole, num_shards, add) == tree_sum(leaves, num_shards, add)
    start, stop = mine[0].start, mine[-1].start + mine[-1].size
    assert stacked(sorted(mine)) == stacked(Block(shard, 1) for shard in range(start, stop))


@st.composite
def topologies(draw: st.DrawFn) -> tuple[list[int], int]:
    """Draws the node of every rank of 2 to 7, in any order, and a number of virtual shards."""
    world = draw(st.integers(2, 7))
    nodes = draw(st.lists(st.integers(0, world - 1), min_size=world, max_size=world))
    return nodes, draw(st.integers(world, 20))


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=25, deadline=None)
@given(topologies(), st.integers(1, 40))
@example(([0, 0, 1, 1, 1, 2], 12), 40)
@example(([0, 1, 0, 1], 4), 9)
def test_any_topology_sums_to_the_bits_of_the_tree(
    wire: torch.dtype, drawn: tuple[list[int], int], numel: int
) -> None:
    """Nodes of any sizes, whatever the numbers of their ranks; buckets larger and smaller than the world."""
    places, num_shards = drawn
    nodes = nodes_of([[str(node)] for node in places], [1] * len(places))
    cuts = [0, numel, numel + 1, 60]
    plan = [
        Bucket(index=index, start=start, stop=stop, segments=range(1))
        for index, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]
    draw = torch.Generator().manual_seed(num_shards)
    leaves = [torch.randn(60, generator=draw).to(wire) for _ in range(num_shards)]
    usual = blocks_of_ranks(num_shards, len(places))
    dealer = random.Random(num_shards)
    owners = [dealer.randrange(len(places)) for _ in range(num_shards)]
    # Whoever has a shard, by itself and in no order; some ranks have none.
    dealt = [
        [Block(v, 1) for v in range(num_shards)[::-1] if owners[v] == rank] for rank in range(len(places))
    ]

    def work(ranks: Ranks) -> list[torch.Tensor]:
        found = []
        made = node_groups(ranks, nodes)
        for groups, division in ((None, usual), (made, usual), (made, dealt)):
            output = torch.full((60,), torch.nan)
            exchange: Any = (
                TreeExchange(ranks, num_shards, 60, output, wire)
                if groups is None
                else TwoLevelExchange(ranks, num_shards, output, groups, wire)
            )
            if division is dealt:
                exchange.divide(dealt)
            reduce_plan(exchange, plan, leaves, division[ranks.rank])
            found.append(output)
        return found

    for flat, two_level, otherwise in on_threads(len(places), work):
        assert torch.equal(flat, two_level)
        assert torch.equal(flat, otherwise)


@pytest.mark.parametrize(
    ("sizes", "num_shards"), [([2, 2], 4), ([4, 2], 6), ([2, 2, 2], 6), ([4, 1, 1], 6), ([2, 2, 1, 1], 12)]
)
def test_what_leaves_a_node_is_the_share_of_a_ring_whatever_its_size(
    sizes: list[int], num_shards: int
) -> None:
    """Counted, on nodes whose shards are one aligned block; ranks of a node are neighbours in number."""
    nodes = nodes_of([[str(node)] for node, size in enumerate(sizes) for _ in range(size)], [])
    numel = 12_000

    def work(ranks: Ranks) -> int:
        groups = node_groups(ranks, nodes)
        exchange = TwoLevelExchange(ranks, num_shards, torch.zeros(numel), groups)
        blocks = blocks_of_ranks(num_shards, ranks.world)[ranks.rank]
        bucket = Bucket(index=0, start=0, stop=numel, segments=range(1))
        exchange.reduce(bucket, [torch.ones(numel) for _ in blocks])
        between: Any = groups.between
        return int(between.bytes_sent)

    sent = on_threads(sum(sizes), work)
    wanted = 2 * (len(nodes) - 1) / len(nodes) * 4 * numel
    assert [sum(sent[rank] for rank in node) for node in nodes] == pytest.approx(
        [wanted] * len(nodes), rel=0.01
    )


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=300),
    st.integers(4, 40_000),
    st.integers(1, 20_000),
)
def test_a_ramp_covers_all_and_falls_no_faster_than_it_may(sizes: list[int], limit: int, least: int) -> None:
    buckets = plan_ramp(sizes, bucket_bytes=limit, least_bytes=least)
    assert [n for bucket in buckets for n in bucket.segments] == list(range(len(sizes)))
    assert [bucket.start for bucket in buckets] == [0, *(bucket.stop for bucket in buckets[:-1])]
    assert buckets[-1].stop == sum(sizes)
    for before, bucket in itertools.pairwise(buckets):
        if len(before.segments) > 1:
            assert before.numel <= max(limit, least) / 4
            assert before.numel <= max(bucket.numel, least / 4, limit * RAMP / 4) / RAMP + 1e-6
    if len(buckets[-1].segments) > 1:
        assert buckets[-1].numel <= max(1, least / 4)


def waiting_s(link: Link, plan: Sequence[Bucket], backward_s: float) -> float:
    """Plays the exchange of a plan while a backward of even pace makes the gradients."""
    free_s = 0.0
    for bucket in plan:
        ready_s = backward_s * bucket.stop / plan[-1].stop
        free_s = max(free_s, ready_s) + link.seconds(4 * bucket.numel)
    return free_s - backward_s


@pytest.mark.parametrize(("share", "latencies"), [(0.2, 3), (0.5, 3), (0.7, 20)])
def test_behind_a_longer_backward_a_few_latencies_are_left(share: float, latencies: float) -> None:
    """The link needs a share of backward's time. A plan with one small bucket at its end leaves more."""
    link = Link(latency_s=2e-4, bytes_per_s=5e7)
    sizes = [512] * 16384
    backward_s = 4 * sum(sizes) / link.bytes_per_s / share
    flat = plan_buckets(sizes, bucket_bytes=link.bucket_bytes(4 * sum(sizes)))
    found = waiting_s(link, plan_for(link, sizes), backward_s)
    assert found <= latencies * link.latency_s
    assert found < waiting_s(link, flat, backward_s) / 2


def test_slow_links_get_large_buckets_and_long_latencies_few() -> None:
    near, far = Link(latency_s=2e-5, bytes_per_s=1e9), Link(latency_s=5e-3, bytes_per_s=1e9)
    sizes = [4096] * 4096
    assert near.bucket_bytes(4 * sum(sizes)) < far.bucket_bytes(4 * sum(sizes))
    assert len(plan_for(near, sizes)) > len(plan_for(far, sizes)) >= 4


def test_a_limit_that_was_given_makes_the_plan_whatever_the_link() -> None:
    flat = FlatParameters(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(12)]))
    config = RunConfig(output="o", data=DataConfig(store="s"), reducer="tree", bucket_mb=1 / 64)
    expected = plan_buckets([segment.padded for segment in flat.segments], bucket_bytes=2**14)
    for found in on_threads(2, lambda ranks: choose(config, ranks, flat.segments)):
        assert (found.name, found.buckets) == ("tree", expected)
        assert found.why.startswith("measured ")


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


@pytest.fixture
def fake_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Rank 1,234 of 4,096 on nodes of 8; torch's fake groups send nothing, and nobody else is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=1234, world_size=4096)
    real = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda members=None, **options: real(members, backend="fake"))
    cpu = torch.device("cpu")
    whole = [TorchGroup(dist.new_group()) for _ in range(3)]
    yield Ranks(rank=1234, world=4096, device=cpu, scatter=whole[0], gather=whole[1], control=whole[2])
    dist.destroy_process_group()


def test_a_fake_world_of_thousands_steps_and_holds_what_the_formulae_say(fake_world: Ranks) -> None:
    """The real reducer, plan and groups of one rank of 4,096, for both transports, in fp32 and in bf16."""
    num_shards, nodes, local = 4096, 512, 8
    groups = node_groups(fake_world, nodes_of([()] * 4096, [local] * 4096))
    members = [dist.get_process_group_ranks(group._group) for group in (groups.inside, groups.between)]
    assert members[0] == list(range(1232, 1240))
    assert members[1] == list(range(2, 4096, 8))
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(12)])
    flat = FlatParameters(model)
    sizes = [segment.padded for segment in flat.segments]
    plan = plan_buckets(sizes, bucket_bytes=16 * 1024)
    assert plan == plan_buckets(sizes, bucket_bytes=16 * 1024)
    largest = max(bucket.numel for bucket in plan)

    kinds: list[Callable[..., Any]] = [
        lambda wire, output, numel: TreeExchange(fake_world, num_shards, numel, output, wire),
        lambda wire, output, _: TwoLevelExchange(fake_world, num_shards, output, groups, wire),
    ]
    for wire, kind in itertools.product((torch.float32, torch.bfloat16), kinds):
        make = functools.partial(kind, wire)
        reducer = TreeReducer(flat, plan, fake_world, num_shards, make_exchange=make, wire=wire)
        for _ in range(2):
            reducer.begin()
            with reducer.shard(1234):
                model(torch.ones(2, 64)).sum().backward()
            reducer.finish([1.0])
        reducer.close()
        made: Any = reducer._exchange
        held = sum(
            tensor.nbytes
            for tensor in (vars(made) | getattr(made, "_buffers", {})).values()
            if isinstance(tensor, torch.Tensor) and tensor is not reducer.gradient
        )
        chunk = -(-largest // local)
        expected = {
            # A bucket each for what is sent, received and gathered, in chunks; and one's own chunk.
            TreeExchange: (3 * 4096 + 1) * -(-largest // 4096),
            # The same three inside a node, and for an eighth of the bucket between nodes.
            TwoLevelExchange: 3 * local * chunk + 3 * nodes * -(-chunk // nodes),
        }
        assert held == expected[type(made)] * wire.itemsize


@given(st.integers(1, 70), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_equal_blocks_are_summed_level_by_level_to_the_same_bits(
    count: int, level: int, dtype: torch.dtype
) -> None:
    blocks = [Block(number << level, 1 << level) for number in range(count)]
    num_shards = count << level
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(count)).to(dtype)
    known = dict(zip(blocks, rows.clone().unbind(0), strict=True))
    assert torch.equal(sum_rows(rows, blocks, num_shards), tree_sum(known, num_shards, torch.add))


def test_transports_of_the_same_tree_are_one_run() -> None:
    def digest(reducer: Any) -> str:
        return RunConfig(output="o", data=DataConfig(store="s"), reducer=reducer).digest()

    assert digest("tree") == digest("hierarchical") == digest("auto")
    assert len({digest("tree"), digest("ring"), digest("ddp")}) == 3


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_may_change_its_transport_and_says_why(small_store: FeatureStore, tmp_path: Path) -> None:
    """Four ranks on nodes of 1 and 3, dealt out in turn, then two of 2; the weights are those of one rank."""
    sizes = [*SMALL_CROPS, "--no-tensorboard"]
    given = ["--store", small_store.url, "--global-batch", "4", "--device", "cpu", *sizes]

    def train(name: str, nodes: Sequence[dict[str, str]], *options: str) -> str:
        """Runs four ranks, each with the variables that say on which node it is."""
        port = free_port()
        programs = [
            Program(
                module="foldfeed.trainer",
                arguments=[*given, *options],
                environment={**rank_environment(rank, 4, port), **nodes[rank]},
                stdout=tmp_path / f"{name}{rank}.out",
                stderr=tmp_path / f"{name}{rank}.err",
            )
            for rank in range(4)
        ]
        codes = run_programs(programs, timeout_s=200)
        assert codes == [0] * 4, [program.stderr.read_text() for program in programs]
        return "".join(program.stdout.read_text() for program in programs)

    def digest(output: Path) -> str:
        return str(json.loads((output / "result.json").read_text())["weights_digest"])

    alone, changing = tmp_path / "alone", tmp_path / "changing"
    assert main([*given, "--output", str(alone), "--steps", "4"]) == 0
    told = [{"FOLDFEED_PLACE": f"eu/{node}"} for node in "abaa"]
    said = train("first", told, "--output", str(changing), "--steps", "2", "--reducer", "hierarchical")
    assert "gradients travel by hierarchical" in said
    assert json.loads((changing / "run.json").read_text())["network"]["transport"] == "hierarchical"
    # Node a has the ranks 0, 2 and 3.
    assert sorted(re.findall("rank . by its place is what . was", said)) == [
        f"rank {now} by its place is what {before} was" for now, before in ((1, 2), (2, 3), (3, 1))
    ]
    assert "Gbit/s of gradients" in said
    # As torchrun tells those of two nodes.
    local = [{"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"} for rank in range(4)]
    said = train("second", local, "--output", str(changing), "--steps", "4", "--reducer", "auto")
    assert "would take" in said
    assert digest(alone) == digest(changing)


def test_a_hierarchy_needs_several_nodes_of_several_ranks() -> None:
    config = RunConfig(output="o", data=DataConfig(store="s"), reducer="hierarchical")
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"))
    with pytest.raises(TrainerConfigError, match=r"nodes have \[1\] ranks of 1; it needs several nodes"):
        _candidates(config, alone, find_nodes(alone))
