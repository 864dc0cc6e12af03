"""Commands that other rooms bring as entry points; nothing of theirs is imported until one is asked for."""

from __future__ import annotations

import importlib.metadata


def entry_points_of(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Returns the entry points of a group by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}
