"""What a step costs when the link is slow: this reducer beside torch's DDP, on nodes with a shaped link.

Every node is a network namespace behind a bridge, its link shaped by a token bucket (root). The model's
layers sleep instead of computing, so two cores are enough for four nodes: backward of each takes a fixed
time, and what is measured is how much of the exchange hides behind it. The ideal is max(compute, bytes over
the link's rate), which nothing can reach: a token bucket counts headers too. So three times are kept for the
bytes: by the nominal rate, by the rate of payload in full segments, and that of plain streams, measured here:
one connection for each pair of nodes, the same bytes both ways at once, and nothing but the kernel at work.
The last one is what is compared with. Bytes are counted by the kernel.

All ways take turns, two steps each, so that a machine that slows down slows all of them. What was hidden is
then said twice: by medians of times, and by the median over pairs of steps of the same turn (``paired``).
Backward alone adds to gradients that nobody zeroes. A training step begins with zeroed ones: this reducer's
fills its buffer, DDP's drops them (``zero_grad()``); ``compute_zeroed`` is backward alone with this reducer's
zeroing, so what it has left over the step is the exchange's.

`--alone` times exchanges without a backward instead: the tree and the backend's ring (`--reducer ring`), each
with its best of several bucket sizes, beside the plain streams; with wall time, CPU time and bytes.

Run (root): python bench/trainer_overlap.py [--nodes 2,4] [--mbit 100,400,1000] [--layers 8] [--layer-mb 2]
            python bench/trainer_overlap.py --alone --nodes 2,3,4,8 --mbit 400
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shaped_links import Streams, shaped

ROUNDS = 5
# Of the comparison: turns of each way, fewer where the link alone takes longer than that, and steps in each;
# one step of what only informs.
TURNS, SLOW_TURNS, SLOW_S, STEPS = 3, 2, 1.0, 2
CAPS_MB = (1, 2, 4, 25)
# A bucket size of DDP that needs so much more than its best one gets no turns.
DDP_MARGIN = 1.1
# Bytes of a full segment on Ethernet and of its payload: headers of Ethernet, IPv4, TCP with timestamps.
SEGMENT_BYTES, PAYLOAD_BYTES = 14 + 1500, 1500 - 20 - 32


def measure(number: int, mbit: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one rank in each namespace; returns what the first one measured."""
    with shaped(number, mbit) as places, tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "result.json"
        settings = [str(found), str(arguments.layers), str(arguments.layer_mb), str(arguments.layer_ms)]
        settings.append("alone" if arguments.alone else "step")
        ranks = [
            subprocess.Popen(
                [*enter, sys.executable, __file__, "--rank", *settings],
                env={
                    **os.environ,
                    "RANK": str(index),
                    "WORLD_SIZE": str(number),
                    "LOCAL_RANK": "0",
                    "MASTER_ADDR": places[0][1],
                    "MASTER_PORT": "29571",
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1",
                },
            )
            for index, (enter, _) in enumerate(places)
        ]
        try:
            for rank in ranks:
                if rank.wait(timeout=300):
                    raise SystemExit(f"a rank failed with {rank.returncode}")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return dict(json.loads(found.read_text()))


class Clock:
    """Times steps on all ranks at once; what it found of each way is in ``results``."""

    def __init__(self, ranks: Any) -> None:
        self.ranks = ranks
        self.results: dict[str, Any] = {}

    def barrier(self) -> None:
        """Waits for all."""
        self.ranks.gather_floats([0.0], "a barrier")

    def seconds(self, step: Callable[[], object]) -> float:
        """Returns how long a step takes that all ranks begin together."""
        self.barrier()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    def timed(self, name: str, step: Callable[[], object]) -> None:
        """Times one way by itself."""
        first = self.seconds(step)
        self.seconds(step)
        cpu_s = time.process_time()
        seconds = [self.seconds(step) for _ in range(ROUNDS)]
        self.keep(name, first, seconds, (time.process_time() - cpu_s) / ROUNDS)

    def keep(self, name: str, first: float, seconds: list[float], cpu_s: float) -> list[float]:
        """Keeps the time of the first step, the median and the least of later ones, and CPU time.

        Returns each step's seconds on the slowest rank.
        """
        mine = [statistics.median(seconds), first, min(seconds), cpu_s, *seconds]
        rows = self.ranks.gather_floats(mine, "a time")
        slowest = [max(column) for column in zip(*rows, strict=True)]
        for key, value in zip(("", "_first", "_least"), slowest[:3], strict=True):
            self.results[f"{name}{key}_ms"] = round(1e3 * value, 1)
        self.results[f"{name}_cpu_ms"] = round(1e3 * sum(row[3] for row in rows), 1)
        return slowest[4:]

    def in_turn(self, ways: dict[str, Callable[[], object]], informing: set[str]) -> None:
        """Times several ways in turns; ``pairs`` has every step's time, equally many of each way."""
        firsts = {name: self.seconds(step) for name, step in ways.items()}
        # DDP lays its buckets out anew for the second step.
        again = {name: self.seconds(ways[name]) for name in ways if name.startswith("ddp")}
        rows = self.ranks.gather_floats([*again.values(), firsts["plain"]], "the first steps")
        *slowest, plain_s = map(max, zip(*rows, strict=True))
        again = dict(zip(again, slowest, strict=True))
        for name, seconds in again.items():
            self.results[f"{name}_second_ms"] = round(1e3 * seconds, 1)
        best = min(again.values(), default=0.0)
        kept = [name for name in ways if name not in again or again[name] <= DDP_MARGIN * best]
        times: dict[str, list[float]] = {name: [] for name in kept}
        cpu_s = dict.fromkeys(kept, 0.0)
        for _ in range(SLOW_TURNS if plain_s > SLOW_S else TURNS):
            for name in kept:
                for _ in range(1 if name in informing else STEPS):
                    self.barrier()
                    cpu_s[name] -= time.process_time()
                    times[name].append(self.seconds(ways[name]))
                    cpu_s[name] += time.process_time()
        pairs = {}
        for name, seconds in times.items():
            of_all = self.keep(name, firsts[name], seconds, cpu_s[name] / len(seconds))
            if name not in informing:
                pairs[name] = [round(1e3 * value, 1) for value in of_all]
        self.results["pairs"] = pairs


def rank_main(found: str, layers: int, layer_mb: float, layer_ms: float, what: str) -> None:
    """One rank: times steps of every way of reducing, or exchanges alone."""
    import torch

    from foldfeed.trainer.groups.ranks import joined, world_from_environment

    torch.set_num_threads(1)
    rank, world, _ = world_from_environment()
    pieces, numel = 16 * layers, int(layer_mb * 2**20 / 4 / 16)
    with joined(rank=rank, world=world, device=torch.device("cpu"), timeout_s=60.0) as ranks:
        clock = Clock(ranks)
        streams = Streams(rank, world, clock.barrier)
        total = 4 * pieces * numel

        def move() -> None:
            streams.move(2 * (world - 1) * total // world)

        if what == "alone":
            clock.timed("plain", move)
            time_exchanges(clock, pieces * numel)
        else:
            time_steps(clock, pieces, numel, layer_ms / 1e3 / 16, move)
        streams.close()
    clock.results["gradient_mb"] = total / 2**20
    if rank == 0:
        Path(found).write_text(json.dumps(clock.results))


def time_exchanges(clock: Clock, numel: int) -> None:
    """Times the tree and the ring without a backward."""
    import torch

    from foldfeed.trainer.gradients.buckets import Bucket
    from foldfeed.trainer.gradients.exchange import Exchange, elements_sent
    from foldfeed.trainer.gradients.ring import RingExchange
    from foldfeed.trainer.gradients.stream import tree_exchange

    ranks, results, world = clock.ranks, clock.results, clock.ranks.world
    values, output = torch.ones(numel), torch.zeros(numel)
    for number in (8, 16, 32, 64):
        size = numel // number
        plan = [
            Bucket(index=index, start=index * size, stop=(index + 1) * size, segments=range(1))
            for index in range(number)
        ]
        ways: dict[str, Exchange] = {
            "tree": tree_exchange(ranks, world, size, output),
            "ring": RingExchange(ranks, output),
        }
        for name, way in ways.items():

            def exchange_all(way: Exchange = way, plan: list[Bucket] = plan) -> None:
                for bucket in plan:
                    way.reduce(bucket, [values[bucket.start : bucket.stop]])
                way.drain()

            sent = _sent()
            exchange_all()
            # What is sent may still stand in the link's queue.
            clock.barrier()
            results[f"{name}_{number}_bytes"] = _sent() - sent
            clock.timed(f"{name}_{number}", exchange_all)
            assert bool((output == world).all()), "a wrong sum"
    results["predicted_bytes"] = 4 * elements_sent(world, world, numel)[ranks.rank]


def time_steps(clock: Clock, pieces: int, numel: int, piece_s: float, move: Callable[[], None]) -> None:
    """Times steps: backward alone, this reducer in several ways, DDP with several sizes, plain streams.

    Args:
      clock: of this rank.
      pieces: parameters.
      numel: elements of each.
      piece_s: that backward takes for each.
      move: moves an exchange's bytes over plain streams.
    """
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from foldfeed.trainer.gradients.buckets import Bucket, auto_bucket_bytes, plan_buckets
    from foldfeed.trainer.gradients.dyadic import owned_shards
    from foldfeed.trainer.gradients.exchange import Exchange, TreeExchange, elements_sent
    from foldfeed.trainer.gradients.flat import FlatParameters
    from foldfeed.trainer.gradients.probe import measure as measure_link
    from foldfeed.trainer.gradients.reducer import TreeReducer
    from foldfeed.trainer.gradients.stream import tree_exchange
    from foldfeed.trainer.gradients.transports import plan_for

    class Slow(torch.autograd.Function):
        """Passes on; its backward sleeps and gives every piece of the layer a gradient of ones."""

        @staticmethod
        def forward(context: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(weight)
            return x * 1.0

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (weight,) = context.saved_tensors
            time.sleep(piece_s)
            return gradient, torch.ones_like(weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(numel)) for _ in range(pieces))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = Slow.apply(x, weight)
            return x.sum()

    ranks, results, world = clock.ranks, clock.results, clock.ranks.world
    x = torch.ones(4, requires_grad=True)
    # As a run on GPUs has it, here over gloo.
    by_backend = dataclasses.replace(ranks, scatter=ranks.gather)

    def exchange(output: torch.Tensor, numel: int) -> Exchange:
        return tree_exchange(ranks, world, numel, output)

    def backend_exchange(output: torch.Tensor, numel: int) -> Exchange:
        return TreeExchange(by_backend, world, numel, output)

    def short_exchange(output: torch.Tensor, numel: int) -> Exchange:
        return tree_exchange(ranks, world, numel, output, torch.bfloat16)

    reducers: list[TreeReducer] = []

    def reduced(name: str, buckets: list[Bucket]) -> Callable[[], None]:
        """Returns a step by this reducer; notes its bytes."""
        model = Model()
        wire = torch.bfloat16 if name == "bf16" else torch.float32
        make = {"bf16": short_exchange, "backend": backend_exchange}.get(name, exchange)
        reducer = TreeReducer(FlatParameters(model), buckets, ranks, world, wire=wire, make_exchange=make)
        reducers.append(reducer)
        shard = owned_shards(world, world, ranks.rank).start

        def ours() -> None:
            reducer.begin()
            with reducer.shard(shard):
                model(x).backward()
            reducer.finish([])

        sent = _sent()
        ours()
        results[f"tree_{name}_bytes"] = _sent() - sent
        results[f"tree_{name}_buckets"] = len(buckets)
        results[f"tree_{name}_predicted_bytes"] = wire.itemsize * sum(
            elements_sent(world, world, bucket.numel)[ranks.rank] for bucket in buckets
        )
        return ours

    def theirs(wrapped: nn.Module) -> None:
        wrapped.zero_grad()
        wrapped(x).backward()

    plain, zeroed = Model(), Model()
    flat = FlatParameters(zeroed)

    def zero_and_compute() -> None:
        flat.zero_gradients()
        zeroed(x).backward()

    sizes = [segment.padded for segment in flat.segments]
    link, short_link = (measure_link(ranks, make, 1) for make in (exchange, short_exchange))
    results["link"] = {"latency_us": round(1e6 * link.latency_s, 1), "gbit_per_s": 8e-9 * link.bytes_per_s}
    ways: dict[str, Callable[[], object]] = {
        "compute_alone": lambda: plain(x).backward(),
        "tree_planned": reduced("planned", plan_for(link, sizes)),
    }
    for cap in CAPS_MB:
        wrapped = DistributedDataParallel(Model(), bucket_cap_mb=cap, gradient_as_bucket_view=True)
        ways[f"ddp_{cap}mb"] = functools.partial(theirs, wrapped)
    ways |= {"plain": move, "compute_zeroed": zero_and_compute}
    fixed = plan_buckets(sizes, bucket_bytes=auto_bucket_bytes(4 * sum(sizes)))
    ways["tree_backend"] = reduced("backend", plan_for(link, sizes))
    ways["tree_fixed"] = reduced("fixed", fixed)
    ways["tree_bf16"] = reduced("bf16", plan_for(short_link, sizes))
    clock.in_turn(ways, informing={"tree_backend", "tree_fixed", "tree_bf16"})
    for reducer in reducers:
        reducer.close()


def _sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def judge(found: dict[str, Any], number: int, mbit: int) -> dict[str, Any]:
    """Adds the closed forms and what of the exchange was hidden, by each of them and by the plain streams."""
    compute_ms, step_ms = found["compute_alone_ms"], found["tree_planned_ms"]
    nominal_ms = found["tree_planned_predicted_bytes"] * 8e-3 / mbit
    headers_ms = nominal_ms * SEGMENT_BYTES / PAYLOAD_BYTES
    ddp_ms = min(found[f"ddp_{cap}mb_ms"] for cap in CAPS_MB if f"ddp_{cap}mb_ms" in found)
    row = {**found, "nodes": number, "mbit": mbit, "step_to_best_ddp": round(step_ms / ddp_ms, 3)}
    for name, compute_of, wire_ms in (
        ("nominal", compute_ms, nominal_ms),
        ("headers", compute_ms, headers_ms),
        ("headers_zeroed", found["compute_zeroed_ms"], headers_ms),
        ("plain", compute_ms, found["plain_ms"]),
        ("plain_zeroed", found["compute_zeroed_ms"], found["plain_ms"]),
    ):
        ideal_ms = max(compute_of, wire_ms)
        row[f"wire_{name}_ms"] = round(wire_ms, 1)
        row[f"ideal_{name}_ms"] = round(ideal_ms, 1)
        row[f"step_to_ideal_{name}"] = round(step_ms / ideal_ms, 3)
        row[f"hidden_share_{name}"] = round((compute_of + wire_ms - step_ms) / min(compute_of, wire_ms), 3)
    row["paired"] = judge_pairs(found["pairs"])
    row["bf16_bytes_to_fp32"] = round(found["tree_bf16_bytes"] / found["tree_planned_bytes"], 4)
    row["bytes_to_predicted"] = round(found["tree_planned_bytes"] / found["tree_planned_predicted_bytes"], 4)
    return row


def judge_pairs(pairs: dict[str, list[float]]) -> dict[str, float]:
    """Returns medians over steps that were taken in the same turn, of this step to others.

    The link's time is the least of plain streams: they vary more than it does.
    """
    steps, wire_ms = pairs["tree_planned"], min(pairs["plain"])
    verdict = {}
    for name, key in (("compute_alone", ""), ("compute_zeroed", "_zeroed")):
        turns = list(zip(pairs[name], steps, strict=True))
        hidden = [(compute + wire_ms - step) / min(compute, wire_ms) for compute, step in turns]
        verdict[f"hidden_share{key}"] = round(statistics.median(hidden), 3)
        to_ideal = [step / max(compute, wire_ms) for compute, step in turns]
        verdict[f"step_to_ideal{key}"] = round(statistics.median(to_ideal), 3)
        beyond = [step - max(compute, wire_ms) for compute, step in turns]
        verdict[f"beyond_ideal{key}_ms"] = round(statistics.median(beyond), 1)
    # The size that does best by such pairs.
    verdict["step_to_best_ddp"] = max(
        round(statistics.median(step / other for step, other in zip(steps, pairs[name], strict=True)), 3)
        for name in pairs
        if name.startswith("ddp")
    )
    return verdict


def judge_alone(found: dict[str, Any], number: int, mbit: int) -> dict[str, Any]:
    """Adds the best of each way, and the tree's over the ring's."""
    row = {**found, "nodes": number, "mbit": mbit}
    for way in ("tree", "ring"):
        best = min((8, 16, 32, 64), key=lambda size: found[f"{way}_{size}_ms"])
        row |= {f"{way}_best": best, f"{way}_best_ms": found[f"{way}_{best}_ms"]}
        row[f"{way}_best_cpu_ms"] = found[f"{way}_{best}_cpu_ms"]
        row[f"{way}_bytes_to_predicted"] = round(found[f"{way}_{best}_bytes"] / found["predicted_bytes"], 4)
    row["tree_to_ring"] = round(row["tree_best_ms"] / row["ring_best_ms"], 3)
    row["tree_to_plain"] = round(row["tree_best_ms"] / found["plain_ms"], 3)
    return row


def _say(row: dict[str, Any]) -> str:
    paired = row["paired"]
    return (
        f"step {row['tree_planned_ms']:.0f} ms in {row['tree_planned_buckets']} buckets, "
        f"{row['tree_planned_ms'] / row['tree_backend_ms']:.2f}x the backend's, "
        f"{row['step_to_best_ddp']:.2f}x the best DDP, bytes {row['bytes_to_predicted']:.3f}x predicted; "
        + "; ".join(
            f"{name}: {row[f'step_to_ideal_{name}']:.2f}x of {row[f'ideal_{name}_ms']:.0f} ms, "
            f"{100 * row[f'hidden_share_{name}']:.0f} % hidden"
            for name in ("nominal", "headers", "headers_zeroed", "plain", "plain_zeroed")
        )
        + f"; in pairs: {paired['step_to_ideal']:.3f}x the ideal ({paired['beyond_ideal_ms']:.1f} ms more), "
        f"{100 * paired['hidden_share']:.0f} % hidden, {paired['step_to_best_ddp']:.3f}x the best DDP; "
        f"beside a backward that zeroes: {paired['step_to_ideal_zeroed']:.3f}x, "
        f"{100 * paired['hidden_share_zeroed']:.0f} % hidden"
    )


def _say_alone(row: dict[str, Any]) -> str:
    return (
        f"tree {row['tree_best_ms']:.0f} ms, ring {row['ring_best_ms']:.0f} ms "
        f"({row['tree_to_ring']:.2f}x), plain streams {row['plain_ms']:.0f} ms; "
        f"CPU {row['tree_best_cpu_ms']:.0f}, {row['ring_best_cpu_ms']:.0f} and {row['plain_cpu_ms']:.0f} ms; "
        f"bytes {row['tree_bytes_to_predicted']:.3f} and {row['ring_bytes_to_predicted']:.3f}x predicted"
    )


def main() -> None:
    """Measures every link and number of nodes; writes one row."""
    if sys.argv[1:2] == ["--rank"]:
        found, layers, layer_mb, layer_ms, what = sys.argv[2:]
        rank_main(found, int(layers), float(layer_mb), float(layer_ms), what)
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from rows import NOTHING_TO_MEASURE, emit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="2,4")
    parser.add_argument("--mbit", default="100,400,1000")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layer-mb", type=float, default=2.0)
    parser.add_argument("--layer-ms", type=float, default=60.0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/trainer_overlap.jsonl"
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("trainer_overlap: nothing measured: network namespaces need root", file=sys.stderr)
        raise SystemExit(NOTHING_TO_MEASURE)
    rows = []
    for number in map(int, arguments.nodes.split(",")):
        for mbit in map(int, arguments.mbit.split(",")):
            found = measure(number, mbit, arguments)
            row = judge_alone(found, number, mbit) if arguments.alone else judge(found, number, mbit)
            rows.append(row)
            print(f"{number} nodes, {mbit} Mbit/s: " + (_say_alone(row) if arguments.alone else _say(row)))
            sys.stdout.flush()
    config = {"layers": arguments.layers, "layer_mb": arguments.layer_mb, "layer_ms": arguments.layer_ms}
    emit(
        "trainer_overlap_alone" if arguments.alone else "trainer_overlap",
        config,
        {"rows": rows},
        arguments.output,
    )


if __name__ == "__main__":
    main()
