"""Where parts lie, and how a writer says that it is about to need some.

Owns the folder's name and the mark that `foldfeed gc` honours: a part whose last file was touched within the
grace period stays, whether or not a version names it yet.
"""

from __future__ import annotations

from collections.abc import Iterable

from foldfeed.feature_store.storage import LAST_FILE, open_blobs

PARTS_FOLDER = "parts"


def mark_wanted(store_url: str, part_ids: Iterable[str]) -> list[str]:
    """Restarts the grace period of parts that are about to be committed; returns those that are not there."""
    blobs = open_blobs(store_url)
    missing = []
    for part_id in part_ids:
        try:
            blobs.touch(f"{PARTS_FOLDER}/{part_id}/{LAST_FILE}")
        except FileNotFoundError:
            missing.append(part_id)
    return missing
