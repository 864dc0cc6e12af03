"""Files of a store behind a URL: object stores, web servers, anything that fsspec knows.

Owns what makes them reliable over a network that is not: bounded retries with one typed error at the end,
the check that all bytes came that were asked for, and the answer to "was the name new?" when the first answer
got lost. Does not own single requests (`storage.fsspec_requests`, `storage.http_requests`). Invariants: a
read returns exactly the bytes asked for, fewer only where the file ends; a PUT is atomic by itself, and a
folder becomes visible only when the index names it, so the order of its uploads does not matter and a broken
one leaves garbage at most.

Thread safe; a forked child makes clients of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from foldfeed.feature_store.storage.contract import LAST_FILE, TEMPORARY_PREFIX, FileInfo, RangeReader
from foldfeed.feature_store.storage.fsspec_requests import (
    FsspecFiles,
    RemoteFiles,
    file_system,
    refuse_exclusive,
)
from foldfeed.feature_store.storage.http_requests import HttpFiles
from foldfeed.feature_store.storage.local import disk_full_is_typed
from foldfeed.feature_store.storage.options import (
    HTTP_PROTOCOLS,
    S3_PROTOCOLS,
    protocol_of,
    refuse_credentials,
    without_secrets,
)
from foldfeed.feature_store.storage.retries import ShortReadError, retrying
from foldfeed.feature_store.storage.s3_requests import S3Files

T = TypeVar("T")
_UPLOAD_THREADS = 4
# Storages that were seen to refuse a name that is there, by `RemoteFiles.identity`.
_exclusive_storages: set[str] = set()


def _open_files(url: str) -> RemoteFiles:
    refuse_credentials(url)
    protocol = protocol_of(url)
    if protocol in HTTP_PROTOCOLS:
        return HttpFiles(url)
    root = file_system(url)[1].rstrip("/")
    return S3Files(url, root) if protocol in S3_PROTOCOLS else FsspecFiles(url, root)


class RemoteBlobs:
    """Objects behind a URL (``s3://``, ``gs://``, ``https://``, ...)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files = _open_files(self.url)
        self.can_list = self._files.can_list

    def read(self, path: str) -> bytes:
        def whole() -> bytes:
            found = self._files.get(path, 0, None)
            if found.total is not None and len(found.data) != found.total:
                raise ShortReadError(f"{len(found.data)} bytes came of a file of {found.total}")
            return found.data

        return self._retrying("read", path, whole)

    def read_range(self, path: str, start: int, size: int) -> bytes:
        return self._retrying("read", path, lambda: self._range(path, start, size)) if size else b""

    def open_range(self, path: str) -> RangeReader:
        return functools.partial(self.read_range, path)

    def write_atomic(self, path: str, data: bytes) -> None:
        self._retrying("write", path, lambda: self._files.put(path, data))

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """See `Blobs`.

        Raises:
          StorageRefusedError: this storage cannot, or does not, refuse a name that is there.
        """
        if not self._files.can_create_exclusively:
            raise refuse_exclusive(self.url)
        if self._files.identity not in _exclusive_storages:
            self._prove_exclusive()
            _exclusive_storages.add(self._files.identity)
        return self._create(path, data)

    def exists(self, path: str) -> bool:
        if path:
            try:
                self.info(path)
            except FileNotFoundError:
                pass
            else:
                return True
        # Where nothing can be listed a folder is not known to exist; of the root that is assumed.
        return bool(self.list(path)) if self.can_list else not path

    def list(self, prefix: str) -> list[str]:
        return sorted(self._retrying("list", prefix, lambda: self._files.names(prefix)))

    @contextlib.contextmanager
    def staging_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="foldfeed-") as folder, disk_full_is_typed(folder):
            yield Path(folder)

    def publish_folder(self, local: Path, path: str) -> None:
        names = [file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file()]
        names.sort(key=lambda name: (name == LAST_FILE, name))
        with concurrent.futures.ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
            waiting = [pool.submit(self._upload, local, path, name) for name in names if name != LAST_FILE]
            try:
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        # Written again whether it is there or not: that heals a damaged part and marks it as wanted now.
        if LAST_FILE in names:
            self._upload(local, path, LAST_FILE)

    def info(self, path: str) -> FileInfo:
        return self._retrying("look up", path, lambda: self._files.head(path))

    def walk(self, prefix: str) -> tuple[FileInfo, ...]:
        found = self._retrying("list", prefix, lambda: self._files.walk(prefix))
        return tuple(sorted(found, key=lambda file: file.path))

    def delete(self, path: str) -> None:
        paths = [file.path for file in self.walk(path)]
        # First what makes a part one, so that half a part is never taken for a whole.
        first = [name for name in paths if name == f"{path}/{LAST_FILE}"]
        for batch in (first, [path, *(name for name in paths if name not in first)]):
            if batch:
                self._retrying("delete", path, functools.partial(self._files.remove, batch))

    def unfinished_uploads(self) -> tuple[FileInfo, ...]:
        found = self._retrying("list", "", self._files.uploads)
        return tuple(sorted(found, key=lambda file: file.path))

    def abort_upload(self, path: str) -> None:
        self._retrying("delete", path, lambda: self._files.abort(path))

    def touch(self, path: str) -> None:
        self._retrying("mark", path, lambda: self._files.touch(path))

    def make_durable(self, path: str) -> None:
        """An object that can be read is durable."""

    def in_use(self, path: str) -> bool:
        return False

    def rename_folder(self, path: str, name: str) -> bool:
        return False

    def _range(self, path: str, start: int, size: int) -> bytes:
        found = self._files.get(path, start, size)
        if len(found.data) != size:
            # Fewer are right at the end of the file only, and whoever sent them may not be the one to ask.
            total = self._files.head(path).num_bytes if found.total is None else found.total
            wanted = max(0, min(size, total - start))
            if len(found.data) != wanted:
                raise ShortReadError(
                    f"{len(found.data)} bytes came instead of {wanted} from {start} on in a file of {total}"
                )
        return found.data

    def _upload(self, local: Path, path: str, name: str) -> None:
        target = f"{path}/{name}"
        self._files.upload(target, local / name, lambda call: self._retrying("upload", target, call))

    def _create(self, path: str, data: bytes) -> bool:
        token = uuid.uuid4().hex

        def attempt() -> bool:
            try:
                self._files.create(path, data, token)
            except FileExistsError:
                # An earlier attempt may have landed though its answer did not, and clients make more of them
                # than we see: then the file is ours.
                return self._files.is_ours(path, data, token)
            return True

        return self._retrying("create", path, attempt)

    def _prove_exclusive(self) -> None:
        """Finds out on a file of its own whether the storage refuses a name that is there.

        Servers that do not know If-None-Match ignore it and replace the file.
        """
        probe = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        self._create(probe, b"first")
        try:
            if self._create(probe, b"second"):
                raise refuse_exclusive(self.url)
        finally:
            self.delete(probe)

    def _retrying(self, operation: str, path: str, call: Callable[[], T]) -> T:
        shown = without_secrets(self.url)
        return retrying(call, operation, f"{shown}/{path}" if path else shown)
