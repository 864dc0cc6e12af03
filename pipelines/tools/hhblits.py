"""HHblits with AlphaFold 2's flags, one query against one or more HH-suite databases.

Owns the command line and the checks of its output. Does not own the process (`subprocess_runner`) or
parsing. Invariants: the query is one upper-case record, because HHblits reads several records as one
alignment and lower case as insertions, both without a word; a query longer than it can hold is refused,
because HHblits would cut it and exit 0.

Source: AlphaFold 2 ``data/tools/hhblits.py``; HH-suite user guide.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

from foldfeed.pipelines.errors import QueryTooLongError, ToolOutputError
from foldfeed.pipelines.programs.subprocess_runner import require_success, run_program
from foldfeed.pipelines.tools.search_tool import (
    QUERY_NAME,
    SearchResult,
    ToolIdentity,
    find_binary,
    identity_of,
)

NAME = "hhblits"

# AlphaFold 2 leaves -p, -Z, -all and -alt at HHblits' own defaults, and does not set -maxres.
FLAGS = (
    *("-i", "{query}", "-cpu", "{cpus}", "-oa3m", "{alignment}", "-o", "/dev/null"),
    *("-n", "3", "-e", "0.001", "-maxseq", "1000000", "-realign_max", "100000"),
    *("-maxfilt", "100000", "-min_prefilter_hits", "1000"),
)

# -maxres is 20,001 by default. Measured with HH-suite 3.3.0: 19,999 residues are kept whole; from 20,000 on
# it warns "Only first 19999 match columns will be kept!" and exits 0.
MAX_RESIDUES = 19_999

_VERSION = re.compile(r"^HHblits (\S+?):?$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hhblits:
    """An HHblits that is ready to search.

    Attributes:
      identity: program and settings.
      binary: absolute path of the executable.
      databases: prefixes of HH-suite databases, searched together as AlphaFold 2 searches BFD and UniRef30.
      cpus: threads of one search.
      timeout_s: longest wall time of one search.
    """

    identity: ToolIdentity
    binary: str
    databases: tuple[str, ...]
    cpus: int
    timeout_s: float

    @classmethod
    def find(cls, *, databases: tuple[str, ...], cpus: int, timeout_s: float) -> Hhblits:
        """Returns the HHblits on PATH.

        Raises:
          ToolNotFoundError: there is none, or it does not say its version.
        """
        binary = find_binary(NAME)
        words = (*FLAGS, *("-d", "{database}") * len(databases))
        identity = identity_of(NAME, binary, _VERSION, words)
        return cls(identity=identity, binary=binary, databases=databases, cpus=cpus, timeout_s=timeout_s)

    @property
    def max_residues(self) -> int | None:
        """The longest query that HHblits keeps whole."""
        return MAX_RESIDUES

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence; see `tools.search_tool.SearchTool`."""
        if len(sequence) > MAX_RESIDUES:
            raise QueryTooLongError(NAME, len(sequence), MAX_RESIDUES)
        with tempfile.TemporaryDirectory(prefix="foldfeed-hhblits-") as name:
            folder = Path(name)
            query, alignment = folder / "query.fasta", folder / "alignment.a3m"
            query.write_text(f">{QUERY_NAME}\n{sequence}\n", encoding="ascii")
            argv = [flag.format(query=query, cpus=self.cpus, alignment=alignment) for flag in FLAGS]
            argv += [word for prefix in self.databases for word in ("-d", prefix)]
            done = run_program([self.binary, *argv], folder=folder, timeout_s=self.timeout_s)
            require_success(NAME, done, folder)
            return SearchResult(
                tool=self.identity,
                format="a3m",
                alignment=_alignment(alignment),
                table=b"",
                usage=done.usage,
            )


def _alignment(path: Path) -> bytes:
    """Returns the ``-oa3m`` file. HHblits prints no closing mark, so a whole last line must do."""
    data = path.read_bytes() if path.exists() else b""
    if not data.strip():
        raise ToolOutputError(NAME, "it wrote no alignment")
    if not data.endswith(b"\n"):
        raise ToolOutputError(NAME, "its alignment ends in the middle of a line")
    return data
