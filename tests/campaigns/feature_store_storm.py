"""Eight processes commit, replace, delete and repeat jobs in one store for a minute.

See tests/commit_storm.py for what is checked.

    python tests/campaigns/feature_store_storm.py --workers 8 --seconds 60
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from commit_storm import run_storm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = run_storm(Path(folder), options.workers, options.seconds)
    counts["seconds_with_checks"] = round(time.monotonic() - started)
    print(json.dumps(counts | vars(options), indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
