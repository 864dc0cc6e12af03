"""Records written once more into other parts: the way that `compact` and `copy` share.

Owns how records are grouped, read, and found at their new places. Does not own which records move nor the
commit. Invariant: what a row says of its record is the same before and after; only part and places differ,
and the fingerprint of every record is checked on the way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.rebuild import load_record
from foldfeed.feature_store.progress import Progress
from foldfeed.feature_store.storage import Blobs

DEFAULT_TARGET_BYTES = 256 << 20
# Each holds a descriptor per array, and a process has 1,024 of them.
_OPEN_PARTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Records that will share a new part: index rows, sorted by id, and the bytes they are likely to take."""

    rows: pa.Table
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LivePart:
    """A part and those of its records that an index names.

    Attributes:
      part_id: the part.
      num_records: records that it holds.
      num_live: records of it that the index names.
      num_tokens: cells of their alignments.
      num_bytes: what they take of it, as if all of its records were equal.
    """

    part_id: str
    num_records: int
    num_live: int
    num_tokens: int
    num_bytes: float

    @property
    def bytes_per_token(self) -> float:
        """Bytes follow tokens within a part, near enough for filling new ones."""
        return self.num_bytes / self.num_tokens


def live_parts(blobs: Blobs, rows: pa.Table) -> Iterator[LivePart]:
    """Yields the parts of index rows."""
    per_part = rows.select(["part_id"]).append_column("tokens", _num_tokens(rows))
    by_part = per_part.group_by("part_id", use_threads=False)
    for entry in by_part.aggregate([("tokens", "sum"), ("tokens", "count")]).to_pylist():
        part = PartReader(blobs, entry["part_id"])
        num_live = entry["tokens_count"]
        yield LivePart(
            part_id=part.part_id,
            num_records=part.num_records,
            num_live=num_live,
            num_tokens=entry["tokens_sum"],
            num_bytes=sum(file["bytes"] for file in part.files.values()) * num_live / part.num_records,
        )


def _num_tokens(rows: pa.Table) -> pa.ChunkedArray:
    """Returns how many cells the alignment of each row has, int64."""
    return pc.multiply(rows["length"].cast(pa.int64()), rows["depth"].cast(pa.int64()))


def fill(rows: pa.Table, parts: Iterable[LivePart], target_bytes: int) -> list[Group]:
    """Returns rows, sorted by id, in groups of about that many bytes.

    Args:
      rows: of the index.
      parts: where they lie.
      target_bytes: size that new parts aim for.
    """
    costs = {part.part_id: part.bytes_per_token for part in parts}
    groups = []
    start, size = 0, 0.0
    places = zip(rows["part_id"].to_pylist(), _num_tokens(rows).to_pylist(), strict=True)
    for position, (part_id, count) in enumerate(places):
        cost = count * costs[part_id]
        if size and size + cost > target_bytes:
            groups.append(Group(rows=rows.slice(start, position - start), num_bytes=int(size)))
            start, size = position, 0.0
        size += cost
    if size:
        groups.append(Group(rows=rows.slice(start), num_bytes=int(size)))
    return groups


def read_records(
    blobs: Blobs, rows: pa.Table, progress: Progress, stage: str, done: int, total: int
) -> Iterator[MsaRecord]:
    """Yields the records of index rows, one in memory at a time.

    Args:
      blobs: of the store that holds them.
      rows: of its index.
      progress: told after each record.
      stage: what it is told.
      done: records before these.
      total: records in all.
    Raises:
      CorruptDataError: a record is damaged.
    """

    @functools.lru_cache(_OPEN_PARTS)
    def opened(part_id: str) -> PartReader:
        return PartReader(blobs, part_id)

    for position in range(len(rows)):
        row = rows.slice(position, 1).to_pylist()[0]
        yield load_record(opened(row["part_id"]), row)
        progress(stage, done + position + 1, total)


def places_in(part: PartReader, old: pa.Table) -> list[dict[str, Any]]:
    """Returns old part and new position of each record of a new part, after a look at what it holds.

    Raises:
      CorruptDataError: the new part says something else of a record than its old row.
    """
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


def relocated(rows: pa.Table, moved: pa.Table) -> pa.Table:
    """Returns the rows that are still what they were when they were copied, with their new places.

    Args:
      rows: of the index, now.
      moved: of `places_in`, with every record of ``rows``.
    """
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
