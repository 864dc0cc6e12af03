"""From the death of a rank to the others' first collective, and to the next step: elastic against torchrun.

Both train the same small model on the same store, on the same cores, one after the other. Ranks get SIGKILL
amid their steps. Elastic: the others go on, a spare that stands by joins them. torchrun: the agent restarts
all ranks, which import torch and read the last snapshot. Times come from the run's ledger, which the first
rank writes after the first collective of a generation (of a start), and after each step.

Then: the same budget for 4, 8 and 16 ranks that sleep most of the time, so that few cores do; and how fast a
state goes to a rank that joins, against bare sockets on the same way (loopback, a shaped link). And a step
that lost a rank, with the shards that the others had computed and without.

Run: python bench/trainer_recovery.py --store STORE [--ranks 4] [--kills 3] [--worlds 4,8,16] [--mbit 1000]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import emit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from elastic_ranks import Nursery

from foldfeed.trainer.elastic import Launcher, Plan
from foldfeed.trainer.groups.wire import MeshGroup, raw
from foldfeed.trainer.members.transfer import _move
from foldfeed.trainer.network import namespaces
from foldfeed.trainer.prove import SETTINGS, members_of
from foldfeed.trainer.state.snapshot import BUFFERS

PHASES = ("detect_s", "stop_s", "agree_s", "form_s", "transfer_s")
TRANSFER_PORT = 47_321
POLL_S = 0.005
LIMIT_S = 300.0


def ledger_lines(output: Path) -> list[dict[str, object]]:
    path = output / "goodput.jsonl"
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def wait_for(ready: Callable[[], bool], poll: Callable[[], int | None]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        if (code := poll()) is not None:
            raise SystemExit(f"the run ended with code {code} before it was measured; give more --steps")
        if time.monotonic() > deadline:
            raise SystemExit(f"not ready after {LIMIT_S:.0f} s")
        time.sleep(POLL_S)


def measure_kill(output: Path, pid: int, event: str, poll: Callable[[], int | None]) -> tuple[float, float]:
    """Kills a rank; returns seconds until the ledger's next ``event`` line, and until the step after it."""
    before = len(ledger_lines(output))
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    found: list[float] = []

    def done() -> bool:
        lines = ledger_lines(output)[before:]
        times = [float(line["time"]) for line in lines if line["event"] == event]  # type: ignore[arg-type]
        after = [
            float(line["time"])  # type: ignore[arg-type]
            for line in lines
            if times and line["event"] == "step" and float(line["time"]) > times[0]  # type: ignore[arg-type]
        ]
        found[:] = [times[0] - killed, after[0] - killed] if after else []
        return bool(found)

    wait_for(done, poll)
    return found[0], found[1]


def num_steps(output: Path) -> int:
    return sum(line["event"] == "step" for line in ledger_lines(output))


def elastic(store: str, ranks: int, kills: int, folder: Path) -> list[tuple[float, float]]:
    """Returns the times of each kill; a spare has joined before the next one."""
    output = folder / "elastic"
    with (folder / "elastic.log").open("wb") as log:
        launcher = Launcher(
            Plan(ranks=ranks, max_ranks=ranks),
            ["--store", store, "--output", str(output), "--steps", "100000", *SETTINGS],
            ranks=ranks,
            spares=kills,
            respawns=kills,
            log=log,
        )
        try:
            launcher.start()
            found = []
            for number in range(kills):
                steps = num_steps(output) + 3
                wait_for(
                    lambda steps=steps: num_steps(output) >= steps and len(members_of(output)) == ranks,  # type: ignore[misc]
                    launcher.poll,
                )
                pids = [int(member.identity["pid"]) for member in members_of(output)]
                # The first rank is the worst one to lose: every second time.
                pid = pids[0 if number % 2 == 0 else -1]
                found.append(measure_kill(output, pid, "regroup", launcher.poll))
            return found
        finally:
            launcher.kill()


def torchrun(store: str, ranks: int, folder: Path) -> tuple[float, float]:
    """Returns the times of one kill."""
    output = folder / "torchrun"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={ranks}", "--max-restarts=1", "-m", "foldfeed.trainer"),
        *("--store", store, "--output", str(output), "--steps", "100000", *SETTINGS),
    ]
    with (folder / "torchrun.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: num_steps(output) >= 6, process.poll)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return measure_kill(output, int(children[-1]), "start", process.poll)
        finally:
            # Its session holds its ranks alone.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rate(way: str, parameters: int, spaces: list[str], address: str) -> dict[str, float]:
    """Returns GB/s, and CPU seconds of the busier side, of a state that goes from one process to another.

    Args:
      way: ``bare`` (sendall, recv_into) or ``checked`` (the trainer's transfer with checksums).
      parameters: three buffers of so many.
      spaces: network namespaces of giver and taker; none for loopback.
      address: of the giver.
    """
    state = {name: torch.randn(parameters) for name in BUFFERS}
    reader, writer = os.pipe()
    children = []
    for side in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os.write(writer, transfer_side(way, side, state, spaces, address))
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    found = [struct.unpack("dd", os.read(reader, 16)) for _ in children]
    os.close(reader)
    os.close(writer)
    seconds, cpu_s = (max(column) for column in zip(*found, strict=True))
    return {"gb_per_s": 12 * parameters / seconds / 1e9, "cpu_s": cpu_s}


def transfer_side(
    way: str, side: int, state: dict[str, torch.Tensor], spaces: list[str], address: str
) -> bytes:
    """Gives (0) or takes (1) the state; returns its seconds and CPU seconds."""
    if spaces:
        space = os.open(f"/run/netns/{spaces[side]}", os.O_RDONLY)
        os.setns(space, os.CLONE_NEWNET)
    if side == 0:
        with socket.create_server((address, TRANSFER_PORT)) as listener:
            connection, _ = listener.accept()
    else:
        state = {name: torch.zeros_like(buffer) for name, buffer in state.items()}
        while True:
            try:
                connection = socket.create_connection((address, TRANSFER_PORT))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        connection.sendall(b"x")
    if side == 0:
        connection.recv(1)
    started, cpu = time.perf_counter(), time.process_time()
    if way == "checked":
        group = MeshGroup(side, {1 - side: connection}, LIMIT_S)
        assert _move(group, state, sends=[1]) if side == 0 else _move(group, state, receives=[0])
    else:
        for buffer in state.values():
            left = raw(buffer)
            if side == 0:
                connection.sendall(left)
            while side and len(left):
                left = left[connection.recv_into(left) :]
    return struct.pack("dd", time.perf_counter() - started, time.process_time() - cpu)


def transfer_rates(parameters: int, mbit: int, rounds: int = 3) -> dict[str, float]:
    """Returns the rates of loopback and, if asked for, of a shaped link; best of the rounds."""
    results: dict[str, float] = {"state_gb": 12 * parameters / 1e9}
    with contextlib.ExitStack() as stack:
        links: dict[str, tuple[list[str], str]] = {"loopback": ([], "127.0.0.1")}
        if mbit:
            network = stack.enter_context(namespaces(2))
            names = [network.names(slot) for slot in range(2)]
            links[f"{mbit}mbit"] = [name[0] for name in names], names[0][1]
            shape = ["tbf", "rate", f"{mbit}mbit", "burst", "512kb", "latency", "200ms"]
            for space, _, _ in names:
                command = ["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", "eth0", "root", *shape]
                subprocess.run(command, check=True)
        for link, (spaces, address) in links.items():
            best = {
                way: [rate(way, parameters, spaces, address) for _ in range(rounds)]
                for way in ("bare", "checked")
            }
            for way, found in best.items():
                results[f"{link}_{way}_gb_per_s"] = max(one["gb_per_s"] for one in found)
                results[f"{link}_{way}_cpu_s"] = min(one["cpu_s"] for one in found)
            for what, sign in (("gb_per_s", 1), ("cpu_s", -1)):
                ratio = results[f"{link}_checked_{what}"] / results[f"{link}_bare_{what}"]
                results[f"{link}_checked_of_bare_by_{what}"] = ratio**sign
    return results


def budget(world: int, folder: Path, kills: int = 3) -> dict[str, float]:
    """Returns medians over kills of an elastic run whose ranks sleep most of the time: cores are free.

    ``unseen_s`` goes by before the first rank notices: the kernel takes the dead process apart.
    """
    victims = [1, 0, 2][:kills]
    faults = [
        {"rank": rank, "step": 3 + 2 * number, "phase": "forward", "signal": "KILL"}
        for number, rank in enumerate(victims)
    ]
    with Nursery(folder / f"world{world}") as nursery:
        found = nursery.run(
            ranks=world,
            steps=4 + 2 * kills,
            faults=faults,
            pause_s=1.0,
            limit_s=LIMIT_S,
            wait_s=LIMIT_S,
            config={"data": {"global_batch": 16}},
        )
    phases: dict[str, list[float]] = {}
    for struck in found["struck"]:
        after = [line for line in found["ledger"] if line["time"] > struck["time"]]
        regroup = next(line for line in after if line["event"] == "regroup")
        step = next(line for line in after if line["event"] == "step" and line["time"] > regroup["time"])
        total = regroup["time"] - struck["time"]
        known = {name: regroup[name] for name in PHASES}
        # Asleep, or amid a shard: a rank stops when it looks.
        slept = known.pop("stop_s")
        known |= {
            "stop_s": slept,
            "unseen_s": total - sum(known.values()) - slept + known["detect_s"],
            "protocol_s": sum(regroup[name] for name in ("agree_s", "form_s", "transfer_s")),
            "to_first_collective_s": total,
            "without_stop_s": total - slept,
            "rerun_s": step["time"] - regroup["time"],
        }
        for name, seconds in known.items():
            phases.setdefault(name, []).append(seconds)
    return {f"world{world}_{name}": statistics.median(values) for name, values in phases.items()}


def broken_step(folder: Path, shards: int, world: int = 4, shard_s: float = 0.5) -> dict[str, float]:
    """Returns how long a step takes that lost a rank before its commit: with kept shards, and all again.

    Shards sleep, so that few cores do. From the meeting of those that are left to the end of the step.
    """
    found = {}
    with Nursery(folder / f"shards{shards}") as nursery:
        for way in ("kept", "whole"):
            run = nursery.run(
                ranks=world,
                steps=5,
                faults=[{"rank": 1, "step": 3, "phase": "arrived", "signal": "KILL"}],
                shard_s=shard_s,
                forgets=way == "whole",
                limit_s=LIMIT_S,
                wait_s=LIMIT_S,
                config={"data": {"global_batch": shards}},
            )
            lines = list(itertools.dropwhile(lambda line: "shards_kept" not in line, run["ledger"]))
            met, step = lines[:2]
            assert (step["step"], met["world"]) == (4, world - 1), lines
            found[f"shards{shards}_{way}_step_s"] = step["time"] - met["time"]
            found[f"shards{shards}_{way}_computed"] = met["shards_again"]
    ratio = found[f"shards{shards}_whole_step_s"] / found[f"shards{shards}_kept_step_s"]
    return {**found, f"shards{shards}_ratio": ratio}


def against_torchrun(store: str, ranks: int, kills: int, folder: Path) -> dict[str, float]:
    """Returns how soon the run goes on after kills: elastic, and with a restart by torchrun."""
    ours = elastic(store, ranks, kills, folder)
    budgets = [line for line in ledger_lines(folder / "elastic") if "detect_s" in line]
    first, step = torchrun(store, ranks, folder)
    deaths = [line for line in budgets if int(str(line["world"])) < ranks]
    next_step_s = statistics.median(times[1] for times in ours)
    return {
        **{
            f"elastic_{name}": statistics.median(float(str(line[name])) for line in deaths) for name in PHASES
        },
        "elastic_to_first_collective_s": statistics.median(times[0] for times in ours),
        "elastic_to_first_collective_max_s": max(times[0] for times in ours),
        "elastic_to_next_step_s": next_step_s,
        "torchrun_to_first_collective_s": first,
        "torchrun_to_next_step_s": step,
        "ratio_to_next_step": step / next_step_s,
    }


def main() -> None:
    """Measures and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="", help="needed but for --kills 0")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3, help="of the runs on the store; 0 for none")
    parser.add_argument("--parameters", type=int, default=31_000_000, help="of a state to transfer; 0: none")
    parser.add_argument("--mbit", type=int, default=0, help="of a shaped link, needs root; 0 for none")
    parser.add_argument("--worlds", default="4,8,16", help="ranks of the runs that mostly sleep")
    parser.add_argument("--shards", default="4,8,16", help="virtual shards of steps that lose one of 4 ranks")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/trainer_recovery.jsonl"
    )
    arguments = parser.parse_args()
    results = transfer_rates(arguments.parameters, arguments.mbit) if arguments.parameters else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for world in (int(text) for text in arguments.worlds.split(",") if text):
            results |= budget(world, folder)
        for shards in (int(text) for text in arguments.shards.split(",") if text):
            results |= broken_step(folder, shards)
        if arguments.kills:
            results |= against_torchrun(arguments.store, arguments.ranks, arguments.kills, folder)
    config = {"ranks": arguments.ranks, "kills": arguments.kills, "parameters": arguments.parameters}
    results = {name: round(value, 4) for name, value in results.items()}
    emit("trainer_recovery", config, results, arguments.output)


if __name__ == "__main__":
    main()
