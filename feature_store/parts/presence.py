"""Is the store still there? Asked when a file of it is missing, and at no other time.

Owns the difference between a damaged store and one that was moved, deleted or unmounted while it was open: of
the second kind nothing is left at its place. Costs requests only after a read has failed.
"""

from __future__ import annotations

from foldfeed.feature_store.errors import CorruptDataError, StoreGoneError
from foldfeed.feature_store.format.settings import SETTINGS_FILE
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER
from foldfeed.feature_store.storage import Blobs

# As in `index.files`, which lies above this room.
_INDEX_FOLDER = "index"


def anything_left(blobs: Blobs) -> bool:
    """Returns whether there is anything of a store: its settings, its index or its parts."""
    # A web server tells of files only, and a store is one there as long as its settings can be read.
    return blobs.exists(SETTINGS_FILE) or (
        blobs.can_list and (blobs.exists(_INDEX_FOLDER) or blobs.exists(PARTS_FOLDER))
    )


def check_present(blobs: Blobs, path: str) -> None:
    """Raises `StoreGoneError` when nothing of the store is left where it was opened.

    Args:
      blobs: the store's files.
      path: what was to be read and is not there, for the message.
    """
    if not anything_left(blobs):
        raise StoreGoneError(blobs.url, path)


def missing_file(blobs: Blobs, path: str) -> CorruptDataError | StoreGoneError:
    """Returns what the absence of a file means: damage, or that the whole store is gone."""
    if anything_left(blobs):
        return CorruptDataError(path, "the file is missing")
    return StoreGoneError(blobs.url, path)
