"""`verify`: is everything in a store as it was written?

Owns which checks run, and the report. Reads only. Invariant: a report without problems means that each check
of its level was made on every file that the version needs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from foldfeed.feature_store.care.verify_index import check_index, check_names
from foldfeed.feature_store.care.verify_parts import LEVELS, PartCheck, Problem, check_part
from foldfeed.feature_store.errors import NOT_DAMAGE, FoldfeedError, NotAStoreError
from foldfeed.feature_store.format.schema import INDEX_SCHEMA
from foldfeed.feature_store.format.settings import SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index.files import INDEX_FOLDER
from foldfeed.feature_store.index.transactions import Index
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
      version: the version whose parts were checked; None when the index cannot be read.
      num_records: visible records.
      num_parts: parts checked.
      num_files: files of parts checked.
      num_bytes: their size.
      problems: empty when all is well.
      seconds: how long it took.
    """

    url: str
    level: str
    version: int | None
    num_records: int
    num_parts: int
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
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
    progress: Progress = silent,
) -> VerifyReport:
    """Checks a store: settings, log, index files, tags, and the parts that a version names.

    Args:
      store_url: the store.
      level: ``quick``, ``full`` or ``deep``, see `care.verify_parts.check_part`.
      version: the newest when None.
      progress: told after each part.
    Raises:
      NotAStoreError: there is nothing of a store at all.
      ValueError: an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    started = time.monotonic()
    blobs = open_blobs(store_url)
    if not any(blobs.exists(name) for name in (SETTINGS_FILE, INDEX_FOLDER, PARTS_FOLDER)):
        raise NotAStoreError(
            blobs.url, f"it has neither {SETTINGS_FILE} nor {INDEX_FOLDER}/ nor {PARTS_FOLDER}/"
        )
    problems: list[Problem] = []
    opened = _open(blobs, version, problems)
    if opened is None:
        # Without an index nobody knows what is visible; whatever parts there are can still be checked.
        names = [name for name in blobs.list(PARTS_FOLDER) if not name.startswith(TEMPORARY_PREFIX)]
        by_part = dict.fromkeys(names, INDEX_SCHEMA.empty_table())
    else:
        problems += check_index(blobs, Index.open(blobs.url, None), level)
        by_part = rows_by_part(opened.index_rows())
        problems += check_names(blobs, opened.settings)
    checks = _check_parts(blobs, by_part, level, None if opened is None else opened.settings, progress)
    return VerifyReport(
        url=blobs.url,
        level=level,
        version=None if opened is None else opened.version,
        num_records=0 if opened is None else len(opened),
        num_parts=len(checks),
        num_files=sum(check.num_files for check in checks),
        num_bytes=sum(check.num_bytes for check in checks),
        problems=(*problems, *(problem for check in checks for problem in check.problems)),
        seconds=time.monotonic() - started,
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
        return None
    return store


def rows_by_part(rows: pa.Table) -> dict[str, pa.Table]:
    """Returns the index rows of each part, sorted by record id."""
    rows = rows.sort_by([("part_id", "ascending"), ("record_id", "ascending")])
    counts = {entry["values"].as_py(): entry["counts"].as_py() for entry in pc.value_counts(rows["part_id"])}
    found, start = {}, 0
    for part_id in sorted(counts):
        found[part_id] = rows.slice(start, counts[part_id])
        start += counts[part_id]
    return found


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
