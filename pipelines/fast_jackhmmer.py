"""JackHMMER behind the fast scan: HMMER's first filter is computed here, the rest by jackhmmer.

Owns the joint of the two: which targets are written for jackhmmer, ``-Z``, the identity of such a result
and its cost. Does not own the scan (`foldfeed.pipelines.scan`, where it says why the rows are jackhmmer's
own) nor jackhmmer's flags. Invariant: jackhmmer gets every target that its own first filter would let
through, in the file's order, and the number of all targets.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines import scan
from foldfeed.pipelines.errors import ToolNotFoundError, ToolTimeoutError
from foldfeed.pipelines.jackhmmer import FLAGS, Jackhmmer, run_jackhmmer
from foldfeed.pipelines.scan_database import ScanDatabase, open_database
from foldfeed.pipelines.scan_kernels import best_kernel
from foldfeed.pipelines.search_tool import SearchResult, ToolIdentity
from foldfeed.pipelines.subprocess_runner import raise_if_cancelled

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
        """
        if best_kernel().name == "plain":
            raise ToolNotFoundError(
                "fast scan",
                "this processor has none of the vector instructions that it is written for (SSE4.1, AVX2, "
                "AVX-512, NEON), and without them it is slower than jackhmmer; use '--engine binary'",
            )
        scan.pyhmmer_version()
        plain = Jackhmmer.find(database=database, cpus=cpus, timeout_s=timeout_s)
        # Kernels of all processors give equal bytes and the profile's code HMMER's, so neither is named.
        template = (
            "-Z",
            "{targets}",
            *plain.identity.argv_template[:-1],
            f"{{scan {SCAN_VERSION}:database}}",
        )
        identity = dataclasses.replace(plain.identity, argv_template=template)
        return cls(identity=identity, binary=plain.binary, database=database, cpus=cpus, timeout_s=timeout_s)

    @property
    def max_residues(self) -> int | None:
        """None, as of JackHMMER itself."""
        return None

    def describe_scan(self) -> str:
        """Returns kernel and libraries of the scan in words."""
        return f"the fast scan ({best_kernel().name} kernel, profiles by pyhmmer {scan.pyhmmer_version()})"

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence; see `foldfeed.pipelines.search_tool.SearchTool`."""
        started, started_cpu = time.monotonic(), time.thread_time()
        with tempfile.TemporaryDirectory(prefix="foldfeed-jackhmmer-") as name:
            folder = Path(name)
            targets = folder / "targets"
            with disk_full_is_typed(folder):
                database = open_database(self.database)
                write_survivors(
                    sequence, database, targets, threads=self.cpus, check=lambda: self._check(started)
                )
            scanned_s, scanned_cpu_s = time.monotonic() - started, time.thread_time() - started_cpu
            self._check(started)
            result = run_jackhmmer(
                dataclasses.replace(self, timeout_s=self.timeout_s - scanned_s),
                sequence,
                folder=folder,
                database=str(targets),
                extra_flags=("-Z", str(database.num_records)),
            )
        usage = dataclasses.replace(
            result.usage, wall_s=result.usage.wall_s + scanned_s, cpu_s=result.usage.cpu_s + scanned_cpu_s
        )
        return dataclasses.replace(result, usage=usage)

    def write_candidates(self, sequence: str, path: Path, started: float) -> int:
        """Writes the targets that the first filter lets through, none where it lets none through.

        Args:
          sequence: the query.
          path: of the file to write.
          started: when the time limit began, `time.monotonic`.
        Returns:
          How many targets the database has.

        Raises:
          SearchError, StorageFullError: as of `search`.
        """
        with disk_full_is_typed(path.parent):
            database = open_database(self.database)
            _write_passing(sequence, database, path, threads=self.cpus, check=lambda: self._check(started))
            return database.num_records

    def _check(self, started: float) -> None:
        raise_if_cancelled("the fast scan")
        if time.monotonic() - started >= self.timeout_s:
            raise ToolTimeoutError(self.identity.name, self.timeout_s)


def write_survivors(
    sequence: str,
    database: ScanDatabase,
    path: Path,
    *,
    threads: int,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Writes the targets that a query's first filter lets through, as they stand in the database.

    Args:
      sequence: the query.
      database: to scan.
      path: of the file to write.
      threads: of the scan.
      check: called before each chunk; raises to stop.
    Returns:
      How many. One target is written where none passes, because HMMER refuses an empty file; its filter
      drops it.

    Raises:
      DatabaseError: the database is no FASTA file that HMMER reads.
    """
    number = _write_passing(sequence, database, path, threads=threads, check=check)
    if number == 0:
        chunk = next(iter(database.chunks()))
        with path.open("wb") as out:
            database.copy_records(chunk, chunk.order[-1:], out)
    return number


def _write_passing(
    sequence: str, database: ScanDatabase, path: Path, *, threads: int, check: Callable[[], None]
) -> int:
    profile = _profile_of(sequence)
    number = 0
    with path.open("wb") as out:
        for chunk in database.chunks():
            check()
            found = scan.survivors([profile], chunk, f1=F1, kernel=database.kernel, threads=threads)[0]
            database.copy_records(chunk, found.records, out)
            number += len(found.records)
    return number


@functools.lru_cache(maxsize=32)
def _profile_of(sequence: str) -> scan.FilterProfile:
    """Returns a query's profile, made once for all files of a database that are scanned here."""
    return scan.profile_of(sequence)


def forget_profiles() -> None:
    """Makes the next search of any query build its profile, for measurements."""
    _profile_of.cache_clear()
