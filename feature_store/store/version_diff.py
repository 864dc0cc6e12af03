"""What changed between two versions of a store: which records, in what, and by which commits.

Owns the comparison. Does not own versions (`index`) nor the reading of records (`parts`). Invariant: a record
is *replaced* if and only if its fingerprint differs; *annotated* if it says the same and a column of one's
own, or its N_eff, differs. Only files of the index that the versions do not share are read, and parts only
where the index leaves open what differs: of replaced records that are as deep as before, or that have a
structure with the same facts in both. One band of rows is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.index.files import read_files
from foldfeed.feature_store.index.log import LogEntry, entry_of
from foldfeed.feature_store.index.tags import oldest_version
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.record import Record
from foldfeed.feature_store.parts.row_scan import ROWS_SCHEMA, rows_in_part
from foldfeed.feature_store.storage import Blobs

ADDED, REMOVED, REPLACED, ANNOTATED = CHANGES = ("added", "removed", "replaced", "annotated")
# What a record says, in the words of `why`, where the index alone knows.
TEXTS = ("description", "sequence")
DIFF_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("change", pa.string()),
        ("why", pa.list_(pa.string())),
        ("versions", pa.list_(pa.int64())),
        ("job_ids", pa.list_(pa.string())),
    ]
)
_BAND_CELLS = 1 << 22
_Row: TypeAlias = "Mapping[str, Any]"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VersionDiff:
    """What changed from one version to another, which may be an older one.

    Attributes:
      old: the version to start from.
      new: the version to get to.
      table: `DIFF_SCHEMA`, one row per record that differs, sorted by id. ``change`` is one of `CHANGES`.
        ``why`` says in what a replaced record differs: ``description``, ``sequence``, ``depth`` (and with it
        the alignment), ``alignment`` (tokens or deletions, at the same depth), ``rows`` (hit ids, databases,
        species, E-values or scores of rows, at the same depth), ``databases``, ``extra``, ``structure``,
        ``templates``; of an annotated one it names the columns. ``versions`` are those between the two whose
        commits touched the record, ``job_ids`` their jobs; null where `gc` may have removed what tells.
      commits: all between the two, the oldest first.
    """

    old: int
    new: int
    table: pa.Table
    commits: list[LogEntry]

    @property
    def counts(self) -> dict[str, int]:
        """Number of records by kind of change, all of `CHANGES`."""
        changes = self.table["change"].to_pylist()
        return {change: changes.count(change) for change in CHANGES}


def compare_versions(
    blobs: Blobs, old: Index, new: Index, record_of: Callable[[_Row], Record]
) -> VersionDiff:
    """Returns what changed.

    Args:
      blobs: the store's files.
      old: the index to start from.
      new: the index to get to.
      record_of: gives the record that an index row describes.
    Raises:
      CorruptDataError: something that is read is damaged.
    """
    schema = _joined_schema(old, new)
    only = [sorted(set(a.files) - set(b.files)) for a, b in ((old, new), (new, old))]
    before, after = (read_files(blobs, names, _light(schema)) for names in only)
    changes, why = _changes(before, after)
    replaced = pa.array(sorted(name for name, kind in changes.items() if kind == REPLACED), pa.string())
    rows = [_rows_of(blobs, names, schema, replaced) for names in only]
    for one, other in zip(*(_one_by_one(table) for table in rows), strict=True):
        why[one["record_id"].to_pylist()[0]] = list(_reasons(one, other, record_of))

    first, last = sorted((old.version, new.version))
    commits = [commit for commit in (new if new.version == last else old).log() if commit.version > first]
    touched: dict[str, list[int]] | None = None
    if first >= oldest_version(blobs):
        touched = {name: [] for name in changes}
        wanted = pa.array(sorted(changes), pa.string())
        for commit in commits:
            sides = (sorted(commit.removed), sorted(commit.added))
            steps = (_rows_of(blobs, names, _light(schema), wanted) for names in sides)
            for name in _changes(*steps)[0]:
                touched[name].append(commit.version)
    entries = [entry_of(commit, ()) for commit in commits]
    jobs = {entry.version: entry.job_id for entry in entries}
    table = [
        {
            "record_id": name,
            "change": changes[name],
            "why": why.get(name, []),
            "versions": None if touched is None else touched[name],
            "job_ids": None if touched is None else _jobs(jobs[version] for version in touched[name]),
        }
        for name in sorted(changes)
    ]
    return VersionDiff(
        old=old.version,
        new=new.version,
        table=pa.Table.from_pylist(table, schema=DIFF_SCHEMA),
        commits=entries,
    )


def _jobs(names: Iterable[str]) -> list[str]:
    """Returns each job once, in the order of its first commit; commits without one are left out."""
    return [name for name in dict.fromkeys(names) if name]


def _joined_schema(old: Index, new: Index) -> pa.Schema:
    """Returns the columns of both; a column that one does not have yet is null there."""
    return pa.schema(list({field.name: field for field in (*old.schema, *new.schema)}.values()))


def _light(schema: pa.Schema) -> pa.Schema:
    """Returns the columns that tell whether a record changed."""
    names = {"record_id", "fingerprint", *_annotations(schema)}
    # A column that came later is null in older rows, whatever it is in a new table.
    return pa.schema([field.with_nullable(True) for field in schema if field.name in names])


def _annotations(schema: pa.Schema) -> list[str]:
    return ["neff", *(name for name in schema.names if name not in INDEX_SCHEMA.names)]


def _rows_of(blobs: Blobs, names: Sequence[str], schema: pa.Schema, ids: pa.Array) -> pa.Table:
    """Returns the rows of some records that files hold, sorted by id; one file in memory at a time."""
    found = [schema.empty_table()]
    for name in names if len(ids) else ():
        rows = read_files(blobs, [name], schema)
        found.append(rows.filter(pc.is_in(rows["record_id"], value_set=ids)))
    return pa.concat_tables(found).sort_by("record_id")


def _one_by_one(rows: pa.Table) -> Iterator[pa.Table]:
    return (rows.slice(at, 1) for at in range(len(rows)))


def _changes(before: pa.Table, after: pa.Table) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns the kind of change of each record that differs, and the columns in which annotated ones do."""
    position = pc.index_in(after["record_id"], value_set=before["record_id"])
    here = pc.index_in(before["record_id"], value_set=after["record_id"])
    changes = dict.fromkeys(after["record_id"].filter(pc.is_null(position)).to_pylist(), ADDED)
    changes |= dict.fromkeys(before["record_id"].filter(pc.is_null(here)).to_pylist(), REMOVED)
    both = after.filter(pc.is_valid(position))
    then = before.take(position.drop_null())
    ids = both["record_id"]
    why: dict[str, list[str]] = {}
    for column in _annotations(both.schema):
        for name in ids.filter(_differs(then[column], both[column])).to_pylist():
            changes[name] = ANNOTATED
            why.setdefault(name, []).append(column)
    for name in ids.filter(_differs(then["fingerprint"], both["fingerprint"])).to_pylist():
        changes[name] = REPLACED
        why.pop(name, None)
    return changes, why


def _differs(a: pa.ChunkedArray, b: pa.ChunkedArray) -> pa.Array:
    """Returns where two columns differ; null equals null, NaN equals NaN."""
    if pa.types.is_nested(a.type):
        pairs = zip(a.to_pylist(), b.to_pylist(), strict=True)
        return pa.array([repr(one) != repr(other) for one, other in pairs], pa.bool_())
    unequal = pc.fill_null(pc.not_equal(a, b), False)
    if pa.types.is_floating(a.type):
        unequal = pc.and_not(unequal, pc.fill_null(pc.and_(pc.is_nan(a), pc.is_nan(b)), False))
    return pc.or_(unequal, pc.xor(pc.is_null(a), pc.is_null(b)))


def _reasons(before: pa.Table, after: pa.Table, record_of: Callable[[_Row], Record]) -> Iterator[str]:
    """Yields in what two records of one id differ; each table is the index row of one."""
    (one,), (other,) = before.to_pylist(), after.to_pylist()
    # Made only where the index does not suffice: making them opens their parts.
    both = functools.cache(lambda: (record_of(one), record_of(other)))
    yield from (name for name in TEXTS if one[name] != other[name])
    if one["depth"] != other["depth"]:
        yield "depth"
    else:
        shape = ("length", "gap_fraction")
        if any(one[name] != other[name] for name in shape) or not _same_alignment(*both()):
            yield "alignment"
        old, new = both()
        if not _same_rows(old.part, new.part, before, after):
            yield "rows"
    if one["databases"] != other["databases"]:
        yield "databases"
    if json.loads(one["extra"]) != json.loads(other["extra"]):
        yield "extra"
    if one["structure"] is None or other["structure"] is None:
        if one["structure"] is not other["structure"]:
            yield "structure"
    elif json.loads(one["structure"]) != json.loads(other["structure"]) or not _same_atoms(*both()):
        yield "structure"
    if one["templates"] is None or other["templates"] is None:
        if one["templates"] is not other["templates"]:
            yield "templates"
    elif not _same_templates(*both()):
        yield "templates"


def _same_alignment(old: Record, new: Record) -> bool:
    """Returns whether two alignments of the same shape hold the same tokens and deletions."""
    # Stored order is the same for both: it follows from the store, the id and the depth. Reading it is fast,
    # whatever the order is.
    hits = old.depth - 1
    band = max(old.part.settings.tile_rows, _BAND_CELLS // old.length)
    for start in range(0, max(hits, 1), band):
        num_rows = 1 + min(band, hits - start)
        a, b = (record.slab(start=start, num_rows=num_rows) for record in (old, new))
        if not (np.array_equal(a.msa, b.msa) and np.array_equal(a.deletions, b.deletions)):
            return False
    return True


def _same_rows(old: PartReader, new: PartReader, before: pa.Table, after: pa.Table) -> bool:
    columns = [name for name in ROWS_SCHEMA.names if name not in ("record_id", "rank")]
    return _same_batches(rows_in_part(old, before, columns), rows_in_part(new, after, columns))


def _same_batches(ours: Iterator[pa.RecordBatch], theirs: Iterator[pa.RecordBatch]) -> bool:
    """Returns whether two streams hold the same rows, however they are cut into batches."""
    a, b = next(ours, None), next(theirs, None)
    while a is not None and b is not None:
        size = min(len(a), len(b))
        if not a.slice(0, size).equals(b.slice(0, size)):
            return False
        a = a.slice(size) if size < len(a) else next(ours, None)
        b = b.slice(size) if size < len(b) else next(theirs, None)
    return a is b


def _same_atoms(old: Record, new: Record) -> bool:
    a, b = old.structure(), new.structure()
    return a is not None and b is not None and a.fingerprint == b.fingerprint


def _same_templates(old: Record, new: Record) -> bool:
    a, b = old.templates(), new.templates()
    return a is not None and b is not None and a.fingerprint == b.fingerprint
