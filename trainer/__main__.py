"""Entry of ``python -m foldfeed.trainer`` and ``torchrun -m foldfeed.trainer``."""

from __future__ import annotations

from foldfeed.trainer.cli import leave_with, main

if __name__ == "__main__":
    leave_with(main)
