"""Checks of everything in a store that is not a part: settings, commit log, checkpoints, index files, tags.

Owns the checks; `verify` runs them. Reads only; damage is returned as `Problem`s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from foldfeed.feature_store.care.verify_parts import Problem
from foldfeed.feature_store.errors import NOT_DAMAGE, CorruptDataError, FoldfeedError, TagError
from foldfeed.feature_store.format.settings import StoreSettings
from foldfeed.feature_store.index import log as index_log
from foldfeed.feature_store.index import tags as versions
from foldfeed.feature_store.index.files import INDEX_FOLDER, read_checked
from foldfeed.feature_store.index.log import AddedFile, Commit
from foldfeed.feature_store.index.table import CONFIGURATION
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.storage import Blobs
from foldfeed.feature_store.storage.arrow_file import arrow_file
from foldfeed.feature_store.store import named_tables, record_sets, splits

_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")
_LAST_CHECKPOINT = "_last_checkpoint"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NeededFile:
    """An index file that a readable version needs.

    Attributes:
      file: what its commit says of it.
      versions: the first and the last readable version that needs it.
    """

    file: AddedFile
    versions: tuple[int, int]


def check_index(
    blobs: Blobs, index: Index, log: list[Commit], needed: Mapping[str, NeededFile], level: str
) -> list[Problem]:
    """Checks log, checkpoints and index files of all versions that are kept.

    Args:
      blobs: the store's files.
      index: its newest version.
      log: of that version.
      needed: of `needed_files`.
      level: ``quick`` goes by the sizes of index files, the others read them.
    """
    problems = [*check_checkpoints(blobs, log), *_check_files(blobs, needed, level)]
    if sorted(index_log.live_files(log)) != index.files:
        problems.append(
            Problem(
                where=index_log.LOG_FOLDER,
                reason="its commits, one by one, lead to other files than Delta's view",
            )
        )
    return problems


def damaged_commits(blobs: Blobs) -> list[Problem]:
    """Returns which files our own reader refuses of a log that delta-rs refuses without naming one."""
    found = (_COMMIT.fullmatch(name) for name in sorted(blobs.list(index_log.LOG_FOLDER)))
    versions_there = [int(match[1]) for match in found if match]
    problems = []
    for version in versions_there:
        problems += _tried(lambda version=version: index_log.read_commit(blobs, version))  # type: ignore[misc]
    return problems


def check_names(blobs: Blobs, settings: StoreSettings) -> list[Problem]:
    """Checks tags, the retention file, named sets and splits."""
    problems = []
    for name in versions.tag_names(blobs):
        problems += _tried(lambda name=name: versions.open_index(blobs.url, name))  # type: ignore[misc]
    problems += _tried(lambda: versions.oldest_version(blobs))
    for name in named_tables.names(blobs, record_sets.FOLDER):
        problems += _tried(lambda name=name: _check_set(blobs, settings, name))  # type: ignore[misc]
    for name in named_tables.names(blobs, splits.FOLDER):
        problems += _tried(lambda name=name: splits.load(blobs, name))  # type: ignore[misc]
    return problems


def _check_set(blobs: Blobs, settings: StoreSettings, name: str) -> None:
    found = record_sets.load(blobs, settings, name)
    if found.within is not None:
        cut = splits.load(blobs, found.within.split)
        cut.check_inside(found.within.part, found.ids)
        if cut.fingerprint != found.within.fingerprint:
            reason = f"it promises to lie within another split {cut.name!r} than the one there is"
            raise CorruptDataError(f"{record_sets.FOLDER}/{name}", reason)


def _tried(check: Callable[[], object]) -> list[Problem]:
    try:
        check()
    except NOT_DAMAGE:
        raise
    except (FoldfeedError, ValueError) as error:
        return [_problem_of(error)]
    return []


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, CorruptDataError):
        return Problem(where=error.where, reason=error.reason)
    return Problem(where="the store", reason=str(error))


def needed_files(log: list[Commit], readable: Collection[int]) -> dict[str, NeededFile]:
    """Returns the index files that readable versions need, by name.

    Args:
      log: of the newest version.
      readable: of `readable_versions`.
    """
    shown = frozenset(readable)
    needed: dict[str, NeededFile] = {}
    live: dict[str, AddedFile] = {}
    for commit in log:
        for name in commit.removed:
            live.pop(name, None)
        live.update(commit.added)
        if commit.version not in shown:
            continue
        for name, file in live.items():
            first = needed[name].versions[0] if name in needed else commit.version
            needed[name] = NeededFile(file=file, versions=(first, commit.version))
    return needed


def _check_files(blobs: Blobs, needed: Mapping[str, NeededFile], level: str) -> Iterator[Problem]:
    for name, entry in sorted(needed.items()):
        where = f"{INDEX_FOLDER}/{name}"
        reason = ""
        try:
            found = blobs.info(where).num_bytes if level == "quick" else len(read_checked(blobs, name))
            if found != entry.file.num_bytes:
                reason = f"it has {found} bytes, not {entry.file.num_bytes}"
        except FileNotFoundError:
            reason = "the file is missing"
        except CorruptDataError as error:
            reason = error.reason
        if reason:
            yield Problem(where=where, reason=reason, versions=entry.versions)


def readable_versions(blobs: Blobs, log: list[Commit]) -> list[int]:
    """Returns the versions that can be opened: from the retention file's on, tagged ones, and the newest.

    Where a file that says so is damaged (`check_names` reports it), no more is asked for than is certain.
    """
    newest = log[-1].version
    # A number beyond the newest version is a leftover of a longer history.
    oldest, tagged = newest, set()
    with contextlib.suppress(CorruptDataError):
        oldest = min(newest, versions.oldest_version(blobs))
    for name in versions.tag_names(blobs):
        with contextlib.suppress(CorruptDataError, TagError):
            tagged.add(versions.read_tag(blobs, name).version)
    return [commit.version for commit in log if commit.version >= oldest or commit.version in tagged]


def check_checkpoints(blobs: Blobs, log: list[Commit]) -> Iterator[Problem]:
    """Compares Delta's checkpoints, which have no checksum, with the commits that they sum up."""
    names = blobs.list(index_log.LOG_FOLDER)
    found = {int(match[1]): name for name in names if (match := _CHECKPOINT.fullmatch(name))}
    for version, name in found.items():
        where = f"{index_log.LOG_FOLDER}/{name}"
        if version >= len(log):
            yield Problem(where=where, reason="it is newer than the newest version")
            continue
        try:
            table = pq.ParquetFile(arrow_file(blobs.read(where))).read()
            reason = _checkpoint_reason(table, log[: version + 1])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            reason = f"it cannot be read ({error})"
        if reason:
            yield Problem(where=where, reason=reason)
    if _LAST_CHECKPOINT in names:
        where = f"{index_log.LOG_FOLDER}/{_LAST_CHECKPOINT}"
        try:
            version = json.loads(blobs.read(where))["version"]
        except (ValueError, KeyError, TypeError) as error:
            yield Problem(where=where, reason=f"it is not JSON of a checkpoint ({error})")
            return
        if version not in found:
            yield Problem(where=where, reason=f"it names version {version}, of which there is no checkpoint")


def _checkpoint_reason(table: pa.Table, log: list[Commit]) -> str:
    rows = table.to_pylist()
    adds = {row["add"]["path"]: _file(row["add"]) for row in rows if row.get("add")}
    jobs = {row["txn"]["appId"] for row in rows if row.get("txn")}
    live = index_log.live_files(log)
    if adds != {name: (file.num_bytes, json.loads(file.statistics)) for name, file in live.items()}:
        return "it names other files than the commits do"
    if jobs != {commit.note.job_id for commit in log if commit.note.job_id}:
        return "it names other jobs than the commits do"
    (about,) = [row["metaData"] for row in rows if row.get("metaData")]
    if index_log.schema_digest(about["schemaString"]) != log[-1].note.schema_sha256:
        return "it has another schema than the commits"
    if dict(about["configuration"]) != CONFIGURATION:
        return "it has another configuration than the table was made with"
    return ""


def _file(add: dict[str, Any]) -> tuple[int, Any]:
    return add["size"], json.loads(add["stats"])
