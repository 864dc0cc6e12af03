"""JackHMMER with AlphaFold 2's flags, one query against one FASTA database.

Owns the command line and the checks of its output. Does not own the process (`subprocess_runner`), parsing
or caps on the number of rows, which AlphaFold 2 applies to the finished alignment. Invariant: a result is
returned only if the table ends with ``# [ok]``, the line HMMER prints last.

Source: AlphaFold 2 ``data/tools/jackhmmer.py``; HMMER 3 user guide.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.programs.subprocess_runner import require_success, run_program
from foldfeed.pipelines.tools.search_tool import (
    QUERY_NAME,
    SearchResult,
    ToolIdentity,
    binary_sha256,
    binary_version,
    find_binary,
)

NAME = "jackhmmer"

# AlphaFold 2's settings: filters 20 to 40 times stricter than HMMER's own defaults, one iteration.
FLAGS = (
    *("-o", "/dev/null", "-A", "{alignment}", "--noali"),
    *("--F1", "0.0005", "--F2", "0.00005", "--F3", "0.0000005"),
    *("--incE", "0.0001", "-E", "0.0001", "--cpu", "{cpus}", "-N", "1", "--tblout", "{table}"),
    *("{query}", "{database}"),
)

_VERSION = re.compile(r"^# HMMER (\S+)", re.MULTILINE)
_UNIQUE_WARNING = b"seq names have been made unique"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Jackhmmer:
    """A JackHMMER that is ready to search one database.

    Attributes:
      identity: program and settings.
      binary: absolute path of the executable.
      database: path of a FASTA file.
      cpus: worker threads of one search (HMMER adds one that reads).
      timeout_s: longest wall time of one search.
    """

    identity: ToolIdentity
    binary: str
    database: str
    cpus: int
    timeout_s: float

    @classmethod
    def find(cls, *, database: str, cpus: int, timeout_s: float) -> Jackhmmer:
        """Returns the JackHMMER on PATH.

        Raises:
          ToolNotFoundError: there is none, or it does not say its version.
        """
        binary = find_binary(NAME)
        identity = ToolIdentity(
            name=NAME,
            version=binary_version(NAME, binary, _VERSION),
            binary_sha256=binary_sha256(binary),
            argv_template=tuple(flag for flag in FLAGS if flag not in ("--cpu", "{cpus}")),
        )
        return cls(identity=identity, binary=binary, database=database, cpus=cpus, timeout_s=timeout_s)

    @property
    def max_residues(self) -> int | None:
        """None: HMMER searches a query of any length whole (tried with 40,000 residues)."""
        return None

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence; see `tools.search_tool.SearchTool`."""
        with tempfile.TemporaryDirectory(prefix="foldfeed-jackhmmer-") as name:
            return run_jackhmmer(self, sequence, folder=Path(name))


class JackhmmerRun(Protocol):
    """What `run_jackhmmer` needs to know of a search tool."""

    @property
    def identity(self) -> ToolIdentity:
        """Who answers."""
        ...

    @property
    def binary(self) -> str:
        """Absolute path of the executable."""
        ...

    @property
    def database(self) -> str:
        """Path of a FASTA file."""
        ...

    @property
    def cpus(self) -> int:
        """Worker threads of one search."""
        ...

    @property
    def timeout_s(self) -> float:
        """Longest wall time of one search."""
        ...


def run_jackhmmer(
    tool: JackhmmerRun,
    sequence: str,
    *,
    folder: Path,
    database: str | None = None,
    extra_flags: Sequence[str] = (),
) -> SearchResult:
    """Runs the program once and checks what it wrote.

    Args:
      tool: whose program, settings and identity.
      sequence: the query.
      folder: for its files.
      database: what to search; the tool's when None.
      extra_flags: before all others.
    Raises:
      SearchError: no usable result for this query.
      StorageFullError: no space for the tool's files.
    """
    paths = {key: folder / key for key in ("query", "alignment", "table")}
    paths["query"].write_text(f">{QUERY_NAME}\n{sequence}\n", encoding="ascii")
    words = {**{key: str(path) for key, path in paths.items()}, "database": database or tool.database}
    argv = [*extra_flags, *(flag.format(cpus=tool.cpus, **words) for flag in FLAGS)]
    done = run_program([tool.binary, *argv], folder=folder, timeout_s=tool.timeout_s)
    require_success(NAME, done, folder)
    table = read_table(paths["table"])
    return SearchResult(
        tool=tool.identity,
        format="stockholm",
        alignment=_alignment(paths["alignment"], sequence, table),
        table=table,
        usage=done.usage,
    )


def read_table(path: Path) -> bytes:
    """Returns the data lines of a ``--tblout`` table, after checking that HMMER finished it.

    Raises:
      ToolOutputError: it did not.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    if not lines or lines[-1].strip() != b"# [ok]":
        raise ToolOutputError(NAME, "its table does not end with '# [ok]': the search is not complete")
    # The comment lines hold the date and temporary paths; without them equal searches give equal bytes.
    return b"".join(line + b"\n" for line in lines if line and not line.startswith(b"#"))


def _alignment(path: Path, sequence: str, table: bytes) -> bytes:
    """Returns the ``-A`` file; a search without included hits gives the query alone.

    Raises:
      ToolOutputError: there is no alignment, although the table counts domains that belong to it.
    """
    data = path.read_bytes() if path.exists() else b""
    if not data.strip():
        # Column 18 of the table is "inc", the target's domains that enter the alignment.
        missing = sum(int(line.split(maxsplit=18)[17]) for line in table.splitlines())
        if missing:
            raise ToolOutputError(NAME, f"it wrote no alignment of the {missing} domains in its table")
        return f"# STOCKHOLM 1.0\n\n{QUERY_NAME} {sequence}\n//\n".encode("ascii")
    return data


def has_numbered_names(alignment: bytes) -> bool:
    """Returns whether HMMER put ``NUMBER|`` before every name, which it does when two rows share one.

    It says so in a comment line; without that line a ``7|`` is part of the name.
    """
    return _UNIQUE_WARNING in alignment[:400]
