"""Reading a search database once: counting what is in it, unpacking it, making its manifest.

Owns the counts and the copy that a compressed FASTA file needs, because the tools read plain files. Does
not own digests (`databases.spec`). Invariants: the counts are the tool's own (a test
compares with what jackhmmer prints); text that the tool would refuse in the middle of a search is refused
here; a file that is unpacked appears whole or not at all. Memory: one entry.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.release_dates import parse_release_dates
from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.databases.spec import DatabaseSpec, digest_of, file_sha256
from foldfeed.pipelines.errors import DatabaseError
from foldfeed.pipelines.fasta import BadStreamError, decompressed
from foldfeed.pipelines.manifest import DatabaseFile, DatabaseManifest, file_state
from foldfeed.pipelines.tools import hhsearch, jackhmmer
from foldfeed.pipelines.tools.mmseqs_files import NAME as MMSEQS
from foldfeed.pipelines.tools.mmseqs_files import count_mmseqs, is_database

_SPACE = b" \t\r\n\v\f"
# What HMMER 3.4 takes as a residue, tried one by one; it counts all of them. Digits and '-' end a search with
# "illegal character".
_RESIDUES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz*._~"
SUFFIXES = (".gz", ".zst")


def make_manifest(
    spec: DatabaseSpec, *, version: str = "", date: str = "", licence: str = "", source: str = ""
) -> DatabaseManifest:
    """Reads a whole database and returns its manifest.

    Args:
      spec: the database.
      version: of the release.
      date: of the release, ISO 8601.
      licence: of the data.
      source: the compressed file that it was unpacked from.
    Raises:
      DatabaseError: a file is missing, empty, no text the tool could read, or changes while it is read.
    """
    names = spec.files()
    before = [file_state(name) for name in names]
    num_sequences, num_residues = _count(spec)
    files = tuple(
        DatabaseFile(path=name, num_bytes=os.path.getsize(name), sha256=file_sha256(name), state=state)
        for name, state in zip(names, before, strict=True)
    )
    for name, state in zip(names, before, strict=True):
        if file_state(name) != state:
            raise DatabaseError(spec.name, name, "it changed while it was read; add it when it is whole")
    return DatabaseManifest(
        name=spec.name,
        tool=spec.tool,
        paths=spec.paths,
        files=files,
        num_sequences=num_sequences,
        num_residues=num_residues,
        digest=digest_of(spec.tool, [(file.path, file.num_bytes, file.sha256) for file in files]),
        added=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        version=version,
        date=date,
        licence=licence,
        source=source,
    )


def count_fasta(name: str, path: str) -> tuple[int, int]:
    """Returns how many sequences and residues a FASTA file holds, as HMMER counts them; plain or compressed.

    Raises:
      DatabaseError: HMMER would refuse it; the message names the entry.
    """
    num_sequences = num_residues = 0
    for entry in _entries(name, path):
        header, _, body = entry.partition(b"\n")
        words = header.split(None, 1)
        if not words:
            raise DatabaseError(name, path, f"entry {num_sequences + 1} has no name after '>'")
        residues = body.translate(None, _SPACE)
        foreign = residues.translate(None, _RESIDUES)
        if foreign:
            shown = words[0].decode("utf-8", errors="replace")
            raise DatabaseError(name, path, f"entry {shown!r} holds {chr(foreign[0])!r}, which is no residue")
        num_sequences += 1
        num_residues += len(residues)
    return num_sequences, num_residues


def is_compressed(path: str) -> bool:
    """Returns whether a name says gzip or Zstandard."""
    return path.endswith(SUFFIXES)


def unpack(name: str, path: str, folder: str | None, tell: Callable[[int], None] | None = None) -> str:
    """Writes a compressed FASTA file as a plain one and returns where that is.

    Args:
      name: of the database, for messages.
      path: a file whose name ends in .gz or .zst.
      folder: where to; beside the file when None.
      tell: called with the number of bytes written so far.
    Raises:
      DatabaseError: it cannot be unpacked, or something of that name is there.
      StorageFullError: no space left; nothing is visible.
    """
    base = os.path.basename(path)
    for suffix in SUFFIXES:
        base = base.removesuffix(suffix)
    target = Path(folder or os.path.dirname(path)) / base
    if target.exists():
        raise DatabaseError(
            name, str(target), "it exists; add that file itself, or give --unpack-to another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with (
        disk_full_is_typed(target),
        tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-foldfeed-", delete=False) as file,
    ):
        try:
            for chunk in _chunks(name, path):
                file.write(chunk)
                written += len(chunk)
                if tell is not None:
                    tell(written)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
    return str(target)


def differences(manifest: DatabaseManifest, *, quick: bool) -> list[str]:
    """Returns what is no longer as it was when a database was added, one sentence each.

    Args:
      manifest: of the database.
      quick: files that look the same from outside count as unchanged.
    """
    found = []
    for file in manifest.files:
        if not os.path.exists(file.path):
            found.append(f"{file.path} is gone")
        elif os.path.getsize(file.path) != file.num_bytes:
            found.append(f"{file.path} has {os.path.getsize(file.path)} bytes, not {file.num_bytes}")
        elif quick and file_state(file.path) == file.state:
            continue
        elif file_sha256(file.path) != file.sha256:
            found.append(f"{file.path} has another content")
    return found


def refreshed(manifest: DatabaseManifest) -> DatabaseManifest:
    """Returns the manifest of verified files with what they look like now, e.g. after a touch."""
    files = tuple(dataclasses.replace(file, state=file_state(file.path)) for file in manifest.files)
    return dataclasses.replace(manifest, files=files)


def _count(spec: DatabaseSpec) -> tuple[int, int]:
    if spec.tool == MMSEQS and is_database(spec.paths[0]):
        counts = [count_mmseqs(spec.name, spec.paths[0])]
    elif spec.searches_templates:
        count = _count_hh if spec.tool == hhsearch.NAME else count_fasta
        counts = [count(spec.name, spec.paths[0])]
        _check_dates(spec.name, spec.paths[1])
    elif spec.tool in (jackhmmer.NAME, MMSEQS):
        counts = [count_fasta(spec.name, path) for path in spec.paths]
    else:
        counts = [_count_hh(spec.name, prefix) for prefix in spec.paths]
    return sum(one for one, _ in counts), sum(two for _, two in counts)


def _check_dates(name: str, path: str) -> None:
    """Raises DatabaseError where a file is no table of release dates, or an empty one."""
    try:
        dates = parse_release_dates(Path(path).read_bytes())
    except AlignmentParseError as error:
        raise DatabaseError(name, path, f"it is no table of release dates: {error}") from error
    if not dates:
        raise DatabaseError(name, path, "it has no release date")


def _count_hh(name: str, prefix: str) -> tuple[int, int]:
    """Returns alignments and match columns: cs219 has one byte per column and one that ends them."""
    path = f"{prefix}_cs219.ffindex"
    num_alignments = num_columns = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            words = line.split(b"\t")
            if len(words) != 3 or not words[2].strip().isdigit():
                raise DatabaseError(name, path, f"line {number} is no entry of an index: name, start, length")
            num_alignments += 1
            num_columns += int(words[2]) - 1
    return num_alignments, num_columns


def _entries(name: str, path: str) -> Iterator[bytes]:
    """Yields the text of every entry without its '>'."""
    rest: bytes | None = None
    for chunk in _chunks(name, path):
        if rest is None:
            chunk = chunk.lstrip(_SPACE)
            if not chunk:
                continue
            if not chunk.startswith(b">"):
                raise DatabaseError(name, path, "it does not start with '>', so it is no FASTA file")
            rest, chunk = b"", chunk[1:]
        *whole, rest = (rest + chunk).split(b"\n>")
        yield from whole
    if rest is None:
        raise DatabaseError(name, path, "the file is empty")
    yield rest


def _chunks(name: str, path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as raw:
            yield from decompressed(raw, path)
    except FileNotFoundError as error:
        raise DatabaseError(name, path, "no such file") from error
    except (BadStreamError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise DatabaseError(name, path, f"it cannot be unpacked: {error}") from error
