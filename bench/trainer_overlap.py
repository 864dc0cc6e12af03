"""What a step costs when the link is slow: this reducer beside torch's DDP, on nodes with a shaped link.

Every node is a network namespace behind a bridge, its link shaped by a token bucket (root). The model's
layers sleep instead of computing, so two cores are enough for four nodes: backward of each takes a fixed
time, and what is measured is how much of the exchange hides behind it. The ideal is max(compute, bytes over
the link's rate), which nothing can reach; bytes are counted by the kernel.

Run (root): python bench/trainer_overlap.py [--nodes 2,4] [--mbit 100,400,1000] [--layers 8] [--layer-mb 2]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BRIDGE, PREFIX = "ffbench0", "ffb"
_counter = itertools.count(1)
ROUNDS = 5


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


def rank_main(found: str, layers: int, layer_mb: float, layer_ms: float) -> None:
    """One rank: times steps of every way of reducing."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from foldfeed.trainer.gradients.buckets import auto_bucket_bytes, plan_buckets
    from foldfeed.trainer.gradients.dyadic import owned_shards
    from foldfeed.trainer.gradients.exchange import TreeExchange, elements_sent
    from foldfeed.trainer.gradients.flat import FlatParameters
    from foldfeed.trainer.gradients.probe import measure as measure_link
    from foldfeed.trainer.gradients.reducer import TreeReducer
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

        def timed(name: str, step: Callable[[], object]) -> float:
            first = clock(step)
            clock(step)
            seconds = statistics.median(clock(step) for _ in range(ROUNDS))
            rows = ranks.gather_floats([seconds, first], "a time")
            results[f"{name}_ms"] = round(1e3 * max(row[0] for row in rows), 1)
            results[f"{name}_first_ms"] = round(1e3 * max(row[1] for row in rows), 1)
            return seconds

        def clock(step: Callable[[], object]) -> float:
            ranks.gather_floats([0.0], "a barrier")
            started = time.perf_counter()
            step()
            return time.perf_counter() - started

        plain = Model()
        timed("compute_alone", lambda: plain(x).backward())
        total = 4 * layers * pieces * numel
        flat = FlatParameters(Model())
        sizes = [segment.padded for segment in flat.segments]

        def exchange(output: torch.Tensor, numel: int) -> TreeExchange:
            return TreeExchange(ranks, world, numel, output)

        def short_exchange(output: torch.Tensor, numel: int) -> TreeExchange:
            return TreeExchange(ranks, world, numel, output, torch.bfloat16)

        link, short_link = (measure_link(ranks, make, 1) for make in (exchange, short_exchange))
        fixed = plan_buckets(sizes, bucket_bytes=auto_bucket_bytes(total))
        for name, buckets in (
            ("planned", plan_for(link, sizes)),
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
                make_exchange=short_exchange if name == "bf16" else exchange,
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
    results["link"] = {"latency_us": round(1e6 * link.latency_s, 1), "gbit_per_s": 8e-9 * link.bytes_per_s}
    results["gradient_mb"] = total / 2**20
    if rank == 0:
        Path(found).write_text(json.dumps(results))


def _sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def judge(found: dict[str, Any], number: int, mbit: int) -> dict[str, Any]:
    """Adds the closed form and what of the exchange was hidden."""
    compute_s = found["compute_alone_ms"] / 1e3
    wire_s = found["tree_planned_predicted_bytes"] * 8 / (mbit * 1e6)
    ideal_s = max(compute_s, wire_s)
    ddp = (
        min(value for name, value in found.items() if name.startswith("ddp_") and name.endswith("mb_ms"))
        / 1e3
    )
    step_s = found["tree_planned_ms"] / 1e3
    hideable_s = min(compute_s, wire_s)
    return {
        **found,
        "nodes": number,
        "mbit": mbit,
        "wire_ms": round(1e3 * wire_s, 1),
        "ideal_ms": round(1e3 * ideal_s, 1),
        "step_to_ideal": round(step_s / ideal_s, 3),
        "step_to_best_ddp": round(step_s / ddp, 3),
        "hidden_share": round((compute_s + wire_s - step_s) / hideable_s, 3),
        "bf16_bytes_to_fp32": round(found["tree_bf16_bytes"] / found["tree_planned_bytes"], 4),
        "bytes_to_predicted": round(found["tree_planned_bytes"] / found["tree_planned_predicted_bytes"], 4),
    }


def main() -> None:
    """Measures every link and number of nodes; writes one row."""
    if sys.argv[1:2] == ["--rank"]:
        found, layers, layer_mb, layer_ms = sys.argv[2:]
        rank_main(found, int(layers), float(layer_mb), float(layer_ms))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from rows import NOTHING_TO_MEASURE, emit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="2,4")
    parser.add_argument("--mbit", default="100,400,1000")
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
            rows.append(judge(measure(number, mbit, arguments), number, mbit))
            row = rows[-1]
            print(
                f"{number} nodes, {mbit} Mbit/s: step {row['tree_planned_ms']:.0f} ms in "
                f"{row['tree_planned_buckets']} buckets, "
                f"{row['step_to_ideal']:.2f}x the ideal, {row['step_to_best_ddp']:.2f}x the best DDP, "
                f"{100 * row['hidden_share']:.0f} % hidden, bytes {row['bytes_to_predicted']:.3f}x predicted",
                flush=True,
            )
    config = {"layers": arguments.layers, "layer_mb": arguments.layer_mb, "layer_ms": arguments.layer_ms}
    emit("trainer_overlap", config, {"rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
