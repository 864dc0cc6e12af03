"""How long work tells how far it is: a plain function, so that the work knows no terminal.

Owns nothing but the type and the silent one; `cli.care` draws bars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Called with what is being done, how much of it is done, and how much there is; from one thread at a time.
Progress: TypeAlias = "Callable[[str, int, int], None]"


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""
