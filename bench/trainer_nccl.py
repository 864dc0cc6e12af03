"""Presets of NCCL (trainer/groups/nccl.py) measured: all-reduces of given sizes, in fresh processes each.

NCCL reads its environment once in a process, so every preset gets processes of its own: they are forked from
one that has imported torch and touched no device. A table goes to the terminal and one row to the results:
the time of an all-reduce (median over repeats, of the slowest rank), its bus bandwidth 2 (W - 1) / W bytes/s,
and whether the sums have the bits of the first preset's. What is set in the environment stays, as in a run. A
preset that fails is told and makes the exit code 1; where nothing can be measured it is 69.

One node:       python bench/trainer_nccl.py [--ranks 8] [--mb 1,16,64] [--presets none,nvlink]
Several nodes:  the same on each, with --nodes 2 --node 0 (1, ...) --master HOST [--port 29600]
Without GPUs:   --backend gloo proves processes, measurement and table; presets change nothing there.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WARMUP = 3
PRESET_LIMIT_S = 300.0


def measure(
    preset: str,
    backend: str,
    place: Mapping[str, Any],
    sizes_mb: Sequence[float],
    repeats: int,
    out: Connection,
) -> None:
    """Measures one preset as one rank; rank 0 sends its findings. Runs in a process of its own."""
    import torch
    import torch.distributed as dist

    from foldfeed.trainer.groups import nccl

    rank, world = place["rank"], place["world"]
    device = torch.device("cuda", place["local_rank"]) if backend == "nccl" else torch.device("cpu")
    said: list[str] = []
    nccl.apply(preset, said.append)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=place["address"], rank=rank, world_size=world)

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    for size_mb in sizes_mb:
        numel = max(1, int(size_mb * 2**20 / 4))
        mine = torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(device)
        summed = mine.clone()
        dist.all_reduce(summed)
        bits = hashlib.sha256(summed.cpu().numpy().tobytes()).hexdigest()[:16]
        times = []
        for repeat in range(WARMUP + repeats):
            summed.copy_(mine)
            dist.barrier()
            finish()
            started = time.perf_counter()
            dist.all_reduce(summed)
            finish()
            if repeat >= WARMUP:
                times.append(time.perf_counter() - started)
        slowest = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds = slowest.item()
        bus = 2 * (world - 1) / world * 4 * numel / seconds / 1e9
        found.append(
            {"mb": size_mb, "ms": round(1e3 * seconds, 4), "bus_gb_per_s": round(bus, 3), "bits": bits}
        )
    if rank == 0:
        version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
        variables = nccl.record("all_reduce", version)
        out.send({"preset": preset, "said": said, "variables": variables, "sizes": found})
    dist.destroy_process_group()


def sweep_one(preset: str, address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what fresh processes find of a preset; with ``failed`` where they do not end well.

    Args:
      preset: its name, or none.
      address: where its ranks meet; not that of another preset.
      arguments: of the command line.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "foldfeed.trainer.groups.nccl"])
    receiver, sender = context.Pipe(duplex=False)
    sizes = [float(size) for size in arguments.mb.split(",")]
    processes = []
    for local_rank in range(arguments.ranks):
        place = {
            "rank": arguments.node * arguments.ranks + local_rank,
            "world": arguments.nodes * arguments.ranks,
            "local_rank": local_rank,
            "address": address,
        }
        given = (preset, arguments.backend, place, sizes, arguments.repeats, sender)
        processes.append(context.Process(target=measure, args=given))
    for process in processes:
        process.start()
    sender.close()
    deadline = time.monotonic() + PRESET_LIMIT_S
    # What it sends is small, so nobody waits for this side to read.
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    failed = (
        {}
        if set(codes) == {0}
        else {"failed": f"exit codes {codes} (None: longer than {PRESET_LIMIT_S:g} s)"}
    )
    found: dict[str, Any] = {"preset": preset, "sizes": []}
    if not failed and arguments.node == 0:
        found = receiver.recv()
    return found | failed


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns lines for people; presets are compared with the first one that was measured."""
    base = {size["mb"]: size for row in rows[:1] for size in row["sizes"]}
    lines = [f"{'preset':<18}{'MB':>8}{'ms':>10}{'bus GB/s':>10}{'of first':>10}  bits"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['preset']:<18} failed: {row['failed']}")
        for size in row["sizes"]:
            first = base.get(size["mb"], size)
            bits = "as the first" if size["bits"] == first["bits"] else "others"
            lines.append(
                f"{row['preset']:<18}{size['mb']:>8g}{size['ms']:>10.3f}{size['bus_gb_per_s']:>10.2f}"
                f"{size['ms'] / first['ms']:>10.2f}  {bits}"
            )
    return lines


def refusal(arguments: argparse.Namespace) -> str:
    """Returns why nothing can be measured here; empty when something can."""
    if arguments.nodes * arguments.ranks < 2:
        return f"{arguments.nodes * arguments.ranks} ranks exchange nothing; give --ranks 2 or more"
    if arguments.backend == "gloo":
        return ""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices < arguments.ranks:
        return (
            f"NCCL needs a GPU for each of the {arguments.ranks} ranks of this node, and {devices} are here; "
            "--backend gloo tries the sweep itself without any"
        )
    return ""


def main() -> None:
    """Sweeps, prints a table, writes one row."""
    sys.path.insert(0, str(Path(__file__).parent))
    from rows import NOTHING_TO_MEASURE, emit

    from foldfeed.trainer.groups.nccl import PRESETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--ranks", type=int, default=2, help="of this node")
    parser.add_argument("--mb", default="1,16,64")
    parser.add_argument("--presets", default=",".join(("none", *PRESETS)))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--master", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=29600)
    results = Path(__file__).parent / "results/trainer_nccl.jsonl"
    parser.add_argument("--output", type=Path, default=results)
    arguments = parser.parse_args()
    names = arguments.presets.split(",")
    if unknown := [name for name in names if name not in ("none", *PRESETS)]:
        parser.error(f"no preset {', '.join(unknown)}; choose of none, {', '.join(PRESETS)}")
    if reason := refusal(arguments):
        print(f"nothing measured: {reason}", file=sys.stderr)
        raise SystemExit(NOTHING_TO_MEASURE)
    os.environ.pop("FOLDFEED_NCCL_PRESET", None)
    with tempfile.TemporaryDirectory() as folder:
        # On one node by a file, which asks for no free port; on several by a port for each preset, because
        # the system may still hold the one before.
        places = [
            f"file://{folder}/{index}"
            if arguments.nodes == 1
            else f"tcp://{arguments.master}:{arguments.port + index}"
            for index in range(len(names))
        ]
        rows = [sweep_one(name, place, arguments) for name, place in zip(names, places, strict=True)]
    if arguments.node == 0:
        for line in [text for row in rows for text in row.get("said", ())] + table(rows):
            print(line)
        config = {name: value for name, value in vars(arguments).items() if name not in ("output", "master")}
        emit("trainer_nccl", config, {"presets": rows}, arguments.output)
    raise SystemExit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
