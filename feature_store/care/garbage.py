"""`gc`: finds and removes what no version needs: parts, index files, leftovers of interrupted writers.

Owns the question "may this file go?". Invariants: what a kept version names is never removed; nothing younger
than the grace period is removed, so a job that has written its parts and not yet committed is safe, and so is
a staging folder that a living process fills, whatever its age. Versions are given up only on request and for
good: ``retention.json`` says so before the first file goes.

On a disk a part is set aside, looked for in the index once more, and then removed. An object store cannot
rename a folder, so there only the grace period protects a commit that names an old part, unnamed so far, in
the very moment of its removal: do not shorten it while others write. Index files are looked at once more, one
by one, right before they go; between that look and the removal lies one request, in which a commit that
writes the same file again (its content was in the store before) would lose it.

Not delta-rs's VACUUM: that would go by the age of a file's removal alone, knows no tags, and sees no parts.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import time
from collections.abc import Iterable, Sequence

import pyarrow as pa

from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.files import INDEX_FOLDER, SUFFIX, read_files
from foldfeed.feature_store.index.log import Commit
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import TEMPORARY_PREFIX, Blobs, FileInfo, open_blobs

# A part that is about to go; whoever finds one that is needed after all puts it back.
ASIDE_PREFIX = f"{TEMPORARY_PREFIX}gc-"
# A week: large jobs may write parts for days before they commit.
DEFAULT_GRACE_S = 7 * 24 * 3600.0
_UPLOAD = "unfinished upload"
_INDEX_FILE = "index file"
_PART_COLUMN = pa.schema([pa.field("part_id", pa.string())])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One thing that no kept version needs.

    Attributes:
      path: file or folder, relative to the store.
      kind: ``part``, ``index file``, ``leftover`` or ``unfinished upload``.
      num_bytes: its size.
      age_s: seconds since it was last written or wanted.
    """

    path: str
    kind: str
    num_bytes: int
    age_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GarbageReport:
    """What `collect_garbage` found and did.

    Attributes:
      removed: what is gone, or would be with ``dry_run``.
      spared: garbage that is younger than the grace period or in use.
      oldest_version: every version from this one on is readable, and every tagged one.
      dry_run: nothing was removed.
    """

    removed: tuple[Garbage, ...]
    spared: tuple[Garbage, ...]
    oldest_version: int
    dry_run: bool

    @property
    def num_bytes(self) -> int:
        """Size of what is gone."""
        return sum(item.num_bytes for item in self.removed)


def collect_garbage(
    store_url: str | os.PathLike[str],
    *,
    grace_s: float = DEFAULT_GRACE_S,
    keep_days: float | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> GarbageReport:
    """Removes what no kept version names.

    Args:
      store_url: the store.
      grace_s: younger things are spared. Less than the time between the first part and the commit of a
        running job would remove its parts under its hands; 0 is for stores that nobody writes to.
      keep_days: versions superseded longer ago than this are given up, but for tagged ones and the newest;
        None keeps all.
      dry_run: only report.
      progress: told how far it is.
    Raises:
      CorruptDataError: the log is damaged; nothing is removed, because what is needed is unknown.
    """
    blobs = open_blobs(store_url)
    newest = Index.open(blobs.url, None)
    log = newest.log()
    kept, oldest = _kept_versions(blobs, log, keep_days)
    files, parts = _needed(blobs, log, kept)
    if not dry_run:
        restore_set_aside(blobs, parts)
    found = [*_index_garbage(blobs, files), *_part_garbage(blobs, parts), *_leftovers(blobs, parts)]
    found += _uploads(blobs)
    due = [item for item in found if item.age_s >= grace_s and not _in_use(blobs, item)]
    if not dry_run:
        versions.set_oldest_version(blobs, oldest)
        due = _remove(blobs, due, newest, grace_s, progress)
    gone = {item.path for item in due}
    return GarbageReport(
        removed=tuple(due),
        spared=tuple(item for item in found if item.path not in gone),
        oldest_version=oldest,
        dry_run=dry_run,
    )


def restore_set_aside(blobs: Blobs, needed: set[str]) -> list[str]:
    """Puts back parts that a killed `gc` had set aside and that are needed; returns their ids."""
    restored = []
    for name in blobs.list(PARTS_FOLDER):
        part_id = name.removeprefix(ASIDE_PREFIX)
        if part_id == name or part_id not in needed or blobs.exists(f"{PARTS_FOLDER}/{part_id}"):
            continue
        # Where folders cannot be renamed nothing is ever set aside.
        if blobs.rename_folder(f"{PARTS_FOLDER}/{name}", f"{PARTS_FOLDER}/{part_id}"):
            restored.append(part_id)
    return restored


def _kept_versions(blobs: Blobs, log: list[Commit], keep_days: float | None) -> tuple[list[int], int]:
    """Returns the versions that must stay readable, and the oldest from which all do."""
    # A number beyond the newest version is a leftover of a longer history, and the newest is never given up.
    oldest = min(versions.oldest_version(blobs), log[-1].version)
    if keep_days is not None:
        limit = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=keep_days)
        for before, after in itertools.pairwise(log):
            # A version's time ends when the next one begins.
            if datetime.datetime.fromisoformat(after.note.time) <= limit:
                oldest = max(oldest, before.version + 1)
    tagged = {tag.version for tag in versions.list_tags(blobs.url)}
    return [c.version for c in log if c.version >= oldest or c.version in tagged], oldest


def _needed(blobs: Blobs, log: list[Commit], kept: Iterable[int]) -> tuple[set[str], set[str]]:
    """Returns the index files and the parts that versions name."""
    wanted = set(kept)
    live: set[str] = set()
    files: set[str] = set()
    for commit in log:
        live = (live - set(commit.removed)) | set(commit.added)
        if commit.version in wanted:
            files |= live
    parts: set[str] = set()
    for name in sorted(files):
        parts.update(read_files(blobs, [name], _PART_COLUMN)["part_id"].unique().to_pylist())
    return files, parts


def _index_garbage(blobs: Blobs, needed: set[str]) -> list[Garbage]:
    now = time.time()
    found = []
    for file in blobs.walk(INDEX_FOLDER):
        name = file.path.rsplit("/", 1)[-1]
        in_table = file.path == f"{INDEX_FOLDER}/{name}"
        # delta-rs writes beside the name it wants, as NAME#1, and leaves that when it is killed.
        if "#" in name:
            found.append(_garbage(file.path, "leftover", [file], now))
        elif in_table and name.endswith(SUFFIX) and name not in needed:
            found.append(_garbage(file.path, _INDEX_FILE, [file], now))
    return found


def _part_garbage(blobs: Blobs, needed: set[str]) -> list[Garbage]:
    now = time.time()
    found = []
    for name in blobs.list(PARTS_FOLDER):
        if name not in needed and not name.startswith(TEMPORARY_PREFIX):
            path = f"{PARTS_FOLDER}/{name}"
            found.append(_garbage(path, "part", blobs.walk(path), now))
    return found


def _leftovers(blobs: Blobs, needed: set[str]) -> list[Garbage]:
    """Returns staging folders and files that writers of ours left, wherever they write."""
    now = time.time()
    found = []
    for folder in ("", index_log.LOG_FOLDER, *blobs.list("")):
        for name in blobs.list(folder):
            if name.startswith(TEMPORARY_PREFIX) and name.removeprefix(ASIDE_PREFIX) not in needed:
                path = f"{folder}/{name}" if folder else name
                found.append(_garbage(path, "leftover", blobs.walk(path) or _alone(blobs, path), now))
    return found


def _uploads(blobs: Blobs) -> list[Garbage]:
    """Returns uploads in pieces that an interrupted writer left: they cost money, and no listing has them."""
    now = time.time()
    return [_garbage(file.path, _UPLOAD, [file], now) for file in blobs.unfinished_uploads()]


def _alone(blobs: Blobs, path: str) -> list[FileInfo]:
    try:
        return [blobs.info(path)]
    except FileNotFoundError:
        return []


def _garbage(path: str, kind: str, files: Sequence[FileInfo], now: float) -> Garbage:
    youngest = max((file.modified_s for file in files), default=0.0)
    num_bytes = sum(file.num_bytes for file in files)
    return Garbage(path=path, kind=kind, num_bytes=num_bytes, age_s=now - youngest)


def _in_use(blobs: Blobs, item: Garbage) -> bool:
    return item.kind == "leftover" and blobs.in_use(item.path)


def _remove(
    blobs: Blobs, due: list[Garbage], seen: Index, grace_s: float, progress: Progress
) -> list[Garbage]:
    """Removes things, parts and index files after a second look at what others do; returns those gone."""
    hidden: list[tuple[Garbage, str]] = []
    index_files: list[Garbage] = []
    gone = []
    for number, item in enumerate(due):
        progress("removing", number, len(due))
        if item.kind == "part":
            aside = f"{PARTS_FOLDER}/{ASIDE_PREFIX}{item.path.rsplit('/', 1)[-1]}"
            blobs.delete(aside)
            hidden.append((item, aside if blobs.rename_folder(item.path, aside) else item.path))
        elif item.kind == _INDEX_FILE:
            index_files.append(item)
        else:
            (blobs.abort_upload if item.kind == _UPLOAD else blobs.delete)(item.path)
            gone.append(item)
    newest = Index.open(blobs.url, None)
    named = (
        set(newest.rows(["part_id"])["part_id"].unique().to_pylist())
        if newest.version > seen.version
        else set()
    )
    for item, path in hidden:
        young = _garbage(path, "part", blobs.walk(path), time.time()).age_s < grace_s
        if item.path.rsplit("/", 1)[-1] in named or young:
            # Somebody committed it, or is about to (`mark_wanted`), while we looked.
            if path != item.path:
                blobs.rename_folder(path, item.path)
            continue
        blobs.delete(path)
        gone.append(item)
    gone += _remove_index_files(blobs, index_files, seen, grace_s)
    progress("removing", len(due), len(due))
    return gone


def _remove_index_files(blobs: Blobs, due: list[Garbage], seen: Index, grace_s: float) -> list[Garbage]:
    """Removes index files that still nobody wants; returns those gone.

    They are named by their content: a commit may write one again that no version named any more. It dates the
    file anew when it does, and names it afterwards, so each file's age and the newest log are looked at just
    before it goes.
    """
    gone = []
    named: set[str] = set()
    for item in due:
        before = seen.version
        seen.refresh()
        for version in range(before + 1, seen.version + 1):
            named.update(index_log.read_commit(blobs, version).added)
        young = _garbage(item.path, item.kind, _alone(blobs, item.path), time.time()).age_s < grace_s
        if young or item.path.rsplit("/", 1)[-1] in named:
            continue
        blobs.delete(item.path)
        gone.append(item)
    return gone
