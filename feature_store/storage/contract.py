"""What byte access to a store means: the contract that local and remote storage share.

Owns the names of things (`Blobs`, `FileInfo`) and no behaviour. Invariant of every implementation: a reader
that follows a published name sees all of the file or none of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from foldfeed.feature_store.errors import StorageError

# Names that start so are never part of a store: an interrupted writer may leave them, `gc` may remove them.
TEMPORARY_PREFIX = ".tmp-"


# A folder is complete when this file is there; it is uploaded last where a folder cannot appear at once.
LAST_FILE = "zarr.json"


RangeReader: TypeAlias = "Callable[[int, int], bytes]"


class ForbiddenError(PermissionError):
    """A web server denies a file (403). Buckets that may not be listed say that of absent files, too."""


def is_forbidden(error: StorageError) -> bool:
    """Returns whether a request failed for good because the file is denied, or not there, see above."""
    return isinstance(error.__cause__, ForbiddenError)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """One file under a root.

    Attributes:
      path: relative to the root.
      num_bytes: its size.
      modified_s: when it was last written or touched, seconds since 1970; 0 where the storage does not say.
      version: what the storage calls this content (an ETag); "" where it does not say, as in listings. Two
        files are not told apart by it.
    """

    path: str
    num_bytes: int
    modified_s: float
    version: str = dataclasses.field(default="", compare=False)


class Blobs(Protocol):
    """Files under one root; every path is relative to it and uses ``/``."""

    url: str
    # Whether the storage tells which files there are; a web server does not.
    can_list: bool

    def read(self, path: str) -> bytes:
        """Returns a whole file; FileNotFoundError when there is none."""
        ...

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """Returns up to ``size`` bytes from ``start``; fewer only at the end of the file."""
        ...

    def open_range(self, path: str) -> RangeReader:
        """Returns a function ``(start, size) -> bytes`` over one file, for many reads of the same file.

        FileNotFoundError when there is no such file (at once, or at the first read of a remote one).
        """
        ...

    def write_atomic(self, path: str, data: bytes) -> None:
        """Publishes a file whole, replacing one of that name."""
        ...

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Publishes a file unless the name exists; returns whether it did."""
        ...

    def exists(self, path: str) -> bool:
        """Returns whether a file or folder of that name exists."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Returns the names directly under a folder, sorted; [] when there is no such folder."""
        ...

    def staging_folder(self) -> contextlib.AbstractContextManager[Path]:
        """Gives a local folder to fill; it is removed afterwards unless it was published."""
        ...

    def publish_folder(self, local: Path, path: str) -> None:
        """Makes a staged folder visible under a name that stands for its content.

        A folder that is there already is left, marked as wanted now (`touch`), unless it is damaged: then
        the staged one takes its place.
        """
        ...

    def info(self, path: str) -> FileInfo:
        """Returns size and age of a file; FileNotFoundError when there is none."""
        ...

    def walk(self, prefix: str) -> tuple[FileInfo, ...]:
        """Returns all files under a folder, at any depth, sorted by path; () when there is no such folder."""
        ...

    def delete(self, path: str) -> None:
        """Removes a file or a folder with all it holds; nothing happens when there is none."""
        ...

    def unfinished_uploads(self) -> tuple[FileInfo, ...]:
        """Returns uploads in pieces that nobody completed, sorted; no listing of files shows them."""
        ...

    def abort_upload(self, path: str) -> None:
        """Removes the pieces of an unfinished upload."""
        ...

    def touch(self, path: str) -> None:
        """Sets a file's time to now; FileNotFoundError when there is none."""
        ...

    def make_durable(self, path: str) -> None:
        """Forces to the disk a file that other software wrote."""
        ...

    def in_use(self, path: str) -> bool:
        """Returns whether a living process on this file system fills that staging folder."""
        ...

    def rename_folder(self, path: str, name: str) -> bool:
        """Renames a folder; returns False where the storage cannot do that in one step."""
        ...
