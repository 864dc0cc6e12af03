"""Elastic runs of real processes for tests, the campaign and the benchmark, with faults at chosen places.

Importing torch costs seconds per process, so a *nursery* imports once and forks the ranks (it has made no
tensor yet, so no thread is lost). It is the launcher, too: a killed rank is replaced by a fork, a stopped one
continued after `AWAY_S`. The ranks are the trainer's own `ElasticRank` over the synthetic source.

    python tests/elastic_ranks.py FOLDER      reads scenarios (JSON) from stdin, one a line; answers likewise

A fault {"phase": P, "step": K, "signal": S, "rank": R} strikes the process that was started R-th: at the
first time that its step is at least K and it is at P, one of `PHASES` or `ODD_PHASES`; with "generation": G
in that one at the earliest, with "skip": N at the N-th time after the first. Ranks that are started later, as
replacements, are counted on. Three signals are none: FLIP changes a bit of the process's parameters, CUT
takes its link away for `AWAY_S`, DEAF ends what it does as the loss of another rank would.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
AWAY_S = 3.2
# Where a fault can strike: what is called there, and whether before or after it.
PHASES = {
    "forward": ("models.model", "CompactEvoformer.forward", "before"),
    "hook": ("gradients.reducer", "TreeReducer._complete", "before"),
    "collective": ("gradients.stream", "StreamExchange.reduce", "before"),
    "mid-stream": ("gradients.stream", "StreamExchange._send_to", "after"),
    "mid-collective": ("groups.wire", "_Flow.send", "after"),
    "arrived": ("gradients.reducer", "TreeReducer._collect", "after"),
    "commit": ("training.loop", "combine", "before"),
    "optimizer": ("gradients.optimizer", "FlatAdamW.step", "before"),
    "applied": ("gradients.optimizer", "FlatAdamW.step", "after"),
    "snapshot": ("state.snapshot", "SnapshotFolder.write", "before"),
    "publish": ("state.snapshot", "SnapshotFolder._retire", "before"),
    "published": ("state.snapshot", "SnapshotFolder.write", "after"),
    "agree": ("members.agreement", "FolderRegister.claim", "before"),
    "agreed": ("members.agreement", "FolderRegister.claim", "after"),
    "connect": ("members.membership", "Membership.connect", "before"),
    "transfer": ("members.rank", "transfer", "before"),
    "transferred": ("members.rank", "transfer", "after"),
}
# Where ranks never are that hold equal bits, or whose first meeting is over.
ODD_PHASES = {
    "vote": ("groups.ranks", "odd_ranks", "before"),
    "measure": ("gradients.transports", "measure", "before"),
}


# ---------------------------------------------------------------- the test's side


class Nursery:
    """A process that imports torch once and runs scenarios, one at a time; a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "nursery.log").open("wb")
        self.log = folder / "nursery.log"
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def run(self, **scenario: Any) -> dict[str, Any]:
        """Runs one scenario: see `run_scenario`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(scenario).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the nursery died: {self.log.read_text()[-3000:]}"
        found: dict[str, Any] = json.loads(answer)
        assert "error" not in found, f"{found}\n{self.log.read_text()[-6000:]}"
        return found

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        # Its session holds its ranks alone, stopped ones too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()


# ---------------------------------------------------------------- the nursery's side


def run_scenario(folder: Path, scenario: dict[str, Any]) -> dict[str, Any]:
    """Runs ranks until all have ended; returns digest, exit codes, generations and times.

    Args:
      folder: of the run.
      scenario: ``ranks``, ``steps``; ``faults``, a list; ``respawns``, ``joins`` (steps after which one more
        rank is started), ``max_ranks``, ``limit_s``, ``config`` (changes of `tiny_config`), ``pause_s``;
        ``places``, of each process: its network namespace, address and port of the bridge (network.py);
        ``silent_s`` of the plan and ``away_s`` in the place of `AWAY_S`;
        ``shard_s``, that each virtual shard sleeps; ``forgets``, whether ranks keep nothing of a broken step;
        ``launches``, of each process a letter for its launcher;
        ``torchrun``, whether ranks are as torchrun starts them;
        ``nodes``, of each process, whose snapshots in memory are theirs alone; ``hosts``, a letter for that
        of each process; ``folder`` of an earlier run to go on with, ``lost`` nodes of it.
    """
    for node in scenario.get("lost", ()):
        shutil.rmtree(folder / f"memory{node}")
    limit = time.monotonic() + scenario.get("limit_s", 60.0)
    away_s = scenario.get("away_s", AWAY_S)
    respawns, joins = scenario.get("respawns", 0), sorted(scenario.get("joins", ()))
    joined = 0
    pids: dict[int, int] = {}
    codes: dict[int, int] = {}
    stopped: dict[int, float] = {}
    cut: dict[int, float] = {}
    for number in range(scenario["ranks"]):
        pids[number] = fork_rank(folder, scenario, number)
    try:
        while len(codes) < len(pids):
            if time.monotonic() > limit:
                return {"error": f"hangs: {codes} of {pids}", "log": tail(folder)}
            for number, pid in pids.items():
                if number not in codes and (code := reaped(pid, stopped, number)) is not None:
                    codes[number] = code
            dead = sum(code < 0 for code in codes.values())
            while joins and last_step(folder) >= joins[0]:
                joins.pop(0)
                joined += 1
            missing = scenario["ranks"] + min(dead, respawns) + joined - len(pids)
            for _ in range(missing):
                # Who comes after the end finds that it is over; that is tested, too.
                pids[len(pids)] = fork_rank(folder, scenario, len(pids))
            for number, since in list(stopped.items()):
                if time.monotonic() - since > away_s:
                    del stopped[number]
                    os.kill(pids[number], signal.SIGCONT)
            for path in folder.glob("cut-*"):
                number = int(path.name.removeprefix("cut-"))
                if number not in cut:
                    set_link(scenario["places"][number], "down")
                    cut[number] = time.monotonic()
                elif time.monotonic() - cut[number] > away_s:
                    set_link(scenario["places"][number], "up")
                    path.unlink()
            time.sleep(0.002)
    finally:
        for path in folder.glob("cut-*"):
            set_link(scenario["places"][int(path.name.removeprefix("cut-"))], "up")
            path.unlink()
        for number, pid in pids.items():
            if number not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    numbers = {pid: number for number, pid in pids.items()}
    return {"codes": [codes[number] for number in sorted(codes)], **results(folder, numbers)}


def set_link(place: Sequence[str], state: str) -> None:
    """Cuts or heals the link of a network namespace, at the bridge's end of it."""
    subprocess.run(["ip", "link", "set", place[2], state], check=True)


def reaped(pid: int, stopped: dict[int, float], number: int) -> int | None:
    """Returns a process's exit code, as Popen gives it; None while it lives. Notes when it was stopped."""
    found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
    if not found:
        return None
    if os.WIFSTOPPED(status):
        stopped[number] = time.monotonic()
        return None
    return os.waitstatus_to_exitcode(status)


def results(folder: Path, numbers: dict[int, int]) -> dict[str, Any]:
    """Returns what a run left; processes by number, as they were started (None: before this start)."""
    result = folder / "result.json"
    generations = [json.loads(p.read_text()) for p in sorted(folder.glob("elastic/*/generation-*.json"))]
    metrics = folder / "metrics.jsonl"
    ledger = folder / "goodput.jsonl"
    return {
        "digest": final_digest(folder) if result.exists() else "",
        "generations": generations,
        "members": [[numbers.get(m["identity"]["pid"]) for m in view["members"]] for view in generations],
        "steps": [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        if metrics.exists()
        else [],
        "ledger": [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else [],
        "said": (said := (folder / "ranks.log").read_text()),
        "struck": [json.loads(line[7:]) for line in said.splitlines() if line.startswith("STRUCK ")],
        "folder": folder.name,
        "snapshots": sorted(path.name for path in folder.glob("snapshots/*")),
    }


def final_digest(folder: Path) -> str:
    """Returns digests of the weights at the end, of all steps' losses, and of the last snapshot's average."""
    weights = json.loads((folder / "result.json").read_text())["weights_digest"]
    average = max(folder.glob("snapshots/step-*")) / "ema.f32"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss_metrics/global_avg_loss", "loss_metrics/global_max_loss")
    texts = [json.dumps([[line[name] for name in names] for line in lines]).encode()]
    if average.exists():
        texts.append(average.read_bytes())
    return " ".join([str(weights), *(hashlib.sha256(text).hexdigest() for text in texts)])


def ledger_error(ledger: Sequence[dict[str, Any]]) -> float:
    """Returns by what share the parts of a ledger, and the gaps between its lines, miss the wall time."""
    parts = sum(sum(line["parts"].values()) for line in ledger)
    for before, line in itertools.pairwise(ledger):
        parts += max(0.0, line["began"] - before["time"]) if "began" in line else 0.0
    wall = ledger[-1]["time"] - ledger[0]["began"]
    return float(abs(parts - wall) / wall)


def tail(folder: Path) -> str:
    return (folder / "ranks.log").read_text()[-5000:]


def last_step(folder: Path) -> int:
    from foldfeed.trainer.prove import _last_step

    return _last_step(folder)


def fork_rank(folder: Path, scenario: dict[str, Any], number: int) -> int:
    """Forks a rank; the child never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with (folder / "ranks.log").open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = be_rank(folder, scenario, number)
    except BaseException:  # noqa: BLE001 - reported, and the child must not go on as its parent
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def be_rank(folder: Path, scenario: dict[str, Any], number: int) -> int:
    import torch
    from trainer_ranks import tiny_config

    from foldfeed.trainer.elastic import Plan
    from foldfeed.trainer.errors import TrainerError
    from foldfeed.trainer.goodput import Ledger
    from foldfeed.trainer.groups.ranks import Ranks
    from foldfeed.trainer.members.rank import ElasticRank
    from foldfeed.trainer.models.task import load_task
    from foldfeed.trainer.training.launch import prepare_numerics
    from foldfeed.trainer.training.source import Source

    host = "127.0.0.1"
    if places := scenario.get("places"):
        host = places[number][1]
        space = os.open(f"/run/netns/{places[number][0]}", os.O_RDONLY)
        os.setns(space, os.CLONE_NEWNET)
        os.close(space)
    print(f"---- process {number} is {os.getpid()} at {time.time():.3f}", flush=True)
    torchrun = scenario.get("torchrun", False)
    founds = number == 0 and not torchrun
    # The average of the weights is a part of the state that travels.
    changes = {"optimizer": {"ema_decay": 0.9}, **scenario.get("config", {})}
    if nodes := scenario.get("nodes"):
        memory = folder / f"memory{nodes[number]}"
        memory.mkdir(exist_ok=True)
        os.environ["FOLDFEED_PLACE"] = f"region/switch{nodes[number]}/{number}"
        changes["snapshots"] = {**changes.get("snapshots", {}), "memory": str(memory)}
    if hosts := scenario.get("hosts"):
        os.environ["FOLDFEED_PLACE"] = f"region/{hosts[number]}"
    config = tiny_config(folder, steps=scenario["steps"], **changes)
    prepare_numerics(config)
    plan = Plan(
        founds=founds,
        refounds=number >= scenario["ranks"],
        launch=scenario.get("launches", "a" * 16)[number],
        torchrun=torchrun,
        ranks=scenario["ranks"],
        max_ranks=scenario.get("max_ranks", 0),
        host=host,
        silent_s=scenario.get("silent_s", 5.0),
        wait_s=scenario.get("wait_s", 30.0),
    )
    alone = Ranks(rank=0, world=1, device=torch.device("cpu"))
    source = divisible_source(config, scenario.get("pause_s", 0.0))
    ledger = Ledger(folder, active=founds)
    rank = ElasticRank(config, plan, alone, Source(source, "f" * 16), load_task(config), ledger)
    if shard_s := scenario.get("shard_s", 0.0):
        loss = rank.trainer.task.loss
        rank.trainer.task.loss = lambda *given: (time.sleep(shard_s), loss(*given))[1]  # type: ignore[method-assign]
    if scenario.get("forgets", False):
        kept = rank.trainer.kept
        rank.trainer.kept = lambda: kept() and []  # type: ignore[method-assign]
    for fault in scenario.get("faults", ()):
        if fault["rank"] == number:
            set_trap(rank, fault, folder / f"cut-{number}")
    try:
        rank.train()
    except TrainerError as error:
        print(f"---- process {number} ends with {type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def divisible_source(config: Any, pause_s: float) -> Any:
    from trainer_ranks import SyntheticSource

    from foldfeed.trainer.groups.ranks import Ranks

    class Source(SyntheticSource):
        def redivide(self, step: int, rank: int, world: int, first: Any = None) -> None:
            self.step, self.odd = step, (step, first)
            self.ranks = Ranks(rank=rank, world=world, device=self.ranks.device)

    import torch

    alone = Ranks(rank=0, world=1, device=torch.device("cpu"))
    return Source(config.data, config.seed, alone, {"pause_s": pause_s})


def set_trap(rank: Any, fault: dict[str, Any], cut: Path) -> None:
    """Makes this process kill, stop or cut off itself at a phase; see the module docstring."""
    import importlib

    from foldfeed.trainer.errors import CommunicationError

    module_name, path, when = (PHASES | ODD_PHASES)[fault["phase"]]
    module = importlib.import_module(f"foldfeed.trainer.{module_name}")
    *outer, name = path.split(".")
    owner: Any = module
    for part in outer:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    # How many more times it is passed.
    left = [fault.get("skip", 0)]

    def spring() -> None:
        # In recovery alone, where the phase is one of it: the beginning is a meeting, too.
        ready = rank.membership is not None and rank.membership.view.generation >= fault.get("generation", 1)
        if ready and rank.trainer.step >= fault["step"]:
            left[0] -= 1
            if left[0] != -1:
                return
            struck = {**fault, "time": time.time()}
            os.write(1, b"STRUCK " + json.dumps(struck).encode() + b"\n")
            if fault["signal"] == "FLIP":
                rank.trainer.flat.params.numpy().view("int32")[5] ^= 1 << 20
            elif fault["signal"] == "CUT":
                cut.touch()
            elif fault["signal"] == "DEAF":
                raise CommunicationError(rank.trainer.ranks.rank, fault["phase"], "another one was lost")
            else:
                os.kill(os.getpid(), getattr(signal, f"SIG{fault['signal']}"))

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            spring()
        result = original(*args, **kwargs)
        if when == "after":
            spring()
        return result

    setattr(owner, name, replacement)


def scenarios(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield json.loads(line)


def main(arguments: Sequence[str]) -> None:
    sys.path.insert(0, str(HERE.parent))
    import torch
    import trainer_ranks

    import foldfeed.trainer.members.rank  # noqa: F401 - for the children

    assert trainer_ranks.HERE.exists()
    torch.set_num_threads(1)
    # Imports nine hundred modules.
    torch.use_deterministic_algorithms(True)
    base = Path(arguments[0])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for number, scenario in enumerate(scenarios(iter(sys.stdin.readline, ""))):
        folder = base / scenario.get("folder", f"run{number}")
        folder.mkdir(exist_ok=True)
        answers.write(json.dumps(run_scenario(folder, scenario)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
