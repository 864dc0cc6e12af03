"""What runs, as far as /proc says; a process may go while it is looked at."""

from pathlib import Path


def alive(pid: int) -> bool:
    """Returns whether a process runs (a zombie that nobody has collected yet does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def children_of(pid: int) -> list[int]:
    """Returns the direct children of a process; of one that is gone, none."""
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in listed.split()]
