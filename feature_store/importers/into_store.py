"""Import into a store: records to parts, parts to one commit, and a report.

Owns how records are dealt into parts and the job id. Does not own formats or the store. Invariants: nothing
is visible until the single commit at the end; an interrupted import leaves garbage at most, and the same
import done again has the same job id and adds nothing. A record that comes without a structure keeps the one
that the store has for its id and sequence (`foldfeed structures` put it there): alignments that are imported
again do not take it away, and one that did not change is no conflict.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping

from foldfeed.feature_store.errors import CommitConflictError
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.importers.layouts import AlignmentImport
from foldfeed.feature_store.importers.sources import Reject
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.writer import write_part
from foldfeed.feature_store.storage import open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore, Record

# A part of this many tokens has shards of about 100 MB, which object stores and copies handle well.
MAX_PART_TOKENS = 256 << 20
MAX_PART_RECORDS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What an import did.

    Attributes:
      layout: that was read.
      num_read: records read and written.
      num_added: records that the commit made visible.
      num_unchanged: records that were in the store already, or were skipped.
      num_parts: parts written.
      version: of the store after it; None when nothing was committed.
      job_id: of the commit; "" when nothing was committed.
      already_done: the same job was committed before.
      query_insertions: ids of records whose query had residues that are no columns.
      rejects: what could not be imported.
      renamed: names of sources that cannot be ids, and the ids of their records.
      kept_structures: ids of records that were replaced and kept the structure that the store had.
      lost_structures: ids of records that were replaced and have no structure any more, because their
        sequence is another one now.
    """

    layout: str
    num_read: int
    num_added: int
    num_unchanged: int
    num_parts: int
    version: int | None
    job_id: str
    already_done: bool
    query_insertions: tuple[str, ...]
    rejects: tuple[Reject, ...]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept_structures: tuple[str, ...] = ()
    lost_structures: tuple[str, ...] = ()


def import_into(
    store_url: str | os.PathLike[str],
    found: AlignmentImport,
    *,
    settings: StoreSettings | None = None,
    on_existing: str = "error",
    job_id: str | None = None,
    on_record: Callable[[], None] | None = None,
) -> ImportReport:
    """Writes the records of an import to a store and commits them at once.

    Args:
      store_url: made when it is absent.
      found: the import; read one record at a time.
      settings: for a new store.
      on_existing: ``error``, ``replace`` or ``skip`` records whose id is there with other content. A record
        without a structure takes over the one that the store has for its id, and its release date, if the
        sequences are equal.
      job_id: names the commit; made from what the records say when None.
      on_record: called after every source, for a progress bar.
    Raises:
      NotAStoreError, StoreSettingsError: the store cannot be used.
      CommitConflictError: an id would get a second meaning, or a record that would be replaced got a
        structure while the import ran; nothing is committed.
      StorageFullError: no space left; nothing is committed.
    """
    parts: list[str] = []
    insertions: list[str] = []
    num_read = 0
    store: FeatureStore | None = None
    structures = _Structures()

    def watched() -> Iterator[MsaRecord]:
        nonlocal num_read, store
        for record in found:
            num_read += 1
            if "query_insertions" in record.extra:
                insertions.append(record.record_id)
            store = store or FeatureStore.create(store_url, settings)
            record = structures.keep(record, store)
            yield record
            del record
            if on_record is not None:
                on_record()

    for batch in batches(watched()):
        assert store is not None
        parts.append(write_part(store.url, batch, store.settings).part_id)
    version, added, unchanged, done, job = None, 0, 0, False, ""
    if store is not None:
        job = job_id or _job_id(store, parts, on_existing, structures.before)
        if on_existing == "replace":
            _refuse_lost_structures(store, parts, structures.before)
        message = f"import of {num_read} records ({found.layout})"
        result = store.commit(parts, job_id=job, message=message, on_existing=on_existing)
        version, added, unchanged, done = (
            result.version,
            result.num_added,
            result.num_unchanged,
            result.already_done,
        )
    return ImportReport(
        layout=found.layout,
        num_read=num_read,
        num_added=added,
        num_unchanged=unchanged,
        num_parts=len(parts),
        version=version,
        job_id=job,
        already_done=done,
        query_insertions=tuple(insertions),
        rejects=tuple(found.rejects),
        renamed=found.renamed,
        kept_structures=tuple(structures.kept) if on_existing == "replace" and not done else (),
        lost_structures=tuple(structures.lost) if on_existing == "replace" and not done else (),
    )


class _Structures:
    """What becomes of the structures that a store has, when records without one come for their ids.

    Attributes:
      before: fingerprint, as they came, of records that took over a structure; by id.
      kept: of these, the ids whose content is not what the store has.
      lost: ids of records that have one in the store and another sequence now.
    """

    def __init__(self) -> None:
        self.before: dict[str, str] = {}
        self.kept: list[str] = []
        self.lost: list[str] = []

    def keep(self, record: MsaRecord, store: FeatureStore) -> MsaRecord:
        """Returns the record, with the structure of the store's record when it is to keep it."""
        there = _with_structure(store, record.record_id) if record.structure is None else None
        if there is None:
            return record
        if there.sequence != record.sequence:
            self.lost.append(record.record_id)
            return record
        structure = there.structure()
        assert structure is not None
        extra = dict(record.extra)
        # As `attach_structures` does: `FeatureStore.as_of` looks there for the day of a structure.
        if RELEASE_DATE in structure.source:
            extra[RELEASE_DATE] = structure.source[RELEASE_DATE]
        elif RELEASE_DATE in there.extra:
            extra.setdefault(RELEASE_DATE, there.extra[RELEASE_DATE])
        found = dataclasses.replace(record, structure=structure, extra=extra)
        self.before[record.record_id] = record.fingerprint
        if found.fingerprint != there.fingerprint:
            self.kept.append(record.record_id)
        return found


def _with_structure(store: FeatureStore, record_id: str) -> Record | None:
    """Returns the store's record of an id if it has a structure."""
    position = store.find(record_id) if len(store) else None
    if position is None or store.index_rows()["structure"][position].as_py() is None:
        return None
    return store.at(position)


def _refuse_lost_structures(store: FeatureStore, parts: list[str], kept: Mapping[str, str]) -> None:
    """Raises when a record that is to be replaced got another structure since the import began.

    An import may take hours, and `foldfeed structures` a part of them. What others commit between this look
    and the commit a moment later is not seen.
    """
    newest = FeatureStore.open(store.url)
    if newest.version == store.version:
        return
    rows, blobs = newest.index_rows(), open_blobs(store.url)
    for part_id in parts:
        for row in PartReader(blobs, part_id).index_rows():
            record_id = row["record_id"]
            position = newest.find(record_id)
            brings_one = row["structure"] is not None and record_id not in kept
            if position is None or brings_one or rows["structure"][position].as_py() is None:
                continue
            if record_id in store and store[record_id].fingerprint == newest.at(position).fingerprint:
                continue
            raise CommitConflictError(
                f"record {record_id!r} got a structure while this import ran, and replacing the record would "
                "drop it; nothing is committed. Run the import again: it keeps the structure"
            )


def _job_id(store: FeatureStore, parts: list[str], on_existing: str, before: Mapping[str, str]) -> str:
    """Returns a name made from what the records said when they came, whatever the store had for them."""
    blobs = open_blobs(store.url)
    lines = [
        before.get(row["record_id"], row["fingerprint"])
        for part_id in parts
        for row in PartReader(blobs, part_id).index_rows()
    ]
    return "import-" + hashlib.sha256("\n".join([on_existing, *lines]).encode()).hexdigest()[:32]


def batches(records: Iterator[MsaRecord]) -> Iterator[Iterator[MsaRecord]]:
    """Yields the records of one part after the other; each must be used up before the next."""
    for first in records:
        yield _batch(itertools.chain([first], records))


def _batch(records: Iterator[MsaRecord]) -> Iterator[MsaRecord]:
    tokens = 0
    for count, record in enumerate(records, start=1):
        tokens += record.depth * record.length
        # Not held here while the next one is read: two deep alignments at once would double the memory.
        yield record
        del record
        if tokens >= MAX_PART_TOKENS or count >= MAX_PART_RECORDS:
            return
