"""Files of a store in a local folder, or on a mounted file system.

Owns atomic publication (rename after fsync; a hard link where a name must be new) and the translation of
"disk full" into `StorageFullError`. Does not own descriptors of open files (`storage.open_files`).

Thread safety: instances hold no mutable state.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from foldfeed.feature_store.errors import StorageFullError
from foldfeed.feature_store.storage.contract import LAST_FILE, TEMPORARY_PREFIX, FileInfo, RangeReader
from foldfeed.feature_store.storage.open_files import LocalFile


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it where they are missing, and their names durable.

    A file that is on the disk in a folder whose own name is not would be gone after a power cut.
    """
    missing = [folder, *folder.parents]
    missing = missing[: next(number for number, path in enumerate(missing) if path.exists())]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


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

    can_list = True

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
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    @contextlib.contextmanager
    def staging_folder(self) -> Iterator[Path]:
        # Beside the parts, because a rename is atomic only within one file system.
        with disk_full_is_typed(self.root):
            parts = self.root / "parts"
            make_folder(parts)
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

    def unfinished_uploads(self) -> tuple[FileInfo, ...]:
        return ()

    def abort_upload(self, path: str) -> None:
        """There are none."""

    def touch(self, path: str) -> None:
        os.utime(self.root / path)

    def make_durable(self, path: str) -> None:
        target = self.root / path
        with target.open("rb") as file:
            os.fsync(file.fileno())
        # Other software made the folders, too, and may not have forced their names.
        for folder in target.relative_to(self.root).parents:
            fsync_folder(self.root / folder)

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
        make_folder(target.parent)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


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
