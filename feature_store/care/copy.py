"""`copy`: one version of a store, or some of its records, to another place, with resume.

Owns the order: parts first, each checked byte by byte against its own metadata on the way, the index last, in
one transaction. So an interrupted copy is an older (or empty) store beside parts that nothing names yet, and
the same command goes on where it stopped. Copies the chosen version with its tags, and all named sets and
splits (`care.copy_names`); other versions stay behind.

Of a selection no other record leaves the source (named sets and splits still give ids of others): a part that
holds other records, too, is not copied, its chosen records are written into new parts (`care.rewrite`), each
checked against its fingerprint.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.care.copy_names import Names, collect_names, write_names
from foldfeed.feature_store.care.rewrite import (
    DEFAULT_TARGET_BYTES,
    Group,
    fill,
    live_parts,
    places_in,
    read_records,
    relocated,
)
from foldfeed.feature_store.care.verify_parts import file_sha256
from foldfeed.feature_store.errors import CorruptDataError, FormatVersionError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER, mark_wanted
from foldfeed.feature_store.parts.writer import WrittenPart, write_part
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import LAST_FILE, Blobs, open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore
from foldfeed.feature_store.store.selection import choose_ids

_PIECE_BYTES = 8 << 20
_THREADS = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CopyReport:
    """What `copy_store` did.

    Attributes:
      source_version: version of the source that was copied.
      version: version of the copy after it.
      num_chosen: records of that version that were to be copied.
      num_added: records that the copy did not have, or had with other content.
      parts_copied: parts written.
      parts_rewritten: how many of them were made anew, for chosen records whose part holds others as well.
      parts_skipped: parts that were there already, checked byte by byte.
      bytes_copied: size of the parts written.
      names_copied: paths of the sets, splits and tags that the copy did not have.
      tags_left: tags of the version that were not set, because the copy holds other records as well.
      names_known: false where the source is on a web server: which sets, splits and tags it has cannot be
        asked there, and none were copied.
    """

    source_version: int
    version: int
    num_chosen: int
    num_added: int
    parts_copied: int
    parts_rewritten: int
    parts_skipped: int
    bytes_copied: int
    names_copied: tuple[str, ...]
    tags_left: tuple[str, ...]
    names_known: bool


def copy_store(
    source_url: str | os.PathLike[str],
    target_url: str | os.PathLike[str],
    *,
    version: int | str | None = None,
    record_ids: Sequence[str] | None = None,
    where: str | None = None,
    record_set: str | None = None,
    on_existing: str = "error",
    progress: Progress = silent,
) -> CopyReport:
    """Brings the records of one version into another store, which is made when it is not there.

    All records, or those that ``record_ids``, ``where`` or ``record_set`` choose. The same copy again adds
    nothing. Named sets and splits come along whole; a set says so when it is used and not all of its records
    are there. Tags come along where the copy holds what the version holds.

    Example:
      >>> copy_store("my-store", "deep-ones", where="depth > 1000").num_chosen

    Args:
      source_url: the store to copy.
      target_url: an empty place, or a store of the same settings; its other records stay.
      version: of the source, the newest when None.
      record_ids: only these records.
      where: only records for which this SQL condition holds.
      record_set: only the records of that saved set of the source.
      on_existing: for a record that the target has with other content: ``error``, ``replace`` or ``skip``.
        A set or split never changes its meaning: ``replace`` is an error there, too.
      progress: told after each part.
    Raises:
      CorruptDataError: a part of the source is damaged; it is not published in the target.
      ValueError: more than one of ``record_ids``, ``where`` and ``record_set``.
      RecordNotFoundError, QueryError, NameNotFoundError, RecordSetMismatchError: they choose what is not
        there; nothing was written. See `store.selection.choose_ids`.
      StoreSettingsError: the target has other settings.
      CommitConflictError: see ``on_existing``; the parts are there, the index is as it was.
      NameTakenError: see ``on_existing``; nothing was copied.
      TagError: the target has a tag of the version's that names something else; all else was copied.
    """
    source = FeatureStore.open(source_url, version)
    rows = source.index_rows()
    selected = record_ids is not None or where is not None or record_set is not None
    if selected:
        ids = choose_ids(source, record_ids=record_ids, where=where, record_set=record_set)
        rows = rows.filter(pc.is_in(rows["record_id"], pa.array(ids, pa.string())))
    num_chosen = len(rows)
    target = FeatureStore.create(target_url, source.settings)
    from_blobs, to_blobs = open_blobs(source.url), open_blobs(target.url)
    loose = rows.slice(0, 0)
    if selected:
        rows, loose = _split(from_blobs, target, rows, on_existing)
    part_ids = sorted(pc.unique(rows["part_id"]).to_pylist())
    names = (
        collect_names(from_blobs, to_blobs, source.settings, source.version, on_existing)
        if from_blobs.can_list
        else Names(files={}, tags=())
    )
    sizes = _copy_parts(from_blobs, to_blobs, part_ids, progress)
    made, placed = _rewrite(from_blobs, to_blobs, loose, source.settings, progress)
    # The first part may have been here for hours by now, and a `gc` in the very moment may have taken it.
    while gone := mark_wanted(target.url, [*part_ids, *made]):
        for part_id in gone:
            if part_id in made:
                _write_group(from_blobs, to_blobs, made[part_id].rows, source.settings)
            else:
                sizes[part_id] += copy_part(from_blobs, to_blobs, part_id)
    sizes |= {part_id: group.num_bytes for part_id, group in made.items()}
    index = Index.open(target.url, None)
    index.add_columns([field for field in rows.schema if field.name not in INDEX_SCHEMA.names])
    result = index.commit(
        pa.concat_tables([rows, placed]),
        job_id="",
        message=f"copy of {source.url}, version {source.version}{_words(record_ids, where, record_set)}",
        on_existing=on_existing,
    )
    same = FeatureStore.open(target.url, result.version).fingerprint == source.fingerprint
    written = write_names(to_blobs, names, result.version if same else None)
    return CopyReport(
        source_version=source.version,
        version=result.version,
        num_chosen=num_chosen,
        num_added=result.num_added,
        parts_copied=sum(size > 0 for size in sizes.values()),
        parts_rewritten=len(made),
        parts_skipped=sum(size == 0 for size in sizes.values()),
        bytes_copied=sum(sizes.values()),
        names_copied=written,
        tags_left=() if same else tuple(tag.name for tag in names.tags),
        names_known=from_blobs.can_list,
    )


def _split(
    source: Blobs, target: FeatureStore, rows: pa.Table, on_existing: str
) -> tuple[pa.Table, pa.Table]:
    """Returns the chosen rows whose parts hold no other record, and those that are to be written anew.

    Of the others those are left out that the target would not take: it has them already, or keeps its own.
    """
    counts = {entry["values"].as_py(): entry["counts"].as_py() for entry in pc.value_counts(rows["part_id"])}
    whole = [part_id for part_id, count in counts.items() if PartReader(source, part_id).num_records == count]
    is_whole_part = pc.is_in(rows["part_id"], pa.array(whole, pa.string()))
    loose = rows.filter(pc.invert(is_whole_part))
    there = target.index_rows()
    at = pc.index_in(loose["record_id"], value_set=there["record_id"])
    same = pc.equal(there["fingerprint"].take(at), loose["fingerprint"])
    passed = pc.is_valid(at) if on_existing == "skip" else pc.fill_null(same, False)
    return rows.filter(is_whole_part), loose.filter(pc.invert(passed))


def _copy_parts(source: Blobs, target: Blobs, part_ids: list[str], progress: Progress) -> dict[str, int]:
    """Copies parts, some at a time; returns the bytes written for each."""
    sizes: dict[str, int] = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        waiting = {pool.submit(copy_part, source, target, part_id): part_id for part_id in part_ids}
        try:
            for future in concurrent.futures.as_completed(waiting):
                sizes[waiting[future]] = future.result()
                progress("copying parts", len(sizes), len(part_ids))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sizes


def _rewrite(
    source: Blobs, target: Blobs, rows: pa.Table, settings: StoreSettings, progress: Progress
) -> tuple[dict[str, Group], pa.Table]:
    """Writes records into new parts; returns what each holds, and the index rows at their new places."""
    made: dict[str, Group] = {}
    placed = [rows.slice(0, 0)]
    done = 0
    for group in fill(rows, live_parts(source, rows), DEFAULT_TARGET_BYTES):
        written = _write_group(source, target, group.rows, settings, progress, done, len(rows))
        moved = pa.Table.from_pylist(places_in(PartReader(target, written.part_id), group.rows))
        placed.append(relocated(group.rows, moved))
        made[written.part_id] = dataclasses.replace(group, num_bytes=written.num_bytes)
        done += len(group.rows)
    return made, pa.concat_tables(placed)


def _write_group(
    source: Blobs,
    target: Blobs,
    rows: pa.Table,
    settings: StoreSettings,
    progress: Progress = silent,
    done: int = 0,
    total: int = 0,
) -> WrittenPart:
    records = read_records(source, rows, progress, "writing records", done, total)
    return write_part(target.url, records, settings)


def _words(record_ids: Sequence[str] | None, where: str | None, record_set: str | None) -> str:
    """Returns what the log says about a selection."""
    if record_set is not None:
        return f", record set {record_set}"
    if where is not None:
        return f", where {where}"
    return "" if record_ids is None else f", {len(set(record_ids))} named records"


def copy_part(source: Blobs, target: Blobs, part_id: str) -> int:
    """Copies one part unless the target has it, whole; returns the bytes written.

    Raises:
      CorruptDataError: the source's part is damaged.
    """
    # Before the look: what lies there unnamed may be old enough for `gc`.
    if not mark_wanted(target.url, [part_id]) and is_whole(target, part_id):
        return 0
    part = PartReader(source, part_id)
    group = source.read(f"{part.path}/{LAST_FILE}")
    with target.staging_folder() as folder:
        for path, entry in part.files.items():
            _copy_file(source, f"{part.path}/{path}", folder / path, entry)
        (folder / LAST_FILE).write_bytes(group)
        target.publish_folder(folder, part.path)
    return len(group) + sum(entry["bytes"] for entry in part.files.values())


def is_whole(blobs: Blobs, part_id: str) -> bool:
    """Returns whether a part is there and every byte of it is as its metadata says."""
    if not blobs.exists(f"{PARTS_FOLDER}/{part_id}/{LAST_FILE}"):
        return False
    try:
        part = PartReader(blobs, part_id)
        return all(
            blobs.info(f"{part.path}/{path}").num_bytes == entry["bytes"]
            and file_sha256(blobs, f"{part.path}/{path}") == entry["sha256"]
            for path, entry in part.files.items()
        )
    except (CorruptDataError, FormatVersionError, FileNotFoundError):
        return False


def _copy_file(source: Blobs, path: str, target: Path, entry: Mapping[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        read = source.open_range(path)
        with target.open("xb") as out:
            for start in range(0, entry["bytes"], _PIECE_BYTES):
                piece = read(start, min(_PIECE_BYTES, entry["bytes"] - start))
                digest.update(piece)
                out.write(piece)
    except FileNotFoundError as error:
        raise CorruptDataError(path, "the file is missing") from error
    if digest.hexdigest() != entry["sha256"]:
        raise CorruptDataError(path, "its bytes do not match their sha256")
