"""One version of the index's Delta table, held against what its committer wrote, and one try to follow it.

Owns what goes into a commit and the decision whose commit made a version. Does not own what the rows mean
(`index`) nor how the log is read and written: `index.delta_rs` on a disk, `index.object_log` elsewhere.
Invariants: files and columns of a `IndexTable` are those its committer named; `try_commit` makes version N +
1 of exactly the version N that is shown, or nothing. A version N that a repair has taken back since it was
opened is not followed: just before it writes, a committer looks whether N is still what it was. Between that
look and the write a repair may still slip in, so do not repair a store while others commit to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import deltalake
import pyarrow as pa

from foldfeed.feature_store.errors import (
    CorruptDataError,
    HistoryChangedError,
    StorageError,
    StorageFullError,
    StoreGoneError,
)
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import SETTINGS_FILE
from foldfeed.feature_store.index import delta_rs as index_delta
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index import object_log as index_objects
from foldfeed.feature_store.index.files import INDEX_FOLDER, STATISTICS_COLUMNS, IndexFile
from foldfeed.feature_store.index.log import AddedFile, Commit, CommitNote, files_digest, schema_digest
from foldfeed.feature_store.storage import Blobs, LocalBlobs, disk_full_is_typed, open_blobs

CONFIGURATION = {
    "delta.dataSkippingStatsColumns": ",".join(STATISTICS_COLUMNS),
    # Delta would delete log files after 30 days, and old versions with them; here `gc` decides that.
    "delta.enableExpiredLogCleanup": "false",
}


class TableLog(Protocol):
    """One version of a Delta log, and the way to the next."""

    @property
    def version(self) -> int:
        """The version that is shown."""
        ...

    @property
    def head(self) -> Commit:
        """The commit that made it."""
        ...

    @property
    def files(self) -> list[str]:
        """Names of the live files, sorted."""
        ...

    @property
    def schema(self) -> deltalake.Schema:
        """The table's schema."""
        ...

    def has_job(self, job_id: str) -> bool:
        """Returns whether a job has committed."""
        ...

    def refresh(self) -> None:
        """Moves to the newest version."""
        ...

    def show(self, version: int) -> None:
        """Moves to an older version."""
        ...

    def append(
        self,
        metadata: Mapping[str, str],
        job_id: str,
        added: Mapping[str, AddedFile],
        removed: Sequence[str],
    ) -> None:
        """Tries to write the next version; whether it became ours, `refresh` and the log tell."""
        ...

    def add_columns(self, metadata: Mapping[str, str], fields: Sequence[deltalake.Field]) -> None:
        """Tries to write a next version with more columns; see `append`."""
        ...


class IndexTable:
    """One version of the Delta table of a store.

    Attributes:
      blobs: the store's files.
    """

    def __init__(self, blobs: Blobs, log: TableLog) -> None:
        """Use `open` or `create`."""
        self.blobs = blobs
        self._log = log
        self._load()

    @classmethod
    def create(cls, store_url: str, settings_sha256: str) -> IndexTable:
        """Returns the table of a new store; one that exists already is opened at its newest version.

        Raises:
          StorageRefusedError: this storage cannot be written to safely.
        """
        blobs = open_blobs(store_url)
        schema = deltalake.Schema.from_arrow(INDEX_SCHEMA)
        note = CommitNote(
            operation="create",
            time=index_log.now(),
            settings_sha256=settings_sha256,
            schema_sha256=schema_digest(schema.to_json()),
            files_sha256=files_digest([]),
        )
        create_log = index_delta.create_log if isinstance(blobs, LocalBlobs) else index_objects.create_log
        with disk_full_is_typed(blobs.url):
            create_log(blobs, schema, CONFIGURATION, index_log.metadata_of(0, note, {}, []))
        return cls.open(store_url, None)

    @classmethod
    def open(cls, store_url: str, version: int | None) -> IndexTable:
        """Returns the table at a version, the newest by default; see `Index.open` for errors."""
        blobs = open_blobs(store_url)
        kind = index_delta.DeltaLog if isinstance(blobs, LocalBlobs) else index_objects.ObjectLog
        return cls(blobs, kind(blobs, version))

    @property
    def head(self) -> Commit:
        """The commit that made this version."""
        return self._head

    @property
    def version(self) -> int:
        """This version."""
        return self._head.version

    @property
    def files(self) -> list[str]:
        """Names of the files that hold its rows, sorted."""
        return list(self._files)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the rows: those of `INDEX_SCHEMA`, then those that were added to this table alone."""
        return self._schema

    @property
    def lacking(self) -> list[pa.Field]:
        """Fields of `INDEX_SCHEMA` that came after this table was made and are not in it yet."""
        there = {field.name for field in self._log.schema.fields}
        return [field for field in INDEX_SCHEMA if field.name not in there]

    def refresh(self) -> None:
        """Moves to the newest version.

        Raises:
          HistoryChangedError: the version that was shown is no longer part of the history.
        """
        self._check_history()
        self._move()

    def knows_job(self, job_id: str) -> bool:
        """Returns whether a job has committed.

        Raises:
          CorruptDataError: Delta lists it, and no commit is by that job.
        """
        return bool(job_id) and self._log.has_job(job_id)

    def try_commit(self, note: CommitNote, added: Mapping[str, IndexFile], removed: Sequence[str]) -> bool:
        """Makes the next version and shows it, unless somebody else made it; then shows the newest one.

        Args:
          note: for the log; what depends on this table is filled in here.
          added: new files by name; they are written first.
          removed: names of files whose rows are no longer visible.
        """
        for name, file in added.items():
            self.blobs.write_atomic(f"{INDEX_FOLDER}/{name}", file.data)
        live = (set(self._files) - set(removed)) | set(added)
        note = self._complete(note, files_sha256=files_digest(live))
        files = {
            name: AddedFile(num_bytes=len(file.data), statistics=file.statistics)
            for name, file in added.items()
        }
        metadata = index_log.metadata_of(self.version + 1, note, files, removed)
        with self._at_most_once(metadata) as won:
            self._log.append(metadata, note.job_id, files, removed)
        return won[0]

    def try_columns(self, note: CommitNote, fields: Sequence[pa.Field]) -> bool:
        """Makes the next version with more columns, unless somebody else has made it; see `try_commit`."""
        new = deltalake.Schema.from_arrow(pa.schema(fields)).fields
        schema = deltalake.Schema([*self._log.schema.fields, *new])
        note = self._complete(note, schema_sha256=schema_digest(schema.to_json()))
        metadata = index_log.metadata_of(self.version + 1, note, {}, [])
        with self._at_most_once(metadata) as won:
            self._log.add_columns(metadata, new)
        return won[0]

    def _move(self) -> None:
        self._log.refresh()
        self._load()

    def _check_history(self) -> None:
        """Raises HistoryChangedError unless the shown version's log file is the one that was read.

        StoreGoneError when it is missing together with the store.
        """
        try:
            data = self.blobs.read(index_log.log_path(self.version))
        except FileNotFoundError as error:
            # Without its settings nobody can open it, whatever a writer has put in its place meanwhile.
            if not self.blobs.exists(SETTINGS_FILE):
                raise StoreGoneError(self.blobs.url, index_log.log_path(self.version)) from error
            raise HistoryChangedError(self.blobs.url, self.version) from error
        if hashlib.sha256(data).hexdigest() != self._head.sha256:
            raise HistoryChangedError(self.blobs.url, self.version)

    def _complete(self, note: CommitNote, files_sha256: str = "", schema_sha256: str = "") -> CommitNote:
        before = self._head.note
        return dataclasses.replace(
            note,
            settings_sha256=before.settings_sha256,
            schema_sha256=schema_sha256 or before.schema_sha256,
            files_sha256=files_sha256 or before.files_sha256,
            time=index_log.now(),
            parent=self._head.sha256,
            attempt=uuid.uuid4().hex,
        )

    @contextlib.contextmanager
    def _at_most_once(self, metadata: Mapping[str, str]) -> Iterator[list[bool]]:
        """Runs one attempt and finds out, whatever delta-rs said, whether the next version is ours."""
        self._check_history()
        next_version = self.version + 1
        won: list[bool] = []
        failure: Exception | None = None
        try:
            with disk_full_is_typed(self.blobs.url):
                yield won
        except (*index_delta.COMMIT_FAILURES, StorageError) as error:
            # Lost the race; or the answer got lost on its way after the commit had landed.
            failure = error
        self._move()
        if self.version < next_version:
            if failure is None:
                raise CorruptDataError(
                    index_log.LOG_FOLDER, f"version {next_version} vanished after its commit"
                )
            if "os error 28" in str(failure):
                # delta-rs tells ENOSPC in words only.
                raise StorageFullError(index_log.log_path(next_version)) from failure
            raise failure
        landed = index_log.read_commit(self.blobs, next_version)
        won.append(landed.checksum == metadata[index_log.CHECKSUM])
        if not won[0]:
            return
        self.blobs.make_durable(index_log.log_path(next_version))
        for path in (index_log.checkpoint_path(next_version), index_log.LAST_CHECKPOINT):
            # Every hundredth commit has one. A torn one would stop readers until `repair` removes it.
            with contextlib.suppress(FileNotFoundError):
                self.blobs.make_durable(path)
        if self.version > next_version:
            # Others went on meanwhile; a committer is shown what its own commit made.
            self._log.show(next_version)
            self._load()

    def _load(self) -> None:
        """Reads what the version's commit says and holds the log's view of the table against it."""
        files, schema, head = self._log.files, self._log.schema, self._log.head
        where = f"{INDEX_FOLDER}, version {head.version}"
        if files_digest(files) != head.note.files_sha256:
            raise CorruptDataError(where, "the log names other files than the commit did")
        if schema_digest(schema.to_json()) != head.note.schema_sha256:
            raise CorruptDataError(where, "the log names other columns than the commit did")
        self._head, self._files, self._schema = head, files, _rows_schema(schema)


def _rows_schema(table_schema: deltalake.Schema) -> pa.Schema:
    """Returns the columns that rows are read with.

    A column that the table got later is null in older rows, whatever this release thinks of it.
    """
    nullable = {field.name: field.nullable for field in table_schema.fields}
    own = [field.with_nullable(nullable.get(field.name, True)) for field in INDEX_SCHEMA]
    names = set(INDEX_SCHEMA.names)
    return pa.schema([*own, *(field for field in plain_schema(table_schema) if field.name not in names)])


def plain_schema(table_schema: deltalake.Schema) -> pa.Schema:
    """Returns a Delta schema in the Arrow types that Parquet files are read with."""
    return pa.schema(
        [pa.field(f.name, _plain(f.type), f.nullable) for f in pa.schema(table_schema.to_arrow())]
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    # delta-rs hands out Arrow's newer string layouts, which differ by release.
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(_plain(kind.value_type))
    return kind
