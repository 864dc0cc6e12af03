"""One attempt at one request to remote storage: the contract, and fsspec's file systems.

Owns what a single request means: which bytes, how many there are in all, whether a name was new. Does not own
retries or the checks of what came (`storage.remote`). Invariants: "there is no such file" is said only when
the storage said so, never when it could not be asked; nothing is cached.

Thread and fork safety: fsspec's file systems are thread safe and must not be used in a forked child; they are
kept per process here, so that a child makes its own.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fsspec

from foldfeed.feature_store.errors import MissingExtraError, StorageError, StorageRefusedError, StoreUrlError
from foldfeed.feature_store.storage.contract import FileInfo
from foldfeed.feature_store.storage.options import (
    EXTRAS,
    GCS_PROTOCOLS,
    fsspec_options,
    protocol_of,
    without_secrets,
)
from foldfeed.feature_store.storage.retries import describe, is_storage_failure


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """What a read brought.

    Attributes:
      data: the bytes.
      total: size of the whole file as the server says, None when it did not.
    """

    data: bytes
    total: int | None


class RemoteFiles(Protocol):
    """Files under one root; one request a call, errors as they come."""

    # Two that create one name at once: exactly one wins.
    can_create_exclusively: bool
    can_list: bool
    # Tells storages apart, for what is found out about one once.
    identity: str

    def get(self, path: str, start: int, size: int | None) -> Fetched:
        """Returns bytes from ``start``, ``size`` of them or all; FileNotFoundError when there is no file."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Publishes a file, in place of one of that name."""
        ...

    def create(self, path: str, data: bytes, token: str) -> None:
        """Publishes a file; FileExistsError when the name is taken."""
        ...

    def is_ours(self, path: str, data: bytes, token: str) -> bool:
        """Returns whether a `create` with that token made the file that is there."""
        ...

    def upload(self, path: str, local: Path, retried: Callable[[Callable[[], Any]], Any]) -> None:
        """Publishes a local file; ``retried`` runs each of its requests."""
        ...

    def head(self, path: str) -> FileInfo:
        """Returns size and age; FileNotFoundError when there is no file."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Returns the names directly under a folder; [] when there is none."""
        ...

    def walk(self, prefix: str) -> list[FileInfo]:
        """Returns all files under a folder; [] when there is none."""
        ...

    def remove(self, paths: Sequence[str]) -> None:
        """Removes files; those that are gone already are no error."""
        ...

    def touch(self, path: str) -> None:
        """Dates a file now; FileNotFoundError when there is none."""
        ...

    def uploads(self) -> list[FileInfo]:
        """Returns uploads that were begun and not completed; path ``NAME (upload ID)``."""
        ...

    def abort(self, path: str) -> None:
        """Removes what `uploads` names; one that is gone is no error."""
        ...


# Never emptied and small: one entry for each kind of storage (and its credentials) in each process.
_file_systems: dict[tuple[int, str], Any] = {}


def file_system(url: str) -> tuple[Any, str]:
    """Returns this process's fsspec file system for a URL, and the URL's path in it."""
    protocol = protocol_of(url)
    # Opening a client takes a tenth of a second and its connections; stores are opened all the time. A forked
    # child has another process id: the parent's client talks through a thread that the child does not have.
    try:
        kind = fsspec.get_filesystem_class(protocol)
        # Of ftp:// and the like the client, too, must know the host, and a client speaks with one.
        options = kind._get_kwargs_from_urls(url) | fsspec_options(url)
        key = os.getpid(), f"{protocol} {sorted(options.items(), key=str)}"
        if key not in _file_systems:
            made = kind(**options)
            # `retries` counts attempts; a client that tries again by itself would multiply them.
            made.retries = 1
            _file_systems.setdefault(key, made)
    except ImportError as error:
        if protocol in EXTRAS:
            raise MissingExtraError(*EXTRAS[protocol]) from error
        raise StoreUrlError(without_secrets(url), str(error).rstrip(".")) from error
    except ValueError as error:
        # An unknown protocol; fsspec's sentence says so.
        raise StoreUrlError(without_secrets(url), str(error).rstrip(".")) from error
    except TypeError as error:
        # What the client needs to know is not in the URL.
        raise StoreUrlError(without_secrets(url), f"its client says: {error}") from error
    except Exception as error:
        # Some clients connect at once, and theirs and their packages' errors have no base class in common.
        if not is_storage_failure(error):
            raise
        raise StorageError(without_secrets(url), "connect to", 1, describe(error)) from error
    return _file_systems[key], kind._strip_protocol(url)


class FsspecFiles:
    """Any file system of fsspec."""

    can_list = True

    def __init__(self, url: str, root: str) -> None:
        self._is_google = protocol_of(url) in GCS_PROTOCOLS
        self.can_create_exclusively = self._is_google or protocol_of(url) == "memory"
        host = fsspec.get_filesystem_class(protocol_of(url))._get_kwargs_from_urls(url)
        self.identity = f"{protocol_of(url)}://{root.split('/')[0]} {sorted(host.items(), key=str)}"
        self._url = url
        self._root = root

    @property
    def files(self) -> Any:
        """The file system, this process's own."""
        return file_system(self._url)[0]

    def at(self, path: str) -> str:
        """Returns a path as the file system wants it."""
        return f"{self._root}/{path}" if path else self._root

    def get(self, path: str, start: int, size: int | None) -> Fetched:
        if size is None:
            total = self.head(path).num_bytes
            return Fetched(self.files.cat_file(self.at(path), start=start), total - start)
        return Fetched(self.files.cat_file(self.at(path), start=start, end=start + size), None)

    def put(self, path: str, data: bytes) -> None:
        self.files.pipe_file(self.at(path), data)

    def create(self, path: str, data: bytes, token: str) -> None:
        # fsspec's files in memory look and then write; all else that may come here does both in one request.
        with _memory_lock:
            self.files.pipe_file(self.at(path), data, mode="create")

    def is_ours(self, path: str, data: bytes, token: str) -> bool:
        # Nothing gets lost on the way to memory. Google's client repeats requests by itself, and its files
        # carry no token of ours, so equal bytes have to do: of two that create the same both may have won.
        return self._is_google and self.files.cat_file(self.at(path)) == data

    def upload(self, path: str, local: Path, retried: Callable[[Callable[[], Any]], Any]) -> None:
        retried(lambda: self.files.put_file(str(local), self.at(path)))

    def head(self, path: str) -> FileInfo:
        entry = self.files.info(self.at(path))
        if entry.get("type") == "directory":
            raise FileNotFoundError(path)
        return info_of(path, entry)

    def names(self, prefix: str) -> list[str]:
        try:
            found = self.files.ls(self.at(prefix), detail=False)
        except FileNotFoundError:
            return []
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in found]

    def walk(self, prefix: str) -> list[FileInfo]:
        # With "/" a file of that very name is not taken for a folder.
        found = self.files.find(self.at(prefix) + "/", detail=True)
        skip = len(self._root) + 1
        return [info_of(name[skip:], entry) for name, entry in found.items()]

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                self.files.rm_file(self.at(path))
            except FileNotFoundError:
                # Gone already: what was wanted.
                continue

    def touch(self, path: str) -> None:
        # Object stores date an object by its last PUT; only small files are ever touched. Between the two
        # requests `gc` may remove the part that the file belongs to, and then the file comes back alone: a
        # part without its arrays, which readers and `verify` report. S3Files has no such window.
        self.files.pipe_file(self.at(path), self.files.cat_file(self.at(path)))

    def uploads(self) -> list[FileInfo]:
        return []

    def abort(self, path: str) -> None:
        """There are none that we know of."""


_memory_lock = threading.Lock()
# A fork may happen while another thread holds the lock; the child gets one of its own.
os.register_at_fork(after_in_child=lambda: globals().__setitem__("_memory_lock", threading.Lock()))


def info_of(path: str, entry: dict[str, Any]) -> FileInfo:
    """Returns what a storage says of an object; each file system of fsspec names its time differently."""
    when = next(
        (entry[key] for key in ("LastModified", "mtime", "updated", "created") if entry.get(key)), 0.0
    )
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    if isinstance(when, datetime.datetime):
        when = when.timestamp()
    version = str(entry.get("ETag") or entry.get("etag") or "")
    return FileInfo(path=path, num_bytes=int(entry.get("size") or 0), modified_s=float(when), version=version)


def refuse_exclusive(url: str) -> StorageRefusedError:
    """Returns the error for a storage on which two creators of one name might both win."""
    return StorageRefusedError(
        without_secrets(url),
        "create a new name in",
        "this kind of storage cannot tell whether a name is new in the same request that writes it (on S3: "
        "If-None-Match), so two commits at once could lose one. Write the store to S3, Google Cloud Storage "
        "or a local disk; reading works from here",
    )
