"""`repair`: rebuilds what can be rebuilt exactly, and takes what cannot out of sight.

Owns the order of the steps. Without flags only exact repairs are made: files whose restored bytes hash to
what they should. What may lose or change something is done on request alone: ``quarantine`` deletes damaged
records from the index (the parts stay), ``roll_back`` goes back to the last version that can be read,
``rebuild_index`` makes a new index, ``add_missing`` makes records visible that no row names.

Repairs what the newest version needs, or another version: then that version can be read again, and no version
changes, because none ever does.
"""

from __future__ import annotations

import dataclasses
import os

import pyarrow as pa

from foldfeed.feature_store.care.garbage import restore_set_aside
from foldfeed.feature_store.care.repair_index import (
    drop_wrong_checkpoints,
    part_ids_of,
    rebuild_index,
    restore_index_files,
    restore_settings,
    rows_of_parts,
    store_settings,
)
from foldfeed.feature_store.care.repair_parts import restore_part
from foldfeed.feature_store.care.roll_back import RollBack, roll_back
from foldfeed.feature_store.care.verify import VerifyReport, verify
from foldfeed.feature_store.errors import CorruptDataError, NotAStoreError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import SETTINGS_FILE
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.presence import anything_left
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import Blobs, open_blobs

# A message of the log names this many quarantined records in full; the report has all of them.
_NAMED = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What `repair` did.

    Attributes:
      before: what `verify` found first (after restoring what it needs to look at all).
      restored: files that are again what they were.
      quarantined: records that were deleted from the index because they are damaged.
      added: records made visible again.
      index_rebuilt: there is a new index.
      rolled_back: what going back to an older version took out of sight; None when nothing went back.
      ambiguous: ids that several parts hold with different content.
      after: what `verify` finds now; equal to ``before`` in a dry run.
      dry_run: nothing was done; the other fields say what would be.
    """

    before: VerifyReport
    restored: tuple[str, ...]
    quarantined: tuple[str, ...]
    added: tuple[str, ...]
    index_rebuilt: bool
    rolled_back: RollBack | None
    ambiguous: tuple[str, ...]
    after: VerifyReport
    dry_run: bool


def repair(
    store_url: str | os.PathLike[str],
    *,
    version: int | str | None = None,
    source_url: str | os.PathLike[str] | None = None,
    quarantine: bool = False,
    roll_back_index: bool = False,
    rebuild_lost_index: bool = False,
    add_missing: bool = False,
    on_ambiguous: str = "error",
    dry_run: bool = False,
    progress: Progress = silent,
) -> RepairReport:
    """Repairs a store.

    Args:
      store_url: the store.
      version: a version or tag, the newest when None: which one's parts are looked at and restored, bit for
        bit. No commit is made for another version than the newest. `verify` with all versions tells which
        versions show a damaged part; restoring it for one of them restores it for all.
      source_url: another store that holds the same parts (a copy): damaged files are taken from it, files of
        the index, too, for all readable versions (a copy that was made file by file has all of them).
      quarantine: delete from the index, in one transaction, the records that stay damaged.
      roll_back_index: when the newest version cannot be read, go back to the last one that can, in a new
        commit; see `care.roll_back`. Records of later versions are named and stay in their parts.
      rebuild_lost_index: make a new index from the parts when the index cannot be read.
      add_missing: make records visible that parts hold and the index does not name: rows that got lost, but
        also records that were deleted on purpose.
      on_ambiguous: ``error``, ``newest`` or ``skip``, for ids that several parts hold with different content.
      dry_run: only say what would be done.
      progress: told how far it is.
    Raises:
      CommitConflictError: see ``on_ambiguous``.
      CorruptDataError: the log, or the tag that names the version, is damaged.
      NotAStoreError: there is no store, or none at ``source_url``.
      ValueError: ``roll_back_index`` and ``rebuild_lost_index``: one keeps the history, one does not. No such
        version. A version together with what changes the newest one: ``quarantine``, ``roll_back_index``,
        ``rebuild_lost_index`` or ``add_missing``.
    """
    if version is not None:
        _refuse_changes(
            version,
            quarantine=quarantine,
            roll_back_index=roll_back_index,
            rebuild_lost_index=rebuild_lost_index,
            add_missing=add_missing,
        )
    if roll_back_index and rebuild_lost_index:
        raise ValueError(
            "roll_back_index and rebuild_lost_index exclude each other: the first keeps the history up to "
            "the last good version, the second makes a new one; try the first"
        )
    blobs = open_blobs(store_url)
    source = None if source_url is None else open_blobs(source_url)
    if source is not None and not anything_left(source):
        raise NotAStoreError(source.url, "there is nothing of a store that files could be taken from")
    restored = [*drop_wrong_checkpoints(blobs, dry_run)]
    if version is not None:
        # Now, so that nothing else is done for a version that is not there.
        versions.open_index(blobs.url, version)
    if restore_settings(blobs, dry_run):
        restored.append(SETTINGS_FILE)
    if source is not None:
        restored += restore_index_files(blobs, source, dry_run)
    ambiguous: tuple[str, ...] = ()
    lost = not _readable(blobs, version)
    rolled_back = roll_back(blobs, dry_run) if lost and roll_back_index else None
    lost = not _readable(blobs, version) if rolled_back else lost
    if lost and rebuild_lost_index and not dry_run:
        ambiguous = rebuild_index(blobs, on_ambiguous).ambiguous
    if not lost and not dry_run:
        parts = versions.open_index(blobs.url, version).rows(["part_id"])["part_id"]
        restore_set_aside(blobs, set(parts.to_pylist()))
    before = verify(blobs.url, level="full", version=version, progress=progress)
    restored += _restore_parts(blobs, before, source, dry_run)
    added: tuple[str, ...] = ()
    if add_missing and before.version is not None:
        added, ambiguous = _add_missing(blobs, on_ambiguous, dry_run)
    after = before if dry_run else verify(blobs.url, level="full", version=version, progress=progress)
    quarantined: tuple[str, ...] = ()
    if quarantine and after.damaged_records:
        quarantined = tuple(after.damaged_records)
        if not dry_run:
            _quarantine(blobs, after)
            after = verify(blobs.url, level="full", progress=progress)
    return RepairReport(
        before=before,
        restored=tuple(restored),
        quarantined=quarantined,
        added=added,
        index_rebuilt=lost and rebuild_lost_index,
        rolled_back=rolled_back,
        ambiguous=ambiguous,
        after=after,
        dry_run=dry_run,
    )


def _refuse_changes(version: int | str, **asked: bool) -> None:
    """Raises ValueError for what would change the newest version while another one is to be repaired."""
    given = [name for name, value in asked.items() if value]
    if given:
        raise ValueError(
            f"{' and '.join(given)} would change the newest version, and version {version!r} was asked for, "
            "which never changes. Restore its files (source_url), or leave the version out"
        )


def _readable(blobs: Blobs, version: int | str | None) -> bool:
    try:
        versions.open_index(blobs.url, version).rows(["record_id"])
    except (CorruptDataError, NotAStoreError):
        # Nothing else says anything about what is stored, and a new index would throw the history away.
        return False
    return True


def _restore_parts(blobs: Blobs, report: VerifyReport, source: Blobs | None, dry_run: bool) -> list[str]:
    damaged = {
        problem.where.split("/")[1].split(",")[0] for problem in report.problems if "parts/" in problem.where
    }
    restored: list[str] = []
    for part_id in sorted(damaged):
        restored += restore_part(blobs, part_id, store_settings(blobs), source, dry_run)
    return restored


def _add_missing(blobs: Blobs, on_ambiguous: str, dry_run: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the ids that became visible, and those that several parts hold with different content."""
    index = Index.open(blobs.url, None)
    visible = index.rows(["record_id"])
    there = set(visible["record_id"].to_pylist())
    found = rows_of_parts(blobs, part_ids_of(blobs), "newest")
    absent = [row for row in found.rows if row["record_id"] not in there]
    unclear = sorted({row["record_id"] for row in absent} & set(found.ambiguous))
    if unclear:
        # Only now the choice matters: ambiguous ids that are visible need no decision.
        chosen = (
            rows_of_parts(blobs, part_ids_of(blobs), on_ambiguous).rows
            if on_ambiguous != "newest"
            else found.rows
        )
        absent = [row for row in chosen if row["record_id"] not in there]
    if absent and not dry_run:
        index.commit(
            pa.Table.from_pylist(absent, schema=INDEX_SCHEMA),
            job_id="",
            message=f"{len(absent)} records made visible again, as their parts hold them",
            on_existing="skip",
        )
    return tuple(sorted(row["record_id"] for row in absent)), tuple(unclear)


def _quarantine(blobs: Blobs, report: VerifyReport) -> None:
    names = report.damaged_records
    reasons = {name: problem for problem in report.problems for name in problem.record_ids}
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    first = reasons[names[0]]
    Index.open(blobs.url, None).delete(
        names,
        operation="quarantine",
        message=f"damaged: {', '.join(names[:_NAMED])}{more} ({first.where}: {first.reason})",
        missing_ok=True,
    )
