"""The index's Delta log on a local disk, through delta-rs.

Owns everything that talks to delta-rs. Does not own what goes into a commit (`index.table`).

Delta's own retries are off, because its conflict checker lets two appends of the same record id pass: one of
two committers that start from the same version loses here and looks again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import deltalake
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import DeltaError, SchemaMismatchError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from foldfeed.feature_store.errors import CorruptDataError, ForkedProcessError, NotAStoreError
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index.files import INDEX_FOLDER
from foldfeed.feature_store.index.log import AddedFile, Commit
from foldfeed.feature_store.storage import Blobs

# How delta-rs says that a commit failed, whatever the reason.
COMMIT_FAILURES = (DeltaError, SchemaMismatchError, OSError)
# Said again with each commit: the table's own word for it stands in a checkpoint, which has no checksum.
_AFTER_COMMIT = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)
# The process that started delta-rs's threads, if any.
_used_by: int | None = None


class DeltaLog:
    """One version of a log; see `index.table.TableLog`."""

    def __init__(self, blobs: Blobs, version: int | None) -> None:
        """Opens the table; see `ObjectLog` for arguments and errors."""
        self._blobs = blobs
        with _damage_is_typed(blobs.url):
            self._table = DeltaTable(_uri(blobs))
            newest = self._table.version()
        if version is not None:
            if not 0 <= version <= newest:
                raise ValueError(
                    f"version {version} does not exist; {blobs.url!r} has versions 0 to {newest}"
                )
            self.show(version)

    @property
    def version(self) -> int:
        """The version that is shown."""
        with _damage_is_typed(self._blobs.url):
            return self._table.version()

    @property
    def head(self) -> Commit:
        """The commit that made it."""
        return index_log.read_commit(self._blobs, self.version)

    @property
    def files(self) -> list[str]:
        """Names of the live files, sorted."""
        with _damage_is_typed(self._blobs.url):
            return sorted(uri.rsplit("/", 1)[-1] for uri in self._table.file_uris())

    @property
    def schema(self) -> deltalake.Schema:
        """The table's schema."""
        with _damage_is_typed(self._blobs.url):
            return self._table.schema()

    def has_job(self, job_id: str) -> bool:
        """Returns whether a job has committed.

        Raises:
          CorruptDataError: Delta lists it, and no commit is by that job.
        """
        if self._table.transaction_version(job_id) is None:
            return False
        # Delta's list has no checksum; the commit that the entry came with has one.
        for version in range(self.version, -1, -1):
            if index_log.read_commit(self._blobs, version).note.job_id == job_id:
                return True
        raise CorruptDataError(
            index_log.LOG_FOLDER, f"it lists job {job_id!r} as done, and no commit is by that job"
        )

    def refresh(self) -> None:
        """Moves to the newest version."""
        _refuse_after_fork(self._blobs.url)
        with _damage_is_typed(self._blobs.url):
            self._table.update_incremental()

    def show(self, version: int) -> None:
        """Moves to a version."""
        _refuse_after_fork(self._blobs.url)
        with _damage_is_typed(self._blobs.url):
            self._table.load_as_version(version)

    def append(
        self,
        metadata: Mapping[str, str],
        job_id: str,
        added: Mapping[str, AddedFile],
        removed: Sequence[str],
    ) -> None:
        """Tries to write the next version; whether it became ours, `refresh` and the log tell."""
        _refuse_after_fork(self._blobs.url)
        now_ms = int(time.time() * 1000)
        adds = [
            AddAction(name, file.num_bytes, {}, now_ms, True, file.statistics) for name, file in added.items()
        ]
        removes = [RemoveAction(name, True, now_ms, partition_values={}) for name in removed]
        self._table.create_write_transaction(
            [*adds, *removes],
            "append",
            self._table.schema(),
            commit_properties=_properties(metadata, job_id),
            post_commithook_properties=_AFTER_COMMIT,
        )

    def add_columns(self, metadata: Mapping[str, str], fields: Sequence[deltalake.Field]) -> None:
        """Tries to write a next version with more columns; see `append`."""
        _refuse_after_fork(self._blobs.url)
        self._table.alter.add_columns(
            list(fields),
            commit_properties=_properties(metadata, ""),
            post_commithook_properties=_AFTER_COMMIT,
        )


def create_log(
    blobs: Blobs, schema: deltalake.Schema, configuration: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Writes version 0 unless it is there."""
    uri = _uri(blobs)
    if DeltaTable.is_deltatable(uri):
        return
    try:
        DeltaTable.create(
            uri,
            schema=schema,
            name="foldfeed-index",
            configuration=dict(configuration),
            commit_properties=_properties(metadata, ""),
        )
    except DeltaError:
        # Of two creators one writes version 0; the other finds it there.
        if not DeltaTable.is_deltatable(uri):
            raise
    blobs.make_durable(index_log.log_path(0))


def _properties(metadata: Mapping[str, str], job_id: str) -> CommitProperties:
    return CommitProperties(
        custom_metadata=dict(metadata),
        max_commit_retries=0,
        app_transactions=[Transaction(job_id, 1)] if job_id else None,
    )


def _uri(blobs: Blobs) -> str:
    _refuse_after_fork(blobs.url)
    return os.path.join(blobs.url, INDEX_FOLDER)


def _refuse_after_fork(url: str) -> None:
    """Raises in a child of a process that has used delta-rs, whose threads a fork leaves behind.

    Used there it panics, with an error that is no `Exception` and a trace on the screen.
    """
    global _used_by
    if _used_by is not None and _used_by != os.getpid():
        raise ForkedProcessError(url, os.getpid(), _used_by)
    _used_by = os.getpid()


@contextlib.contextmanager
def _damage_is_typed(store_url: str) -> Iterator[None]:
    """Turns what delta-rs says about an absent or unreadable log into our errors."""
    try:
        yield
    except TableNotFoundError as error:
        raise NotAStoreError(store_url, index_log.NO_INDEX) from error
    except (DeltaError, ValueError) as error:
        raise CorruptDataError(index_log.LOG_FOLDER, f"delta-rs cannot read it: {error}") from error
