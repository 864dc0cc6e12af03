"""What finds the candidates of some queries in one FASTA file: one method, and what it gives.

Owns the protocol that the engines of jackhmmer share, the sharing of their costs and their limit of time.
Does not own any engine: `jackhmmer_scanner` (the binary itself), `fast_jackhmmer`, `pyhmmer_scanner`,
`hmmpgmd_scanner`; nor what becomes of candidates (`sharded_jackhmmer`).

Invariant: the candidates of a query hold every target that jackhmmer would report in a database that the file
is a part of, in the file's order, whatever the database's size. More are harmless: stock jackhmmer searches
them with the number of all targets, and a target that it does not report leaves no trace.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from foldfeed.pipelines.errors import ToolTimeoutError
from foldfeed.pipelines.fast_scan.database import ScanDatabase
from foldfeed.pipelines.programs.energy import EnergyMeter
from foldfeed.pipelines.programs.subprocess_runner import Usage, raise_if_cancelled


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The candidates of one query in one file.

    Attributes:
      records: text of FASTA records, as they stand in the file.
      num_targets: of the whole file, HMMER's Z.
      usage: what it cost; of a scan for several queries the query's share.
    """

    records: bytes
    num_targets: int
    usage: Usage


class Scanner(Protocol):
    """An engine; small and picklable."""

    @property
    def source(self) -> str:
        """What jackhmmer then searches, in words of the identity: ``database``, ``scan 1:database``, ...

        The number is raised when other targets may be let through.
        """
        ...

    @property
    def flags(self) -> tuple[str, ...] | None:
        """The command line that makes the candidates where it is not that of the search itself."""
        ...

    @property
    def num_together(self) -> int:
        """Queries that are best taken through a file together; 1 where that saves nothing."""
        ...

    @property
    def few_batches(self) -> bool:
        """Whether reading a file costs so much that batches should be large rather than many."""
        ...

    @property
    def name_here(self) -> str:
        """What scans on this machine, for receipts; "" for jackhmmer itself."""
        ...

    def describe(self, paths: Sequence[str]) -> str | None:
        """Returns the same in words for a person, for a database of some files; None for jackhmmer itself."""
        ...

    def candidates(self, sequences: Sequence[str], path: str) -> Iterator[Found]:
        """Yields the candidates of some queries, in their order; one query's text is in memory at a time.

        Args:
          sequences: of upper-case residues.
          path: of a FASTA file.
        Raises:
          SearchError: no usable result; for all that are still to come where they are scanned together.
          StorageFullError: no space for a tool's files.
          CancelledError: the run was stopped.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Targets of one file that may be reported for some queries.

    Attributes:
      database: where they are.
      num_targets: of the whole file, HMMER's Z.
      extents: of each query, int64 (candidates, 2), where they start and end, in the file's order.
    """

    database: ScanDatabase
    num_targets: int
    extents: tuple[NDArray[np.int64], ...]

    def copy(self, query: int, out: BinaryIO) -> None:
        """Writes the records that are one query's candidates, as they stand in the database.

        Raises:
          DatabaseChangedError: the file is not what it was when it was scanned.
        """
        self.database.copy_extents(self.extents[query], out)

    def each(self, usage: Usage) -> Iterator[Found]:
        """Yields what every query found, in order; one query's text is in memory at a time.

        Args:
          usage: one query's share.
        Raises:
          DatabaseChangedError: as of `copy`.
        """
        for query in range(len(self.extents)):
            text = io.BytesIO()
            self.copy(query, text)
            yield Found(records=text.getvalue(), num_targets=self.num_targets, usage=usage)


def time_limit(doing: str, tool: str, limit_s: float) -> Callable[[], None]:
    """Returns what is called now and then while something is done, from this moment on.

    It raises CancelledError when the run was stopped, ToolTimeoutError when the time is over.

    Args:
      doing: what is done, in words.
      tool: whose time it is.
      limit_s: of it.
    """
    started = time.monotonic()

    def check() -> None:
        raise_if_cancelled(doing)
        if time.monotonic() - started >= limit_s:
            raise ToolTimeoutError(tool, limit_s)

    return check


class Cost:
    """What a scan in this thread costs from now on, divided among its queries."""

    def __init__(self, cpu_s: float) -> None:
        self._wall_s, self._cpu_s, self._meter = time.monotonic(), cpu_s, EnergyMeter()

    def share(self, cpu_s: float, num_queries: int) -> Usage:
        """Returns one query's part.

        Args:
          cpu_s: on the clock whose reading began it.
          num_queries: that shared the scan.
        """
        used_s = cpu_s - self._cpu_s
        energy_j = self._meter.joules(used_s)
        return Usage(
            wall_s=(time.monotonic() - self._wall_s) / num_queries,
            cpu_s=used_s / num_queries,
            max_rss_bytes=0,
            energy_j=None if energy_j is None else energy_j / num_queries,
        )
