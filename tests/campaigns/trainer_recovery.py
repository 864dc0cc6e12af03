"""Kills, stops and cuts of ranks at random places of a step and of a recovery, one at a time and at once.

    python tests/campaigns/trainer_recovery.py --kills 200 --stops 30 --cuts 10 --seed 3     (root, for cuts)

Each run trains a model of more than 2 MB on 2 to 5 ranks that live on two emulated nodes (a folder for
snapshots in memory each; every rank in a network namespace when links are to be cut); most of its processes,
replacements too, meet a fault at a random step and phase: SIGKILL, or SIGSTOP or a cut link for a while.
Ranks join meanwhile. The weights must equal those of one rank left alone, every step must be logged once, the
parts of the ledger must sum to the wall time, and nothing may hang. A run in which every rank was killed must
say nothing of an end, and the same command must then finish it from its last snapshot; every second time one
node's memory is lost before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from elastic_ranks import PHASES, Nursery, ledger_error  # noqa: E402

from foldfeed.trainer.network import namespaces  # noqa: E402

STEPS = 20
MOST_PROCESSES = 16
CONFIG = {
    "model": {"c_m": 104, "c_z": 64, "c_e": 48, "num_blocks": 2, "num_heads": 4, "c_opm": 16, "c_tri": 32}
}


def draw_scenario(draw: random.Random, weights: dict[str, int]) -> dict[str, Any]:
    """Returns ranks, faults, joins and replacements of one run."""
    ranks = draw.choice([2, 3, 3, 4, 4, 5])
    respawns, joins = draw.randrange(4, 10), sorted(draw.sample(range(2, STEPS - 4), draw.randrange(3)))
    step = draw.randrange(1, STEPS - 2)
    at_once = draw.random() < 0.3
    processes = ranks + respawns + len(joins)
    faults = [
        {
            "rank": number,
            "step": step if at_once and number < ranks else draw.randrange(1, STEPS - 1),
            "phase": draw.choice(list(PHASES)),
            "signal": draw.choices(list(weights), list(weights.values()))[0],
        }
        for number in draw.sample(range(processes), draw.randrange(processes // 2, processes))
    ]
    memory_every, disk_every = draw.choice([(1, 7), (2, 5), (3, 0)])
    return {
        "ranks": ranks,
        "steps": STEPS,
        "respawns": respawns,
        "joins": joins,
        "faults": faults,
        "silent_s": 1.5,
        "nodes": [number % 2 for number in range(MOST_PROCESSES)],
        "config": {**CONFIG, "snapshots": {"every": disk_every, "memory_every": memory_every}},
        # Half of the runs last longer than a stopped rank is away, so that it comes back.
        "pause_s": draw.choice([0.0, 0.3]),
        "limit_s": 240.0,
        "wait_s": 20.0,
    }


def judge(found: dict[str, Any], digest: str) -> str:
    """Returns what is wrong with a run; "" for nothing."""
    codes = set(found["codes"])
    if codes == {-9} and not found["digest"]:
        return "all killed"
    if found["digest"] != digest or found["steps"] != list(range(1, STEPS + 1)) or not codes <= {0, -9}:
        return f"codes {found['codes']}, digest {found['digest'][:8]}, steps {found['steps']}"
    excess = ledger_error(found["ledger"])
    return f"the ledger's parts miss the wall time by {excess:.2%}" if excess > 0.005 else ""


class Campaign:
    """Counts over all runs."""

    def __init__(self, nursery: Nursery, draw: random.Random, places: list[list[str]], log: TextIO) -> None:
        self.struck: collections.Counter[str] = collections.Counter()
        self.wrong: list[dict[str, Any]] = []
        self.recoveries: list[dict[str, float]] = []
        self.runs = self.changes = self.again = self.from_peers = 0
        self.shards: collections.Counter[str] = collections.Counter()
        self._nursery, self._draw, self._places, self._log = nursery, draw, places, log
        self.digest = nursery.run(ranks=1, steps=STEPS, config=CONFIG, limit_s=120.0)["digest"]

    def count(self, signal: str) -> int:
        """Returns how often a signal struck."""
        return sum(count for what, count in self.struck.items() if what.startswith(signal))

    def run(self, weights: dict[str, int]) -> None:
        """Runs one scenario, and once more when all of its ranks were killed."""
        started, scenario = time.monotonic(), draw_scenario(self._draw, weights)
        if self._places and any(fault["signal"] == "CUT" for fault in scenario["faults"]):
            scenario["places"] = self._places
        found = self._nursery.run(**scenario)
        verdict = judge(found, self.digest)
        self._note(found)
        struck = [
            f"{what['signal']} process {what['rank']} step {what['step']} {what['phase']}"
            for what in found["struck"]
        ]
        line = {name: scenario[name] for name in ("ranks", "respawns", "joins", "pause_s")}
        line |= {
            "struck": struck,
            "worlds": [len(view) for view in found["members"]],
            "codes": found["codes"],
        }
        if verdict == "all killed":
            self.again += 1
            lost = [self._draw.randrange(2)] if self.again % 2 else []
            scenario = {**scenario, "faults": [], "lost": lost}
            line["continued"] = {"memory_lost": lost}
            found = self._nursery.run(**scenario, folder=found["folder"])
            verdict = judge(found, self.digest)
            self.from_peers += "got it from the memory of rank" in found["said"]
        line |= {"digest": found["digest"][:16], "ledger_error": ledger_error(found["ledger"])}
        line |= {"verdict": verdict or "as undisturbed", "seconds": round(time.monotonic() - started, 1)}
        print(json.dumps({"run": self.runs, **line}), file=self._log, flush=True)
        if verdict:
            self.wrong.append({"run": self.runs, "why": verdict, "scenario": scenario, "said": found["said"]})
            print(f"run {self.runs}: {verdict}\n{scenario}\n{found['said']}", file=sys.stderr, flush=True)
        self.runs += 1

    def _note(self, found: dict[str, Any]) -> None:
        self.struck.update(f"{what['signal']} {what['phase']}" for what in found["struck"])
        self.changes += sum(view["generation"] > 1 for view in found["generations"])
        for line in found["ledger"]:
            self.shards.update({name: line.get(name, 0) for name in ("shards_kept", "shards_again")})
        self.recoveries += [
            line for line in found["ledger"] if line["event"] == "regroup" and "detect_s" in line
        ]


def main() -> int:
    """Runs scenarios until enough faults struck; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--cuts", type=int, default=0, help="needs root")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="no run begins later")
    parser.add_argument("--keep", type=Path, default=None, help="a folder for what the runs wrote")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="gets a line of JSON for each run")
    options = parser.parse_args()
    wanted = {"KILL": options.kills, "STOP": options.stops, "CUT": options.cuts}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = []
        if options.cuts:
            network = stack.enter_context(namespaces(MOST_PROCESSES))
            places = [network.names(slot) for slot in range(MOST_PROCESSES)]
        log = stack.enter_context(options.log.open("a"))
        nursery = stack.enter_context(Nursery(keep))
        campaign = Campaign(nursery, random.Random(options.seed), places, log)
        while time.monotonic() - started < 60 * options.minutes:
            weights = {signal: max(0, count - campaign.count(signal)) for signal, count in wanted.items()}
            if not any(weights.values()):
                break
            campaign.run(weights)
            print(
                f"run {campaign.runs}: {dict(campaign.struck)} {len(campaign.wrong)} wrong, "
                f"{time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    worst = {
        name: max((line.get(name, 0.0) for line in campaign.recoveries), default=0.0)
        for name in ("detect_s", "stop_s", "agree_s", "form_s", "transfer_s")
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    result = {
        "seed": options.seed,
        "runs": campaign.runs,
        **{signal: campaign.count(signal) for signal in wanted},
        "struck": dict(sorted(campaign.struck.items())),
        "changes_of_ranks": campaign.changes,
        **campaign.shards,
        "runs_killed_whole_and_continued": campaign.again,
        "continued_from_a_peers_memory": campaign.from_peers,
        "wrong": campaign.wrong,
        "worst_s": worst,
        "seconds": round(time.monotonic() - started),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "digest": campaign.digest,
    }
    with options.log.open("a") as log:
        print(json.dumps({**result, "wrong": len(campaign.wrong)}), file=log)
    print(json.dumps(result))
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
