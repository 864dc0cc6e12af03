"""The index's Delta log on remote storage: read and appended to file by file, without delta-rs.

Owns the actions of a Delta commit as JSON, and the rule that makes a commit safe there: version N + 1 is a
new file, created in a request that fails when the name is taken. Does not own what goes into a commit
(`index.table`).

Why not delta-rs, which writes the log of a store on a disk: every request here is counted, retried and
checked by `storage.remote`, so a network failure is never taken for damage or for an absent version; a commit
whose answer got lost is known to have landed or not; web servers and any file system of fsspec can be read;
and a forked child may open a store. Both write the same protocol: `tests/` reads either with the other.

Invariant: what is shown comes from commits that match their own checksums, one for each version from 0 on.
Costs one small request for each version when a store is opened, and one when it is refreshed.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import deltalake

from foldfeed.feature_store.errors import CorruptDataError, NotAStoreError, StorageError, StorageRefusedError
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index.log import LOG_FOLDER, AddedFile, Commit
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.storage.contract import is_forbidden

_ENGINE = "foldfeed"
# A commit every second would take thirty years.
_MAX_VERSION = 1 << 30
# What a table needs that has nothing but files: no deletion vectors, no column mapping.
_PROTOCOL = {"minReaderVersion": 1, "minWriterVersion": 2}


class ObjectLog:
    """One version of a log; see `index.table.TableLog`."""

    def __init__(self, blobs: Blobs, version: int | None) -> None:
        """Reads the log.

        Args:
          blobs: the store's files.
          version: which one to show, the newest when None.
        Raises:
          NotAStoreError: there is no log.
          ValueError: there is no such version.
          CorruptDataError: a commit is damaged or missing.
          StorageError: the storage cannot be asked.
        """
        self._blobs = blobs
        newest = newest_version(blobs)
        if newest is None:
            raise NotAStoreError(blobs.url, index_log.NO_INDEX)
        if version is not None and not 0 <= version <= newest:
            raise ValueError(f"version {version} does not exist; {blobs.url!r} has versions 0 to {newest}")
        self._commits = index_log.read_log(blobs, newest if version is None else version)

    @property
    def version(self) -> int:
        """The version that is shown."""
        return self.head.version

    @property
    def head(self) -> Commit:
        """The commit that made it."""
        return self._commits[-1]

    @property
    def files(self) -> list[str]:
        """Names of the live files, sorted."""
        return sorted(index_log.live_files(self._commits))

    @property
    def schema(self) -> deltalake.Schema:
        """The table's schema."""
        return deltalake.Schema.from_json(self._metadata["schemaString"])

    def has_job(self, job_id: str) -> bool:
        """Returns whether a job has committed."""
        return any(commit.note.job_id == job_id for commit in self._commits)

    def refresh(self) -> None:
        """Moves to the newest version."""
        while True:
            try:
                commit = index_log.parse_commit(
                    self.version + 1, self._blobs.read(index_log.log_path(self.version + 1))
                )
            except FileNotFoundError:
                return
            index_log.check_follows(self.head, commit)
            self._commits.append(commit)

    def show(self, version: int) -> None:
        """Moves back to a version."""
        del self._commits[version + 1 :]

    def append(
        self,
        metadata: Mapping[str, str],
        job_id: str,
        added: Mapping[str, AddedFile],
        removed: Sequence[str],
    ) -> None:
        """Tries to write the next version; whether it became ours, `refresh` and the log tell.

        Raises:
          StorageRefusedError: this storage cannot do that without the risk of losing another's commit.
        """
        now_ms = int(time.time() * 1000)
        actions: list[dict[str, Any]] = [
            _commit_info(metadata, "WRITE", {"mode": "Append", "partitionBy": "[]"})
        ]
        actions += [
            {
                "add": {
                    "path": name,
                    "partitionValues": {},
                    "size": file.num_bytes,
                    "modificationTime": now_ms,
                    "dataChange": True,
                    "stats": file.statistics,
                }
            }
            for name, file in added.items()
        ]
        actions += [
            {
                "remove": {
                    "path": name,
                    "deletionTimestamp": now_ms,
                    "dataChange": True,
                    "extendedFileMetadata": False,
                    "partitionValues": {},
                }
            }
            for name in removed
        ]
        if job_id:
            actions.append({"txn": {"appId": job_id, "version": 1, "lastUpdated": now_ms}})
        _write(self._blobs, self.version + 1, actions)

    def add_columns(self, metadata: Mapping[str, str], fields: Sequence[deltalake.Field]) -> None:
        """Tries to write a next version with more columns; see `append`."""
        schema = deltalake.Schema([*self.schema.fields, *fields])
        names = {"fields": json.dumps([json.loads(field.to_json()) for field in fields])}
        actions = [
            _commit_info(metadata, "ADD COLUMN", names),
            {"metaData": {**self._metadata, "schemaString": schema.to_json()}},
        ]
        _write(self._blobs, self.version + 1, actions)

    @property
    def _metadata(self) -> Mapping[str, Any]:
        """The newest ``metaData`` action."""
        for commit in reversed(self._commits):
            if commit.metadata is not None:
                return commit.metadata
        raise CorruptDataError(index_log.log_path(0), "it holds no metaData action")


def create_log(
    blobs: Blobs, schema: deltalake.Schema, configuration: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Writes version 0 unless it is there.

    Raises:
      StorageRefusedError: this storage cannot be written to safely.
    """
    table: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "name": "foldfeed-index",
        "description": None,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": schema.to_json(),
        "partitionColumns": [],
        "createdTime": int(time.time() * 1000),
        "configuration": dict(configuration),
    }
    if newest_version(blobs) is not None:
        return
    info = _commit_info(metadata, "CREATE TABLE", {"mode": "ErrorIfExists"})
    _write(blobs, 0, [info, {"protocol": _PROTOCOL}, {"metaData": table}])


def newest_version(blobs: Blobs) -> int | None:
    """Returns the newest version of a store's log; None when it has none."""
    if not blobs.can_list:
        return _newest_by_asking(blobs)
    found = {
        int(name[:20]) for name in blobs.list(LOG_FOLDER) if name.endswith(".json") and name[:20].isdecimal()
    }
    return max(found) if found else None


def _newest_by_asking(blobs: Blobs) -> int | None:
    """Finds the newest version where files cannot be listed.

    Versions have no gaps, and only `repair` ever removes files of theirs, the newest first: one that is there
    has all before it. Where version 0 may be read all may, so a later one that is denied is not there: S3
    answers so if listing is not allowed.
    """

    def there(version: int) -> bool:
        try:
            return blobs.exists(index_log.log_path(version))
        except StorageError as error:
            if version and is_forbidden(error):
                return False
            raise

    if not there(0):
        return None
    low, high = 0, 1
    while there(high):
        low, high = high, 2 * high
        if high > _MAX_VERSION:
            raise StorageRefusedError(
                blobs.url,
                "open",
                "the server claims to have every file that it is asked for; ask its operator",
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if there(middle) else (low, middle)
    return low


def _write(blobs: Blobs, version: int, actions: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(action, separators=(",", ":")) + "\n" for action in actions)
    # Whether the name was new is found out from the log: the answer may get lost on its way.
    blobs.create_exclusive(index_log.log_path(version), text.encode())


def _commit_info(
    metadata: Mapping[str, str], operation: str, parameters: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "commitInfo": {
            "timestamp": int(time.time() * 1000),
            "operation": operation,
            "operationParameters": dict(parameters),
            "engineInfo": _ENGINE,
            **metadata,
        }
    }
