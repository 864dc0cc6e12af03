"""Entry of ``python -m foldfeed.trainer`` and ``torchrun -m foldfeed.trainer``."""

from __future__ import annotations

from foldfeed.trainer.cli import leave_with, main
from foldfeed.trainer.output import outlive_readers

if __name__ == "__main__":
    outlive_readers()
    leave_with(main)
