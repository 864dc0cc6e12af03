"""The index: a Delta table with one row per record; its log is the commit log of the store.

Owns transactions: which records are visible in which version, and that a job's records become visible
together or not at all. Does not own parts. Invariants: a job id commits once (it travels in the commit as a
Delta application transaction, so a retry finds it); an id has one meaning per version; old versions stay
readable.

The table lies apart from ``parts/`` so that a VACUUM of the table can never touch an array.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from foldfeed.feature_store.errors import CommitConflictError, NotAStoreError
from foldfeed.feature_store.schema import INDEX_SCHEMA

INDEX_FOLDER = "index"
ON_EXISTING = ("error", "replace", "skip")
# Delta keeps minimum and maximum of these per file; statistics of whole sequences would only bloat the log.
STATISTICS_COLUMNS = "record_id,length,depth"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommitResult:
    """What a commit did.

    Attributes:
      version: version of the store after it.
      num_added: records new in this version, replaced ones included.
      num_unchanged: records that were there already with equal content, or that ``skip`` left alone.
      already_done: this job id had committed before; nothing was added.
    """

    version: int
    num_added: int
    num_unchanged: int
    already_done: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogEntry:
    """One version of a store.

    Attributes:
      version: 0 is the empty store.
      time: when it was committed, UTC.
      operation: Delta's name for what happened, e.g. ``WRITE``.
      job_id: of the job that committed it, or "".
      message: of the committer.
      num_added: records added or replaced.
    """

    version: int
    time: datetime.datetime
    operation: str
    job_id: str
    message: str
    num_added: int


class Index:
    """The Delta table of one store, at one version."""

    def __init__(self, table: DeltaTable) -> None:
        self._table = table

    @classmethod
    def create(cls, store_url: str) -> Index:
        """Returns the index of a new store; one that exists already is opened."""
        uri = _uri(store_url)
        if not DeltaTable.is_deltatable(uri):
            DeltaTable.create(
                uri,
                schema=INDEX_SCHEMA,
                # Of two creators one writes version 0; the other finds it there.
                mode="ignore",
                name="foldfeed-index",
                configuration={"delta.dataSkippingStatsColumns": STATISTICS_COLUMNS},
            )
        return cls(DeltaTable(uri))

    @classmethod
    def open(cls, store_url: str, version: int | None) -> Index:
        """Returns the index at a version, the newest by default.

        Raises:
          NotAStoreError: there is no index.
          ValueError: there is no such version.
        """
        try:
            table = DeltaTable(_uri(store_url))
        except TableNotFoundError as error:
            raise NotAStoreError(
                store_url, "it has no index/ (its creation was interrupted; build again)"
            ) from error
        newest = table.version()
        if version is not None:
            if not 0 <= version <= newest:
                raise ValueError(
                    f"version {version} does not exist; {store_url!r} has versions 0 to {newest}"
                )
            table.load_as_version(version)
        return cls(table)

    @property
    def version(self) -> int:
        """The version that is open."""
        return self._table.version()

    def rows(self) -> pa.Table:
        """Returns every row of this version, sorted by record id."""
        return self._table.to_pyarrow_table().select(INDEX_SCHEMA.names).sort_by("record_id").combine_chunks()

    def log(self) -> list[LogEntry]:
        """Returns the commits up to this version, newest first."""
        return [_log_entry(entry) for entry in self._table.history() if entry["version"] <= self.version]

    def commit(self, rows: pa.Table, *, job_id: str, message: str, on_existing: str) -> CommitResult:
        """Makes rows visible in one transaction, on top of the newest version.

        Args:
          rows: of `INDEX_SCHEMA`, each record id once.
          job_id: a second commit with it adds nothing.
          message: for the log.
          on_existing: what to do with an id that is there with other content: ``error``, ``replace``,
            ``skip``.
        Raises:
          CommitConflictError: an id occurs twice, or is there with other content and ``on_existing`` is
            error.
        """
        if on_existing not in ON_EXISTING:
            raise ValueError(f"on_existing {on_existing!r} is not one of {', '.join(ON_EXISTING)}")
        self._table.update_incremental()
        if self._table.transaction_version(job_id) is not None:
            return CommitResult(version=self.version, num_added=0, num_unchanged=len(rows), already_done=True)
        _refuse_duplicates(rows)
        fresh, changed = self._compare(rows)
        if len(changed) and on_existing == "error":
            names = changed["record_id"].to_pylist()
            raise CommitConflictError(
                f"{len(names)} record id(s) are in the store with other content, e.g. {names[0]!r}; "
                "commit with on_existing='replace' to replace them or 'skip' to keep the old ones"
            )
        added = pa.concat_tables([fresh, changed]) if on_existing == "replace" else fresh
        if len(added):
            self._write(added, changed if on_existing == "replace" else changed[:0], job_id, message)
        return CommitResult(
            version=self.version,
            num_added=len(added),
            num_unchanged=len(rows) - len(added),
            already_done=False,
        )

    def _compare(self, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Returns the rows whose id is not in the store, and those whose content differs there."""
        known = self._table.to_pyarrow_table(columns=["record_id", "fingerprint"])
        position = pc.index_in(rows["record_id"], value_set=known["record_id"])
        there = known["fingerprint"].take(position)
        changed = pc.fill_null(pc.not_equal(there, rows["fingerprint"]), False)
        return rows.filter(pc.is_null(position)), rows.filter(changed)

    def _write(self, added: pa.Table, replaced: pa.Table, job_id: str, message: str) -> None:
        properties = CommitProperties(
            app_transactions=[Transaction(job_id, 1)],
            custom_metadata={
                "foldfeed.job_id": job_id,
                "foldfeed.message": message,
                "foldfeed.num_added": str(len(added)),
            },
        )
        if len(replaced):
            # One transaction removes the old rows and adds the new ones. Record ids hold no quote
            # (RECORD_ID).
            ids = ", ".join(f"'{name}'" for name in added["record_id"].to_pylist())
            predicate = f"record_id IN ({ids})"
            write_deltalake(
                self._table, added, mode="overwrite", predicate=predicate, commit_properties=properties
            )
        else:
            write_deltalake(self._table, added, mode="append", commit_properties=properties)
        self._table.update_incremental()


def index_uri_exists(store_url: str) -> bool:
    """Returns whether a store has an index."""
    try:
        return DeltaTable.is_deltatable(_uri(store_url))
    except DeltaError:
        return False


def _uri(store_url: str) -> str:
    return os.path.join(store_url, INDEX_FOLDER)


def _refuse_duplicates(rows: pa.Table) -> None:
    counts = pc.value_counts(rows["record_id"])
    twice = [entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1]
    if twice:
        raise CommitConflictError(
            f"record id {twice[0]!r} occurs more than once in this commit ({len(twice)} such ids); "
            "an id names one record"
        )


def _log_entry(entry: dict[str, Any]) -> LogEntry:
    return LogEntry(
        version=entry["version"],
        time=datetime.datetime.fromtimestamp(entry["timestamp"] / 1000, tz=datetime.UTC),
        operation=entry["operation"],
        job_id=entry.get("foldfeed.job_id", ""),
        message=entry.get("foldfeed.message", ""),
        num_added=int(entry.get("foldfeed.num_added", 0)),
    )
