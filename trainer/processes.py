"""What Linux tells of processes, by number: state, and when they started; other systems tell nothing."""

from __future__ import annotations

from pathlib import Path

# Indices into `stat_of` (proc(5) counts from the number, and calls these 3 and 22).
STATE, START_TICKS = 0, 19


def stat_of(pid: int | str) -> list[str]:
    """Returns the fields of /proc/PID/stat that follow the process's name; [] where there is no such process.

    The name may hold spaces and brackets; the fields after it do not.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def boot_id() -> str:
    """Returns what tells this boot of this machine from all others; "" where nothing does."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
