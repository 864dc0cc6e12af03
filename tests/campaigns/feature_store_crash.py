"""SIGKILL at every step of every command that writes, torn writes included, and at random moments.

python tests/campaigns/feature_store_crash.py --every 1 --random 200
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_checks import BEFORE, Case
from crash_harness import server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill at every n-th step; 0: at none")
    parser.add_argument("--random", type=int, default=200, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=1, help="an even one tears the other half of the writes")
    parser.add_argument("--only", choices=sorted(BEFORE), help="one scenario")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    started = time.monotonic()
    outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    faults: list[str] = []

    def kill(case: Case, label: str, **how) -> bool:
        """Returns whether the process was killed before it was done."""
        try:
            outcome = case.kill(**how)
        except AssertionError as error:
            faults.append(f"{case.name} {how}: {error}")
            outcome = "FAULT"
        outcomes[label][outcome] += 1
        total = sum(found.total() for found in outcomes.values())
        if total % 50 == 0:
            print(f"{total}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return outcome != "done"

    with tempfile.TemporaryDirectory() as folder, server() as killer:
        names = [name for name in sorted(BEFORE) if options.only in (None, name)]
        cases = {name: Case(killer, name, Path(folder)) for name in names}
        for name, case in cases.items():
            for step in range(1, case.steps + 1, options.every) if options.every else ():
                kill(case, name, step=step, torn=(step + options.seed) % 2 == 0)
        hits = 0
        while hits < options.random:
            case = cases[rng.choice(names)]
            hits += kill(case, "random", after_s=rng.uniform(0, case.seconds))
    report = {
        "kills": sum(found.total() - found["done"] for found in outcomes.values()),
        "outcomes": {name: dict(found) for name, found in outcomes.items()},
        "steps": {name: case.steps for name, case in cases.items()},
        "faults": faults,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(report | vars(options), indent=1, sort_keys=True))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
