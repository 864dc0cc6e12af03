"""Checks of one part, from sizes to a second writing of everything that is derived.

Owns the checks; `verify` decides which parts and how thoroughly. Reads only. Nothing here raises for damage:
it is returned as `Problem`s, because the next part wants to be checked too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from foldfeed.feature_store.errors import CorruptDataError, FormatVersionError
from foldfeed.feature_store.format.effective_rows import measure_effective_rows
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.format.schema import TEMPLATE_AXIS
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.rebuild import load_record, rewritten
from foldfeed.feature_store.parts.shard_reader import ShardReader
from foldfeed.feature_store.storage import Blobs

LEVELS = ("quick", "full", "deep")
_HASH_PIECE_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
      where: file, array or record, relative to the store.
      reason: the check that failed.
      record_ids: visible records that cannot be read in full because of it, as far as that is known.
      versions: the first and the last readable version that shows what is damaged; None where it is not one
        of versions, or where they were not looked for.
    """

    where: str
    reason: str
    record_ids: tuple[str, ...] = ()
    versions: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartCheck:
    """What `check_part` found in one part.

    Attributes:
      part_id: the part.
      problems: empty when it is as it was written.
      num_files: files looked at.
      num_bytes: bytes read or, at level ``quick``, vouched for by size alone.
    """

    part_id: str
    problems: tuple[Problem, ...]
    num_files: int
    num_bytes: int


def check_part(
    blobs: Blobs,
    part_id: str,
    rows: Sequence[Mapping[str, Any]],
    level: str,
    settings: StoreSettings | None = None,
) -> PartCheck:
    """Checks a part and the index rows that point into it.

    Args:
      blobs: the store's files.
      part_id: the part.
      rows: index rows of the visible records in it.
      level: ``quick``: metadata, file sizes, shard indices, index rows against the part's own copy of them.
        ``full``: also the sha256 of every file and the checksum of every chunk. ``deep``: also every
        record's fingerprint, and every array against one that is derived anew from the alignments.
      settings: of the store, which a part must share; None when they are not known.
    """
    try:
        part = PartReader(blobs, part_id)
    except (CorruptDataError, FormatVersionError) as error:
        everything = tuple(row["record_id"] for row in rows)
        problem = _problem(error, f"parts/{part_id}/zarr.json", everything)
        return PartCheck(part_id=part_id, problems=(problem,), num_files=1, num_bytes=0)
    problems = [*_check_sizes(blobs, part), *_check_shard_indices(part), *_check_rows(part, rows)]
    if level != "quick":
        problems += [*_check_hashes(blobs, part), *_check_chunks(part)]
    if level == "deep" and not problems:
        problems += _check_derived(blobs, part, rows)
    if problems:
        problems = _blame(part, rows, problems)
    if settings is not None and part.settings != settings:
        # Its records can be read, but not by a reader that goes by the store's own settings.
        reason = f"it was written with {part.settings}, the store has {settings}; `compact` writes it anew"
        problems.append(Problem(where=part.path, reason=reason))
    num_bytes = sum(entry["bytes"] for entry in part.files.values())
    return PartCheck(
        part_id=part_id, problems=tuple(problems), num_files=len(part.files) + 1, num_bytes=num_bytes
    )


def unreadable_records(part: PartReader, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns why, by id, for records that cannot be read in full or do not match their fingerprint."""
    found = {}
    for row in rows:
        try:
            load_record(part, row)
            _read_sidecars(part, row)
        except CorruptDataError as error:
            found[row["record_id"]] = f"{error.where}: {error.reason}"
    return found


def _read_sidecars(part: PartReader, row: Mapping[str, Any]) -> None:
    first, stop = row["first_residue"], row["first_residue"] + row["length"]
    for array in part.arrays.values():
        if array.spec.dims[0] == "residue":
            array.read(first, stop)


def _problem(error: CorruptDataError | FormatVersionError, where: str, ids: tuple[str, ...] = ()) -> Problem:
    if isinstance(error, CorruptDataError):
        return Problem(where=error.where, reason=error.reason, record_ids=ids)
    return Problem(where=where, reason=str(error), record_ids=ids)


def _check_sizes(blobs: Blobs, part: PartReader) -> list[Problem]:
    found = []
    for path, entry in part.files.items():
        where = f"{part.path}/{path}"
        try:
            size = blobs.info(where).num_bytes
        except FileNotFoundError:
            found.append(Problem(where=where, reason="the file is missing"))
            continue
        if size != entry["bytes"]:
            found.append(Problem(where=where, reason=f"it has {size} bytes, not {entry['bytes']}"))
    return found


def _check_shard_indices(part: PartReader) -> list[Problem]:
    found = []
    for array in part.arrays.values():
        try:
            array.bytes_stored([])
        except CorruptDataError as error:
            found.append(_problem(error, part.path))
    return found


def _check_rows(part: PartReader, rows: Sequence[Mapping[str, Any]]) -> list[Problem]:
    try:
        own = {row["record_id"]: row for row in part.index_rows()}
    except (CorruptDataError, ValueError) as error:
        reason = error.reason if isinstance(error, CorruptDataError) else str(error)
        return [Problem(where=f"{part.path}/record_json", reason=reason)]
    found = []
    for row in rows:
        name = row["record_id"]
        there = own.get(name)
        if there is None:
            reason = "the index says the record is in this part, and it is not"
            found.append(Problem(where=part.path, reason=reason, record_ids=(name,)))
            continue
        differ = [key for key in there if key in row and row[key] != there[key]]
        if differ:
            reason = f"index and part differ in {', '.join(differ)} of record {name!r}"
            found.append(Problem(where=part.path, reason=reason, record_ids=(name,)))
    return found


def file_sha256(blobs: Blobs, path: str) -> str:
    """Returns the sha256 (hex) of a file, read in pieces."""
    read = blobs.open_range(path)
    digest = hashlib.sha256()
    start = 0
    while piece := read(start, _HASH_PIECE_BYTES):
        digest.update(piece)
        start += len(piece)
        if len(piece) < _HASH_PIECE_BYTES:
            break
    return digest.hexdigest()


def _check_hashes(blobs: Blobs, part: PartReader) -> list[Problem]:
    found = []
    for path, entry in part.files.items():
        where = f"{part.path}/{path}"
        try:
            if file_sha256(blobs, where) != entry["sha256"]:
                found.append(Problem(where=where, reason="its bytes do not match their sha256"))
        except FileNotFoundError:
            # `_check_sizes` has said so.
            continue
    return found


def _check_chunks(part: PartReader) -> list[Problem]:
    found = []
    for array in part.arrays.values():
        for number in range(array.spec.num_chunks(array.length)):
            try:
                for _ in array.chunks([number]):
                    pass
            except CorruptDataError as error:
                found.append(_problem(error, part.path))
    return found


def _check_derived(blobs: Blobs, part: PartReader, rows: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Writes the part anew from its records and compares every array.

    Every file's sha256 was checked before: a copy with the part's own id is the part, bit for bit.
    """
    visible = {row["record_id"] for row in rows}
    found: list[Problem] = []

    def check(record: MsaRecord) -> None:
        found.extend(_check_neff(part, record, visible))

    try:
        with rewritten(blobs, part.part_id, check) as (scratch, new_id):
            if new_id != part.part_id:
                other = PartReader(scratch, new_id)
                for name, array in part.arrays.items():
                    found += _compare(part, array, other.arrays[name], rows)
    except CorruptDataError as error:
        # It ends at the first record; all of them are named.
        broken = unreadable_records(part, part.index_rows()) or {error.where: error.reason}
        return [
            Problem(
                where=f"{part.path}, record {name}" if name != error.where else name,
                reason=reason,
                record_ids=(name,) if name in visible else (),
            )
            for name, reason in broken.items()
        ]
    return found


def _check_neff(part: PartReader, record: MsaRecord, visible: Container[str]) -> list[Problem]:
    """Computes N_eff anew where it is stored: rewriting a record takes it over as it is."""
    if record.neff is None:
        return []
    derived = measure_effective_rows(record.msa)
    same = np.array_equal(derived.per_residue, record.neff.per_residue)
    if same and derived.total == record.neff.total:
        return []
    ids = (record.record_id,) if record.record_id in visible else ()
    where = f"{part.path}, record {record.record_id}"
    return [Problem(where=where, reason="its N_eff is not that of its alignment", record_ids=ids)]


def _compare(
    part: PartReader, array: ShardReader, other: ShardReader, rows: Sequence[Mapping[str, Any]]
) -> list[Problem]:
    name = array.spec.name
    if array.length != other.length:
        reason = f"it has {array.length} entries; derived from the records it has {other.length}"
        return [Problem(where=f"{part.path}/{name}", reason=reason)]
    size = array.spec.chunk[0]
    for number in range(array.spec.num_chunks(array.length)):
        window = number * size, min((number + 1) * size, array.length)
        if array.read(*window).tobytes() != other.read(*window).tobytes():
            span = range(number * size, (number + 1) * size)
            return [
                Problem(
                    where=f"{part.path}/{name}, chunk {number}",
                    reason="it differs from the same array derived anew from the alignments",
                    record_ids=_records_in(array, span, rows),
                )
            ]
    return []


def _records_in(array: ShardReader, span: range, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Returns the records with residues or rows in that stretch of an array's first axis."""
    columns = {
        "residue": ("first_residue", "length"),
        "row": ("first_row", "depth"),
        TEMPLATE_AXIS: ("first_template", "num_templates"),
    }.get(array.spec.dims[0])
    if columns is None:
        return ()
    first, count = columns
    # Null where a record has none of it.
    places = ((row["record_id"], row.get(first), row.get(count)) for row in rows)
    return tuple(
        name
        for name, start, size in places
        if start is not None and size is not None and start < span.stop and start + size > span.start
    )


def _blame(part: PartReader, rows: Sequence[Mapping[str, Any]], problems: list[Problem]) -> list[Problem]:
    """Names the records that suffer from damage that is known by file or chunk only."""
    broken = unreadable_records(part, rows)
    named = {name for problem in problems for name in problem.record_ids}
    for name in sorted(broken.keys() - named):
        problems.append(Problem(where=f"{part.path}, record {name}", reason=broken[name], record_ids=(name,)))
    return problems
