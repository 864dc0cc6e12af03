"""One attempt at one request to remote storage, by kind of storage: fsspec's file systems, S3 among them.

Owns what a single request means: which bytes, how many there are in all, whether a name was new. Does not own
retries or the checks of what came (`blobs_remote`). Invariants: "there is no such file" is said only when the
storage said so, never when it could not be asked; nothing is cached.

Thread and fork safety: fsspec's file systems are thread safe and must not be used in a forked child; they are
kept per process here, so that a child makes its own.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fsspec
import fsspec.asyn

from foldfeed.feature_store.blob_types import FileInfo
from foldfeed.feature_store.errors import MissingExtraError, StorageRefusedError, StoreUrlError
from foldfeed.feature_store.storage_options import (
    EXTRAS,
    GCS_PROTOCOLS,
    S3_PROTOCOLS,
    fsspec_options,
    protocol_of,
)

# Larger files are uploaded in pieces of this size, so that a cut costs a piece and not the file.
UPLOAD_PIECE_BYTES = 32 << 20
# S3 takes no more pieces than this of one file.
_MAX_PIECES = 10_000
_DELETE_BATCH = 1000
# Metadata of an object that was created exclusively: by whom.
_TOKEN = "foldfeed-token"
_PRECONDITION_FAILED, _RANGE_NOT_SATISFIABLE = 412, 416


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


def open_files(url: str) -> RemoteFiles:
    """Returns the files behind a URL that fsspec knows.

    Raises:
      StoreUrlError: no package knows that kind of URL.
      MissingExtraError: the package that knows it is not installed.
    """
    root = file_system(url)[1].rstrip("/")
    if protocol_of(url) in S3_PROTOCOLS:
        return S3Files(url, root)
    return FsspecFiles(url, root)


# Never emptied and small: one entry for each kind of storage (and its credentials) in each process.
_file_systems: dict[tuple[int, str], Any] = {}


def file_system(url: str) -> tuple[Any, str]:
    """Returns this process's fsspec file system for a URL, and the URL's path in it."""
    protocol = protocol_of(url)
    options = fsspec_options(url)
    # Opening a client takes a tenth of a second and its connections; stores are opened all the time. A forked
    # child has another process id: the parent's client talks through a thread that the child does not have.
    key = os.getpid(), f"{protocol} {sorted(options.items(), key=str)}"
    try:
        kind = fsspec.get_filesystem_class(protocol)
        if key not in _file_systems:
            made = kind(**options)
            # `retries` counts attempts; a client that tries again by itself would multiply them.
            made.retries = 1
            _file_systems.setdefault(key, made)
    except ImportError as error:
        if protocol in EXTRAS:
            raise MissingExtraError(*EXTRAS[protocol]) from error
        raise StoreUrlError(url, str(error).rstrip(".")) from error
    except ValueError as error:
        # An unknown protocol; fsspec's sentence says so.
        raise StoreUrlError(url, str(error).rstrip(".")) from error
    return _file_systems[key], kind._strip_protocol(url)


class FsspecFiles:
    """Any file system of fsspec."""

    can_list = True

    def __init__(self, url: str, root: str) -> None:
        self._is_google = protocol_of(url) in GCS_PROTOCOLS
        self.can_create_exclusively = self._is_google or protocol_of(url) == "memory"
        self.identity = f"{protocol_of(url)}://{root.split('/')[0]}"
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
        return _info_of(path, entry)

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
        return [_info_of(name[skip:], entry) for name, entry in found.items()]

    def remove(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                self.files.rm_file(self.at(path))
            except FileNotFoundError:
                # Gone already: what was wanted.
                continue

    def touch(self, path: str) -> None:
        # Object stores date an object by its last PUT; only small files are ever touched.
        self.files.pipe_file(self.at(path), self.files.cat_file(self.at(path)))


class S3Files:
    """Objects in a bucket of S3 or of a server that speaks its protocol.

    S3's own requests and not fsspec's file operations: those do not tell how large the whole object is, which
    a truncated answer is known by, and take some failures for an absent object.
    """

    can_list = True
    can_create_exclusively = True

    def __init__(self, url: str, root: str) -> None:
        self._url = url
        self._bucket, _, self._prefix = root.partition("/")
        if not self._bucket:
            raise StoreUrlError(url, "it names no bucket")
        endpoint = fsspec_options(url)["endpoint_url"] or "s3"
        self.identity = f"{endpoint}/{self._bucket}"

    def get(self, path: str, start: int, size: int | None) -> Fetched:
        # An open range, because its answer says how large the object is and a plain one does not.
        last = "" if size is None else start + size - 1
        try:
            answer, data = self._run(self._fetch, Key=self._key(path), Range=f"bytes={start}-{last}")
        except OSError as error:
            if _status_of(error) != _RANGE_NOT_SATISFIABLE:
                raise
            # Behind the end, or an empty object, which has no range at all.
            return Fetched(b"", self.head(path).num_bytes)
        total = answer.get("ContentRange", "").rpartition("/")[2]
        return Fetched(data, int(total) if total.isdecimal() else None)

    def put(self, path: str, data: bytes) -> None:
        try:
            self._call("put_object", Key=self._key(path), Body=data)
        except FileNotFoundError as error:
            raise self._no_bucket() from error

    def create(self, path: str, data: bytes, token: str) -> None:
        request = {"Key": self._key(path), "Body": data, "Metadata": {_TOKEN: token}, "IfNoneMatch": "*"}
        try:
            self._call("put_object", **request)
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        except OSError as error:
            if _status_of(error) == _PRECONDITION_FAILED:
                raise FileExistsError(path) from error
            raise

    def is_ours(self, path: str, data: bytes, token: str) -> bool:
        return self._call("head_object", Key=self._key(path)).get("Metadata", {}).get(_TOKEN) == token

    def upload(self, path: str, local: Path, retried: Callable[[Callable[[], Any]], Any]) -> None:
        size = local.stat().st_size
        if size <= UPLOAD_PIECE_BYTES:
            retried(lambda: self.put(path, local.read_bytes()))
            return
        key = self._key(path)
        try:
            upload = retried(lambda: self._call("create_multipart_upload", Key=key))["UploadId"]
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        try:
            pieces = self._upload_pieces(key, upload, local, size, retried)
            retried(lambda: self._complete(path, upload, pieces, size))
        except BaseException:
            # Pieces of an upload that nobody completes cost money and are in no listing.
            retried(lambda: self._abort(key, upload))
            raise

    def head(self, path: str) -> FileInfo:
        answer = self._call("head_object", Key=self._key(path))
        return _info_of(path, {"size": answer["ContentLength"], "LastModified": answer["LastModified"]})

    def names(self, prefix: str) -> list[str]:
        start = self._folder(prefix)
        found: set[str] = set()
        for page in self._pages(Prefix=start, Delimiter="/"):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            folders = [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
            found.update(key[len(start) :].rstrip("/") for key in (*keys, *folders))
        # The folder itself, where somebody made a placeholder for it.
        return sorted(found - {""})

    def walk(self, prefix: str) -> list[FileInfo]:
        skip = len(self._folder(""))
        return [
            _info_of(entry["Key"][skip:], {"size": entry["Size"], "LastModified": entry["LastModified"]})
            for page in self._pages(Prefix=self._folder(prefix))
            for entry in page.get("Contents", [])
            if not entry["Key"].endswith("/")
        ]

    def remove(self, paths: Sequence[str]) -> None:
        for start in range(0, len(paths), _DELETE_BATCH):
            objects = [{"Key": self._key(path)} for path in paths[start : start + _DELETE_BATCH]]
            answer = self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            for failed in answer.get("Errors", []):
                # The request as a whole succeeds even if nothing was removed.
                raise OSError(f"{failed.get('Code')} for {failed.get('Key')}: {failed.get('Message')}")

    def touch(self, path: str) -> None:
        # S3 dates an object by its last PUT (a copy onto itself does not count everywhere). It must not bring
        # back an object that `gc` has just removed, alone of all its part.
        key = self._key(path)
        answer, data = self._run(self._fetch, Key=key)
        try:
            self._call("put_object", Key=key, Body=data, IfMatch=answer["ETag"])
        except OSError as error:
            if _status_of(error) == _PRECONDITION_FAILED:
                raise FileNotFoundError(path) from error
            raise

    def _upload_pieces(
        self, key: str, upload: str, local: Path, size: int, retried: Callable[[Callable[[], Any]], Any]
    ) -> list[dict[str, Any]]:
        piece_bytes = max(UPLOAD_PIECE_BYTES, -(-size // _MAX_PIECES))
        done = []
        with local.open("rb") as file:
            for number, data in enumerate(iter(lambda: file.read(piece_bytes), b""), start=1):
                call = functools.partial(
                    self._call, "upload_part", Key=key, UploadId=upload, PartNumber=number, Body=data
                )
                done.append({"PartNumber": number, "ETag": retried(call)["ETag"]})
        return done

    def _complete(self, path: str, upload: str, pieces: list[dict[str, Any]], size: int) -> None:
        try:
            self._call(
                "complete_multipart_upload",
                Key=self._key(path),
                UploadId=upload,
                MultipartUpload={"Parts": pieces},
            )
        except FileNotFoundError:
            # No such upload: an attempt before this one completed it, and its answer got lost.
            if self.head(path).num_bytes != size:
                raise

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", Key=key, UploadId=upload)
        except FileNotFoundError:
            # It is gone, or was completed after all.
            return

    def _pages(self, **request: Any) -> Sequence[dict[str, Any]]:
        pages = []
        token: dict[str, str] = {}
        while True:
            try:
                page = self._call("list_objects_v2", **request, **token)
            except FileNotFoundError:
                # There is no such bucket, so nothing in it.
                return []
            pages.append(page)
            if not page.get("IsTruncated"):
                return pages
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _call(self, method: str, **request: Any) -> Any:
        return self._run(lambda files, **arguments: files._call_s3(method, **arguments), **request)

    async def _fetch(self, files: Any, **request: Any) -> tuple[dict[str, Any], bytes]:
        answer = await files._call_s3("get_object", **request)
        async with answer["Body"] as body:
            return answer, await body.read()

    def _run(self, work: Callable[..., Awaitable[Any]], **request: Any) -> Any:
        files = file_system(self._url)[0]
        return fsspec.asyn.sync(files.loop, work, files, Bucket=self._bucket, **request)

    def _no_bucket(self) -> StoreUrlError:
        return StoreUrlError(self._url, f"there is no bucket {self._bucket!r}; make it first")

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _folder(self, prefix: str) -> str:
        key = self._key(prefix).rstrip("/")
        return f"{key}/" if key else ""


_memory_lock = threading.Lock()
# A fork may happen while another thread holds the lock; the child gets one of its own.
os.register_at_fork(after_in_child=lambda: globals().__setitem__("_memory_lock", threading.Lock()))


def _status_of(error: OSError) -> int | None:
    """Returns the HTTP status behind an error of s3fs."""
    answer = getattr(error.__cause__, "response", None) or {}
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _info_of(path: str, entry: dict[str, Any]) -> FileInfo:
    """Returns what a storage says of an object; each file system of fsspec names its time differently."""
    when = next(
        (entry[key] for key in ("LastModified", "mtime", "updated", "created") if entry.get(key)), 0.0
    )
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    if isinstance(when, datetime.datetime):
        when = when.timestamp()
    return FileInfo(path=path, num_bytes=int(entry.get("size") or 0), modified_s=float(when))


def refuse_exclusive(url: str) -> StorageRefusedError:
    """Returns the error for a storage on which two creators of one name might both win."""
    return StorageRefusedError(
        url,
        "create a new name in",
        "this kind of storage cannot tell whether a name is new in the same request that writes it (on S3: "
        "If-None-Match), so two commits at once could lose one. Write the store to S3, Google Cloud Storage "
        "or a local disk; reading works from here",
    )
