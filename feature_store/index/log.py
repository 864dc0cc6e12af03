"""What each commit of the index says about itself, and the check that it still says so.

A Delta log has no checksums: a flipped character in it can bring a deleted row back or lose one. So every
commit of ours carries, in its ``commitInfo``, the digest of all files that are live after it, the digest of
its own actions, and the sha256 of the log file before. This module owns making and checking them. It does not
own transactions.

Invariant: a `Commit` that `read_commit` returns says what its committer said. Checked against `files_sha256`,
the list of live files that a Delta reader found is the committer's too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from foldfeed.feature_store.errors import CorruptDataError
from foldfeed.feature_store.parts.presence import missing_file
from foldfeed.feature_store.storage import Blobs

LOG_FOLDER = "index/_delta_log"
LAST_CHECKPOINT = f"{LOG_FOLDER}/_last_checkpoint"
PREFIX = "foldfeed."
CHECKSUM = "foldfeed.checksum"
# What a store without a log is told.
NO_INDEX = (
    "it has no index/ (its creation was interrupted, or the index is lost: "
    "build again, or `foldfeed repair --rebuild-index`)"
)
_READ_THREADS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CommitNote:
    """What a committer writes down with a commit.

    Attributes:
      operation: ``create``, ``commit``, ``replace``, ``delete``, ``compact``, ``repair``, ``annotate``,
        ``add_columns``.
      job_id: of the job that committed, or "".
      message: of the committer.
      num_added: records added or replaced.
      num_removed: records that are gone, replaced ones not counted.
      num_records: records of the store after the commit.
      time: ISO 8601, UTC.
      settings_sha256: of ``foldfeed.json``.
      schema_sha256: of the table's schema, see `schema_digest`.
      files_sha256: of the names of all live files, see `files_digest`.
      parent: sha256 of the log file of the version before, "" for version 0.
      attempt: random. Two committers of the same job may write the same note in the same millisecond; by this
        each finds out whose commit landed.
    """

    operation: str
    job_id: str = ""
    message: str = ""
    num_added: int = 0
    num_removed: int = 0
    num_records: int = 0
    time: str = ""
    settings_sha256: str = ""
    schema_sha256: str = ""
    files_sha256: str = ""
    parent: str = ""
    attempt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AddedFile:
    """What a commit says of a file.

    Attributes:
      num_bytes: its size.
      statistics: Delta's statistics of it, JSON; readers of others skip files by them.
    """

    num_bytes: int
    statistics: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One commit, read from its log file and checked.

    Attributes:
      version: of the store after it.
      note: what the committer wrote down.
      checksum: over note and actions.
      added: each file that the commit added, by name.
      removed: names of the files it removed.
      sha256: of the log file; the next commit names it as its parent.
      metadata: Delta's ``metaData`` action (schema and configuration) where the commit has one.
    """

    version: int
    note: CommitNote
    checksum: str
    added: Mapping[str, AddedFile]
    removed: tuple[str, ...]
    sha256: str
    metadata: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LogEntry:
    """One version of a store, for people.

    Attributes:
      version: 0 is the empty store.
      time: when it was committed, UTC.
      operation: what was done, see `CommitNote`.
      job_id: of the job that committed it, or "".
      message: of the committer.
      num_added: records added or replaced.
      num_removed: records removed.
      num_records: records after it.
      tags: names that people gave to this version.
    """

    version: int
    time: datetime.datetime
    operation: str
    job_id: str
    message: str
    num_added: int
    num_removed: int
    num_records: int
    tags: tuple[str, ...] = ()


def files_digest(names: Iterable[str]) -> str:
    """Returns sha256 (hex) of the sorted names of live files, one per line.

    The names are hashes of the contents, so this one value stands for every row of a version.
    """
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()


def schema_digest(schema_json: str) -> str:
    """Returns sha256 (hex) of a Delta schema's JSON with sorted keys and no spaces."""
    text = json.dumps(json.loads(schema_json), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def metadata_of(
    version: int, note: CommitNote, added: Mapping[str, AddedFile], removed: Iterable[str]
) -> dict[str, str]:
    """Returns what goes into ``commitInfo``: the note and its checksum.

    Args:
      version: that the commit will make.
      note: what to write down.
      added: files by name.
      removed: names of removed files.
    """
    fields = {PREFIX + name: str(value) for name, value in dataclasses.asdict(note).items()}
    jobs = [note.job_id] if note.job_id else []
    return fields | {CHECKSUM: _checksum(version, fields, added, removed, jobs)}


def _checksum(
    version: int,
    fields: Mapping[str, str],
    added: Mapping[str, AddedFile],
    removed: Iterable[str],
    jobs: Iterable[str],
) -> str:
    document = {
        "version": version,
        "fields": dict(fields),
        "added": {name: [file.num_bytes, file.statistics] for name, file in added.items()},
        "removed": sorted(removed),
        "jobs": sorted(jobs),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def log_path(version: int) -> str:
    """Returns the path of a version's log file."""
    return f"{LOG_FOLDER}/{version:020}.json"


def checkpoint_path(version: int) -> str:
    """Returns the path of the checkpoint that delta-rs may have written for a version."""
    return f"{LOG_FOLDER}/{version:020}.checkpoint.parquet"


def read_commit(blobs: Blobs, version: int) -> Commit:
    """Returns a commit.

    Raises:
      CorruptDataError: its log file is missing, or does not say what its committer wrote.
      StoreGoneError: it is missing, and so is the whole store.
    """
    where = log_path(version)
    try:
        data = blobs.read(where)
    except FileNotFoundError as error:
        raise missing_file(blobs, where) from error
    return parse_commit(version, data)


def parse_commit(version: int, data: bytes) -> Commit:
    """Returns the commit in a log file's bytes.

    Raises:
      CorruptDataError: they are not what its committer wrote.
    """
    try:
        return _parse_commit(version, data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptDataError(log_path(version), f"it is not a commit of foldfeed ({error})") from error


def _parse_commit(version: int, data: bytes) -> Commit:
    actions: dict[str, list[Any]] = {}
    for line in data.decode().splitlines():
        for kind, action in json.loads(line).items():
            actions.setdefault(kind, []).append(action)
    (info,) = actions["commitInfo"]
    fields = {name: info[name] for name in info if name.startswith(PREFIX)}
    claimed = fields.pop(CHECKSUM)
    added = {
        action["path"]: AddedFile(num_bytes=action["size"], statistics=action["stats"])
        for action in actions.get("add", [])
    }
    removed = tuple(action["path"] for action in actions.get("remove", []))
    jobs = [action["appId"] for action in actions.get("txn", [])]
    if claimed != _checksum(version, fields, added, removed, jobs):
        raise ValueError("its content does not match its checksum")
    note = _parse_note(fields)
    (metadata,) = actions.get("metaData") or [None]
    if metadata is not None and schema_digest(metadata["schemaString"]) != note.schema_sha256:
        raise ValueError("the schema does not match its checksum")
    return Commit(
        version=version,
        note=note,
        checksum=claimed,
        added=added,
        removed=removed,
        sha256=hashlib.sha256(data).hexdigest(),
        metadata=metadata,
    )


def _parse_note(fields: Mapping[str, str]) -> CommitNote:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(CommitNote):
        text = fields[PREFIX + field.name]
        values[field.name] = int(text) if field.name.startswith("num_") else text
    return CommitNote(**values)


def read_log(blobs: Blobs, newest: int) -> list[Commit]:
    """Returns the commits 0..newest, oldest first.

    Raises:
      CorruptDataError: one of them is damaged, see `read_commit`, or does not follow the one before.
    """
    with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as pool:
        commits = list(pool.map(lambda version: read_commit(blobs, version), range(newest + 1)))
    for before, after in itertools.pairwise([None, *commits]):
        assert after is not None
        check_follows(before, after)
    return commits


def check_follows(before: Commit | None, after: Commit) -> None:
    """Raises `CorruptDataError` unless a commit was made on top of the one before (None: of nothing)."""
    if after.note.parent != ("" if before is None else before.sha256):
        reason = f"version {after.version} was committed on top of other bytes"
        raise CorruptDataError(log_path(after.version - 1), reason)


def live_files(commits: Iterable[Commit]) -> dict[str, AddedFile]:
    """Returns each live file by name after commits that start at version 0."""
    live: dict[str, AddedFile] = {}
    for commit in commits:
        for name in commit.removed:
            live.pop(name, None)
        live.update(commit.added)
    return live


def now() -> str:
    """Returns the time in the form of a note."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def entry_of(commit: Commit, tags: tuple[str, ...]) -> LogEntry:
    """Returns a commit for people."""
    note = commit.note
    return LogEntry(
        version=commit.version,
        time=datetime.datetime.fromisoformat(note.time),
        operation=note.operation,
        job_id=note.job_id,
        message=note.message,
        num_added=note.num_added,
        num_removed=note.num_removed,
        num_records=note.num_records,
        tags=tags,
    )
