"""`compact`: many small or half-dead parts become a few full ones; what the records say stays the same.

Owns which parts are rewritten and the swap. Crash-safe without a journal: new parts are content-addressed and
nothing names them until one transaction moves all records over; interrupted before it, the next run writes
the same parts again, and `gc` removes them otherwise. Old versions keep the old parts.

Invariant: a record's fingerprint, annotations and job id are the same before and after, and a record that
somebody replaces or deletes meanwhile stays replaced or deleted.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.format.settings import SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.rebuild import load_record
from foldfeed.feature_store.parts.writer import write_part
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import Blobs, open_blobs

DEFAULT_TARGET_BYTES = 256 << 20
# With fewer live records than this share a part is rewritten however big it is.
DEFAULT_MIN_LIVE = 0.5
# Every version opens all its index files; this few are not worth a transaction of their own.
_FEW_INDEX_FILES = 4
# Each holds a descriptor per array, and a process has 1,024 of them.
_OPEN_PARTS = 16


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Records that will share a new part: index rows, sorted by id, and the bytes they are likely to take."""

    rows: pa.Table
    num_bytes: int


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
) -> list[_Group]:
    """Returns the new parts to write; none where there is nothing to gain."""
    tokens = pc.multiply(rows["length"].cast(pa.int64()), rows["depth"].cast(pa.int64()))
    per_part = rows.select(["part_id"]).append_column("tokens", tokens).group_by("part_id")
    chosen: list[str] = []
    num_dead = 0
    costs: dict[str, float] = {}
    for entry in per_part.aggregate([("tokens", "sum"), ("tokens", "count")]).to_pylist():
        part_id, live = entry["part_id"], entry["tokens_count"]
        part = PartReader(blobs, part_id)
        size = sum(file["bytes"] for file in part.files.values()) * live / part.num_records
        small = size < target_bytes / 2
        if small or live / part.num_records < min_live or part_id in part_ids:
            chosen.append(part_id)
            num_dead += part.num_records - live
            # Bytes follow tokens within a part, near enough for filling the new ones.
            costs[part_id] = size / entry["tokens_sum"]
    wanted = pc.is_in(rows["part_id"], value_set=pa.array(chosen, pa.string()))
    groups = _fill(rows.filter(wanted), tokens.filter(wanted).to_pylist(), costs, target_bytes)
    return groups if num_dead or part_ids or len(groups) < len(chosen) else []


def _fill(rows: pa.Table, tokens: Sequence[int], costs: Mapping[str, float], target: int) -> list[_Group]:
    groups = []
    start, size = 0, 0.0
    parts = rows["part_id"].to_pylist()
    for position, (part_id, count) in enumerate(zip(parts, tokens, strict=True)):
        cost = count * costs[part_id]
        if size and size + cost > target:
            groups.append(_Group(rows=rows.slice(start, position - start), num_bytes=int(size)))
            start, size = position, 0.0
        size += cost
    if size:
        groups.append(_Group(rows=rows.slice(start), num_bytes=int(size)))
    return groups


def _run(blobs: Blobs, index: Index, groups: Sequence[_Group], num_moved: int, progress: Progress) -> int:
    """Writes the new parts, then moves all records in one transaction; returns the bytes written."""
    moves: list[dict[str, Any]] = []
    num_bytes = 0
    settings = StoreSettings.from_json(blobs.read(SETTINGS_FILE), blobs.url)
    for group in groups:
        written = write_part(
            blobs.url,
            _records(blobs, group.rows, len(moves), num_moved, progress),
            settings,
        )
        num_bytes += written.num_bytes
        moves += _moves(PartReader(blobs, written.part_id), group.rows)
    if moves:
        moved = pa.Table.from_pylist(moves)
        index.update(
            moved["record_id"].to_pylist(),
            lambda rows: _relocated(rows, moved),
            operation="compact",
            message=f"{num_moved} records moved into {len(groups)} part(s)",
        )
    if len(index.files) > _FEW_INDEX_FILES:
        index.merge_files(message=f"{len(index.files)} index files merged")
    return num_bytes


def _records(blobs: Blobs, rows: pa.Table, done: int, total: int, progress: Progress) -> Iterator[MsaRecord]:
    @functools.lru_cache(_OPEN_PARTS)
    def opened(part_id: str) -> PartReader:
        return PartReader(blobs, part_id)

    for position in range(len(rows)):
        row = rows.slice(position, 1).to_pylist()[0]
        yield load_record(opened(row["part_id"]), row)
        progress("moving records", done + position + 1, total)


def _moves(part: PartReader, old: pa.Table) -> list[dict[str, Any]]:
    """Returns old part and new position of each record of a new part, after a look at what it holds."""
    before = {row["record_id"]: row for row in old.to_pylist()}
    found = []
    for row in part.index_rows():
        was = before[row["record_id"]]
        places = {name: row[name] for name in row if name.startswith("first_")}
        differ = [name for name in row if name not in places and row[name] != was.get(name)]
        if differ:
            reason = f"record {row['record_id']!r} would lose or change {', '.join(differ)}"
            raise CorruptDataError(part.path, reason)
        found.append(
            {
                "record_id": row["record_id"],
                "fingerprint": row["fingerprint"],
                "old_part": was["part_id"],
                "part_id": part.part_id,
                **places,
            }
        )
    return found


def _relocated(rows: pa.Table, moved: pa.Table) -> pa.Table:
    """Returns the rows that are still what they were when they were copied, with their new places."""
    at = pc.index_in(rows["record_id"], value_set=moved["record_id"])
    same_part = pc.equal(moved["old_part"].take(at), rows["part_id"])
    same = pc.and_(same_part, pc.equal(moved["fingerprint"].take(at), rows["fingerprint"]))
    rows, at = rows.filter(same), at.filter(same)
    for name in moved.column_names:
        if name == "part_id" or name.startswith("first_"):
            position = rows.schema.get_field_index(name)
            field = rows.schema.field(position)
            rows = rows.set_column(position, field, moved[name].take(at).cast(field.type))
    return rows
