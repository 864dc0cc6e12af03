"""Databases on a local disk: copied once per host, found there ever after.

Owns the folder of copies, its lock, and what makes a copy visible. Does not own the copying of one file
(`databases.staging_copy`) or where files come from (`databases.staging_source`). Layout:

    FOLDER/NAME-DIGEST/                 a whole database; DIGEST begins that of its content
        .foldfeed-staged.json           its digest, where it came from, and its files as they were published
    FOLDER/.foldfeed-staging/NAME/      lock, and what is on its way, by version of the source

Invariants: a folder of the first kind appears by one rename, after its bytes are on the disk and their hashes
are those of the manifest, where one is known. One process of a host copies a database of a name at a time (a
lock that ends with its holder, however that ends); others wait and find the copy. A copy that is there costs
a ``stat`` of each file, and no look at its source where the digest is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from foldfeed.feature_store.errors import StorageFullError
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import LocalBlobs, disk_full_is_typed, fsync_folder
from foldfeed.feature_store.storage.options import without_secrets
from foldfeed.pipelines.databases.files import SUFFIXES, is_compressed, unpack
from foldfeed.pipelines.databases.registry import Registry
from foldfeed.pipelines.databases.spec import TOOLS, WHOLE_FILE_BYTES, DatabaseSpec, digest_of, file_sha256
from foldfeed.pipelines.databases.staging_copy import FileCopy
from foldfeed.pipelines.databases.staging_source import Identity, Source, source_of, source_of_manifest
from foldfeed.pipelines.errors import DatabaseError, StagingError, StagingFullError
from foldfeed.pipelines.manifest import DatabaseFile, DatabaseManifest, file_state
from foldfeed.pipelines.tools import jackhmmer
from foldfeed.pipelines.tools.mmseqs_commands import MmseqsOptions
from foldfeed.pipelines.tools.mmseqs_files import NAME as MMSEQS

RECORD = ".foldfeed-staged.json"
_WORK = ".foldfeed-staging"
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StagedDatabase:
    """A database on a local disk.

    Attributes:
      folder: absolute.
      spec: ready for a build.
      digest: sha256 (hex) of its content, see `databases.spec.digest_of`.
      num_bytes: its size.
      was_there: nothing was copied.
    """

    folder: str
    spec: DatabaseSpec
    digest: str
    num_bytes: int
    was_there: bool


def stage(
    text: str,
    folder: str | os.PathLike[str],
    *,
    name: str,
    manifest: DatabaseManifest | None = None,
    tell: Progress = silent,
) -> StagedDatabase:
    """Makes sure that a database lies in a folder on a local disk, and returns where.

    Args:
      text: path or URL of it, see `source_of`; not looked at where there is a manifest.
      folder: of copies, made when absent; several processes may use it at once.
      name: of the database.
      manifest: of a known database: the copy must have its digest.
      tell: called with what is done and bytes done and in all.
    Raises:
      StagingError: the source is not there, changed meanwhile, cannot be told from other versions, or has
        another digest; or a copy that is there was changed.
      StagingFullError: no space; what was copied is kept, and the next call goes on.
      StorageError: the source cannot be read; what was copied is kept.
    """
    return _Staging(text, Path(folder).absolute(), name, manifest, tell).run()


def staged_database(
    text: str, registry: Registry, folder: str | os.PathLike[str], tell: Progress = silent
) -> DatabaseSpec:
    """Returns the local copy of what ``NAME=PATH_OR_URL[:TOOL]``, or a name in a registry, says.

    Raises:
      ConfigError, RegistryError: the text names no database.
      StagingError: see `stage`.
    """
    name, *words = text.split(",") if "," in text.partition("=")[0] else [text]
    if "=" not in name:
        spec = stage("", folder, name=name, manifest=registry.get(name), tell=tell).spec
        return dataclasses.replace(spec, options=MmseqsOptions.parse(words))
    name, _, place = text.partition("=")
    stem, colon, tool = place.rpartition(":")
    tool, *words = tool.split(",") if tool.startswith(f"{MMSEQS},") else [tool]
    asked = tool if colon and tool in TOOLS else None
    spec = stage(stem if asked else place, folder, name=name, tell=tell).spec
    if asked == MMSEQS and spec.tool == jackhmmer.NAME:
        # A FASTA file is searched by either.
        spec = dataclasses.replace(spec, tool=MMSEQS)
    if asked is not None and asked != spec.tool:
        raise StagingError(place, f"it is a database of {spec.tool}, not of {asked}")
    return dataclasses.replace(spec, options=MmseqsOptions.parse(words))


class _Staging:
    """One call of `stage`."""

    def __init__(
        self, text: str, root: Path, name: str, manifest: DatabaseManifest | None, tell: Progress
    ) -> None:
        # A name becomes part of a path, and the spec knows which names can.
        DatabaseSpec(name=name, paths=("unknown",), tool=manifest.tool if manifest else TOOLS[0])
        self._text, self._root, self._name = text, root, name
        self._manifest, self._tell = manifest, tell

    def run(self) -> StagedDatabase:
        # Without the lock first: whoever needs a copy that is there need not wait for one that is not.
        found = self._known()
        if found is not None:
            return found
        work = self._root / _WORK / self._name
        with disk_full_is_typed(work):
            work.mkdir(parents=True, exist_ok=True)
        with _locked(work / "lock", lambda: self._tell(f"waiting for another copy of {self._name}", 0, 1)):
            found = self._known()
            return found if found is not None else self._stage(work)

    def _known(self) -> StagedDatabase | None:
        """Returns the copy with the digest of the manifest."""
        if self._manifest is None:
            return None
        digest = self._manifest.digest
        return self._found(lambda record: record["digest"] == digest)

    def _stage(self, work: Path) -> StagedDatabase:
        """Copies, with the lock held."""
        source = source_of_manifest(self._manifest) if self._manifest else source_of(self._text)
        seen = [self._look(source, number) for number in range(len(source.files))]
        states = [one.state for one in seen]
        if self._manifest is None:
            found = self._found(lambda record: record["sources"] == states)
            if found is not None:
                return found
        key = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
        _remove_others(work, key)
        copies = [
            FileCopy(source=file, seen=one, folder=work / key)
            for file, one in zip(source.files, seen, strict=True)
        ]
        try:
            with disk_full_is_typed(self._root):
                _begin(work / key, copies)
                hashes = self._copy(copies)
                files = self._assemble(copies, hashes, work / key / "files")
                digest = digest_of(source.tool, [(file.path, file.num_bytes, file.sha256) for file in files])
                self._check(work / key, files, digest)
                self._check_kind(source, work / key)
                return self._publish(work / key, source, states, files, digest)
        except StorageFullError as error:
            raise self._full(copies) from error

    def _look(self, source: Source, number: int) -> Identity:
        file = source.files[number]
        try:
            seen = file.identity()
        except FileNotFoundError as error:
            raise StagingError(file.shown, "there is no such file (any more)") from error
        if not seen.is_told and self._manifest is None:
            raise StagingError(
                file.shown,
                "its server tells neither an ETag nor a time, so another version of that size would be taken "
                "for this one. Serve it from one that does, or stage it by a name whose digest is known",
            )
        return seen

    def _copy(self, copies: Sequence[FileCopy]) -> list[str]:
        """Copies what is missing; returns the hash of every file."""
        total = sum(copy.seen.num_bytes for copy in copies)
        missing, free = self._room(copies)
        if missing > free:
            raise StagingFullError(str(self._root), missing, free)
        hashes, before = [], 0
        for copy in copies:
            hashes.append(copy.run(functools.partial(self._say, before, total)))
            before += copy.seen.num_bytes
        return hashes

    def _say(self, before: int, total: int, done: int) -> None:
        self._tell(f"copying {self._name}", before + done, total)

    def _room(self, copies: Sequence[FileCopy]) -> tuple[int, int]:
        """Returns how many bytes are still to be copied, and how many are free."""
        missing = sum(copy.seen.num_bytes - copy.num_kept() for copy in copies)
        return missing, shutil.disk_usage(self._root).free

    def _full(self, copies: Sequence[FileCopy]) -> StagingFullError:
        return StagingFullError(str(self._root), *self._room(copies))

    def _assemble(
        self, copies: Sequence[FileCopy], hashes: Sequence[str], target: Path
    ) -> list[DatabaseFile]:
        """Makes the files as the tools read them; `_begin` undoes it where the next step does not come."""
        target.mkdir()
        files = []
        for copy, sha256 in zip(copies, hashes, strict=True):
            path = target / copy.source.name
            if is_compressed(copy.source.name):
                path = Path(unpack(self._name, str(copy.part), str(target)))
            else:
                copy.part.rename(path)
            if is_compressed(copy.source.name) or copy.seen.num_bytes > WHOLE_FILE_BYTES:
                sha256 = file_sha256(path)
            files.append(DatabaseFile(path=str(path), num_bytes=path.stat().st_size, sha256=sha256, state=""))
        return files

    def _check_kind(self, source: Source, work: Path) -> None:
        """Refuses what no tool could open, e.g. the page of a server that should have said 404."""
        paths = tuple(str(work / "files" / _plain_name(name)) for name in source.names)
        try:
            DatabaseSpec(name=self._name, paths=paths, tool=source.tool).files()
        except DatabaseError as error:
            shutil.rmtree(work)
            raise StagingError(without_secrets(source.text), f"{error.reason}; nothing is kept") from error

    def _check(self, work: Path, files: Sequence[DatabaseFile], digest: str) -> None:
        if self._manifest is None or digest == self._manifest.digest:
            return
        known = {os.path.basename(file.path): file.sha256 for file in self._manifest.files}
        other = [name for file in files if known.get(name := os.path.basename(file.path)) != file.sha256]
        # What has a wrong hash cannot be gone on with.
        shutil.rmtree(work)
        raise StagingError(
            self._name,
            f"the copy has not the digest that the database had when it was added ({', '.join(other[:3])}); "
            "the source has another release, or was damaged. Nothing of the copy is kept. `foldfeed database "
            "verify` looks at local files; add another release under another name, or with --replace",
        )

    def _publish(
        self, work: Path, source: Source, states: list[str], files: Sequence[DatabaseFile], digest: str
    ) -> StagedDatabase:
        found = self._found(lambda record: record["digest"] == digest)
        if found is None:
            record = {
                "format": _FORMAT,
                "digest": digest,
                "tool": source.tool,
                "paths": [_plain_name(name) for name in source.names],
                "sources": states,
                "files": [_entry(file) for file in files],
            }
            folder, target = work / "files", self._target(digest)
            LocalBlobs(folder).write_atomic(RECORD, json.dumps(record, indent=1).encode())
            fsync_folder(folder)
            if target.exists():
                raise StagingError(str(target), "it is there and is no staged database; remove or rename it")
            folder.rename(target)
            fsync_folder(self._root)
            found = dataclasses.replace(self._opened(target, record), was_there=False)
        shutil.rmtree(work)
        return found

    def _target(self, digest: str) -> Path:
        return self._root / f"{self._name}-{digest[:16]}"

    def _found(self, wanted: Callable[[dict[str, Any]], bool]) -> StagedDatabase | None:
        """Returns a whole copy that is there."""
        for path in sorted(self._root.glob(f"{self._name}-*/{RECORD}")):
            record = json.loads(path.read_bytes())
            if record.get("format") != _FORMAT:
                raise StagingError(str(path), f"its format is {record.get('format')!r}, not {_FORMAT}")
            # Another database may be called NAME-SOMETHING.
            if path.parent == self._target(record["digest"]) and wanted(record):
                return self._opened(path.parent, record)
        return None

    def _opened(self, folder: Path, record: dict[str, Any]) -> StagedDatabase:
        files = []
        for entry in record["files"]:
            path = folder / entry["name"]
            if not path.exists() or (_seen(path) != entry["seen"] and file_sha256(path) != entry["sha256"]):
                raise StagingError(
                    str(path),
                    "this copy was changed after it was made; remove its folder and run the command again",
                )
            files.append(
                DatabaseFile(
                    path=str(path),
                    num_bytes=entry["num_bytes"],
                    sha256=entry["sha256"],
                    state=file_state(str(path)),
                )
            )
        paths = tuple(str(folder / name) for name in record["paths"])
        manifest = self._manifest and dataclasses.replace(self._manifest, paths=paths, files=tuple(files))
        return StagedDatabase(
            folder=str(folder),
            spec=DatabaseSpec(name=self._name, paths=paths, tool=record["tool"], manifest=manifest),
            digest=record["digest"],
            num_bytes=sum(file.num_bytes for file in files),
            was_there=True,
        )


@contextlib.contextmanager
def _locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock of this host; ``wait`` is called when another process holds it."""
    # The file stays: if it were removed, one could hold the old one and another the new one.
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _begin(work: Path, copies: Sequence[FileCopy]) -> None:
    """Makes the folders of an attempt; files that an earlier one had moved to be published come back."""
    for name in ("parts", "notes"):
        (work / name).mkdir(parents=True, exist_ok=True)
    moved = work / "files"
    if not moved.exists():
        return
    for copy in copies:
        if (moved / copy.source.name).exists():
            (moved / copy.source.name).rename(copy.part)
    # What was unpacked, perhaps in part.
    shutil.rmtree(moved)


def _remove_others(work: Path, key: str) -> None:
    """Removes what was begun of other versions of the source."""
    for path in work.iterdir():
        if path.is_dir() and path.name != key:
            shutil.rmtree(path)


def _plain_name(name: str) -> str:
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _entry(file: DatabaseFile) -> dict[str, Any]:
    path = Path(file.path)
    return {"name": path.name, "num_bytes": file.num_bytes, "sha256": file.sha256, "seen": _seen(path)}


def _seen(path: Path) -> list[int]:
    """Returns what a file looks like from outside, wherever its folder is moved."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]
