"""Flips bytes and cuts files of a store, 10,000 times, over every kind of file; see tests/damage.py.

python tests/campaigns/feature_store_damage.py --number 10000
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from damage import campaign, make_store


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()

    def tell(done: int, counts: dict) -> None:
        if done % 500 == 0:
            print(
                f"{done} of {options.number}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
            )

    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder, "s"))
        report = campaign(Path(folder, "s"), options.number, options.seed, tell)
    report |= {
        "number": options.number,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(report, indent=1, sort_keys=True))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
