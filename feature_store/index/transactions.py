"""The index: one row per record in a Delta table whose log is the commit log of the store.

Owns transactions: which records are visible in which version, and that a job's records become visible
together or not at all. Does not own parts, nor how Delta is spoken (`index.table`). Invariants: a job id
commits once; an id has one row per version, however many processes commit at once; old versions stay
readable; rows that it returns are those that were committed.

How a race is decided: a commit compares its rows with version N and may only become version N + 1. Who finds
that taken compares again with what the winner left.

The table lies apart from ``parts/`` so that a VACUUM of the table can never touch an array.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import (
    CommitConflictError,
    CommitContentionError,
    CorruptDataError,
    RecordNotFoundError,
)
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index.files import (
    INDEX_FOLDER,
    MAX_FILE_ROWS,
    FileCache,
    conform,
    encode,
    read_files,
)
from foldfeed.feature_store.index.log import Commit, CommitNote
from foldfeed.feature_store.index.table import IndexTable

ON_EXISTING = ("error", "replace", "skip")
# A commit that keeps losing against others gives up after this long.
COMMIT_PATIENCE_S = 120.0
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 1.0
# A reader opens all files of a version; a commit that finds this many small ones writes them into its own.
MERGED_AT = 64
SMALL_FILE_ROWS = MAX_FILE_ROWS // 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommitResult:
    """What a commit did.

    Attributes:
      version: version of the store after it.
      num_added: records new in this version, replaced ones included.
      num_unchanged: records that were there already with equal content, or that ``skip`` left alone.
      already_done: this job id had committed before; nothing was added.
      num_removed: records that are gone; replaced ones are not.
    """

    version: int
    num_added: int
    num_unchanged: int
    already_done: bool
    num_removed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """What one transaction does: rows of ``drop`` go, ``rows`` come, ``files`` are written anew."""

    operation: str
    rows: pa.Table | None = None
    drop: Sequence[str] = ()
    files: Sequence[str] = ()
    num_added: int = 0
    num_removed: int = 0


class Index:
    """The rows of one store at one version. Reading is thread safe; committing is for one thread."""

    def __init__(self, table: IndexTable) -> None:
        """Use `open` or `create`."""
        self._table = table
        self._cache = FileCache(table.blobs, INDEX_SCHEMA)

    @classmethod
    def create(cls, store_url: str, settings_sha256: str) -> Index:
        """Returns the index of a new store; one that exists already is opened.

        Args:
          store_url: the store.
          settings_sha256: of its ``foldfeed.json``; every commit repeats it.
        """
        return cls(IndexTable.create(store_url, settings_sha256))

    @classmethod
    def open(cls, store_url: str, version: int | None) -> Index:
        """Returns the index at a version, the newest by default.

        Raises:
          NotAStoreError: there is no index.
          CorruptDataError: its log is damaged.
          ValueError: there is no such version.
        """
        return cls(IndexTable.open(store_url, version))

    @property
    def version(self) -> int:
        """The version that is open."""
        return self._table.version

    @property
    def head(self) -> Commit:
        """The commit that made this version."""
        return self._table.head

    @property
    def files(self) -> list[str]:
        """Names of the files under ``index/`` that hold the rows of this version."""
        return self._table.files

    @property
    def schema(self) -> pa.Schema:
        """Columns of `rows`: those of `INDEX_SCHEMA`, then those that were added to this store."""
        return self._table.schema

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns every row of this version, sorted by record id; some columns or all.

        Raises:
          CorruptDataError: a file is damaged, or an id has two rows.
        """
        names = self.schema.names if columns is None else list(columns)
        # The ids come along, so that files are read and checked once however little is asked for.
        schema = pa.schema([self.schema.field(name) for name in dict.fromkeys(["record_id", *names])])
        rows = read_files(self._table.blobs, self.files, schema)
        order = self._order_of(rows["record_id"])
        rows = rows.select(names)
        joined = []
        for name in names:
            column = rows.select([name])
            # A table's joining copies, and leaves apart what is too large for one array of text.
            joined.append((column if order is None else column.take(order)).combine_chunks()[name])
            # All columns twice would be the most memory that opening a store needs.
            rows, column = rows.drop_columns([name]), None
        return pa.Table.from_arrays(joined, schema=pa.schema([schema.field(name) for name in names]))

    def knows_job(self, job_id: str) -> bool:
        """Returns whether a job has committed up to this version; a commit of it would add nothing.

        Raises:
          CorruptDataError: Delta lists it, and no commit is by that job.
        """
        return self._table.knows_job(job_id)

    def log(self) -> list[Commit]:
        """Returns the commits up to this version, oldest first.

        Raises:
          CorruptDataError: one of them is damaged.
        """
        return index_log.read_log(self._table.blobs, self.version)

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._table.refresh()

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
          CommitContentionError: others kept committing for two minutes.
        """
        if on_existing not in ON_EXISTING:
            raise ValueError(f"on_existing {on_existing!r} is not one of {', '.join(ON_EXISTING)}")
        _refuse_duplicates(rows)
        if self._table.lacking:
            self.add_columns(self._table.lacking)

        def plan() -> _Change | None:
            fresh, changed = self._compare(rows)
            names = changed["record_id"].to_pylist()
            if names and on_existing == "error":
                raise CommitConflictError(
                    f"{len(names)} record id(s) are in the store with other content, e.g. {names[0]!r}; "
                    "commit with on_existing='replace' (--on-existing replace) to replace them, or "
                    "'skip' to keep the old ones"
                )
            drop = names if on_existing == "replace" else []
            added = pa.concat_tables([fresh, changed]) if drop else fresh
            if not len(added):
                return None
            return _Change(
                operation="replace" if drop else "commit", rows=added, drop=drop, num_added=len(added)
            )

        return self._transact(plan, job_id, message, len(rows))

    def delete(
        self,
        record_ids: Sequence[str],
        *,
        job_id: str = "",
        message: str = "",
        operation: str = "delete",
        missing_ok: bool = False,
    ) -> CommitResult:
        """Removes records from the newest version in one transaction; older versions keep them.

        Raises:
          RecordNotFoundError: an id is not there and ``missing_ok`` is false; nothing is removed.
        """
        wanted = sorted(set(record_ids))

        def plan() -> _Change | None:
            there = set(self._keys()["record_id"].to_pylist())
            absent = [name for name in wanted if name not in there]
            if absent and not missing_ok:
                raise RecordNotFoundError(absent[0])
            drop = [name for name in wanted if name in there]
            return _Change(operation=operation, drop=drop, num_removed=len(drop)) if drop else None

        return self._transact(plan, job_id, message, len(wanted))

    def update(
        self,
        record_ids: Sequence[str],
        change: Callable[[pa.Table], pa.Table],
        *,
        operation: str,
        job_id: str = "",
        message: str = "",
    ) -> CommitResult:
        """Changes rows of records in one transaction.

        Args:
          record_ids: those that are gone meanwhile are left out.
          change: from the rows as they are (all columns, sorted by id) to as they shall be; may leave some
            out, which then stay. Called again after a lost race.
          operation: for the log; ``replace`` says that the records say something else now.
          job_id: see `commit`.
          message: for the log.
        """
        wanted = pa.array(sorted(set(record_ids)), pa.string())

        def plan() -> _Change | None:
            rows = read_files(self._table.blobs, self._holders(wanted), self.schema)
            now = rows.filter(pc.is_in(rows["record_id"], value_set=wanted)).sort_by("record_id")
            then = change(now)
            drop = then["record_id"].to_pylist()
            if then.equals(now) or not drop:
                return None
            num_added = len(drop) if operation == "replace" else 0
            return _Change(operation=operation, rows=then, drop=drop, num_added=num_added)

        return self._transact(plan, job_id, message, len(wanted))

    def merge_files(self, *, message: str = "") -> CommitResult:
        """Writes small files into few; a reader opens all files of a version. Full ones stay as they are."""

        def plan() -> _Change | None:
            small = self._small_files()
            return _Change(operation="compact", files=small) if len(small) > 1 else None

        return self._transact(plan, "", message, 0)

    def add_columns(self, fields: Sequence[pa.Field]) -> None:
        """Adds columns to the table, null in the rows that are there; those it has already are left alone.

        Raises:
          CommitConflictError: a column of that name exists with another type.
        """

        def attempt() -> bool:
            new = [field.with_nullable(True) for field in fields if self._is_new(field)]
            note = self._note("add_columns", "", ", ".join(field.name for field in new))
            return not new or self._table.try_columns(note, new)

        self._until_won(attempt)

    def _is_new(self, field: pa.Field) -> bool:
        if field.name in {lacking.name for lacking in self._table.lacking}:
            return True
        if field.name not in self.schema.names:
            return True
        there = self.schema.field(field.name).type
        if there != field.type:
            raise CommitConflictError(
                f"column {field.name!r} exists as {there}, not {field.type}; give it another name"
            )
        return False

    def _order_of(self, ids: pa.ChunkedArray) -> pa.Array | None:
        """Returns positions that sort the rows of all files by id; None when they are sorted already."""
        if len(ids) != self.head.note.num_records:
            raise CorruptDataError(INDEX_FOLDER, f"it has {len(ids)} rows, not {self.head.note.num_records}")
        order = None if _is_increasing(ids) else pc.sort_indices(ids)
        if order is not None and not _is_increasing(ids.take(order)):
            raise CorruptDataError(INDEX_FOLDER, "a record id has more than one row")
        return order

    def _keys(self) -> pa.Table:
        return self._cache.keys(self.files)

    def _holders(self, record_ids: pa.Array) -> list[str]:
        """Returns the files that hold rows of those ids."""
        keys = self._keys()
        return pc.unique(keys["file"].filter(pc.is_in(keys["record_id"], value_set=record_ids))).to_pylist()

    def _small_files(self) -> list[str]:
        """Returns the files that are worth merging."""
        counts = pc.value_counts(self._keys()["file"]).to_pylist()
        return [entry["values"] for entry in counts if entry["counts"] < SMALL_FILE_ROWS]

    def _compare(self, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Returns the rows whose id is not in the store, and those whose content differs there."""
        keys = self._keys()
        position = pc.index_in(rows["record_id"], value_set=keys["record_id"])
        there = keys["fingerprint"].take(position)
        changed = pc.fill_null(pc.not_equal(there, rows["fingerprint"]), False)
        return rows.filter(pc.is_null(position)), rows.filter(changed)

    def _transact(
        self, plan: Callable[[], _Change | None], job_id: str, message: str, num_asked: int
    ) -> CommitResult:
        """Plans a change against the newest version and commits it, until nobody was faster."""
        done: _Change | None = None
        already = False

        def attempt() -> bool:
            nonlocal done, already
            already = self._table.knows_job(job_id)
            done = None if already else plan()
            return done is None or self._try(done, job_id, message)

        self._until_won(attempt)
        num_added = done.num_added if done else 0
        num_removed = done.num_removed if done else 0
        return CommitResult(
            version=self.version,
            num_added=num_added,
            num_unchanged=num_asked - num_added - num_removed,
            already_done=already,
            num_removed=num_removed,
        )

    def _until_won(self, attempt: Callable[[], bool]) -> None:
        started = time.monotonic()
        for number in itertools.count(1):
            self.refresh()
            if attempt():
                return
            waited = time.monotonic() - started
            if waited > COMMIT_PATIENCE_S:
                raise CommitContentionError(self._table.blobs.url, number, waited)
            # The random part lets two that collided once not collide for ever.
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(number, 20))))

    def _try(self, change: _Change, job_id: str, message: str) -> bool:
        """Writes the files of a change and tries to make them the next version."""
        drop = pa.array(change.drop, pa.string())
        small = self._small_files()
        merged = small if len(small) >= MERGED_AT else []
        old = sorted({*change.files, *self._holders(drop), *merged})
        before = read_files(self._table.blobs, old, self.schema)
        rows = before.filter(pc.invert(pc.is_in(before["record_id"], value_set=drop)))
        if change.rows is not None:
            rows = pa.concat_tables([rows, conform(change.rows, self.schema)])
        files = {file.name: file for file in encode(rows)}
        note = self._note(change.operation, job_id, message)
        note = dataclasses.replace(
            note,
            num_added=change.num_added,
            num_removed=change.num_removed,
            num_records=note.num_records - len(before) + len(rows),
        )
        added = {name: file for name, file in files.items() if name not in old}
        return self._table.try_commit(note, added, [name for name in old if name not in files])

    def _note(self, operation: str, job_id: str, message: str) -> CommitNote:
        num_records = self.head.note.num_records
        return CommitNote(operation=operation, job_id=job_id, message=message, num_records=num_records)


def _is_increasing(ids: pa.ChunkedArray) -> bool:
    joined = ids.combine_chunks()
    return len(joined) < 2 or bool(pc.all(pc.less(joined.slice(0, len(joined) - 1), joined.slice(1))).as_py())


def _refuse_duplicates(rows: pa.Table) -> None:
    counts = pc.value_counts(rows["record_id"])
    twice = [entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1]
    if twice:
        raise CommitConflictError(
            f"record id {twice[0]!r} occurs more than once in this commit ({len(twice)} such ids); "
            "an id names one record"
        )
