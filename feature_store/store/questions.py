"""What a store and a selection of its records have in common: questions, names, and views.

`RecordSource` is what a loader, a plot or a report takes; `FeatureStore` is one and `StoreView` is another.
Owns the questions that can be asked and the making of views. Does not own the tables of SQL (`query_tables`),
the index or the reading of arrays. Invariant: a view shows the records it was made with for as long as it
lives, whatever happens to the store it came from.
"""

from __future__ import annotations

import abc
import bisect
import datetime
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import pyarrow as pa

from foldfeed.feature_store.errors import QueryError, RecordNotFoundError
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.lazy_names import LateModule
from foldfeed.feature_store.parts.many_crops import BatchArrays, CropRequest, read_crops
from foldfeed.feature_store.parts.reader import RecordLocation
from foldfeed.feature_store.parts.record import Record
from foldfeed.feature_store.parts.row_scan import ROWS_SCHEMA
from foldfeed.feature_store.parts.tiles import Crop, CropPlan
from foldfeed.feature_store.storage import Blobs, open_blobs
from foldfeed.feature_store.store import named_tables, point_in_time, record_sets, splits
from foldfeed.feature_store.store.record_sets import RecordSet, Within
from foldfeed.feature_store.store.splits import Split
from foldfeed.feature_store.store.time_limit import TimeLimit

if TYPE_CHECKING:
    from foldfeed.feature_store.store import query_tables
    from foldfeed.feature_store.store import sql as query
else:
    # They bring DuckDB and pandas: 0.4 s of CPU, and who only reads needs neither.
    query = LateModule("foldfeed.feature_store.store.sql")
    query_tables = LateModule("foldfeed.feature_store.store.query_tables")

PLACE_COLUMNS = ("part_id", *RecordLocation.__slots__)


class _HasRows(Protocol):
    def rows(self) -> pa.Table: ...


RecordT = TypeVar("RecordT", bound=_HasRows)


class RecordSource(abc.ABC, Generic[RecordT]):
    """Records in the order of their ids, and questions about them.

    Attributes:
      url: of the store.
      settings: of the store.
    """

    url: str
    settings: StoreSettings

    @property
    @abc.abstractmethod
    def version(self) -> int:
        """The version of the store whose records these are."""

    @property
    @abc.abstractmethod
    def ids(self) -> list[str]:
        """All record ids, sorted."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of the settings and of what every record says."""

    @abc.abstractmethod
    def at(self, position: int) -> RecordT:
        """Returns the record at a position of the sorted ids; IndexError outside 0..len-1."""

    @abc.abstractmethod
    def index_rows(self) -> pa.Table:
        """Returns the index row of every record, sorted by record id."""

    @abc.abstractmethod
    def record_of(self, row: Mapping[str, Any]) -> RecordT:
        """Returns the record that an index row of this store describes."""

    @abc.abstractmethod
    def reading_through(self, wrap: Callable[[Blobs], Blobs]) -> RecordSource[RecordT]:
        """Returns the same records, whose parts are read through other access to the store's files.

        Example:
          >>> records = store.reading_through(lambda files: CachedFiles(files, cache))

        Args:
          wrap: takes the store's own access. What it returns may say ``answers_at_once = True``: then reads
            of one crop are done one after the other, without threads.
        Returns: it reads; changing the store, and pickling, are as without.
        """

    @abc.abstractmethod
    def size_at(self, position: int) -> tuple[int, int]:
        """Returns length and depth of the record at a position, without looking for its part."""

    @abc.abstractmethod
    def places(self) -> pa.Table:
        """Returns where each record lies, sorted by record id: `PLACE_COLUMNS` of the index."""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """Yields the record ids, sorted, as iterating over a mapping yields its keys."""
        return iter(self.ids)

    def __contains__(self, record_id: object) -> bool:
        return isinstance(record_id, str) and self.find(record_id) is not None

    def __getitem__(self, record_id: str) -> RecordT:
        """Returns a record.

        Raises:
          RecordNotFoundError: no such id here.
        """
        position = self.find(record_id)
        if position is None:
            raise self.not_found(record_id)
        return self.at(position)

    def not_found(self, record_id: str) -> RecordNotFoundError:
        """Returns the error for an id that is not here; it names similar ones."""
        return RecordNotFoundError(record_id, tuple(difflib.get_close_matches(record_id, self.ids, n=3)))

    def crops(
        self: RecordSource[Record],
        requests: Sequence[CropRequest],
        *,
        out: BatchArrays | None = None,
        in_flight: int | None = None,
    ) -> list[Crop]:
        """Returns crops of many records, in the order asked for; equal to reading them one by one.

        Tiles that lie side by side in a part share one read, whosever they are, and behind a network many
        reads are in flight.

        Args:
          requests: what to read; a record may come several times.
          out: uint8 (batch, rows, residues) and int32 of that shape, of any strides, one slot per request.
            A crop fills the first rows and residues of its slot and leaves the rest of it alone. What the
            arrays hold after an error is undefined.
          in_flight: reads at a time; they share a process-wide pool of so many threads. By default 1 for a
            local store, whose reads are then done right here, and 32 for others.
        Returns: crops, `Slab` where the rows asked for are a `StoredRun`; views of ``out`` when it is given.
        Raises:
          RecordNotFoundError: no such record.
          IndexError: a request is outside its record.
          ValueError: ``out`` does not fit.
          CorruptDataError: a tile does not match its checksum; the message names the record.
          StoreGoneError: the store is no longer where it was opened. So says every read.
        """
        return read_crops(self._records_of(requests, in_flight), requests, out, in_flight)

    def plan(self: RecordSource[Record], requests: Sequence[CropRequest]) -> list[CropPlan]:
        """Returns what each request would read when it is read alone; see `Record.plan`."""
        records = self._records_of(requests, None)
        return [
            record.plan(request.residues, request.rows)
            for record, request in zip(records, requests, strict=True)
        ]

    def _records_of(
        self: RecordSource[Record], requests: Sequence[CropRequest], in_flight: int | None
    ) -> list[Record]:
        """Returns the record of each request."""
        return [self[request.record_id] for request in requests]

    def find(self, record_id: str) -> int | None:
        """Returns the position of a record id, or None."""
        position = bisect.bisect_left(self.ids, record_id)
        return position if position < len(self.ids) and self.ids[position] == record_id else None

    def table(self, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """Returns index rows, sorted by record id.

        Args:
          columns: names of the index; all when None.
          where: an SQL condition, e.g. ``"depth > 100 and length < 300"``.
        Raises:
          QueryError: an unknown column or bad SQL.
        """
        return query.table(self.index_rows(), columns, where)

    def to_pandas(self, columns: Sequence[str] | None = None, where: str | None = None) -> Any:
        """Returns `table` as a ``pandas.DataFrame``; MissingExtraError without pandas."""
        return query.to_pandas(self.table(columns, where))

    def to_polars(self, columns: Sequence[str] | None = None, where: str | None = None) -> Any:
        """Returns `table` as a ``polars.DataFrame``; MissingExtraError without Polars."""
        return query.to_polars(self.table(columns, where))

    def query(
        self,
        sql: str,
        rows_of: str | None = None,
        *,
        params: query.Params | None = None,
        timeout_s: float | None = None,
    ) -> pa.Table:
        """Returns the answer to a SQL query (DuckDB's dialect), read only.

        Tables: ``records`` (the index), ``rows`` (provenance of every alignment row: record_id, rank,
        database, e_value, bit_score, hit_id, species, pairing_key, taxonomy_id), ``residues`` (record_id,
        position from 0, letter, profile, entropy, gap_fraction, deletion_mean, neff, observed,
        residue_number, insertion_code; see `residue_scan`), ``structures`` (see `structure_table`),
        ``templates`` (hits of template searches, see `template_scan`), ``sets`` (name, record_id) and
        ``splits`` (name, record_id, cluster_id, part). ``profile`` is FLOAT[22] in the order
        ARNDCQEGHILKMFPSTWYVX-, so ``profile[instr('ARNDCQEGHILKMFPSTWYVX-', 'W')]`` is the share of W.

        A query that names ``rows`` or ``residues`` reads them of every record, but only the columns that it
        needs and one batch of rows in memory at a time. It reads fewer records when it says which: with a
        condition ``record_id = 'A'``, ``record_id in ('A', 'B')`` or ``record_id in $ids`` on that table, or
        with ``rows_of``. Without ``order by`` the rows come in no order that one may rely on.

        Example:
          >>> store.query("from residues where record_id = $id and entropy < 1", params={"id": "HBB_HUMAN"})

        Args:
          sql: one query.
          rows_of: a condition on ``records``; the tables of parts then hold what is of these records only.
          params: values for ``?`` (a list) or ``$name`` (a dict) in ``sql``. They are bound, never written
            into the text; a text is cast where it meets a number or a date.
          timeout_s: seconds after which the query is stopped, between two batches where it reads; no limit
            when None.
        Raises:
          QueryError: DuckDB does not accept it or its parameters, or ``rows_of`` is given and the query reads
            none of its tables.
          QueryTimeoutError: it took longer than ``timeout_s``.
          CorruptDataError: something that it reads is damaged.
        """
        limit = None if timeout_s is None else TimeLimit(timeout_s)
        index = self.index_rows()
        allowed = None
        if rows_of is not None:
            allowed = query.table(index, ["record_id"], rows_of, limit)["record_id"].to_pylist()
        lazy = query_tables.lazy_tables(self, self._files, allowed)
        answer = query.sql({query.RECORDS: index, **lazy}, sql, params, limit)
        if rows_of is not None and not any(lazy[name].was_read for name in query_tables.PER_RECORD):
            names = " or ".join(map(repr, query_tables.PER_RECORD))
            raise QueryError(f"rows_of {rows_of!r} has no effect: the query does not read the table {names}")
        return answer

    def row_table(self, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """Returns the provenance of alignment rows, sorted by record id and rank; the whole answer in memory.

        Only the arrays of the columns, and of those that the condition names, are read.

        Example:
          >>> store.row_table(["hit_id", "e_value"], "record_id = 'HBB_HUMAN' and e_value < 1e-30")

        Args:
          columns: of the table ``rows`` (see `query`); all when None.
          where: an SQL condition over that table; every row of every record when None.
        Raises:
          QueryError: an unknown column or bad SQL.
          CorruptDataError: provenance that it reads is damaged.
        """
        names = query.known_columns("the table rows", columns, ROWS_SCHEMA.names)
        condition = "true" if where is None else where
        text = f"select {', '.join(names)} from rows where ({condition}) order by record_id, rank"
        return self.query(text).cast(pa.schema([ROWS_SCHEMA.field(name) for name in names]))

    def view(self, where: str, label: str | None = None) -> StoreView[RecordT]:
        """Returns the records that an SQL condition over ``records`` keeps, as a source of their own.

        Raises:
          QueryError: bad SQL.
        """
        return StoreView(self, self.table(where=where), label or where)

    def as_of(
        self, date: datetime.date | str, *, column: str | None = None, undated: str = "error"
    ) -> StoreView[RecordT]:
        """Returns the records that were public on a date: those whose release date is not after it.

        The same in SQL, for records that all have a date: ``extra->>'release_date' <= '2021-09-30'``.

        Args:
          date: a date, or ISO text such as ``2021-09-30``.
          column: holds the dates, a column of the index or ``extra.KEY``. When None, ``release_date`` where
            somebody annotated such a column, ``extra.release_date`` otherwise.
          undated: what becomes of records without one: ``error``, ``keep`` or ``drop``. There is no silent
            choice, because either one can be the leak.
        Raises:
          QueryError: a date that is none, or undated records with ``undated="error"``.
        """
        rows = point_in_time.released_until(self.index_rows(), date, column, undated)
        return StoreView(self, rows, f"as of {date}")

    def searched_with(self, database: str, digest: str) -> StoreView[RecordT]:
        """Returns the records whose search used one release of a database.

        Args:
          database: its name, e.g. ``uniref90``.
          digest: the first hex digits (8 or more) of the digest of its manifest, as `databases` lists it.
        Raises:
          QueryError: the digest is too short to name one release.
        """
        rows = point_in_time.searched_with(self.index_rows(), database, digest)
        return StoreView(self, rows, f"searched with {database} {digest}")

    def save_split(
        self,
        name: str,
        clusters: str | Mapping[str, str],
        *,
        fractions: Mapping[str, float],
        seed: int,
        member: str = "record_id",
        source: str | None = None,
    ) -> Split:
        """Assigns every record's cluster to a part and stores that under a name.

        Args:
          name: of the split; never changes its meaning.
          clusters: a text column of the index, ``extra.KEY``, or a mapping member -> cluster.
          fractions: share of the clusters by part, e.g. ``{"train": 0.8, "validation": 0.1, "test": 0.1}``.
          seed: of the assignment.
          member: what the keys of a mapping are: ``record_id``, ``sequence`` or ``sequence_sha256``.
          source: words for where the clusters come from.
        Raises:
          SplitError: a record without a cluster, or bad fractions.
          LeakageError: equal sequences would be in two parts.
          NameTakenError: the name exists and means something else.
        """
        rows = self.index_rows()
        found, words = splits.clusters_of(rows, clusters, member)
        made = splits.make_split(name, rows, found, seed=seed, fractions=fractions, source=source or words)
        return splits.save(self._files(), made, self.version)

    def split(self, name: str) -> Split:
        """Returns a stored split, checked; NameNotFoundError when there is none of that name."""
        return splits.load(self._files(), name)

    def split_names(self) -> list[str]:
        """Returns the names of the stored splits, sorted."""
        return named_tables.names(self._files(), splits.FOLDER)

    def save_set(self, name: str, sql: str, *, within: tuple[str, str] | None = None) -> RecordSet:
        """Saves the answer of a query as a named record set.

        Example:
          >>> store.save_set("deep", "select record_id from records where depth >= 1000")
          >>> loader = CropLoader(store.subset("deep"), recipe, seed=1, global_batch=8)

        Args:
          name: of the set; never changes its meaning. Saving the same records again is no error.
          sql: a query with a column ``record_id``; order and repeats do not matter.
          within: (split, part): a promise that every record is of that part, checked now and at every load.
        Raises:
          QueryError: bad SQL, no such column, an unknown id, or an empty answer.
          LeakageError: a record is of a cluster that the split holds out of the part.
          NameTakenError: the name exists and means something else.
        """
        table = record_sets.draw(self.index_rows(), self.query(sql))
        promise = None
        if within is not None:
            cut = self.split(within[0])
            cut.check_inside(within[1], table["record_id"].to_pylist())
            promise = Within(split=within[0], part=within[1], fingerprint=cut.fingerprint)
        made = RecordSet(
            name=name,
            table=table,
            fingerprint=record_sets.fingerprint_of(self.settings, table),
            sql=sql,
            store_version=self.version,
            within=promise,
        )
        return record_sets.save(self._files(), made)

    def set(self, name: str) -> RecordSet:
        """Returns a saved set; its promise, if it made one, is checked again.

        Raises:
          NameNotFoundError: no set of that name.
          CorruptDataError: its file is damaged.
          LeakageError: it does not keep its promise.
        """
        found = record_sets.load(self._files(), self.settings, name)
        if found.within is not None:
            self.split(found.within.split).check_inside(found.within.part, found.ids)
        return found

    def set_names(self) -> list[str]:
        """Returns the names of the saved sets, sorted."""
        return named_tables.names(self._files(), record_sets.FOLDER)

    def subset(self, name: str) -> StoreView[RecordT]:
        """Returns the records of a saved set, as a source of their own.

        Raises:
          RecordSetMismatchError: a record of the set is missing here or has other content.
        """
        rows = record_sets.select(self.index_rows(), self.set(name), self.version)
        return StoreView(self, rows, f"set {name}")

    def _files(self) -> Blobs:
        return open_blobs(self.url)


class StoreView(RecordSource[RecordT]):
    """Some records of a store, with the API of a store: a loader takes it in place of one.

    Attributes:
      label: why these records, for people.
    """

    def __init__(self, base: RecordSource[RecordT], rows: pa.Table, label: str) -> None:
        """Use `RecordSource.view`, `as_of` or `subset`.

        Args:
          base: where the records can be read.
          rows: their index rows, sorted by id.
          label: for people.
        """
        self.url = base.url
        self.settings = base.settings
        self.label = label
        self._base = base
        self._version = base.version
        self._rows = rows.combine_chunks()

    def __reduce__(self) -> tuple[Any, tuple[RecordSource[RecordT], pa.Table, str]]:
        return StoreView, (self._base, self._rows, self.label)

    def __repr__(self) -> str:
        return f"StoreView({self.url!r}, version={self.version}, {self.label!r}, records={len(self)})"

    @property
    def version(self) -> int:
        """The version of the store from which the view was taken."""
        return self._version

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def ids(self) -> list[str]:
        """All record ids, sorted."""
        return self._rows["record_id"].to_pylist()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) as of a store that holds these records and no others."""
        return record_sets.fingerprint_of(self.settings, self._rows)

    def at(self, position: int) -> RecordT:
        """Returns the record at a position of the sorted ids.

        Raises:
          IndexError: position is not in 0..len-1.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside 0..{len(self) - 1} ({self!r})")
        return self.record_of({name: column[position].as_py() for name, column in self._columns.items()})

    def index_rows(self) -> pa.Table:
        """Returns the index row of every record, sorted by record id."""
        return self._rows

    @functools.cached_property
    def _columns(self) -> dict[str, pa.Array]:
        return {name: self._rows[name].combine_chunks() for name in self._rows.column_names}

    def record_of(self, row: Mapping[str, Any]) -> RecordT:
        """Returns the record that an index row of this store describes."""
        return self._base.record_of(row)

    def reading_through(self, wrap: Callable[[Blobs], Blobs]) -> StoreView[RecordT]:
        """Returns the same view of the store read that way, see `RecordSource.reading_through`."""
        return StoreView(self._base.reading_through(wrap), self._rows, self.label)

    def size_at(self, position: int) -> tuple[int, int]:
        """Returns length and depth of a record, see `RecordSource.size_at`."""
        return self._columns["length"][position].as_py(), self._columns["depth"][position].as_py()

    def places(self) -> pa.Table:
        """Returns where each record lies, see `RecordSource.places`."""
        return self._rows.select(PLACE_COLUMNS)

    def _records_of(
        self: StoreView[Record], requests: Sequence[CropRequest], in_flight: int | None
    ) -> list[Record]:
        for request in requests:
            if request.record_id not in self:
                raise self.not_found(request.record_id)
        # The store knows how to open many parts at once.
        return self._base._records_of(requests, in_flight)
