"""Takes a store whose newest versions cannot be read back to the last version that can.

Owns finding that version, and the one commit that says so. Invariants: nothing is thrown away (log files of
later versions are moved aside; index files and parts stay, for `gc`'s grace period at least); what becomes
invisible is named, as far as anything readable still names it; a store whose newest version can be read is
never touched.

When: the log file of the newest commit is torn or flipped (delta-rs links it before its data is on the disk,
so a power cut can do that), or a file of the index that it names is lost.

A version number that was set aside is used again, because Delta's log has no gaps. A tag that was set on it
does not follow: it names its commit by checksum, and says so. Jobs of those versions may run again: the log
no longer knows them. ``retention.json`` is told, so that `gc` keeps what is now the newest version.
"""

from __future__ import annotations

import dataclasses
import re
import time

import pyarrow as pa

from foldfeed.feature_store.errors import CommitContentionError, CorruptDataError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index.files import INDEX_FOLDER, read_checked, read_files
from foldfeed.feature_store.index.log import Commit, CommitNote
from foldfeed.feature_store.index.table import IndexTable
from foldfeed.feature_store.index.tags import lower_oldest_version
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER, mark_wanted
from foldfeed.feature_store.storage import TEMPORARY_PREFIX, Blobs

OPERATION = "rollback"
_KEYS = pa.schema([INDEX_SCHEMA.field(name) for name in ("record_id", "fingerprint")])
_PARTS = pa.schema([INDEX_SCHEMA.field("part_id")])
_LOG_NAME = re.compile(r"(\d{20})\.(json|checkpoint\.parquet)")
_INDEX_NAME = re.compile(rb"[0-9a-f]{64}\.parquet")
# A message of the log names this many records in full; the report has all of them.
_NAMED = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """What going back to the last good version means.

    Attributes:
      good_version: the last version of which every log file and every index file is intact.
      bad_versions: versions after it, which nobody sees any more.
      set_aside: their log files and checkpoints, which are moved out of the log.
      lost: ids of records that the bad versions added or changed, sorted; their parts stay.
      unreadable: index files that the bad versions name and that are damaged or missing: nobody can tell
        which records they named.
      new_version: of the commit that goes back; None in a dry run.
    """

    good_version: int
    bad_versions: tuple[int, ...]
    set_aside: tuple[str, ...]
    lost: tuple[str, ...]
    unreadable: tuple[str, ...]
    new_version: int | None


def roll_back(blobs: Blobs, dry_run: bool) -> RollBack | None:
    """Goes back to the last good version; returns None when there is none.

    Args:
      blobs: a store whose newest version cannot be read.
      dry_run: only find out what would be done.
    Raises:
      CommitContentionError: somebody committed meanwhile; look again.
    """
    names = blobs.list(index_log.LOG_FOLDER)
    found = {name: int(match[1]) for name in names if (match := _LOG_NAME.fullmatch(name))}
    newest = max((version for name, version in found.items() if name.endswith(".json")), default=-1)
    intact = _intact_commits(blobs, newest)
    good = _last_complete(blobs, intact)
    if good is None or good == newest:
        # Nothing to go back to, or nothing that going back would mend.
        return None
    later = sorted(name for name, version in found.items() if version > good)
    if index_log.LAST_CHECKPOINT.rsplit("/", 1)[-1] in names:
        # It may name a checkpoint that goes; without it readers look at the log itself.
        later.append(index_log.LAST_CHECKPOINT.rsplit("/", 1)[-1])
    live = set(index_log.live_files(intact[: good + 1]))
    lost, unreadable = _what_is_lost(blobs, live, range(good + 1, newest + 1))
    plan = RollBack(
        good_version=good,
        bad_versions=tuple(range(good + 1, newest + 1)),
        set_aside=tuple(f"{index_log.LOG_FOLDER}/{name}" for name in later),
        lost=lost,
        unreadable=unreadable,
        new_version=None,
    )
    if dry_run:
        return plan
    # First, so that at no moment the version that is about to be the newest counts as given up.
    lower_oldest_version(blobs, good)
    _keep_parts(blobs, live)
    _set_aside(blobs, plan.set_aside)
    return dataclasses.replace(plan, new_version=_commit(blobs, plan))


def _intact_commits(blobs: Blobs, newest: int) -> list[Commit]:
    """Returns the commits from version 0 up to the first that is damaged or does not follow."""
    commits: list[Commit] = []
    for version in range(newest + 1):
        try:
            commit = index_log.read_commit(blobs, version)
        except CorruptDataError:
            break
        if commit.note.parent != (commits[-1].sha256 if commits else ""):
            # The commit before was changed without breaking its checksum; it is not what this one followed.
            commits = commits[:-1]
            break
        commits.append(commit)
    return commits


def _last_complete(blobs: Blobs, commits: list[Commit]) -> int | None:
    """Returns the last version all of whose index files are there and intact."""
    good: dict[str, bool] = {}

    def is_good(name: str) -> bool:
        if name not in good:
            try:
                read_checked(blobs, name)
                good[name] = True
            except CorruptDataError:
                good[name] = False
        return good[name]

    for commit in reversed(commits):
        if all(map(is_good, index_log.live_files(commits[: commit.version + 1]))):
            return commit.version
    return None


def _what_is_lost(blobs: Blobs, live: set[str], bad: range) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns ids that only bad versions have, and files of theirs that cannot be read.

    A damaged log file is searched for names of index files: they are hashes, and no other text looks so.
    """
    named: set[str] = set()
    for version in bad:
        try:
            data = blobs.read(index_log.log_path(version))
        except FileNotFoundError:
            continue
        named.update(match.decode() for match in _INDEX_NAME.findall(data))
    there = read_files(blobs, sorted(live), _KEYS)
    before = dict(zip(there["record_id"].to_pylist(), there["fingerprint"].to_pylist(), strict=True))
    lost: set[str] = set()
    unreadable = []
    for name in sorted(named - live):
        try:
            rows = read_files(blobs, [name], _KEYS)
        except CorruptDataError:
            unreadable.append(f"{INDEX_FOLDER}/{name}")
            continue
        pairs = zip(rows["record_id"].to_pylist(), rows["fingerprint"].to_pylist(), strict=True)
        lost.update(name for name, fingerprint in pairs if before.get(name) != fingerprint)
    return tuple(sorted(lost)), tuple(unreadable)


def _keep_parts(blobs: Blobs, live: set[str]) -> None:
    """Restarts the grace period of the parts that the good version does not name.

    Those of the lost records are garbage for `gc` from now on, and their files may be old. Which they are
    cannot be known where an index file is unreadable, so all such parts get the time that a new one gets.
    """
    named = set(read_files(blobs, sorted(live), _PARTS)["part_id"].to_pylist())
    there = [name for name in blobs.list(PARTS_FOLDER) if not name.startswith(TEMPORARY_PREFIX)]
    mark_wanted(blobs.url, [name for name in there if name not in named])


def _set_aside(blobs: Blobs, paths: tuple[str, ...]) -> None:
    """Moves files to ``index.damaged-TIME``, the newest first: what stays is a log at every moment."""
    aside = f"{INDEX_FOLDER}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    for path in reversed(paths):
        blobs.write_atomic(aside + path.removeprefix(INDEX_FOLDER), blobs.read(path))
        blobs.delete(path)


def _commit(blobs: Blobs, plan: RollBack) -> int:
    table = IndexTable.open(blobs.url, None)
    note = CommitNote(
        operation=OPERATION,
        message=message_of(plan),
        num_removed=len(plan.lost),
        num_records=table.head.note.num_records,
    )
    if table.version != plan.good_version or not table.try_commit(note, {}, []):
        raise CommitContentionError(blobs.url, 1, 0.0)
    return table.version


def message_of(plan: RollBack) -> str:
    """Returns what the log says about it."""
    first, last = plan.bad_versions[0], plan.bad_versions[-1]
    versions = f"version {first}" if first == last else f"versions {first} to {last}"
    named = ", ".join(plan.lost[:_NAMED]) or "none that can be named"
    more = f" and {len(plan.lost) - _NAMED} more" if len(plan.lost) > _NAMED else ""
    unknown = f"; {len(plan.unreadable)} index file(s) cannot be read" if plan.unreadable else ""
    return (
        f"{versions} cannot be read; back to version {plan.good_version}. "
        f"No longer visible: {named}{more}{unknown}"
    )
