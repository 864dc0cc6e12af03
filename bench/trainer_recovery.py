"""From the death of a rank to the others' first collective, and to the next step: elastic against torchrun.

Both train the same small model on the same store, on the same cores, one after the other. Ranks get SIGKILL
amid their steps. Elastic: the others go on, a spare that stands by joins them. torchrun: the agent restarts
all ranks, which import torch and read the last snapshot. Times come from the run's ledger, which the first
rank writes after the first collective of a generation (of a start), and after each step.

Then: how fast a state goes to a rank that joins, against bare sockets on the same way (loopback).

Run: python bench/trainer_recovery.py --store STORE [--ranks 4] [--kills 3] [--parameters 31000000]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import emit

from foldfeed.trainer.elastic import Launcher, Plan
from foldfeed.trainer.prove import SETTINGS, members_of
from foldfeed.trainer.snapshot import BUFFERS, checksum
from foldfeed.trainer.wire import Channel, raw

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


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


def both(one: Callable[[], object], other: Callable[[], object]) -> float:
    started = time.perf_counter()
    thread = threading.Thread(target=one)
    thread.start()
    other()
    thread.join()
    return time.perf_counter() - started


def transfer_rates(parameters: int, rounds: int = 3) -> dict[str, float]:
    """Returns GB/s of a state: by bare sockets, by our channel, and with checksums at both ends."""
    state = {name: torch.randn(parameters) for name in BUFFERS}
    fresh = {name: torch.zeros(parameters) for name in BUFFERS}
    views, targets = [raw(state[name]) for name in BUFFERS], [raw(fresh[name]) for name in BUFFERS]
    total = sum(len(view) for view in views)
    seconds: dict[str, list[float]] = {"bare": [], "channel": [], "checked": []}
    for _ in range(rounds):
        one, other = connected()

        def receive(other: socket.socket = other) -> None:
            for target in targets:
                left = target
                while len(left):
                    left = left[other.recv_into(left) :]

        def send(one: socket.socket = one) -> None:
            for view in views:
                one.sendall(view)

        seconds["bare"].append(both(send, receive))
        giver, taker = Channel(0, {1: one}, 60.0), Channel(1, {0: other}, 60.0)
        spent = both(lambda g=giver: g.exchange({1: views}, {}), lambda t=taker: t.exchange({}, {0: targets}))  # type: ignore[misc]
        seconds["channel"].append(spent)
        started = time.perf_counter()
        assert [checksum(state[name]) for name in BUFFERS] == [checksum(fresh[name]) for name in BUFFERS]
        seconds["checked"].append(spent + time.perf_counter() - started)
        giver.close()
        taker.close()
    rates = {f"state_{name}_gb_per_s": total / min(values) / 1e9 for name, values in seconds.items()}
    return {
        **rates,
        "state_gb": total / 1e9,
        "channel_of_bare": min(seconds["bare"]) / min(seconds["channel"]),
    }


def main() -> None:
    """Measures and writes one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=31_000_000, help="of the state that is transferred")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/trainer_recovery.jsonl"
    )
    arguments = parser.parse_args()
    results = transfer_rates(arguments.parameters)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = elastic(arguments.store, arguments.ranks, arguments.kills, folder)
        budgets = [line for line in ledger_lines(folder / "elastic") if "detect_s" in line]
        first, step = torchrun(arguments.store, arguments.ranks, folder)
    deaths = [line for line in budgets if int(str(line["world"])) < arguments.ranks]
    for name in ("detect_s", "stop_s", "agree_s", "form_s", "transfer_s"):
        results[f"elastic_{name}"] = statistics.median(float(str(line[name])) for line in deaths)
    results |= {
        "elastic_to_first_collective_s": statistics.median(times[0] for times in ours),
        "elastic_to_first_collective_max_s": max(times[0] for times in ours),
        "elastic_to_next_step_s": statistics.median(times[1] for times in ours),
        "torchrun_to_first_collective_s": first,
        "torchrun_to_next_step_s": step,
    }
    results["ratio_to_next_step"] = step / results["elastic_to_next_step_s"]
    config = {"ranks": arguments.ranks, "kills": arguments.kills, "parameters": arguments.parameters}
    results = {name: round(value, 4) for name, value in results.items()}
    emit("trainer_recovery", config, results, arguments.output)


if __name__ == "__main__":
    main()
