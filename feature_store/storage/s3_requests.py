"""One attempt at one request to S3, or to a server that speaks its protocol.

Owns the requests. Does not own the connection (`storage.fsspec_requests.file_system`) nor retries
(`storage.remote`). Invariants: those of `storage.fsspec_requests`; a name is created by a request that the
server refuses when the name is taken (If-None-Match), and the object carries a token that tells whose it is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec.asyn

from foldfeed.feature_store.errors import StoreUrlError
from foldfeed.feature_store.storage.contract import FileInfo
from foldfeed.feature_store.storage.fsspec_requests import Fetched, file_system, info_of
from foldfeed.feature_store.storage.options import fsspec_options
from foldfeed.feature_store.storage.retries import is_not_implemented
from foldfeed.feature_store.storage.s3_reads import S3Reads, fetched

# Larger files are uploaded in pieces of this size, so that a cut costs a piece and not the file.
UPLOAD_PIECE_BYTES = 32 << 20
# S3 takes no more pieces than this of one file.
_MAX_PIECES = 10_000
_DELETE_BATCH = 1000
# Metadata of an object that was created exclusively: by whom.
_TOKEN = "foldfeed-token"
_PRECONDITION_FAILED, _RANGE_NOT_SATISFIABLE = 412, 416


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
        self._reads = S3Reads(url, self._bucket)

    def get(self, path: str, start: int, size: int | None) -> Fetched:
        # An open range, because its answer says how large the object is and a plain one does not.
        key = self._key(path)
        last = "" if size is None else start + size - 1
        try:
            found = self._reads.get(key, start, size)
            if found is not None:
                return found
            answer, data = self._run(self._fetch, Key=key, Range=f"bytes={start}-{last}")
        except OSError as error:
            if _status_of(error) != _RANGE_NOT_SATISFIABLE:
                raise
            # Behind the end, or an empty object, which has no range at all.
            return Fetched(b"", self.head(path).num_bytes)
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        return fetched(data, start, size, status, answer.get("ContentRange", ""))

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
        entry = {key: answer.get(key) for key in ("LastModified", "ETag")}
        return info_of(path, {"size": answer["ContentLength"], **entry})

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
            info_of(entry["Key"][skip:], {"size": entry["Size"], "LastModified": entry["LastModified"]})
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

    def uploads(self) -> list[FileInfo]:
        skip = len(self._folder(""))
        found: list[FileInfo] = []
        after: dict[str, str] = {}
        while True:
            try:
                page = self._call("list_multipart_uploads", Prefix=self._folder(""), **after)
            except Exception as error:
                if not is_not_implemented(error):
                    raise
                # A server that cannot list them: none are known, and all else of `gc` goes on.
                return found
            for entry in page.get("Uploads", []):
                path = f"{entry['Key'][skip:]} (upload {entry['UploadId']})"
                found.append(info_of(path, {"LastModified": entry["Initiated"]}))
            if not page.get("IsTruncated"):
                return found
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort(self, path: str) -> None:
        name, _, upload = path.removesuffix(")").rpartition(" (upload ")
        self._abort(self._key(name), upload)

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
        return self._run(functools.partial(self._request, method=method), **request)

    async def _request(self, files: Any, *, method: str, **request: Any) -> Any:
        # s3fs's own way to do this sleeps and tries again by rules of its own.
        client = await files.set_session()
        try:
            return await getattr(client, method)(**request)
        except Exception as error:
            plain = _translator()(error)
            if plain is error:
                raise
            raise plain from error

    async def _fetch(self, files: Any, **request: Any) -> tuple[dict[str, Any], bytes]:
        answer = await self._request(files, method="get_object", **request)
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


def _translator() -> Callable[[Exception], Exception]:
    """Returns s3fs's way from S3's errors to Python's; s3fs is an extra, loaded when there is an S3 URL."""
    return importlib.import_module("s3fs.errors").translate_boto_error


def _status_of(error: OSError) -> int | None:
    """Returns the HTTP status behind an error of s3fs."""
    answer = getattr(error.__cause__, "response", None) or {}
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
