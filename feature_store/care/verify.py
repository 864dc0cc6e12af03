"""`verify`: is everything in a store as it was written?

Owns which checks run, and the report. Reads only. Invariant: a report without problems means that each check
of its level was made on every file that the version needs, or that any readable version needs; each part is
checked once, however many versions show it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Mapping

import pyarrow as pa

from foldfeed.feature_store.care.verify_index import (
    NeededFile,
    check_index,
    check_names,
    damaged_commits,
    needed_files,
    readable_versions,
)
from foldfeed.feature_store.care.verify_parts import LEVELS, PartCheck, Problem, check_part
from foldfeed.feature_store.care.verify_versions import named_rows, stale_sets
from foldfeed.feature_store.errors import NOT_DAMAGE, CorruptDataError, FoldfeedError, NotAStoreError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index.files import INDEX_FOLDER
from foldfeed.feature_store.index.log import LOG_FOLDER, Commit
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.parts.presence import anything_left
from foldfeed.feature_store.parts.spans import by_part
from foldfeed.feature_store.parts.wanted import PARTS_FOLDER
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import TEMPORARY_PREFIX, Blobs, open_blobs
from foldfeed.feature_store.store.feature_store import FeatureStore

_THREADS = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
      url: the store.
      level: how thoroughly, see `care.verify_parts.check_part`.
      version: the version whose parts were checked, with all versions the newest; None when the index cannot
        be read.
      versions: all versions whose parts were checked, in order.
      num_records: visible records; with all versions each content of a record counts once.
      num_parts: parts checked.
      num_files: files of parts checked.
      num_bytes: their size.
      problems: empty when all is well.
      stale_sets: record sets that no readable version can have, because a record of theirs is in none as it
        was when the set was saved; no damage, and looked for with all versions only.
      seconds: how long it took.
    """

    url: str
    level: str
    version: int | None
    versions: tuple[int, ...]
    num_records: int
    num_parts: int
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
    stale_sets: tuple[str, ...]
    seconds: float

    @property
    def damaged_records(self) -> list[str]:
        """Ids of visible records that suffer from a problem, sorted."""
        return sorted({name for problem in self.problems for name in problem.record_ids})


def verify(
    store_url: str | os.PathLike[str],
    *,
    level: str = "full",
    version: int | str | None = None,
    all_versions: bool = False,
    progress: Progress = silent,
) -> VerifyReport:
    """Checks a store: settings, log, index files, tags, sets, splits, and the parts that a version names.

    Index files are checked for all readable versions in any case.

    Args:
      store_url: the store.
      level: ``quick``, ``full`` or ``deep``, see `care.verify_parts.check_part`.
      version: the newest when None.
      all_versions: check the parts of every version that can be opened, each part once. Its problems say in
        ``versions`` whom they concern. Where the log is damaged nobody knows these versions: that is told,
        and the parts of the newest version are checked.
      progress: told after each part.
    Raises:
      NotAStoreError: there is nothing of a store at all.
      StoreGoneError: there was, and it went away meanwhile.
      ValueError: an unknown level, no such version, or a version and ``all_versions``.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if all_versions and version is not None:
        raise ValueError(f"version {version!r} and all_versions exclude each other; leave one of them out")
    started = time.monotonic()
    blobs = open_blobs(store_url)
    if not anything_left(blobs):
        raise NotAStoreError(
            blobs.url, f"it has neither {SETTINGS_FILE} nor {INDEX_FOLDER}/ nor {PARTS_FOLDER}/"
        )
    problems: list[Problem] = []
    scope = _scope(blobs, version, all_versions, level, problems)
    checks = _check_parts(blobs, scope.by_part, level, scope.settings, progress)
    checks = [_with_versions(check, scope.spans.get(check.part_id)) for check in checks]
    return VerifyReport(
        url=blobs.url,
        level=level,
        version=scope.version,
        versions=scope.versions,
        num_records=scope.num_records,
        num_parts=len(checks),
        num_files=sum(check.num_files for check in checks),
        num_bytes=sum(check.num_bytes for check in checks),
        problems=(*problems, *(problem for check in checks for problem in check.problems)),
        stale_sets=scope.stale_sets,
        seconds=time.monotonic() - started,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Scope:
    """Which parts are to be checked, with the rows that point into them; fields as in `VerifyReport`.

    ``spans`` has the first and the last version that show a part, where all versions are looked at.
    """

    by_part: Mapping[str, pa.Table]
    settings: StoreSettings | None = None
    version: int | None = None
    versions: tuple[int, ...] = ()
    num_records: int = 0
    spans: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    stale_sets: tuple[str, ...] = ()


def _scope(
    blobs: Blobs, version: int | str | None, all_versions: bool, level: str, problems: list[Problem]
) -> _Scope:
    """Checks everything but the parts, and returns which parts are next."""
    opened = _open(blobs, version, problems)
    if opened is None:
        # Without an index nobody knows what is visible; whatever parts there are can still be checked.
        names = [name for name in blobs.list(PARTS_FOLDER) if not name.startswith(TEMPORARY_PREFIX)]
        return _Scope(by_part=dict.fromkeys(names, INDEX_SCHEMA.empty_table()))
    index = Index.open(blobs.url, None)
    log = _log(index, problems)
    readable: list[int] = []
    needed: Mapping[str, NeededFile] = {}
    if log is not None:
        readable = readable_versions(blobs, log)
        needed = needed_files(log, readable)
        problems += check_index(blobs, index, log, needed, level)
    problems += check_names(blobs, opened.settings)
    if log is None or not all_versions:
        return _Scope(
            by_part=_rows_by_part(opened.index_rows()),
            settings=opened.settings,
            version=opened.version,
            versions=(opened.version,),
            num_records=len(opened),
        )
    named = named_rows(blobs, index.schema, needed)
    reported = {problem.where for problem in problems}
    problems += [problem for problem in named.problems if problem.where not in reported]
    return _Scope(
        by_part=_rows_by_part(named.rows),
        settings=opened.settings,
        version=opened.version,
        versions=tuple(readable),
        num_records=named.num_records,
        spans=named.spans,
        stale_sets=stale_sets(blobs, opened.settings, named),
    )


def _open(blobs: Blobs, version: int | str | None, problems: list[Problem]) -> FeatureStore | None:
    try:
        store = FeatureStore.open(blobs.url, version)
        store.index_rows()
    except NOT_DAMAGE:
        raise
    except FoldfeedError as error:
        where = getattr(error, "where", "the store")
        problems.append(Problem(where=where, reason=getattr(error, "reason", str(error))))
        if where == LOG_FOLDER:
            problems += damaged_commits(blobs)
        return None
    return store


def _log(index: Index, problems: list[Problem]) -> list[Commit] | None:
    """Returns the log; None where it is damaged, and then nobody knows what other versions need."""
    try:
        return index.log()
    except CorruptDataError as error:
        problems.append(Problem(where=error.where, reason=error.reason))
        return None


def _with_versions(check: PartCheck, versions: tuple[int, int] | None) -> PartCheck:
    problems = tuple(dataclasses.replace(problem, versions=versions) for problem in check.problems)
    return dataclasses.replace(check, problems=problems)


def _rows_by_part(rows: pa.Table) -> dict[str, pa.Table]:
    """Returns the index rows of each part, sorted by record id."""
    return dict(by_part(rows, rows.column_names, "record_id"))


def _check_parts(
    blobs: Blobs,
    by_part: Mapping[str, pa.Table],
    level: str,
    settings: StoreSettings | None,
    progress: Progress,
) -> list[PartCheck]:
    def check(part_id: str) -> PartCheck:
        # Rows become Python objects one part at a time: a million of them would need gigabytes.
        return check_part(blobs, part_id, by_part[part_id].to_pylist(), level, settings)

    checks = []
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        waiting = [pool.submit(check, part_id) for part_id in by_part]
        for future in concurrent.futures.as_completed(waiting):
            checks.append(future.result())
            progress("checking parts", len(checks), len(waiting))
    return sorted(checks, key=lambda check: check.part_id)
