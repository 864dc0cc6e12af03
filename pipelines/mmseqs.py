"""MMseqs2 as ColabFold runs it, one query against one database of proteins.

Owns the command lines and the checks of their output. Does not own the processes (`subprocess_runner`),
parsing, or which files a database has (`mmseqs_files`). These commands run, one after the other, with
ColabFold's flags for a database without an index (``COMMANDS`` is what runs, word for word):

    createdb      the query; the database too where it is a FASTA file
    search        three iterations of profile search, sensitivity 8, E-value 0.1, at most 10,000 targets
    align         the second profile against what was found, ten alternative alignments, E-value 10
    filterresult  score per column 0.8, only where there are 100 rows
    result2msa    A3M with scores, the most diverse 3,000 rows per bucket of identity above 1,000 rows

What ColabFold does and this does not, because only its prepared databases have the files: ``expandaln`` (the
members of the clusters that were found, from DB_seq and DB_aln) between search and align. Such a database is
refused: its clusters' representatives alone would be a small part of ColabFold's answer. The second stage of
ColabFold, a search of its environmental database with the profile of the first, is not done either: every
database is searched with the query. ``--prefilter-mode 0``, which old versions do not know, is left at that
default.

Three additions make the answer the same everywhere: one thread, ``--split 1`` (MMseqs2 would split a database
by the memory of the machine, and choose the length of its words by that) and ``--dbtype 1`` (a protein of A,
C, G and T is no gene). The index of a database must have room in memory, 0.9 GB for the smallest: with less
MMseqs2 refuses in words, or warns, goes on, and is slow or killed. An index on disk (``mmseqs createindex``)
saves most of the time and changes rows a little (8,939 instead of 8,938 for ubiquitin in 116,864 sequences),
so its files are part of the database's digest.

Invariants: a result is returned only if the entry of the alignment has the length that its index tells and
ends with the NUL byte that MMseqs2 writes last; the first row is the query. MMseqs2 writes U and O as X, B as
D, Z as E, J as L; in the query's row the letters are put back, in the others they stay so. It names rows by
accession: ``sp|P68871|HBB_HUMAN`` is ``P68871``.

Source: ColabFold ``colabfold/mmseqs/search.py`` mmseqs_search_monomer; MMseqs2 user guide.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import tempfile
import time
from pathlib import Path

from foldfeed.pipelines.errors import QueryTooLongError, ToolFailedError, ToolOutputError, ToolTimeoutError
from foldfeed.pipelines.mmseqs_files import NAME, is_database
from foldfeed.pipelines.search_tool import (
    QUERY_NAME,
    SearchResult,
    ToolIdentity,
    binary_sha256,
    binary_version,
    find_binary,
)
from foldfeed.pipelines.subprocess_runner import Completed, Usage, require_success, run_program

PROGRAM = "mmseqs"

_CREATE = ("--dbtype", "1", "--shuffle", "0", "-v", "2")
_ONE = ("--db-load-mode", "0", "--threads", "1", "-v", "2")
CREATE_DATABASE = ("createdb", "{fasta}", "target", *_CREATE)
COMMANDS = (
    ("createdb", "query.fasta", "query", *_CREATE),
    (
        *("search", "query", "{database}", "found", "tmp", "--num-iterations", "3", "-a", "-e", "0.1"),
        *("--max-seqs", "10000", "-s", "8.0", "--split", "1", *_ONE),
    ),
    (
        *("align", "tmp/latest/profile_1", "{database}", "found", "aligned", "-e", "10"),
        *("--max-accept", "100000", "--alt-ali", "10", "-a", *_ONE),
    ),
    (
        *("filterresult", "query", "{database}", "aligned", "filtered", "--qid", "0", "--qsc", "0.8"),
        *("--diff", "0", "--max-seq-id", "1.0", "--filter-min-enable", "100", *_ONE),
    ),
    (
        *("result2msa", "query", "{database}", "filtered", "msa", "--msa-format-mode", "6"),
        *("--filter-msa", "1", "--filter-min-enable", "1000", "--diff", "3000"),
        *("--qid", "0.0,0.2,0.4,0.6,0.8,1.0", "--qsc", "0", "--max-seq-id", "0.95", *_ONE),
    ),
)

# --max-seq-len is 65,535 by default. Measured with release 14: of a query of 65,648 residues the last 113
# are in no alignment, and the exit code is 0.
MAX_RESIDUES = 65_535

_VERSION = re.compile(r"^MMseqs2 Version: (\S+)", re.MULTILINE)
_WRITTEN_AS = str.maketrans("UOBZJ", "XXDEL")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mmseqs:
    """An MMseqs2 that is ready to search one database; every search takes one thread.

    Attributes:
      identity: program and settings.
      binary: absolute path of the executable.
      database: path of a FASTA file or of an MMseqs2 database.
      from_fasta: it is a FASTA file, made a database anew in the folder of every search.
      timeout_s: longest wall time of one search, all its commands together.
    """

    identity: ToolIdentity
    binary: str
    database: str
    from_fasta: bool
    timeout_s: float

    @classmethod
    def find(cls, *, database: str, timeout_s: float) -> Mmseqs:
        """Returns the MMseqs2 on PATH.

        Raises:
          ToolNotFoundError: there is none, or it does not say its version.
        """
        binary = find_binary(PROGRAM)
        from_fasta = not is_database(database)
        commands = (CREATE_DATABASE, *COMMANDS) if from_fasta else COMMANDS
        identity = ToolIdentity(
            name=NAME,
            version=binary_version(PROGRAM, binary, _VERSION),
            binary_sha256=binary_sha256(binary),
            argv_template=tuple(word for command in commands for word in command),
        )
        return cls(
            identity=identity, binary=binary, database=database, from_fasta=from_fasta, timeout_s=timeout_s
        )

    @property
    def max_residues(self) -> int | None:
        """The longest query that MMseqs2 aligns whole."""
        return MAX_RESIDUES

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence; see `foldfeed.pipelines.search_tool.SearchTool`."""
        if len(sequence) > MAX_RESIDUES:
            raise QueryTooLongError(NAME, len(sequence), MAX_RESIDUES)
        with tempfile.TemporaryDirectory(prefix="foldfeed-mmseqs2-") as name:
            folder = Path(name)
            (folder / "query.fasta").write_text(f">{QUERY_NAME}\n{sequence}\n", encoding="ascii")
            usage = self._run_all(folder)
            return SearchResult(
                tool=self.identity,
                format="a3m",
                alignment=_alignment(folder / "msa", sequence),
                table=b"",
                usage=usage,
            )

    def _run_all(self, folder: Path) -> Usage:
        """Runs the commands one after the other within the time of one search; returns their cost."""
        commands, words = list(COMMANDS), {"fasta": self.database, "database": self.database}
        if self.from_fasta:
            commands.insert(0, CREATE_DATABASE)
            words["database"] = "target"
        until = time.monotonic() + self.timeout_s
        usages = []
        for command in commands:
            argv = [self.binary, *(word.format(**words) for word in command)]
            try:
                done = run_program(argv, folder=folder, timeout_s=max(0.0, until - time.monotonic()))
            except ToolTimeoutError as error:
                raise ToolTimeoutError(NAME, self.timeout_s) from error
            _raise_if_part_was_killed(done)
            require_success(NAME, done, folder)
            usages.append(done.usage)
        return _sum(usages)


def _raise_if_part_was_killed(done: Completed) -> None:
    """Tells a signal from a failure: ``search`` is a shell script, which exits with 1 for both.

    The shell prints the signal's name as a line, e.g. ``Killed``, or at its end in the words of bash.

    Raises:
      ToolFailedError: a program that it started was killed by a signal.
    """
    if done.exit_code <= 0:
        return
    for number in signal.valid_signals():
        name = signal.strsignal(number)
        if name and re.search(rf"(^|\d\s+){re.escape(name)}\b", done.stderr_tail, re.MULTILINE):
            raise ToolFailedError(NAME, -number, done.stderr_tail)


def _alignment(path: Path, sequence: str) -> bytes:
    """Returns the rows of the one entry of an MMseqs2 database, the query's letters put back.

    Raises:
      ToolOutputError: the entry is missing, cut, or its first row is not the query.
    """
    index = path.with_name(f"{path.name}.index")
    data = path.read_bytes() if path.exists() else b""
    entries = index.read_bytes().splitlines() if index.exists() else []
    if not data or not entries:
        raise ToolOutputError(NAME, "it wrote no alignment")
    if entries != [b"0\t0\t%d" % len(data)] or not data.endswith(b"\n\0"):
        raise ToolOutputError(NAME, f"its alignment of {len(data)} bytes is cut, or not of one query alone")
    head, row, rest = data[:-1].split(b"\n", 2)
    written = sequence.translate(_WRITTEN_AS).encode("ascii")
    if head != b">" + QUERY_NAME.encode("ascii") or row != written:
        raise ToolOutputError(
            NAME,
            f"the first row of its alignment ({len(row)} columns) is not the query "
            f"({len(sequence)} residues)",
        )
    return b"\n".join((head, sequence.encode("ascii"), rest))


def _sum(usages: list[Usage]) -> Usage:
    return Usage(
        wall_s=sum(usage.wall_s for usage in usages),
        cpu_s=sum(usage.cpu_s for usage in usages),
        max_rss_bytes=max(usage.max_rss_bytes for usage in usages),
        bytes_read=sum(usage.bytes_read for usage in usages),
        bytes_from_disk=sum(usage.bytes_from_disk for usage in usages),
    )
