"""What a step costs when the link is slow: this reducer beside torch's DDP, on nodes with a shaped link.

Every node is a network namespace behind a bridge, its link shaped by a token bucket (root). The model's
layers sleep instead of computing, so two cores are enough for four nodes: backward of each takes a fixed
time, and what is measured is how much of the exchange hides behind it. The ideal is max(compute, bytes over
the link's rate), which nothing can reach: a token bucket counts headers too. So three times are kept for the
bytes: by the nominal rate, by the rate of payload in full segments, and that of plain streams, measured here:
one connection for each pair of nodes, the same bytes both ways at once, and nothing but the kernel at work.
The last one is what is compared with. Bytes are counted by the kernel.

`--alone` times exchanges without a backward instead: the tree and the backend's ring (`--reducer ring`), each
with its best of several bucket sizes, beside the plain streams; with wall time, CPU time and bytes.

Run (root): python bench/trainer_overlap.py [--nodes 2,4] [--mbit 100,400,1000] [--layers 8] [--layer-mb 2]
            python bench/trainer_overlap.py --alone --nodes 2,3,4,8 --mbit 400
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BRIDGE, PREFIX = f"ffo{os.getpid()}", f"ffo{os.getpid()}-"
_counter = itertools.count(1)
ROUNDS = 5
# Bytes of a full segment on Ethernet and of its payload: headers of Ethernet, IPv4, TCP with timestamps.
SEGMENT_BYTES, PAYLOAD_BYTES = 14 + 1500, 1500 - 20 - 32


def run(*arguments: str) -> None:
    """Runs a command of the system's network tools."""
    subprocess.run(arguments, check=True, capture_output=True, timeout=30)


@contextmanager
def namespaces(number: int, mbit: int) -> Iterator[list[str]]:
    """Makes so many namespaces with shaped links; removes them at the end."""
    # New names each time: the kernel takes links down in the background.
    names = [f"{PREFIX}{next(_counter)}" for _ in range(number)]
    try:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        for index, name in enumerate(names):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", f"v{name}", "master", BRIDGE, "up")
            run("ip", "-n", name, "addr", "add", f"10.77.9.{index + 1}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
            shape = ["tbf", "rate", f"{mbit}mbit", "burst", "512kb", "latency", "200ms"]
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, timeout=30, check=False)


def measure(number: int, mbit: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one rank in each namespace; returns what the first one measured."""
    with namespaces(number, mbit) as names, tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "result.json"
        settings = [str(found), str(arguments.layers), str(arguments.layer_mb), str(arguments.layer_ms)]
        settings.append("alone" if arguments.alone else "step")
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, __file__, "--rank", *settings],
                env={
                    **os.environ,
                    "RANK": str(index),
                    "WORLD_SIZE": str(number),
                    "LOCAL_RANK": "0",
                    "MASTER_ADDR": "10.77.9.1",
                    "MASTER_PORT": "29571",
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1",
                },
            )
            for index, name in enumerate(names)
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


class Streams:
    """Plain connections between all ranks, a thread for each direction: what the links give at best."""

    def __init__(self, rank: int, world: int, meet: Callable[[], object]) -> None:
        addresses = [(f"10.77.9.{other + 1}", 29572) for other in range(world)]
        self._peers: dict[int, socket.socket] = {}
        with socket.create_server(addresses[rank]) as listener:
            meet()
            for other in range(rank):
                self._peers[other] = socket.create_connection(addresses[other])
                self._peers[other].sendall(bytes([rank]))
            while len(self._peers) < world - 1:
                connection, _ = listener.accept()
                self._peers[connection.recv(1)[0]] = connection

    def move(self, num_bytes: int) -> None:
        """Sends so many bytes in all, evenly to all, and receives as many."""
        each = num_bytes // len(self._peers)
        threads = []
        for connection in self._peers.values():
            sent, received = bytes(each), bytearray(each)
            threads.append(threading.Thread(target=connection.sendall, args=(sent,)))
            threads.append(
                threading.Thread(target=connection.recv_into, args=(received, each, socket.MSG_WAITALL))
            )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Closes them."""
        for connection in self._peers.values():
            connection.close()


def rank_main(found: str, layers: int, layer_mb: float, layer_ms: float, what: str) -> None:
    """One rank: times steps of every way of reducing, or exchanges alone."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from foldfeed.trainer.gradients.buckets import Bucket, auto_bucket_bytes, plan_buckets
    from foldfeed.trainer.gradients.dyadic import owned_shards
    from foldfeed.trainer.gradients.exchange import Exchange, TreeExchange, elements_sent
    from foldfeed.trainer.gradients.flat import FlatParameters
    from foldfeed.trainer.gradients.probe import measure as measure_link
    from foldfeed.trainer.gradients.reducer import TreeReducer
    from foldfeed.trainer.gradients.ring import RingExchange
    from foldfeed.trainer.gradients.stream import tree_exchange
    from foldfeed.trainer.gradients.transports import plan_for
    from foldfeed.trainer.groups.ranks import joined, world_from_environment

    torch.set_num_threads(1)
    pieces, numel = 16, int(layer_mb * 2**20 / 4 / 16)

    class Slow(torch.autograd.Function):
        """Passes on; its backward sleeps and gives every piece of the layer a gradient of ones."""

        @staticmethod
        def forward(context: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(weight)
            return x * 1.0

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (weight,) = context.saved_tensors
            time.sleep(layer_ms / 1e3 / pieces)
            return gradient, torch.ones_like(weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(numel)) for _ in range(layers * pieces))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = Slow.apply(x, weight)
            return x.sum()

    rank, world, _ = world_from_environment()
    x = torch.ones(4, requires_grad=True)
    results: dict[str, Any] = {}
    with joined(rank=rank, world=world, device=torch.device("cpu"), timeout_s=60.0) as ranks:

        def timed(name: str, step: Callable[[], object]) -> None:
            """Keeps the time of the first step, the median and the least of later ones, and CPU time."""
            first = clock(step)
            clock(step)
            cpu_s = time.process_time()
            seconds = [clock(step) for _ in range(ROUNDS)]
            cpu_s = (time.process_time() - cpu_s) / ROUNDS
            rows = ranks.gather_floats([statistics.median(seconds), first, min(seconds), cpu_s], "a time")
            results[f"{name}_ms"] = round(1e3 * max(row[0] for row in rows), 1)
            results[f"{name}_first_ms"] = round(1e3 * max(row[1] for row in rows), 1)
            results[f"{name}_least_ms"] = round(1e3 * max(row[2] for row in rows), 1)
            results[f"{name}_cpu_ms"] = round(1e3 * sum(row[3] for row in rows), 1)

        def clock(step: Callable[[], object]) -> float:
            ranks.gather_floats([0.0], "a barrier")
            started = time.perf_counter()
            step()
            return time.perf_counter() - started

        total = 4 * layers * pieces * numel
        streams = Streams(rank, world, lambda: ranks.gather_floats([0.0], "a barrier"))
        timed("plain", lambda: streams.move(2 * (world - 1) * total // world))
        if what == "alone":
            values, output = torch.ones(total // 4), torch.zeros(total // 4)
            for number in (8, 16, 32, 64):
                size = len(values) // number
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
                    ranks.gather_floats([0.0], "a barrier")
                    results[f"{name}_{number}_bytes"] = _sent() - sent
                    timed(f"{name}_{number}", exchange_all)
                    assert bool((output == world).all()), "a wrong sum"
            results["predicted_bytes"] = 4 * elements_sent(world, world, total // 4)[rank]
            streams.close()
            if rank == 0:
                Path(found).write_text(json.dumps(results))
            return
        plain = Model()
        timed("compute_alone", lambda: plain(x).backward())
        flat = FlatParameters(Model())
        sizes = [segment.padded for segment in flat.segments]

        def exchange(output: torch.Tensor, numel: int) -> Exchange:
            return tree_exchange(ranks, world, numel, output)

        # As a run on GPUs has it, here over gloo.
        by_backend = dataclasses.replace(ranks, scatter=ranks.gather)

        def backend_exchange(output: torch.Tensor, numel: int) -> Exchange:
            return TreeExchange(by_backend, world, numel, output)

        def short_exchange(output: torch.Tensor, numel: int) -> Exchange:
            return tree_exchange(ranks, world, numel, output, torch.bfloat16)

        link, short_link = (measure_link(ranks, make, 1) for make in (exchange, short_exchange))
        makers = {"bf16": short_exchange, "backend": backend_exchange}
        fixed = plan_buckets(sizes, bucket_bytes=auto_bucket_bytes(total))
        for name, buckets in (
            ("planned", plan_for(link, sizes)),
            ("backend", plan_for(link, sizes)),
            ("fixed", fixed),
            ("bf16", plan_for(short_link, sizes)),
        ):
            model = Model()
            flat = FlatParameters(model)
            wire = torch.bfloat16 if name == "bf16" else torch.float32
            reducer = TreeReducer(
                flat,
                buckets,
                ranks,
                world,
                wire=wire,
                make_exchange=makers.get(name, exchange),
            )
            shard = owned_shards(world, world, rank).start

            def ours(reducer: TreeReducer = reducer, model: nn.Module = model, shard: int = shard) -> None:
                reducer.begin()
                with reducer.shard(shard):
                    model(x).backward()
                reducer.finish([])

            sent = _sent()
            ours()
            results[f"tree_{name}_bytes"] = _sent() - sent
            timed(f"tree_{name}", ours)
            results[f"tree_{name}_buckets"] = len(buckets)
            results[f"tree_{name}_predicted_bytes"] = wire.itemsize * sum(
                elements_sent(world, world, bucket.numel)[rank] for bucket in buckets
            )
            reducer.close()
        for cap in (1, 2, 4, 25):
            wrapped = DistributedDataParallel(Model(), bucket_cap_mb=cap, gradient_as_bucket_view=True)
            timed(f"ddp_{cap}mb", lambda wrapped=wrapped: wrapped(x).backward())
        timed("plain_again", lambda: streams.move(2 * (world - 1) * total // world))
        streams.close()
    results["link"] = {"latency_us": round(1e6 * link.latency_s, 1), "gbit_per_s": 8e-9 * link.bytes_per_s}
    results["gradient_mb"] = total / 2**20
    if rank == 0:
        Path(found).write_text(json.dumps(results))


def _sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def judge(found: dict[str, Any], number: int, mbit: int) -> dict[str, Any]:
    """Adds the closed forms and what of the exchange was hidden, by each of them and by the plain streams."""
    compute_ms, step_ms = found["compute_alone_ms"], found["tree_planned_ms"]
    nominal_ms = found["tree_planned_predicted_bytes"] * 8e-3 / mbit
    plain_ms = min(found["plain_ms"], found["plain_again_ms"])
    ddp_ms = min(found[f"ddp_{cap}mb_ms"] for cap in (1, 2, 4, 25))
    row = {**found, "nodes": number, "mbit": mbit, "step_to_best_ddp": round(step_ms / ddp_ms, 3)}
    for name, wire_ms in (
        ("nominal", nominal_ms),
        ("headers", nominal_ms * SEGMENT_BYTES / PAYLOAD_BYTES),
        ("plain", plain_ms),
    ):
        ideal_ms = max(compute_ms, wire_ms)
        row[f"wire_{name}_ms"] = round(wire_ms, 1)
        row[f"ideal_{name}_ms"] = round(ideal_ms, 1)
        row[f"step_to_ideal_{name}"] = round(step_ms / ideal_ms, 3)
        row[f"hidden_share_{name}"] = round((compute_ms + wire_ms - step_ms) / min(compute_ms, wire_ms), 3)
    row["bf16_bytes_to_fp32"] = round(found["tree_bf16_bytes"] / found["tree_planned_bytes"], 4)
    row["bytes_to_predicted"] = round(found["tree_planned_bytes"] / found["tree_planned_predicted_bytes"], 4)
    return row


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
    return (
        f"step {row['tree_planned_ms']:.0f} ms in {row['tree_planned_buckets']} buckets, "
        f"{row['tree_planned_ms'] / row['tree_backend_ms']:.2f}x the backend's, "
        f"{row['step_to_best_ddp']:.2f}x the best DDP, bytes {row['bytes_to_predicted']:.3f}x predicted; "
        + "; ".join(
            f"{name}: {row[f'step_to_ideal_{name}']:.2f}x of {row[f'ideal_{name}_ms']:.0f} ms, "
            f"{100 * row[f'hidden_share_{name}']:.0f} % hidden"
            for name in ("nominal", "headers", "plain")
        )
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
