"""Candidates by HMMER's daemon, which keeps a shard in memory for many queries: ``--engine hmmpgmd``.

Owns the settings of its searches and the file that it loads. Does not own the daemon (`hmmpgmd`). A daemon is
started for some queries in one file, and ends with them; it holds the sequences twice, once in each of its
processes. Why nothing is lost: the same filters with the same limits as those of ``--engine pyhmmer``, where
the reasons stand (`pyhmmer_scanner`); the daemon makes the profile of a sequence as jackhmmer does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.database import SYMBOLS, Records, ScanDatabase
from foldfeed.pipelines.fast_scan.kernels import kernels
from foldfeed.pipelines.programs.subprocess_runner import Running, Usage, sum_usages
from foldfeed.pipelines.tools.hmmpgmd import NAME, DaemonProgram, daemon
from foldfeed.pipelines.tools.pyhmmer_scanner import LIMITS
from foldfeed.pipelines.tools.scanner import Candidates, Cost, Found, time_limit

# Part of every result's identity; raise it when other targets may be let through.
HMMPGMD_VERSION = 1

# With Z of 1 an E-value is a P-value, and none is above 1.
OPTIONS = " ".join(f"--{name} {limit:g}" for name, limit in LIMITS.items()) + " -E 1 -Z 1"

NUM_TOGETHER = 128
BLOCK_BYTES = 16 << 20

# Room for the line before the records, which is written last.
_HEAD_BYTES = 160
_LETTERS = np.frombuffer(SYMBOLS.encode("ascii"), dtype=np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HmmpgmdScanner:
    """HMMER's filters in a daemon; see `tools.scanner.Scanner`.

    Attributes:
      program: the daemon.
      cpus: its threads.
      timeout_s: longest wall time of one search; a batch has that of all its queries.
    """

    program: DaemonProgram
    cpus: int
    timeout_s: float

    source = f"hmmpgmd {HMMPGMD_VERSION}:database"
    flags = None
    num_together = NUM_TOGETHER
    few_batches = True

    @classmethod
    def find(cls, *, cpus: int, timeout_s: float) -> HmmpgmdScanner:
        """Returns a scanner that can work here.

        Raises:
          ToolNotFoundError: there is no daemon that can be talked to, or what reads FASTA was not compiled.
        """
        kernels()
        return cls(program=DaemonProgram.find(), cpus=cpus, timeout_s=timeout_s)

    @property
    def name_here(self) -> str:
        """The daemon and its version."""
        return f"{NAME} {self.program.version}"

    def describe(self, paths: Sequence[str]) -> str:
        """Returns the daemon, and that it can be reached from outside."""
        return f"HMMER's daemon ({self.name_here}, which listens on two ports of every address of this host)"

    def candidates(self, sequences: Sequence[str], path: str) -> Iterator[Found]:
        """Yields the targets that pass the filters; the file is loaded once for all queries.

        Raises:
          UnreadableDatabaseError: it is no FASTA file that HMMER reads.
          DatabaseChangedError: it changed meanwhile, or is gone.
          ToolFailedError, ToolOutputError: of the daemon.
          ToolTimeoutError: it took too long.
          StorageFullError: no space for the daemon's copy of the file.
          CancelledError: the run was stopped.
        """
        cost = Cost(time.thread_time())
        with tempfile.TemporaryDirectory(prefix="foldfeed-hmmpgmd-") as name:
            found, programs = self._passing(sequences, path, Path(name))
        share = _with_programs(cost.share(time.thread_time(), len(sequences)), programs, len(sequences))
        yield from found.each(share)

    def _passing(self, sequences: Sequence[str], path: str, folder: Path) -> tuple[Candidates, list[Running]]:
        check = time_limit(NAME, NAME, self.timeout_s * len(sequences))
        database = ScanDatabase(path, kernels()[0], chunk_bytes=BLOCK_BYTES)
        copy = folder / "database"
        with disk_full_is_typed(folder):
            extents, refused = write_daemon_database(database, copy)
        extents_of = []
        with daemon(self.program, copy, folder=folder, cpus=self.cpus, check=check) as (server, programs):
            for sequence in sequences:
                check()
                hits = server.search(sequence, OPTIONS, len(extents))
                extents_of.append(extents[np.union1d(np.array(hits, dtype=np.int64), refused)])
        return Candidates(database=database, num_targets=len(extents), extents=tuple(extents_of)), programs


def write_daemon_database(database: ScanDatabase, path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Writes a FASTA file as the daemon loads it: a line of counts, records numbered from 1 on.

    The line ends with a digest of the records, by which the worker sees that it loaded what its master did.
    Records that HMMER refuses for their length are left without residues.

    Args:
      database: to copy.
      path: of the new file.
    Returns: int64 (records, 2), where they start and end in the database; int64, numbers of those refused.

    Raises:
      UnreadableDatabaseError: it is no FASTA file that HMMER reads.
      DatabaseChangedError: it changed meanwhile, or is gone.
    """
    extents, refused = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    num_records, num_residues, digest = 0, 0, hashlib.sha256()
    with path.open("wb") as out:
        out.write(b"\n" * _HEAD_BYTES)
        for records in database.records():
            lengths = np.diff(records.code_starts)
            long = np.flatnonzero(lengths > scan.MAX_TARGET)
            text = _text_of(records, num_records, set(long.tolist()))
            digest.update(text)
            out.write(text)
            extents.append(records.extents(np.arange(len(records))))
            refused.append(long + num_records)
            num_residues += int(lengths.sum() - lengths[long].sum())
            num_records += len(records)
        head = f"#{num_residues} {num_records} 1 {num_records} {num_records} {digest.hexdigest()[:30]}\n"
        _write_head(out, head.encode("ascii"))
    return np.concatenate(extents), np.concatenate(refused)


def _write_head(out: BinaryIO, head: bytes) -> None:
    assert len(head) <= _HEAD_BYTES, head
    out.seek(0)
    out.write(head)


def _text_of(records: Records, before: int, left_out: set[int]) -> bytes:
    letters = _LETTERS[records.codes].tobytes()
    starts = records.code_starts.tolist()
    # The second word says in which databases of the file a record is: in the first.
    return b"".join(
        b">%d 1\n%b\n" % (before + at + 1, b"" if at in left_out else letters[starts[at] : starts[at + 1]])
        for at in range(len(records))
    )


def _with_programs(share: Usage, programs: Sequence[Running], num_queries: int) -> Usage:
    """Returns a query's share of this process with its share of the daemon's processes."""
    usages = [program.usage for program in programs if program.usage is not None]
    assert len(usages) == len(programs), "the block that ran them has ended"
    whole = sum_usages(usages)
    joules = None
    if whole.energy_j is not None and share.energy_j is not None:
        joules = share.energy_j + whole.energy_j / num_queries
    return Usage(
        wall_s=share.wall_s,
        cpu_s=share.cpu_s + whole.cpu_s / num_queries,
        # They hold the sequences at the same time.
        max_rss_bytes=sum(usage.max_rss_bytes for usage in usages),
        bytes_read=whole.bytes_read // num_queries,
        bytes_from_disk=whole.bytes_from_disk // num_queries,
        energy_j=joules,
    )
