"""Kills and stops of ranks at random places of a step and of a recovery, one at a time and several at once.

    python tests/campaigns/trainer_recovery.py --runs 60 --seed 1

Each run trains the synthetic model on 2 to 5 ranks; most of its processes, replacements too, meet a fault
(SIGKILL four times in five, else SIGSTOP) at a random step and phase. The weights must equal those of one
rank left alone, every step must be logged once, and nothing may hang. A run in which every rank was killed
must say nothing of an end, and the same command must then finish it from its last snapshot.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from elastic_ranks import PHASES, Nursery  # noqa: E402

STEPS = 14


def draw_scenario(draw: random.Random) -> dict[str, Any]:
    """Returns ranks, faults and replacements of one run."""
    ranks = draw.choice([2, 3, 3, 4, 4, 5])
    respawns = draw.randrange(5)
    step = draw.randrange(1, STEPS - 2)
    at_once = draw.random() < 0.4
    faults = []
    for number in draw.sample(range(ranks + respawns), draw.randrange(1, ranks + respawns)):
        faults.append(
            {
                "rank": number,
                "step": step if at_once and number < ranks else draw.randrange(1, STEPS - 1),
                "phase": draw.choice(list(PHASES)),
                "signal": "KILL" if draw.random() < 0.8 else "STOP",
            }
        )
    scenario = {"ranks": ranks, "steps": STEPS, "respawns": respawns, "faults": faults, "silent_s": 1.5}
    # Half of the runs last longer than a stopped rank is away, so that it comes back.
    return {**scenario, "pause_s": draw.choice([0.0, 0.3]), "limit_s": 150.0, "wait_s": 20.0}


def judge(found: dict[str, Any], digest: str) -> str:
    """Returns what is wrong with a run; "" for nothing."""
    codes = set(found["codes"])
    if found["digest"] == digest and found["steps"] == list(range(1, STEPS + 1)) and codes <= {0, -9}:
        return ""
    if codes == {-9} and not found["digest"]:
        return "all killed"
    return f"codes {found['codes']}, digest {found['digest'][:8]}, steps {found['steps']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=None, help="a folder for what the runs wrote")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    started = time.monotonic()
    struck: collections.Counter[str] = collections.Counter()
    wrong: list[dict[str, Any]] = []
    recoveries: list[dict[str, float]] = []
    num_changes = again = 0
    with tempfile.TemporaryDirectory() as temporary, Nursery(options.keep or Path(temporary)) as nursery:
        digest = nursery.run(ranks=1, steps=STEPS)["digest"]
        for number in range(options.runs):
            scenario = draw_scenario(draw)
            found = nursery.run(**scenario)
            verdict = judge(found, digest)
            if verdict == "all killed":
                again += 1
                found = nursery.run(**{**scenario, "faults": []}, folder=found["folder"])
                verdict = judge(found, digest)
            if verdict:
                wrong.append(
                    {"run": number, "why": verdict, "scenario": scenario, "said": found["said"][-4000:]}
                )
                print(f"run {number}: {verdict}\n{scenario}", file=sys.stderr, flush=True)
            struck.update(f"{what['signal']} {what['phase']}" for what in found["struck"])
            num_changes += sum(view["generation"] > 1 for view in found["generations"])
            recoveries += [
                line for line in found["ledger"] if line["event"] == "regroup" and "detect_s" in line
            ]
    worst = {
        name: max((line.get(name, 0.0) for line in recoveries), default=0.0)
        for name in ("detect_s", "stop_s", "agree_s", "form_s", "transfer_s")
    }
    print(
        json.dumps(
            {
                "runs": options.runs,
                "seed": options.seed,
                "kills": sum(count for what, count in struck.items() if what.startswith("KILL")),
                "stops": sum(count for what, count in struck.items() if what.startswith("STOP")),
                "struck": dict(sorted(struck.items())),
                "changes_of_ranks": num_changes,
                "runs_killed_whole_and_continued": again,
                "wrong": wrong,
                "worst_s": worst,
                "seconds": round(time.monotonic() - started),
                "commit": subprocess.run(
                    ["git", "rev-parse", "HEAD"], cwd=HERE.parent, capture_output=True, text=True, check=False
                ).stdout.strip(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "digest": digest,
            }
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
