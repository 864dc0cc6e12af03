"""Where a database is copied from: its files behind paths or URLs, and what tells one version from another.

Owns which files a path, a URL or a manifest names, and their identity. Does not own copying
(`databases.staging_copy`). Invariant: two identities that are equal and told (`Identity.is_told`)
are of one content, as far as the storage can be believed: an ETag or a time for URLs, size, time and inode
for local files.
"""

from __future__ import annotations

import dataclasses
import json
import os

from foldfeed.feature_store.errors import StorageError
from foldfeed.feature_store.storage import Blobs, open_blobs
from foldfeed.feature_store.storage.contract import is_forbidden
from foldfeed.feature_store.storage.options import without_secrets
from foldfeed.pipelines.databases.spec import HH_PARTS, fasta_files
from foldfeed.pipelines.errors import ConfigError, StagingError
from foldfeed.pipelines.manifest import DatabaseManifest, file_state
from foldfeed.pipelines.tools import hhblits, jackhmmer, mmseqs_files


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a file looks like from outside.

    Attributes:
      num_bytes: its size.
      state: place, size and whatever else its storage says, as JSON.
      is_told: whether that is more than place and size, so that a change shows.
    """

    num_bytes: int
    state: str
    is_told: bool


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a database.

    Attributes:
      url: a local path or a URL.
    """

    url: str

    @property
    def name(self) -> str:
        """Its name without folders, which the copy has, too."""
        return self.url.rpartition("/")[2]

    @property
    def shown(self) -> str:
        """Its place as it may be printed."""
        return without_secrets(self.url)

    def open(self) -> Blobs:
        """Returns byte access to its folder."""
        return open_blobs(self.url.rpartition("/")[0] or "/")

    def identity(self) -> Identity:
        """Looks at the file; nothing of its content is read.

        Raises:
          FileNotFoundError: it is not there.
          StorageError: its storage does not answer.
        """
        if "://" not in self.url:
            # A folder may have the name of the HH-suite prefix beside it.
            if os.path.isdir(self.url):
                raise FileNotFoundError(self.url)
            state = file_state(self.url)
            return Identity(num_bytes=json.loads(state)[1], state=state, is_told=True)
        info = self.open().info(self.name)
        state = json.dumps([self.shown, info.num_bytes, info.modified_s, info.version])
        return Identity(num_bytes=info.num_bytes, state=state, is_told=bool(info.version or info.modified_s))

    def exists(self) -> bool:
        """Returns whether it is there."""
        try:
            self.identity()
        except FileNotFoundError:
            return False
        except StorageError as error:
            # Of absent files a bucket that may not be listed says that they are forbidden.
            if is_forbidden(error):
                return False
            raise
        return True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The files of a database, somewhere.

    Attributes:
      text: as the user wrote it.
      tool: ``jackhmmer``, ``hhblits`` or ``mmseqs2``.
      names: of its FASTA files, HH-suite prefixes or MMseqs2 database, without folders.
      files: all of them, no two of one name.
    """

    text: str
    tool: str
    names: tuple[str, ...]
    files: tuple[SourceFile, ...]

    def __post_init__(self) -> None:
        names = [file.name for file in self.files]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{self.text!r}: two files are called {twice[0]!r}; rename one")


def source_of(text: str) -> Source:
    """Returns the database behind ``PATH_OR_URL[,PATH_OR_URL]...``, where one may be ``PATH@16``.

    FASTA files may be compressed. What has a name without dots and ``PATH.dbtype`` beside it is a database of
    MMseqs2; of other names nobody asks the server. What is no file is an HH-suite prefix where
    ``PREFIX_a3m.ffdata`` exists.

    Raises:
      StagingError: there is nothing of that name.
      StorageError: its storage does not answer.
    """
    urls = _expanded(text)
    if "." not in SourceFile(urls[0]).name and SourceFile(f"{urls[0]}.dbtype").exists():
        if len(urls) > 1:
            raise StagingError(
                text, f"{mmseqs_files.NAME} searches one database at a time; give each by itself"
            )
        return Source(
            text=text,
            tool=mmseqs_files.NAME,
            names=(SourceFile(urls[0]).name,),
            files=tuple(file for table in mmseqs_files.TABLES for file in _mmseqs_files(urls[0] + table)),
        )
    if SourceFile(urls[0]).exists():
        return Source(
            text=text,
            tool=jackhmmer.NAME,
            names=tuple(SourceFile(url).name for url in urls),
            files=tuple(map(SourceFile, urls)),
        )
    if not SourceFile(f"{urls[0]}_a3m.ffdata").exists():
        shown = without_secrets(urls[0])
        raise StagingError(shown, f"there is no such file, and no HH-suite database {shown}_a3m.ffdata")
    return Source(
        text=text,
        tool=hhblits.NAME,
        names=tuple(SourceFile(url).name for url in urls),
        files=tuple(file for url in urls for file in _hh_files(url)),
    )


def source_of_manifest(manifest: DatabaseManifest) -> Source:
    """Returns where a known database is copied from: its files, or on other hosts what they came from."""
    if manifest.source and not all(os.path.exists(file.path) for file in manifest.files):
        return source_of(manifest.source)
    return Source(
        text=",".join(manifest.paths),
        tool=manifest.tool,
        names=tuple(os.path.basename(path) for path in manifest.paths),
        files=tuple(SourceFile(file.path) for file in manifest.files),
    )


def _expanded(text: str) -> list[str]:
    """Returns every path or URL that a text names, local ones absolute."""
    urls = [url if "://" in url else os.path.abspath(url) for url in fasta_files(text) if url]
    if not urls or any(url.endswith("/") for url in urls):
        raise ConfigError(f"{text!r} names no file; write a path or URL of a FASTA file or HH-suite prefix")
    return urls


def _mmseqs_files(table: str) -> list[SourceFile]:
    """Returns the files of one table of a database, none where it is not there: data, index and type."""
    if not SourceFile(f"{table}.dbtype").exists():
        return []
    parts = [SourceFile(table)]
    if not parts[0].exists():
        parts = [SourceFile(f"{table}.0")]
        while (part := SourceFile(f"{table}.{len(parts)}")).exists():
            parts.append(part)
    return [*parts, SourceFile(f"{table}.index"), SourceFile(f"{table}.dbtype")]


def _hh_files(prefix: str) -> list[SourceFile]:
    files = [SourceFile(f"{prefix}_{part}.{kind}") for part in HH_PARTS for kind in ("ffdata", "ffindex")]
    # Only hhm may be missing; of the others the copy says which is.
    return [file for file in files if "_hhm." not in file.name or file.exists()]
