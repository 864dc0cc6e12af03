"""Entry of ``python -m foldfeed.trainer`` and ``torchrun -m foldfeed.trainer``."""

from __future__ import annotations

import os
import sys
import traceback

from foldfeed.trainer.cli import main


def _exit() -> None:
    try:
        code = main()
    except Exception:  # noqa: BLE001 - reported in full; the exit below must happen in every case
        traceback.print_exc()
        code = 1
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A thread may be stuck in a collective whose peers are gone, and a normal exit would wait for it.
        # Leaving at once closes this rank's sockets, so that the failure reaches the others in milliseconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit()
