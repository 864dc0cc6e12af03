"""Byte access to the files under a store's root, local or behind any fsspec URL.

Owns: atomic publication of single files and of whole folders, and the translation of "disk full" into
`StorageFullError`. Does not own: formats, caching, retries. Invariant: a reader that follows a published name
sees all of the file or none of it. Locally that is a rename after fsync; in an object store a PUT is atomic
by itself, and a folder becomes visible only when the index names it, so the order of its uploads does not
matter.

Thread safety: instances hold no mutable state besides fsspec's file system, which is thread safe for the
calls made here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import filecmp
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import fsspec

from foldfeed.feature_store.errors import StorageFullError, StoreUrlError
from foldfeed.feature_store.open_files import LocalFile

# Names that start so are never part of a store: an interrupted writer may leave them, `gc` may remove them.
TEMPORARY_PREFIX = ".tmp-"


# A folder is complete when this file is there; it is uploaded last where a folder cannot appear at once.
LAST_FILE = "zarr.json"


RangeReader: TypeAlias = "Callable[[int, int], bytes]"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileInfo:
    """One file under a root.

    Attributes:
      path: relative to the root.
      num_bytes: its size.
      modified_s: when it was last written or touched, seconds since 1970; 0 where the storage does not say.
    """

    path: str
    num_bytes: int
    modified_s: float


class Blobs(Protocol):
    """Files under one root; every path is relative to it and uses ``/``."""

    url: str

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


def open_blobs(url: str | os.PathLike[str]) -> Blobs:
    """Returns byte access to a local path, a ``file://`` URL or any other URL that fsspec knows."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text[len("file://") :]
    if "://" in text:
        return FsspecBlobs(text)
    return LocalBlobs(Path(text))


def fsync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable (POSIX: the folder's own fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_full_is_typed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns ENOSPC, EDQUOT and EFBIG from the block into `StorageFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(os.fspath(path)) from error
        raise


class LocalBlobs:
    """Files in a local folder (or on a mounted file system)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_range(self, path: str, start: int, size: int) -> bytes:
        with (self.root / path).open("rb") as file:
            return os.pread(file.fileno(), size, start)

    def open_range(self, path: str) -> RangeReader:
        return LocalFile(self.root / path)

    def write_atomic(self, path: str, data: bytes) -> None:
        target = self.root / path
        with disk_full_is_typed(target), self._temporary_file(target, data) as temporary:
            temporary.replace(target)
            fsync_folder(target.parent)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        target = self.root / path
        with disk_full_is_typed(target), self._temporary_file(target, data) as temporary:
            try:
                # A hard link fails when the name exists, unlike a rename: of two creators exactly one wins.
                os.link(temporary, target)
            except FileExistsError:
                return False
            fsync_folder(target.parent)
            return True

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def list(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    @contextlib.contextmanager
    def staging_folder(self) -> Iterator[Path]:
        # Beside the parts, because a rename is atomic only within one file system.
        with disk_full_is_typed(self.root):
            parts = self.root / "parts"
            parts.mkdir(parents=True, exist_ok=True)
            folder = parts / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            folder.mkdir()
            # The lock ends with the process, however it ends, so `gc` can tell a writer from a leftover.
            with _locked(folder):
                try:
                    yield folder
                finally:
                    if folder.exists():
                        shutil.rmtree(folder)

    def publish_folder(self, local: Path, path: str) -> None:
        target = self.root / path
        with disk_full_is_typed(target):
            for folder, _, names in os.walk(local, topdown=False):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                fsync_folder(Path(folder))
            try:
                local.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                self._keep_or_heal(local, target)
            fsync_folder(target.parent)

    def _keep_or_heal(self, local: Path, target: Path) -> None:
        """Leaves a folder that holds the staged bytes; swaps in the staged one where it does not."""
        names = [str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()]
        _, differ, missing = filecmp.cmpfiles(local, target, names, shallow=False)
        if not differ and not missing:
            os.utime(target / LAST_FILE)
            return
        aside = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        target.rename(aside)
        local.rename(target)
        shutil.rmtree(aside)

    def info(self, path: str) -> FileInfo:
        found = (self.root / path).stat()
        return FileInfo(path=path, num_bytes=found.st_size, modified_s=found.st_mtime)

    def walk(self, prefix: str) -> tuple[FileInfo, ...]:
        found = []
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                # A file may go while we look: another process published or removed it.
                with contextlib.suppress(FileNotFoundError):
                    found.append(self.info(os.path.relpath(os.path.join(folder, name), self.root)))
        return tuple(sorted(found, key=lambda file: file.path))

    def delete(self, path: str) -> None:
        target = self.root / path
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def touch(self, path: str) -> None:
        os.utime(self.root / path)

    def make_durable(self, path: str) -> None:
        target = self.root / path
        with target.open("rb") as file:
            os.fsync(file.fileno())
        fsync_folder(target.parent)

    def in_use(self, path: str) -> bool:
        try:
            handle = os.open(self.root / path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def rename_folder(self, path: str, name: str) -> bool:
        (self.root / path).rename(self.root / name)
        return True

    @contextlib.contextmanager
    def _temporary_file(self, target: Path, data: bytes) -> Iterator[Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


class FsspecBlobs:
    """Objects behind an fsspec URL (``s3://``, ``gs://``, ``https://``, ...)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            # An unknown protocol, or one whose package is not installed; fsspec's sentence says which.
            raise StoreUrlError(self.url, str(error).rstrip(".")) from error

    def read(self, path: str) -> bytes:
        return self._files.cat_file(self._at(path))

    def read_range(self, path: str, start: int, size: int) -> bytes:
        return self._files.cat_file(self._at(path), start=start, end=start + size)

    def open_range(self, path: str) -> RangeReader:
        return functools.partial(self.read_range, path)

    def write_atomic(self, path: str, data: bytes) -> None:
        self._files.pipe_file(self._at(path), data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(self._at(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    def exists(self, path: str) -> bool:
        return bool(self._files.exists(self._at(path)))

    def list(self, prefix: str) -> list[str]:
        folder = self._at(prefix)
        if not self._files.exists(folder):
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in self._files.ls(folder, detail=False))

    @contextlib.contextmanager
    def staging_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="foldfeed-") as folder, disk_full_is_typed(folder):
            yield Path(folder)

    def publish_folder(self, local: Path, path: str) -> None:
        names = [file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file()]
        for name in sorted(names, key=lambda name: (name == LAST_FILE, name)):
            self._files.put_file(str(local / name), self._at(f"{path}/{name}"))

    def info(self, path: str) -> FileInfo:
        return _remote_info(path, self._files.info(self._at(path)))

    def walk(self, prefix: str) -> tuple[FileInfo, ...]:
        found = self._files.find(self._at(prefix), detail=True)
        skip = len(self._root.rstrip("/")) + 1
        return tuple(_remote_info(name[skip:], found[name]) for name in sorted(found))

    def delete(self, path: str) -> None:
        if self._files.exists(self._at(path)):
            self._files.rm(self._at(path), recursive=True)

    def touch(self, path: str) -> None:
        # Object stores date an object by its last PUT; only small files are ever touched.
        self._files.pipe_file(self._at(path), self._files.cat_file(self._at(path)))

    def make_durable(self, path: str) -> None:
        """An object that can be read is durable."""

    def in_use(self, path: str) -> bool:
        return False

    def rename_folder(self, path: str, name: str) -> bool:
        return False

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _remote_info(path: str, entry: dict[str, Any]) -> FileInfo:
    """Returns what fsspec says of an object; each file system names its time differently."""
    when = next(
        (entry[key] for key in ("LastModified", "mtime", "updated", "created") if entry.get(key)), 0.0
    )
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    if isinstance(when, datetime.datetime):
        when = when.timestamp()
    return FileInfo(path=path, num_bytes=int(entry.get("size") or 0), modified_s=float(when))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds an advisory lock on a folder; a file system that has no locks is used without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
