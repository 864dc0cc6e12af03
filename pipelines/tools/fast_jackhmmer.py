"""JackHMMER behind the fast scan: HMMER's first filter is computed here, the rest by jackhmmer.

Owns the joint of the two: which targets are written for jackhmmer, ``-Z``, the identity of such a result
and its cost. Does not own the scan (`fast_scan.scan`, where it says why the rows are jackhmmer's
own) nor jackhmmer's flags. Invariant: jackhmmer gets every target that its own first filter would let
through, in the file's order, and the number of all targets.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.errors import ToolNotFoundError
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.choice import best_kernel, describe_kernel, scan_kernel
from foldfeed.pipelines.fast_scan.database import ScanDatabase, open_database
from foldfeed.pipelines.fast_scan.memory import describe_room
from foldfeed.pipelines.programs.energy import EnergyMeter, total_joules
from foldfeed.pipelines.tools.jackhmmer import FLAGS, Jackhmmer, JackhmmerRun, run_jackhmmer
from foldfeed.pipelines.tools.scanner import Candidates, Cost, Found, time_limit
from foldfeed.pipelines.tools.search_tool import SearchResult, ToolIdentity

# Part of every result's identity; raise it when other targets may be let through.
SCAN_VERSION = 1

F1 = float(FLAGS[FLAGS.index("--F1") + 1])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FastJackhmmer:
    """A JackHMMER that gets only the targets that its first filter would let through.

    Attributes:
      identity: program and settings; its template says that the database was scanned first.
      binary: absolute path of jackhmmer.
      database: path of a FASTA file.
      cpus: threads of the scan and of jackhmmer.
      timeout_s: longest wall time of scan and jackhmmer together; the scan looks at it, and whether the run
        was stopped, after each chunk of the database.
    """

    identity: ToolIdentity
    binary: str
    database: str
    cpus: int
    timeout_s: float

    @classmethod
    def find(cls, *, database: str, cpus: int, timeout_s: float) -> FastJackhmmer:
        """Returns the JackHMMER on PATH behind the fast scan.

        Raises:
          ToolNotFoundError: no jackhmmer, or the scan's kernels were not compiled or would be slow here.
          MissingExtraError: pyhmmer is not installed.
          KernelError: the kernel for this processor gives wrong scores.
          DeviceError: a device is asked for and cannot be used (`fast_scan.choice`).
        """
        if best_kernel().name == "plain":
            raise ToolNotFoundError(
                "fast scan",
                "this processor has none of the vector instructions that it is written for (SSE4.1, AVX2, "
                "AVX-512, NEON), and without them it is slower than jackhmmer; use '--engine binary'",
            )
        scan.pyhmmer_version()
        scan_kernel()
        plain = Jackhmmer.find(database=database, cpus=cpus, timeout_s=timeout_s)
        # All kernels, of devices too, give equal bytes, and the profile's code HMMER's, so neither is named.
        template = (
            "-Z",
            "{targets}",
            *plain.identity.argv_template[:-1],
            f"{{{FastScanner.source}}}",
        )
        identity = dataclasses.replace(plain.identity, argv_template=template)
        return cls(identity=identity, binary=plain.binary, database=database, cpus=cpus, timeout_s=timeout_s)

    @property
    def max_residues(self) -> int | None:
        """None, as of JackHMMER itself."""
        return None

    @property
    def kernel_name(self) -> str:
        """What computes the first filter on this machine."""
        return scan_kernel().name

    def describe_scan(self) -> str:
        """Returns kernel and libraries of the scan in words, and where the database has no room in memory."""
        return describe_scan([self.database])

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence; see `tools.search_tool.SearchTool`."""
        check = self._time_limit(1)
        started, started_cpu, meter = time.monotonic(), scan.thread_seconds(), EnergyMeter()
        with tempfile.TemporaryDirectory(prefix="foldfeed-jackhmmer-") as name:
            folder = Path(name)
            candidates = self.candidates([sequence])
            with disk_full_is_typed(folder), (folder / "targets").open("wb") as out:
                candidates.copy(0, out)
            scanned_s, scanned_cpu_s = time.monotonic() - started, scan.thread_seconds() - started_cpu
            scanned_j = meter.joules(scanned_cpu_s)
            check()
            found = run_on_candidates(
                dataclasses.replace(self, timeout_s=self.timeout_s - scanned_s),
                sequence,
                folder,
                candidates.num_targets,
            )
        usage = dataclasses.replace(
            found.usage,
            wall_s=found.usage.wall_s + scanned_s,
            cpu_s=found.usage.cpu_s + scanned_cpu_s,
            energy_j=total_joules((scanned_j, found.usage.energy_j)),
        )
        return dataclasses.replace(found, usage=usage)

    def candidates(self, sequences: Sequence[str]) -> Candidates:
        """Returns which targets the first filter lets through for some queries; the database is read once.

        The time limit is that of one search times the number of queries.

        Raises:
          UnreadableDatabaseError: the database is no FASTA file that HMMER reads.
          DatabaseChangedError: it changed meanwhile, or is gone.
          ToolTimeoutError: it took too long.
          CancelledError: the run was stopped.
        """
        check = self._time_limit(len(sequences))
        database = open_database(self.database)
        profiles = [_profile_of(sequence) for sequence in sequences]
        extents = passing_extents(profiles, database, threads=self.cpus, check=check)
        return Candidates(database=database, num_targets=database.num_records, extents=tuple(extents))

    def _time_limit(self, num_queries: int) -> Callable[[], None]:
        return time_limit("the fast scan", self.identity.name, self.timeout_s * num_queries)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FastScanner:
    """The fast scan of one file of several; see `tools.scanner.Scanner`.

    Attributes:
      tool: whose settings; its database is given with each scan.
    """

    tool: FastJackhmmer

    source = f"scan {SCAN_VERSION}:database"
    flags = None
    # Reading a file that does not stay in memory costs as much as scanning it for one or two of 300 residues
    # (bench/search_scan.py); 16 leave a sixteenth to each.
    num_together = 16
    few_batches = False

    @property
    def name_here(self) -> str:
        """The kernel."""
        return self.tool.kernel_name

    def describe(self, paths: Sequence[str]) -> str:
        """Returns kernel and libraries."""
        return describe_scan(paths)

    def candidates(self, sequences: Sequence[str], path: str) -> Iterator[Found]:
        """Yields what the first filter lets through; the file is read once for all queries."""
        cost = Cost(scan.thread_seconds())
        found = dataclasses.replace(self.tool, database=path).candidates(sequences)
        share = cost.share(scan.thread_seconds(), len(sequences))
        yield from found.each(share)


def describe_scan(paths: Sequence[str]) -> str:
    """Returns `FastJackhmmer.describe_scan` of a database of several files."""
    libraries = f"{describe_kernel()}, profiles by pyhmmer {scan.pyhmmer_version()}"
    return f"the fast scan ({libraries}{describe_room(paths)})"


def passing_extents(
    profiles: Sequence[scan.FilterProfile],
    database: ScanDatabase,
    *,
    threads: int,
    check: Callable[[], None] = lambda: None,
) -> list[NDArray[np.int64]]:
    """Returns, for each query, where the records stand that its first filter lets through.

    The database is read once for all of them, a chunk at a time.

    Args:
      profiles: of the queries.
      database: to scan.
      threads: of the scan.
      check: called before each chunk; raises to stop.
    Returns: for each query int64 (passing, 2), starts and ends of records in the file, in its order.

    Raises:
      UnreadableDatabaseError: the database is no FASTA file that HMMER reads.
      DatabaseChangedError: it is not the same any more.
    """
    found: list[list[NDArray[np.int64]]] = [[np.empty((0, 2), dtype=np.int64)] for _ in profiles]
    for chunk in database.chunks():
        check()
        passing = scan.survivors(profiles, chunk, f1=F1, kernel=database.kernel, threads=threads)
        for extents, one in zip(found, passing, strict=True):
            extents.append(chunk.extents(one.records))
    whole = [np.concatenate(extents) for extents in found]
    # Chunks come in the order in which searches that run together read them.
    return [extents[np.argsort(extents[:, 0])] for extents in whole]


def run_on_candidates(tool: JackhmmerRun, sequence: str, folder: Path, num_targets: int) -> SearchResult:
    """Runs jackhmmer on the file ``targets`` of a folder as if it were the whole database.

    Args:
      tool: whose program, settings and identity.
      sequence: the query.
      folder: of the file, and for jackhmmer's own.
      num_targets: of the whole database.
    Raises:
      SearchError: no usable result for this query.
      StorageFullError: no space for the tool's files.
    """
    targets = folder / "targets"
    if not targets.stat().st_size:
        # HMMER refuses an empty file, and never reports a target without residues.
        with disk_full_is_typed(folder):
            targets.write_bytes(b">none\n")
    return run_jackhmmer(
        tool, sequence, folder=folder, database=str(targets), extra_flags=("-Z", str(num_targets))
    )


@functools.lru_cache(maxsize=32)
def _profile_of(sequence: str) -> scan.FilterProfile:
    """Returns a query's profile, made once for all files of a database that are scanned here."""
    return scan.profile_of(sequence)


def forget_profiles() -> None:
    """Makes the next search of any query build its profile, for measurements."""
    _profile_of.cache_clear()
