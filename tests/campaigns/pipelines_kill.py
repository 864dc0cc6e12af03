"""SIGKILL of a build at many random moments, each in a new store: the same command ends it, byte for byte.

python tests/campaigns/pipelines_kill.py --kills 50
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from build_kills import Builds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    rng = random.Random(options.seed)
    met: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        builds = Builds(Path(folder))
        # Before it begins to search, a build loads Beam: every tenth kill goes there.
        begun_s, ended_s = builds.reference.begun_s, builds.reference.ended_s
        for number in range(options.kills):
            after_s = rng.uniform(0, begun_s) if number % 10 == 9 else rng.uniform(begun_s, ended_s)
            met[builds.kill_after(f"killed{number}", after_s)] += 1
            builds.finish(f"killed{number}")
    seconds = round(time.monotonic() - started)
    print(
        json.dumps({"kills": dict(met), "seed": options.seed, "seconds": seconds}, indent=1, sort_keys=True)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
