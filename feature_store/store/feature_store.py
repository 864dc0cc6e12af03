"""`FeatureStore`: the front door. Open a store, look records up, ask SQL, read crops, commit parts.

A store object is a snapshot: it shows one version, whatever others commit meanwhile, until it is asked for a
change itself; then it shows the version that the change made, or, where it was refused, was compared with.
Thread safe for reading. It may be pickled (a worker process opens the same version again). Reading survives a
fork: the index is in memory, reads of parts carry their own offsets, and the threads of reads in flight are
made anew. Opening or changing a local store in a forked child is refused (`index.delta_rs`).
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foldfeed.feature_store.errors import CorruptDataError, NotAStoreError, StoreSettingsError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import PERMUTED, SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.annotations import annotate
from foldfeed.feature_store.index.log import LogEntry, entry_of
from foldfeed.feature_store.index.transactions import CommitResult, Index
from foldfeed.feature_store.parts.many_crops import CropRequest
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.record import Record
from foldfeed.feature_store.parts.wanted import mark_wanted
from foldfeed.feature_store.storage import TEMPORARY_PREFIX, Blobs, LocalBlobs, open_blobs
from foldfeed.feature_store.storage.read_pool import DEFAULT_IN_FLIGHT, run_tasks
from foldfeed.feature_store.store.questions import PLACE_COLUMNS, RecordSource
from foldfeed.feature_store.store.record_sets import fingerprint_of
from foldfeed.feature_store.store.version_diff import VersionDiff, compare_versions


class FeatureStore(RecordSource["Record"]):
    """One version of a store.

    Whatever reads from a store that was moved or deleted since it was opened raises `StoreGoneError`.

    Example:
      >>> store = FeatureStore.open("demo-output/store")
      >>> len(store), store.version
      >>> store.query("select record_id, depth from records order by depth desc limit 3").to_pylist()
      >>> crop = store["HBB_HUMAN"].crop(residues=slice(0, 64), rows=slice(0, 512))

    Attributes:
      url: where it lies.
      settings: chosen when it was created.
    """

    def __init__(self, url: str, settings: StoreSettings, index: Index) -> None:
        """Use `open` or `create`."""
        self.url = url
        self.settings = settings
        self._index = index
        self._blobs = open_blobs(url)
        self._parts: dict[str, PartReader] = {}

    @classmethod
    def open(cls, url: str | os.PathLike[str], version: int | str | None = None) -> FeatureStore:
        """Returns a store at a version or a tag, the newest version by default.

        Raises:
          NotAStoreError: nothing there, or something else.
          FormatVersionError: a format this release does not read.
          CorruptDataError: ``foldfeed.json``, the log or the tag is damaged.
          ValueError: there is no such version (any more), or no such tag.
        """
        blobs = open_blobs(url)
        try:
            data = blobs.read(SETTINGS_FILE)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = f"it has no {SETTINGS_FILE}" if blobs.exists("") else "there is nothing at that path"
            raise NotAStoreError(blobs.url, reason) from error
        settings = StoreSettings.from_json(data, blobs.url)
        index = versions.open_index(blobs.url, version)
        _check_settings(data, index)
        return cls(blobs.url, settings, index)

    @classmethod
    def create(cls, url: str | os.PathLike[str], settings: StoreSettings | None = None) -> FeatureStore:
        """Returns the store at a URL, made new where there is none.

        Args:
          url: an absent or empty folder, or a store.
          settings: for a new store, the defaults when None; for one that exists they must be equal.
        Raises:
          NotAStoreError: the folder holds something else; it is not touched.
          StoreSettingsError: the store exists with other settings.
        """
        blobs = open_blobs(url)
        if not blobs.exists(SETTINGS_FILE):
            names = blobs.list("") if blobs.exists("") else []
            # Asked once more after the look: another creator may have begun in between.
            if not blobs.exists(SETTINGS_FILE):
                _refuse_foreign(blobs.url, names, os.path.isfile(blobs.url))
            blobs.create_exclusive(SETTINGS_FILE, (settings or StoreSettings()).to_json())
        data = blobs.read(SETTINGS_FILE)
        found = StoreSettings.from_json(data, blobs.url)
        if settings is not None and found != settings:
            raise StoreSettingsError(
                f"{blobs.url!r} exists with {found}, not {settings}; a store keeps the settings it was "
                "made with, so use them or choose another folder"
            )
        index = Index.create(blobs.url, hashlib.sha256(data).hexdigest())
        _check_settings(data, index)
        return cls(blobs.url, found, index)

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return FeatureStore.open, (self.url, self.version)

    def __repr__(self) -> str:
        return f"FeatureStore({self.url!r}, version={self.version}, records={len(self)})"

    @property
    def version(self) -> int:
        """The version this object shows."""
        return self._index.version

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, position: int) -> Record:
        """Returns the record at a position of the sorted ids.

        Raises:
          IndexError: position is not in 0..len-1.
        """
        if not 0 <= position < len(self):
            raise IndexError(
                f"position {position} is outside 0..{len(self) - 1} (the store has {len(self)} records)"
            )
        return self.record_of(_RowAt(self, position))

    @functools.cached_property
    def ids(self) -> list[str]:
        """All record ids, sorted."""
        return self._places["record_id"].to_pylist()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the settings and of what every visible record says.

        Two stores with equal records have equal fingerprints, wherever they lie and however often they were
        committed to: a loader's position is bound to this and not to a path.
        """
        return fingerprint_of(self.settings, self._index.rows(["record_id", "fingerprint"]))

    def index_rows(self) -> pa.Table:
        """Returns the index row of every record, sorted by record id."""
        return self._rows

    def record_of(self, row: Mapping[str, Any]) -> Record:
        """Returns the record that an index row of this store describes."""
        return Record(self._part(row["part_id"]), row)

    def reading_through(self, wrap: Callable[[Blobs], Blobs]) -> FeatureStore:
        """Returns this version of the store, whose parts are read that way; see `RecordSource`."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._blobs = wrap(self._blobs)
        other._parts = {}
        return other

    def size_at(self, position: int) -> tuple[int, int]:
        """Returns length and depth of a record, see `RecordSource.size_at`."""
        return self._place_numbers["length"].item(position), self._place_numbers["depth"].item(position)

    def places(self) -> pa.Table:
        """Returns where each record lies, see `RecordSource.places`."""
        return pa.table(self._places)

    def log(self) -> list[LogEntry]:
        """Returns the commits up to this version, newest first."""
        tags: dict[int, tuple[str, ...]] = {}
        for tag in versions.list_tags(self.url):
            tags[tag.version] = (*tags.get(tag.version, ()), tag.name)
        return [entry_of(commit, tags.get(commit.version, ())) for commit in reversed(self._index.log())]

    def diff(self, old: int | str, new: int | str | None = None) -> VersionDiff:
        """Returns what changed between two versions: which records, in what, and by which commits.

        Example:
          >>> store.diff(3).counts
          >>> store.diff("paper-1", "paper-2").table.to_pandas()

        Args:
          old: a version or a tag.
          new: the same, before or after ``old``; the version that this object shows when None.
        Raises:
          ValueError: there is no such version (any more), or no such tag.
          CorruptDataError: something that is read is damaged.
        """
        then = versions.open_index(self.url, old)
        now = self._index if new is None else versions.open_index(self.url, new)
        return compare_versions(self._blobs, then, now, self.record_of)

    def commit(
        self,
        part_ids: Sequence[str],
        *,
        job_id: str,
        message: str = "",
        on_existing: str = "error",
    ) -> CommitResult:
        """Makes the records of parts visible in one transaction and moves this object to the new version.

        Args:
          part_ids: as `write_part` returned them.
          job_id: names the job; committing it again adds nothing.
          message: for the log.
          on_existing: ``error``, ``replace`` or ``skip`` records whose id is there with other content.
        Raises:
          CorruptDataError: a part is missing or damaged; nothing is committed.
          CommitConflictError: an id would get a second meaning; nothing is committed.
          StoreSettingsError: a part was written with other settings; nothing is committed.
        """
        rows: list[dict[str, Any]] = []
        for part_id in part_ids:
            # A part that nothing names yet is old garbage or just about to be named; `gc` goes by its age.
            mark_wanted(self.url, [part_id])
            part = self._part(part_id)
            if part.settings != self.settings:
                raise StoreSettingsError(
                    f"part {part_id} was written with {part.settings}, not with the store's {self.settings}; "
                    "write it with `store.settings`"
                )
            rows.extend(row | {"part_id": part_id, "job_id": job_id} for row in part.index_rows())
        try:
            return self._index.commit(
                pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
                job_id=job_id,
                message=message,
                on_existing=on_existing,
            )
        finally:
            # Refused or not, the index has moved on to the newest version.
            self._forget()

    def delete(self, record_ids: Sequence[str], *, job_id: str = "", message: str = "") -> CommitResult:
        """Removes records in one transaction and moves this object to the new version.

        Versions before keep them, and so does the disk until `gc` drops those versions.

        Raises:
          RecordNotFoundError: an id is not in the newest version; nothing is removed.
        """
        try:
            return self._index.delete(record_ids, job_id=job_id, message=message)
        finally:
            self._forget()

    def annotate(self, columns: pa.Table, *, job_id: str = "", message: str = "") -> CommitResult:
        """Sets columns of one's own for some records; the index gets a column when it is new.

        What a record says does not change, and neither does its fingerprint.

        Args:
          columns: ``record_id`` and the columns to set; records that are not named keep what they have (null
            in a new column).
          job_id: see `commit`.
          message: for the log.
        Raises:
          RecordNotFoundError: an id is not in the newest version; nothing is changed.
          CommitConflictError: a column of the format itself, or one that has another type.
        """
        try:
            return annotate(self._index, columns, job_id=job_id, message=message)
        finally:
            self._forget()

    def _records_of(self, requests: Sequence[CropRequest], in_flight: int | None) -> list[Record]:
        """Returns the record of each request; parts that nobody opened yet are opened together."""
        rows = []
        for request in requests:
            position = self.find(request.record_id)
            if position is None:
                raise self.not_found(request.record_id)
            rows.append(_RowAt(self, position))
        unopened = {part_id for part_id in (row["part_id"] for row in rows) if part_id not in self._parts}
        if in_flight is None:
            in_flight = 1 if isinstance(self._blobs, LocalBlobs) else DEFAULT_IN_FLIGHT
        run_tasks([functools.partial(self._part, part_id) for part_id in sorted(unopened)], in_flight)
        return [self.record_of(row) for row in rows]

    def _forget(self) -> None:
        for name in ("ids", "fingerprint", "_rows", "_places", "_place_numbers", "_facts"):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def _rows(self) -> pa.Table:
        return self._index.rows()

    @functools.cached_property
    def _places(self) -> dict[str, pa.Array]:
        """What finding and reading a record needs, by column: a tenth of the index.

        A store of a million records opens with these; sequences and the like are read when first asked for.
        """
        return _arrays(self._index.rows(PLACE_COLUMNS))

    @functools.cached_property
    def _place_numbers(self) -> dict[str, NDArray[Any]]:
        """The columns of `_places` that are numbers without nulls, as views: an item costs a tenth."""
        return {
            name: _integers(column)
            for name, column in self._places.items()
            if pa.types.is_integer(column.type) and not column.null_count
        }

    @functools.cached_property
    def _facts(self) -> dict[str, pa.Array]:
        return _arrays(self._rows)

    def _part(self, part_id: str) -> PartReader:
        part = self._parts.get(part_id)
        if part is None:
            # Two threads may both open it; either copy serves, so no lock is held over the read.
            part = self._parts.setdefault(part_id, PartReader(self._blobs, part_id))
        return part


def choose_settings(
    url: str | os.PathLike[str], row_order: str | None, row_order_seed: int | None
) -> StoreSettings | None:
    """Returns the settings for `FeatureStore.create` where a person may choose the row order.

    Args:
      url: an absent or empty folder, or a store.
      row_order: for a new store; one that exists must have it. None: whatever it has, or the default.
      row_order_seed: of ``permuted``; None: whatever the store has, or 0.
    Returns: the settings of the store that is there, those of a new one, or None for the default.
    Raises:
      ValueError: an unknown order, or a seed without ``permuted``.
      StoreSettingsError: the store exists with another row order or another seed.
    """
    if row_order is None:
        if row_order_seed is not None:
            raise ValueError(
                f"row_order_seed {row_order_seed} has no effect without row_order {PERMUTED!r}; add it"
            )
        return None
    wanted = StoreSettings.with_row_order(row_order, row_order_seed)
    blobs = open_blobs(url)
    if not blobs.exists(SETTINGS_FILE):
        return wanted
    found = StoreSettings.from_json(blobs.read(SETTINGS_FILE), blobs.url)
    if found.row_order != row_order or row_order_seed not in (None, found.row_order_seed):
        raise StoreSettingsError(
            f"{blobs.url!r} exists with row order {found.row_order!r} (seed {found.row_order_seed}), not "
            f"{row_order!r} (seed {wanted.row_order_seed}); a store keeps the order it was made with, so "
            "leave the option out or choose another folder"
        )
    return found


class _RowAt(Mapping[str, Any]):
    """The index row at a position, column by column as it is asked for."""

    def __init__(self, store: FeatureStore, position: int) -> None:
        self._store = store
        self._position = position
        self._version = store.version
        self._places = store._places
        self._numbers = store._place_numbers

    def __getitem__(self, name: str) -> Any:
        numbers = self._numbers.get(name)
        if numbers is not None:
            return numbers.item(self._position)
        columns = self._places if name in self._places else self._facts
        return columns[name][self._position].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    @property
    def _facts(self) -> dict[str, pa.Array]:
        # The store moves on when it commits, and then this position is another record's.
        if self._store.version != self._version:
            self._store = FeatureStore.open(self._store.url, self._version)
        return self._store._facts


def _integers(column: pa.Array) -> NDArray[Any]:
    """Returns an array of integers without nulls as a view.

    ``to_numpy`` of pyarrow does the same and imports pandas where that is: 0.3 s before the first record.
    """
    values = column.buffers()[1]
    if values is None:
        return np.empty(0, dtype=str(column.type))
    return np.frombuffer(values, dtype=str(column.type))[column.offset : column.offset + len(column)]


def _arrays(rows: pa.Table) -> dict[str, pa.Array]:
    # One array per column: indexing a chunked column by position costs a search of its chunks every time.
    # Few parts hold many records, so their long names are kept once.
    found = {}
    for name in rows.column_names:
        column = rows[name]
        # Joining copies even a single chunk.
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        found[name] = array.dictionary_encode() if name == "part_id" else array
    return found


def _refuse_foreign(url: str, names: list[str], is_file: bool) -> None:
    """Raises unless the place is free for a new store."""
    if is_file:
        raise NotAStoreError(url, "it is a file")
    # A creation that was killed leaves a temporary file; the next one is not stopped by it.
    names = [name for name in names if not name.startswith(TEMPORARY_PREFIX)]
    if names:
        raise NotAStoreError(url, f"the folder exists and holds other things, e.g. {names[0]!r}")


def _check_settings(data: bytes, index: Index) -> None:
    """Raises unless a ``foldfeed.json`` is the one that the store was made with."""
    if hashlib.sha256(data).hexdigest() != index.head.note.settings_sha256:
        raise CorruptDataError(SETTINGS_FILE, "it is not the file that the store was made with")
