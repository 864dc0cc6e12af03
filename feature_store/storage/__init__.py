"""Byte access to the files under a store's root: local, in an object store, or on a web server.

Owns the choice by URL. What byte access promises is in `storage.contract`; `storage.local` and
`storage.remote` keep it.
"""

from __future__ import annotations

import os
from pathlib import Path

from foldfeed.feature_store.storage.contract import LAST_FILE, TEMPORARY_PREFIX, Blobs, FileInfo, RangeReader
from foldfeed.feature_store.storage.local import LocalBlobs, disk_full_is_typed, fsync_folder
from foldfeed.feature_store.storage.remote import RemoteBlobs

__all__ = [
    "LAST_FILE",
    "TEMPORARY_PREFIX",
    "Blobs",
    "FileInfo",
    "LocalBlobs",
    "RangeReader",
    "RemoteBlobs",
    "disk_full_is_typed",
    "fsync_folder",
    "open_blobs",
]

# fsspec's two names for the local disk; it is not reached through fsspec, which does not fsync.
_LOCAL_PREFIXES = ("file://", "local://")


def open_blobs(url: str | os.PathLike[str]) -> Blobs:
    """Returns byte access to a local path, a ``file://`` URL or any other URL that fsspec knows.

    Raises:
      StoreUrlError: a kind of URL that nothing here knows.
      MissingExtraError: a kind of URL whose package is not installed.
    """
    text = os.fspath(url)
    for prefix in _LOCAL_PREFIXES:
        text = text.removeprefix(prefix)
    return RemoteBlobs(text) if "://" in text else LocalBlobs(Path(text))
