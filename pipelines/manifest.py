"""What is known of a search database: files, number of sequences and residues, release, licence.

Owns the manifest and its JSON. Does not own where manifests are kept (`databases.registry`) or
how files are read (`databases.files`). Invariant: the counts are those that the search
tool itself counts, so that the size of the search space (HMMER's Z) is never typed by a person.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseFile:
    """One file of a database.

    Attributes:
      path: absolute.
      num_bytes: its size.
      sha256: content hash (hex), see `databases.spec.file_sha256`.
      state: what it looked like from outside when it was read, see `file_state`.
    """

    path: str
    num_bytes: int
    sha256: str
    state: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseManifest:
    """One database.

    Attributes:
      name: as `foldfeed build --database NAME` takes it.
      tool: ``jackhmmer``, ``hhblits`` or ``mmseqs2``.
      paths: a FASTA file, HH-suite prefixes, or an MMseqs2 database.
      files: all files of it.
      num_sequences: sequences of a FASTA file or MMseqs2 database, of clusters their members; alignments of
        an HH-suite database.
      num_residues: of all sequences; match columns of an HH-suite database.
      digest: sha256 (hex) by which results of it are kept, see
        `databases.spec.database_digest`.
      added: when it was added, UTC, ISO 8601.
      version: of the release, "" when unknown.
      date: of the release, ISO 8601, "" when unknown.
      licence: "" when unknown.
      source: the path or URL that it was unpacked or copied from, "" when it was not.
    """

    name: str
    tool: str
    paths: tuple[str, ...]
    files: tuple[DatabaseFile, ...]
    num_sequences: int
    num_residues: int
    digest: str
    added: str
    version: str = ""
    date: str = ""
    licence: str = ""
    source: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, ready for `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DatabaseManifest:
        """Returns the manifest of `to_json`.

        Raises:
          TypeError, KeyError: fields are missing or unknown.
        """
        files = tuple(DatabaseFile(**file) for file in fields["files"])
        return cls(**{**fields, "files": files, "paths": tuple(fields["paths"])})


def file_state(path: str) -> str:
    """Returns what a file looks like from outside: real path, size, modification time, inode, as JSON.

    The inode tells a file from a copy that was moved into its place and kept its size and time.
    """
    return file_state_of(path, os.stat(path))


def file_state_of(path: str, stat: os.stat_result) -> str:
    """Returns the `file_state` of a file that is open, whose own facts are known."""
    return json.dumps([os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino])


def num_bytes_of(state: str) -> int:
    """Returns the size in a `file_state`."""
    return json.loads(state)[1]
