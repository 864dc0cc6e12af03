"""Import into a store: records to parts, parts to one commit, and a report.

Owns how records are dealt into parts and the job id. Does not own formats or the store. Invariants: nothing
is visible until the single commit at the end; an interrupted import leaves garbage at most, and the same
import done again writes the same parts under the same job id and adds nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator

from foldfeed.feature_store.import_layouts import AlignmentImport
from foldfeed.feature_store.import_sources import Reject
from foldfeed.feature_store.record import MsaRecord
from foldfeed.feature_store.settings import StoreSettings
from foldfeed.feature_store.store import FeatureStore
from foldfeed.feature_store.writer import write_part

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
      on_existing: ``error``, ``replace`` or ``skip`` records whose id is there with other content.
      job_id: names the commit; made from the parts when None.
      on_record: called after every source, for a progress bar.
    Raises:
      NotAStoreError, StoreSettingsError: the store cannot be used.
      CommitConflictError: an id would get a second meaning; nothing is committed.
      StorageFullError: no space left; nothing is committed.
    """
    parts: list[str] = []
    insertions: list[str] = []
    num_read = 0

    def watched() -> Iterator[MsaRecord]:
        nonlocal num_read
        for record in found:
            num_read += 1
            if "query_insertions" in record.extra:
                insertions.append(record.record_id)
            yield record
            del record
            if on_record is not None:
                on_record()

    store: FeatureStore | None = None
    for batch in batches(watched()):
        store = store or FeatureStore.create(store_url, settings)
        parts.append(write_part(store.url, batch, store.settings).part_id)
    version, added, unchanged, done, job = None, 0, 0, False, ""
    if store is not None:
        job = job_id or _job_id(parts, on_existing)
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
    )


def _job_id(parts: list[str], on_existing: str) -> str:
    return "import-" + hashlib.sha256("\n".join([on_existing, *parts]).encode()).hexdigest()[:32]


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
