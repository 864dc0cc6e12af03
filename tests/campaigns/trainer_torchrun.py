"""A torchrun on each of two nodes starts the ranks of one elastic run; ranks, nodes and all of it are killed.

    python tests/campaigns/trainer_torchrun.py --only rank,node --namespaces       (root, for namespaces)

Every node has two ranks. A node's torchrun restarts both when one dies, as torchrun does; the other node's
must go on in their processes, and those that were restarted must join again. In every scenario the weights
must be those of one process left alone, every step must be logged once, and nothing may hang:

    rank    a rank of the second node is killed, then one of the first node, which began the run
    node    a whole torchrun is killed, with its ranks; it is started again when the other node went on
    alone   the same, and nobody comes back
    leave   a torchrun gets SIGTERM: its ranks leave, the other node's go on
    stop    both get SIGTERM, so the run stops with a snapshot; the same commands finish it
    both    a rank of each node is killed at once, so that nobody is left; the run goes on from its snapshot
    plain   `torchrun --nnodes 2` with the plain trainer: a rank is killed, all are restarted
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from foldfeed.trainer.config import ModelConfig  # noqa: E402
from foldfeed.trainer.models.losses import Loss  # noqa: E402
from foldfeed.trainer.models.task import EvoformerTask  # noqa: E402
from foldfeed.trainer.network import Network, namespaces  # noqa: E402
from foldfeed.trainer.prove import _last_step, members_of, weights_digest  # noqa: E402

STEPS = 240
RANKS_PER_NODE = 2
PAUSE = "CAMPAIGN_PAUSE_S"
OPTIONS = (
    *("--recipe", "crop_first", "--crop-residues", "16", "--num-clusters", "6", "--num-extra", "8"),
    *("--global-batch", "8", "--warmup-steps", "3", "--lr", "0.003", "--snapshot-every", "20"),
    *("--device", "cpu", "--no-tensorboard", "--steps", str(STEPS), "--timeout-s", "60"),
    *("--task", f"{HERE}:paused_task"),
)


class PausedTask(EvoformerTask):
    """A small model whose shards take a while without a processor."""

    def loss(self, model: nn.Module, features: Mapping[str, torch.Tensor]) -> Loss:
        time.sleep(float(os.environ.get(PAUSE, "0")))
        return super().loss(model, features)


def paused_task() -> PausedTask:
    """Returns what the ranks train."""
    return PausedTask(ModelConfig(c_m=16, c_z=8, c_e=8, num_blocks=1, num_heads=2, c_opm=4, c_tri=8))


class Node:
    """One machine's torchrun; a killed one can be started again."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        self._command = list(command)
        self._all: list[subprocess.Popen[bytes]] = []
        self.start()

    @property
    def torchrun(self) -> subprocess.Popen[bytes]:
        """The present one."""
        return self._all[-1]

    def start(self) -> None:
        """Starts a torchrun."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", PAUSE: "0.04"}
        with self.log.open("ab") as log:
            # A session of its own; so has each of its ranks, by torchrun.
            self._all.append(
                subprocess.Popen(
                    self._command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            )

    def ranks(self) -> list[int]:
        """Returns the processes of its ranks, in order."""
        pid = self.torchrun.pid
        try:
            listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return [int(child) for child in listed if b"foldfeed.trainer" in _command_line(int(child))]

    def kill_rank(self, number: int) -> None:
        """Kills one of its ranks."""
        os.kill(self.ranks()[number], signal.SIGKILL)

    def kill(self) -> None:
        """Kills torchrun, and its ranks before they can learn of it."""
        ranks = self.ranks()
        self.torchrun.kill()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.torchrun.wait()

    def end(self) -> None:
        """Leaves nothing behind."""
        if self.torchrun.poll() is None:
            self.kill()


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except (FileNotFoundError, ProcessLookupError):
        return b""


class Run:
    """A run on two nodes, and what a scenario asks of it."""

    def __init__(self, folder: Path, nodes: Sequence[Node], output: Path, limit_s: float) -> None:
        self.folder, self.nodes, self.output = folder, nodes, output
        self._deadline = time.monotonic() + limit_s

    def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Waits for something.

        Raises:
          TimeoutError: it does not come to pass.
        """
        while not holds():
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"{what} did not come to pass; at step {self.step()}")
            time.sleep(0.02)

    def step(self) -> int:
        """Returns the last step that was logged."""
        return _last_step(self.output)

    def after(self, step: int) -> None:
        """Waits until a step was logged."""
        self.until(f"step {step}", lambda: self.step() >= step)

    def members(self) -> list[int]:
        """Returns the processes of the present generation."""
        return [int(member.identity["pid"]) for member in members_of(self.output)]

    def full(self) -> None:
        """Waits until all four ranks train."""
        self.until("a generation of all ranks", lambda: len(self._present()) == 2 * RANKS_PER_NODE)

    def _present(self) -> set[int]:
        return set(self.members()) & {pid for node in self.nodes for pid in node.ranks()}

    def finish(self) -> None:
        """Waits until all torchruns have ended, and checks that they ended well."""
        for number, node in enumerate(self.nodes):
            self.until(f"the end of node {number}", lambda node=node: node.torchrun.poll() is not None)
            _require(node.torchrun.returncode == 0, f"node {number} ended with {node.torchrun.returncode}")


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise AssertionError(why)


def rank(run: Run) -> None:
    """See the module docstring."""
    for step, hit, other in ((20, 1, 0), (None, 0, 1)):
        run.full()
        run.after(step or run.step() + 5)
        there, before = run.nodes[other].ranks(), run.nodes[hit].ranks()
        run.nodes[hit].kill_rank(1)
        run.until("a restart", lambda hit=hit, before=before: not set(run.nodes[hit].ranks()) & set(before))
        run.full()
        _require(run.nodes[other].ranks() == there, f"ranks of node {other} did not survive")
    run.finish()


def node(run: Run) -> None:
    """See the module docstring."""
    run.full()
    run.after(20)
    there = run.nodes[1].ranks()
    # The one that began the run: metrics, snapshots and lease go to the other one.
    run.nodes[0].kill()
    run.after(run.step() + 10)
    _require(sorted(run.members()) == sorted(there), "the other node did not go on alone")
    run.nodes[0].start()
    run.full()
    _require(run.nodes[1].ranks() == there, "ranks of node 1 did not survive")
    run.finish()


def alone(run: Run) -> None:
    """See the module docstring."""
    run.full()
    run.after(20)
    run.nodes[1].kill()
    run.nodes = run.nodes[:1]
    run.finish()


def leave(run: Run) -> None:
    """See the module docstring."""
    run.full()
    run.after(20)
    there = run.nodes[1].ranks()
    run.nodes[0].torchrun.terminate()
    run.until("the end of node 0", lambda: run.nodes[0].torchrun.poll() is not None)
    _require("as asked" in run.nodes[0].log.read_text(), "the ranks of node 0 were killed")
    run.after(run.step() + 5)
    _require(sorted(run.members()) == sorted(there), "the other node did not go on alone")
    run.nodes = run.nodes[1:]
    run.finish()


def stop(run: Run) -> None:
    """See the module docstring."""
    run.full()
    run.after(20)
    for each in run.nodes:
        each.torchrun.terminate()
    for each in run.nodes:
        run.until("the end", lambda each=each: each.torchrun.poll() is not None)
    step = run.step()
    _require(step < STEPS, "the run did not stop")
    _require((run.output / f"snapshots/step-{step:08d}").exists(), f"no snapshot of step {step}")
    for each in run.nodes:
        each.start()
    run.finish()


def both(run: Run) -> None:
    """See the module docstring."""
    run.full()
    run.after(45)
    before = {pid for each in run.nodes for pid in each.ranks()}
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    run.until("restarts", lambda: bool(run._present()) and not run._present() & before)
    run.finish()


def plain(run: Run) -> None:
    """See the module docstring."""
    run.after(45)
    before = run.nodes[1].ranks()
    run.nodes[1].kill_rank(0)
    run.until("a restart", lambda: not set(run.nodes[1].ranks()) & set(before))
    run.finish()


SCENARIOS = {each.__name__: each for each in (rank, node, alone, leave, stop, both, plain)}


def commands(name: str, store: str, output: Path, network: Network | None) -> list[list[str]]:
    """Returns the command of each node's torchrun."""
    trainer = ["--store", store, "--output", str(output), *OPTIONS]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS_PER_NODE)]
    torchrun += ["--max-restarts", "9"]
    places = [network.place(slot) if network is not None else ([], "127.0.0.1") for slot in range(2)]
    if name == "plain":
        with socket.socket() as probe:
            probe.bind((places[0][1] if network is None else "", 0))
            endpoint = f"{places[0][1]}:{probe.getsockname()[1]}"
        torchrun += ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        # In a namespace no agent finds out by itself that the endpoint is its own address.
        where = [
            ["--local-addr", host, "--rdzv-conf", f"is_host={slot == 0}"]
            for slot, (_, host) in enumerate(places)
        ]
        # gloo takes the address that the host's name leads to, which is no namespace's.
        gloo = ["env", "GLOO_SOCKET_IFNAME=eth0"] if network is not None else []
        return [
            [*prefix, *gloo, *torchrun, *own, "-m", "foldfeed.trainer", *trainer]
            for (prefix, _), own in zip(places, where, strict=True)
        ]
    elastic = ["-m", "foldfeed.trainer.elastic", "--wait-for", str(2 * RANKS_PER_NODE), "--wait-s", "120"]
    return [
        [*prefix, *torchrun, "--standalone", *elastic, "--host", host, "--", *trainer]
        for prefix, host in places
    ]


def make_store(folder: Path) -> str:
    """Makes a store of a few records."""
    from records import make_record

    from foldfeed.feature_store import FeatureStore
    from foldfeed.feature_store.parts.writer import write_part

    store = FeatureStore.create(folder / "store")
    records = [
        make_record(f"r{number}", 5 + 40 * number, 20 + 9 * number, seed=number) for number in range(9)
    ]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id="job-1", message="first")
    return str(store.url)


def left_alone(store: str, output: Path) -> str:
    """Returns the digest of one process."""
    command = [sys.executable, "-m", "foldfeed.trainer", "--store", store, "--output", str(output), *OPTIONS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return weights_digest(output)


def main() -> int:
    """Runs the scenarios; prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, with commas")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--namespaces", action="store_true", help="each node in a network namespace; root")
    parser.add_argument(
        "--limit-s", type=float, default=400.0, help="for one run, which then counts as hanging"
    )
    parser.add_argument("--keep", type=Path, default=None, help="a folder for what the runs wrote")
    options = parser.parse_args()
    # So that torchruns and namespaces end with this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep.mkdir(parents=True, exist_ok=True)
        network = stack.enter_context(namespaces(2)) if options.namespaces else None
        store = make_store(keep)
        digest = left_alone(store, keep / "alone")
        for number in range(options.repeat):
            for name in options.only.split(","):
                result = run_scenario(name, keep / f"{name}{number}", store, digest, network, options.limit_s)
                results.append(result)
                print(result, file=sys.stderr, flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    summary = {
        "runs": results,
        "wrong": sum(bool(result["wrong"]) for result in results),
        "namespaces": options.namespaces,
        "seconds": round(time.monotonic() - started),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "digest": digest,
    }
    print(json.dumps(summary))
    return 1 if summary["wrong"] else 0


def run_scenario(
    name: str, folder: Path, store: str, digest: str, network: Network | None, limit_s: float
) -> dict[str, Any]:
    """Runs one scenario and judges it."""
    started = time.monotonic()
    folder.mkdir()
    output = folder / "run"
    nodes: list[Node] = []
    wrong = ""
    try:
        for number, command in enumerate(commands(name, store, output, network)):
            nodes.append(Node(command, folder / f"node{number}.log"))
        SCENARIOS[name](Run(folder, nodes, output, limit_s))
        lines = (output / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        _require(weights_digest(output) == digest, f"digest {weights_digest(output)}")
        _require(steps == list(range(1, STEPS + 1)), f"steps {steps}")
    except (AssertionError, TimeoutError, FileNotFoundError) as error:
        tails = "\n".join(each.log.read_text()[-3000:] for each in nodes)
        wrong = f"{error!r}"
        print(f"{name}: {wrong}\n{tails}", file=sys.stderr, flush=True)
    finally:
        for each in nodes:
            each.end()
    ledger = (
        (output / "goodput.jsonl").read_text().splitlines() if (output / "goodput.jsonl").exists() else []
    )
    events = [json.loads(line) for line in ledger]
    return {
        "scenario": name,
        "wrong": wrong,
        "starts": sum(event["event"] == "start" for event in events),
        "changes_of_ranks": sum(event["event"] == "regroup" for event in events),
        "shards_kept": sum(event.get("shards_kept", 0) for event in events),
        "shards_again": sum(event.get("shards_again", 0) for event in events),
        "seconds": round(time.monotonic() - started),
    }


if __name__ == "__main__":
    sys.exit(main())
