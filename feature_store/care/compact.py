"""`compact`: many small or half-dead parts become a few full ones; what the records say stays the same.

Owns which parts are rewritten and the swap. Crash-safe without a journal: new parts are content-addressed and
nothing names them until one transaction moves all records over; interrupted before it, the next run writes
the same parts again, and `gc` removes them otherwise. Old versions keep the old parts.

Invariant: a record's fingerprint, annotations and job id are the same before and after, and a record that
somebody replaces or deletes meanwhile stays replaced or deleted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.care.rewrite import (
    DEFAULT_TARGET_BYTES,
    Group,
    fill,
    live_parts,
    places_in,
    read_records,
    relocated,
)
from foldfeed.feature_store.format.settings import SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.writer import write_part
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import Blobs, open_blobs

# With fewer live records than this share a part is rewritten however big it is.
DEFAULT_MIN_LIVE = 0.5
# Every version opens all its index files; this few are not worth a transaction of their own.
_FEW_INDEX_FILES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What `compact` did.

    Attributes:
      version: of the store after it.
      parts_before: parts that the newest version named before.
      parts_after: parts that it names now.
      num_moved: records that lie in another part now.
      bytes_written: size of the new parts.
      index_files_before: Parquet files of the index before.
      index_files_after: and now.
      dry_run: nothing was done; the numbers say what would be (``index_files_after`` is unknown, 0).
    """

    version: int
    parts_before: int
    parts_after: int
    num_moved: int
    bytes_written: int
    index_files_before: int
    index_files_after: int
    dry_run: bool


def compact(
    store_url: str | os.PathLike[str],
    *,
    target_bytes: int = DEFAULT_TARGET_BYTES,
    min_live: float = DEFAULT_MIN_LIVE,
    part_ids: Sequence[str] = (),
    dry_run: bool = False,
    progress: Progress = silent,
) -> CompactReport:
    """Rewrites parts smaller than half of a target size, and those in which most records are dead.

    Args:
      store_url: the store.
      target_bytes: size that new parts aim for.
      min_live: share of live records below which a part is rewritten whatever its size, 0..1.
      part_ids: parts to rewrite in any case, e.g. damaged ones whose damaged records are in quarantine.
      dry_run: only say what would be done.
      progress: told after each record.
    Raises:
      CorruptDataError: a record to be moved is damaged; nothing changes (see `repair`).
    """
    if target_bytes < 1 or not 0 <= min_live <= 1:
        raise ValueError(f"target_bytes {target_bytes} must be positive and min_live {min_live} within 0..1")
    blobs = open_blobs(store_url)
    index = Index.open(blobs.url, None)
    rows = index.rows()
    groups = _plan(blobs, rows, target_bytes, min_live, part_ids)
    files_before = len(index.files)
    parts_before = pc.count_distinct(rows["part_id"]).as_py()
    num_moved = sum(len(group.rows) for group in groups)
    num_bytes = sum(group.num_bytes for group in groups)
    if dry_run:
        moved = {part for group in groups for part in group.rows["part_id"].unique().to_pylist()}
        parts_after = parts_before - len(moved) + len(groups)
    else:
        num_bytes = _run(blobs, index, groups, num_moved, progress)
        parts_after = pc.count_distinct(index.rows(["part_id"])["part_id"]).as_py()
    return CompactReport(
        version=index.version,
        parts_before=parts_before,
        parts_after=parts_after,
        num_moved=num_moved,
        bytes_written=num_bytes,
        index_files_before=files_before,
        index_files_after=0 if dry_run else len(index.files),
        dry_run=dry_run,
    )


def _plan(
    blobs: Blobs, rows: pa.Table, target_bytes: int, min_live: float, part_ids: Sequence[str]
) -> list[Group]:
    """Returns the new parts to write; none where there is nothing to gain."""
    chosen = [
        part
        for part in live_parts(blobs, rows)
        if part.num_bytes < target_bytes / 2
        or part.num_live / part.num_records < min_live
        or part.part_id in part_ids
    ]
    wanted = pa.array([part.part_id for part in chosen], pa.string())
    groups = fill(rows.filter(pc.is_in(rows["part_id"], value_set=wanted)), chosen, target_bytes)
    num_dead = sum(part.num_records - part.num_live for part in chosen)
    return groups if num_dead or part_ids or len(groups) < len(chosen) else []


def _run(blobs: Blobs, index: Index, groups: Sequence[Group], num_moved: int, progress: Progress) -> int:
    """Writes the new parts, then moves all records in one transaction; returns the bytes written."""
    moves: list[dict[str, Any]] = []
    num_bytes = 0
    settings = StoreSettings.from_json(blobs.read(SETTINGS_FILE), blobs.url)
    for group in groups:
        written = write_part(
            blobs.url,
            read_records(blobs, group.rows, progress, "moving records", len(moves), num_moved),
            settings,
        )
        num_bytes += written.num_bytes
        moves += places_in(PartReader(blobs, written.part_id), group.rows)
    if moves:
        moved = pa.Table.from_pylist(moves)
        index.update(
            moved["record_id"].to_pylist(),
            lambda rows: relocated(rows, moved),
            operation="compact",
            message=f"{num_moved} records moved into {len(groups)} part(s)",
        )
    if len(index.files) > _FEW_INDEX_FILES:
        index.merge_files(message=f"{len(index.files)} index files merged")
    return num_bytes
