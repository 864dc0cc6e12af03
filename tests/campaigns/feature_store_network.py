"""A job over a network that fails at random, many times: the store must be that of a quiet network.

See tests/test_feature_store_remote_faults.py for job and checks; needs the server of `make s3-server`.

    python tests/campaigns/feature_store_network.py --jobs 100
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fault_proxy import ALL, fault_proxy
from s3_server import client_environment, running_server
from test_feature_store_remote_faults import build, check

from foldfeed.feature_store import StorageError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    rng = random.Random(options.seed)
    done: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder)) as endpoint,
        fault_proxy(endpoint) as proxy,
    ):
        os.environ.update(client_environment(proxy.url))
        os.environ["FOLDFEED_STORAGE_PAUSE_S"] = "0.002"
        expected = build(f"{folder}/expected")
        for number in range(options.jobs):
            # Many attempts and few, so that some jobs get through at once and others end and are run again.
            os.environ["FOLDFEED_STORAGE_ATTEMPTS"] = str(rng.choice([2, 3, 30]))
            rate = rng.uniform(0.02, 0.15)
            url = f"s3://bucket/{options.seed}-{number}"
            for _ in range(500):
                proxy.inject(rate, rng.randrange(1 << 30), kinds=ALL)
                try:
                    build(url)
                    break
                except StorageError:
                    done["runs that ended in an error"] += 1
            else:
                raise AssertionError(f"job {number} did not get through in 500 runs")
            proxy.calm()
            check(url, expected)
            done["jobs"] += 1
    seconds = round(time.monotonic() - started)
    print(json.dumps({**done, **proxy.done, **vars(options), "seconds": seconds}, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
