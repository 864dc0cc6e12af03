"""Rebuilds what of the index can be rebuilt: settings, Delta's checkpoints, a lost or unreadable index.

Owns nothing that readers use. Invariants: nothing is thrown away (a damaged index is moved aside), and
nothing is guessed: where parts disagree about a record, the caller decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from foldfeed.feature_store.care.verify_index import check_checkpoints, needed_files, readable_versions
from foldfeed.feature_store.errors import (
    NOT_DAMAGE,
    CommitConflictError,
    CorruptDataError,
    FoldfeedError,
    FormatVersionError,
    NotAStoreError,
)
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.files import INDEX_FOLDER, read_checked
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER
from foldfeed.feature_store.storage import LAST_FILE, TEMPORARY_PREFIX, Blobs

ON_AMBIGUOUS = ("error", "newest", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartRows:
    """Index rows that parts say of themselves.

    Attributes:
      rows: one per record id, ready to be committed.
      ambiguous: ids that several parts hold with different content.
      unreadable: parts whose rows cannot be read.
    """

    rows: list[dict[str, Any]]
    ambiguous: tuple[str, ...]
    unreadable: tuple[str, ...]


def part_ids_of(blobs: Blobs) -> list[str]:
    """Returns the ids of all parts that lie in the store, named by the index or not."""
    return [name for name in blobs.list(PARTS_FOLDER) if not name.startswith(TEMPORARY_PREFIX)]


def rows_of_parts(blobs: Blobs, part_ids: Sequence[str], on_ambiguous: str) -> PartRows:
    """Returns the index rows of the records of parts.

    Args:
      blobs: the store's files.
      part_ids: parts, in any order.
      on_ambiguous: for an id that parts hold with different content: ``newest`` takes the part that was
        written or wanted last, ``skip`` takes none, ``error`` raises.
    Raises:
      CommitConflictError: an ambiguous id and ``error``.
    """
    if on_ambiguous not in ON_AMBIGUOUS:
        raise ValueError(f"on_ambiguous {on_ambiguous!r} is not one of {', '.join(ON_AMBIGUOUS)}")
    found: dict[str, list[dict[str, Any]]] = {}
    unreadable = []
    for part_id in sorted(part_ids, key=lambda name: (_modified(blobs, name), name)):
        try:
            rows = PartReader(blobs, part_id).index_rows()
        except (CorruptDataError, FormatVersionError, ValueError):
            unreadable.append(part_id)
            continue
        for row in rows:
            found.setdefault(row["record_id"], []).append(row | {"part_id": part_id, "job_id": "repair"})
    ambiguous = sorted(name for name, rows in found.items() if len({row["fingerprint"] for row in rows}) > 1)
    if ambiguous and on_ambiguous == "error":
        raise CommitConflictError(
            f"{len(ambiguous)} record id(s) lie in several parts with different content, e.g. "
            f"{ambiguous[0]!r}: the lost index knew which one was meant. Say 'newest' to take the part "
            "that was written last, or 'skip' to take none"
        )
    dropped = set(ambiguous) if on_ambiguous == "skip" else set()
    return PartRows(
        rows=[rows[-1] for name, rows in found.items() if name not in dropped],
        ambiguous=tuple(ambiguous),
        unreadable=tuple(unreadable),
    )


def _settings_bytes(blobs: Blobs) -> bytes:
    """Returns ``foldfeed.json``, written again from the settings of a part when it is lost or unreadable."""
    with _passing_over_damage():
        data = blobs.read(SETTINGS_FILE)
        StoreSettings.from_json(data, blobs.url)
        return data
    for part_id in part_ids_of(blobs):
        with _passing_over_damage():
            data = PartReader(blobs, part_id).settings.to_json()
            blobs.write_atomic(SETTINGS_FILE, data)
            return data
    raise NotAStoreError(blobs.url, f"it has no readable {SETTINGS_FILE} and no readable part")


@contextlib.contextmanager
def _passing_over_damage() -> Iterator[None]:
    """Ends the block at damage, and at nothing else, without an error."""
    try:
        yield
    except NOT_DAMAGE:
        raise
    except (FileNotFoundError, FoldfeedError):
        # The caller goes on to another way.
        return


def _modified(blobs: Blobs, part_id: str) -> float:
    try:
        return blobs.info(f"{PARTS_FOLDER}/{part_id}/{LAST_FILE}").modified_s
    except FileNotFoundError:
        return 0.0


def rebuild_index(blobs: Blobs, on_ambiguous: str) -> PartRows:
    """Makes a new index from what the parts say of themselves; the old one, if any, is moved aside.

    History, tags, annotations and deletions of the old index are lost: every record of every part is visible.
    """
    found = rows_of_parts(blobs, part_ids_of(blobs), on_ambiguous)
    settings = _settings_bytes(blobs)
    _prove_creation(blobs, hashlib.sha256(settings).hexdigest())
    if blobs.exists(INDEX_FOLDER):
        aside = f"{INDEX_FOLDER}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
        if not blobs.rename_folder(INDEX_FOLDER, aside):
            for file in blobs.walk(INDEX_FOLDER):
                blobs.write_atomic(aside + file.path.removeprefix(INDEX_FOLDER), blobs.read(file.path))
            blobs.delete(INDEX_FOLDER)
    # It speaks of the old history; the versions of the new one begin at 0 again, and all are readable.
    blobs.delete(versions.RETENTION_FILE)
    index = Index.create(blobs.url, hashlib.sha256(settings).hexdigest())
    if found.rows:
        index.commit(
            pa.Table.from_pylist(found.rows, schema=INDEX_SCHEMA),
            job_id="repair",
            message=f"index rebuilt from {len(part_ids_of(blobs))} parts",
            on_existing="error",
        )
    return found


def _prove_creation(blobs: Blobs, settings_sha256: str) -> None:
    """Makes an index beside the store's and removes it, so that what hinders that comes up in time."""
    folder = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        Index.create(f"{blobs.url}/{folder}", settings_sha256)
    finally:
        blobs.delete(folder)


def restore_settings(blobs: Blobs, dry_run: bool) -> bool:
    """Writes ``foldfeed.json`` again when it is not what the index says; returns whether that was so.

    A part repeats the settings, and the index knows the sha256 of the file.
    """
    wanted = _settings_sha256(blobs)
    if wanted is None:
        return False
    try:
        if hashlib.sha256(blobs.read(SETTINGS_FILE)).hexdigest() == wanted:
            return False
    except FileNotFoundError:
        # Lost: the same as wrong.
        pass
    for part_id in part_ids_of(blobs):
        try:
            data = PartReader(blobs, part_id).settings.to_json()
        except NOT_DAMAGE:
            raise
        except FoldfeedError:
            continue
        if hashlib.sha256(data).hexdigest() == wanted:
            if not dry_run:
                blobs.write_atomic(SETTINGS_FILE, data)
            return True
    return False


def _settings_sha256(blobs: Blobs) -> str | None:
    try:
        return Index.open(blobs.url, None).head.note.settings_sha256
    except (CorruptDataError, NotAStoreError):
        return None


def restore_index_files(blobs: Blobs, source: Blobs, dry_run: bool) -> list[str]:
    """Takes damaged or missing index files that readable versions need from a copy; returns their paths.

    A file is named by the sha256 of its bytes, so what is taken is what was there. Copies that were made file
    by file have all of them; `foldfeed copy` writes an index of its own, which may have the same file or not.
    """
    try:
        log = Index.open(blobs.url, None).log()
    except (CorruptDataError, NotAStoreError):
        # Without the log nobody knows which files are meant.
        return []
    restored = []
    for name in sorted(needed_files(log, readable_versions(blobs, log))):
        try:
            read_checked(blobs, name)
        except CorruptDataError:
            try:
                data = read_checked(source, name)
            except CorruptDataError:
                # The copy does not have it either; `verify` goes on to report it.
                continue
            if not dry_run:
                blobs.write_atomic(f"{INDEX_FOLDER}/{name}", data)
            restored.append(f"{INDEX_FOLDER}/{name}")
    return restored


def store_settings(blobs: Blobs) -> StoreSettings:
    """Returns the settings that ``foldfeed.json`` holds."""
    return StoreSettings.from_json(blobs.read(SETTINGS_FILE), blobs.url)


def drop_wrong_checkpoints(blobs: Blobs, dry_run: bool) -> list[str]:
    """Removes checkpoints that differ from the commits they sum up; delta-rs reads the commits then.

    Nothing is lost: a checkpoint says nothing that the commits do not, and the next one is written in due
    course. Nothing is removed unless every commit is intact.
    """
    newest = -1
    names = set(blobs.list(index_log.LOG_FOLDER))
    while index_log.log_path(newest + 1).rsplit("/", 1)[-1] in names:
        newest += 1
    try:
        log = index_log.read_log(blobs, newest)
    except CorruptDataError:
        return []
    wrong = sorted({problem.where for problem in check_checkpoints(blobs, log)})
    if wrong and not dry_run:
        blobs.delete(f"{index_log.LOG_FOLDER}/_last_checkpoint")
        for path in wrong:
            blobs.delete(path)
    return wrong
