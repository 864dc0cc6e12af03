"""Byte access to the files under a store's root: local, in an object store, or on a web server.

Owns the choice by URL. What byte access promises is in `storage.contract`; `storage.local` and
`storage.remote` keep it. The second is imported when a URL first needs it: fsspec, HTTP and TLS take a fifth
of the time in which a reading process of a loader starts, and a folder needs none of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from foldfeed.feature_store.lazy_names import LateModule, lazy_names
from foldfeed.feature_store.storage.contract import LAST_FILE, TEMPORARY_PREFIX, Blobs, FileInfo, RangeReader
from foldfeed.feature_store.storage.local import LocalBlobs, disk_full_is_typed, fsync_folder

if TYPE_CHECKING:
    from foldfeed.feature_store.storage import remote as late_remote
    from foldfeed.feature_store.storage.remote import RemoteBlobs
else:
    # Not called `remote`: whoever imports the module of that name from this package must get the module.
    late_remote = LateModule("foldfeed.feature_store.storage.remote")

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

__getattr__, __dir__ = lazy_names(__name__, {"RemoteBlobs": "remote"})

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
    return late_remote.RemoteBlobs(text) if "://" in text else LocalBlobs(Path(text))
