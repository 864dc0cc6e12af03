"""Candidates by HMMER's own filters on sequences that are parsed once for many queries: ``--engine pyhmmer``.

Owns the settings of that pipeline and why it lets through enough. Does not own reading
(`fast_scan.database`), nor the profile, which is made as jackhmmer makes it (`scan.hmmer_profile`). A block
of targets is in memory at a time, and all queries are searched in it before the next is read.

Why nothing is lost
-------------------
A target is reported by jackhmmer if it passes MSV, bias, Viterbi and Forward filters, has a domain, and its
E-value is small enough. pyhmmer carries HMMER's C for all of that (3.4, the binary may be 3.3.2), so scores
should be the same; compilers may differ in how they order sums of floats. Therefore:
- The filters' limits are `MARGIN` times jackhmmer's, which is one bit of score: P-values fall by half with
  every bit (lambda is log 2 in all of them). MSV and Viterbi are integers, equal whoever computes them. Bias
  and Forward are sums of floats that two builds give within a thousandth of a bit of each other, and so are
  mu and tau, which are fitted to scores of drawn sequences (equal ones: the generator and its seed are the
  same); `tests/test_pipelines_scanners.py` compares what both say.
- The E-value is not looked at: it depends on how many targets there are in all, and jackhmmer sees to it.
- Whether there is a domain at all has no limit that could be moved. It is decided by posterior probabilities
  of the same C with the same seed.
- Targets of more than `scan.MAX_TARGET` residues are candidates unseen: HMMER refuses them with an error of
  its own, which it must be given the chance to report.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.database import Records, ScanDatabase
from foldfeed.pipelines.fast_scan.kernels import kernels
from foldfeed.pipelines.tools.jackhmmer import FLAGS, NAME
from foldfeed.pipelines.tools.scanner import Candidates, Cost, Found, time_limit

if TYPE_CHECKING:
    from pyhmmer.easel import DigitalSequenceBlock
    from pyhmmer.plan7 import OptimizedProfile

# Part of every result's identity; raise it when other targets may be let through.
PYHMMER_VERSION = 1

# Of a P-value: one bit of score.
MARGIN = 2.0
LIMITS = {name: MARGIN * float(FLAGS[FLAGS.index(f"--{name}") + 1]) for name in ("F1", "F2", "F3")}

# Text of a block. HMMER's object of a sequence takes about 1 KB beside its residues, so a block of sequences
# of 300 residues takes some 60 MB.
BLOCK_BYTES = 16 << 20

# Parsing a file takes as long as searching it for one or two queries of 300 residues
# (bench/search_batching.py), and nothing is kept of it.
NUM_TOGETHER = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PyhmmerScanner:
    """HMMER's filters in this process; see `tools.scanner.Scanner`.

    Attributes:
      cpus: threads that share the queries.
      timeout_s: longest wall time of one search; a batch has that of all its queries.
    """

    cpus: int
    timeout_s: float

    source = f"pyhmmer {PYHMMER_VERSION}:database"
    flags = None
    num_together = NUM_TOGETHER
    few_batches = True

    @classmethod
    def find(cls, *, cpus: int, timeout_s: float) -> PyhmmerScanner:
        """Returns a scanner that can work here.

        Raises:
          MissingExtraError: pyhmmer is not installed.
          ToolNotFoundError: what reads FASTA was not compiled.
        """
        scan.pyhmmer_version()
        kernels()
        return cls(cpus=cpus, timeout_s=timeout_s)

    @property
    def name_here(self) -> str:
        """The library and its version."""
        return f"pyhmmer {scan.pyhmmer_version()}"

    def describe(self, paths: Sequence[str]) -> str:
        """Returns the library, and that it is HMMER's filters."""
        return f"HMMER's filters in memory ({self.name_here})"

    def candidates(self, sequences: Sequence[str], path: str) -> Iterator[Found]:
        """Yields the targets that pass the filters; the file is read once for all queries.

        Raises:
          UnreadableDatabaseError: it is no FASTA file that HMMER reads.
          DatabaseChangedError: it changed meanwhile, or is gone.
          ToolTimeoutError: it took too long.
          CancelledError: the run was stopped.
        """
        cost = Cost(scan.thread_seconds())
        found = self._passing(sequences, ScanDatabase(path, kernels()[0], chunk_bytes=BLOCK_BYTES))
        share = cost.share(scan.thread_seconds(), len(sequences))
        yield from found.each(share)

    def _passing(self, sequences: Sequence[str], database: ScanDatabase) -> Candidates:
        check = time_limit("the search by pyhmmer", NAME, self.timeout_s * len(sequences))
        check()
        profiles = [scan.hmmer_profile(sequence) for sequence in sequences]
        extents: list[list[NDArray[np.int64]]] = [[np.empty((0, 2), dtype=np.int64)] for _ in profiles]
        num_targets = 0
        with ThreadPoolExecutor(self.cpus) as pool:
            for records in database.records():
                num_targets += len(records)
                block, refused = _block_of(records)

                def search(
                    profile: OptimizedProfile, block: DigitalSequenceBlock = block
                ) -> tuple[NDArray[np.int64], float]:
                    check()
                    started = time.thread_time()
                    return _hits(profile, block), time.thread_time() - started

                passing = map(search, profiles) if self.cpus == 1 else pool.map(search, profiles)
                for found, (hits, helped_s) in zip(extents, passing, strict=True):
                    if self.cpus > 1:
                        scan.add_helped(helped_s)
                    found.append(records.extents(np.union1d(hits, refused)))
        return Candidates(
            database=database,
            num_targets=num_targets,
            extents=tuple(np.concatenate(found) for found in extents),
        )


def _block_of(records: Records) -> tuple[DigitalSequenceBlock, NDArray[np.int64]]:
    """Returns HMMER's objects of targets, named by their number, and the numbers of those that it refuses."""
    easel, alphabet = scan.easel_alphabet()
    codes, lengths = records.codes.data, np.diff(records.code_starts)
    starts = records.code_starts.tolist()
    searched = np.flatnonzero((lengths > 0) & (lengths <= scan.MAX_TARGET)).tolist()
    sequences = (
        easel.DigitalSequence(
            alphabet, name=b"%d" % number, sequence=codes[starts[number] : starts[number + 1]]
        )
        for number in searched
    )
    return easel.DigitalSequenceBlock(alphabet, sequences), np.flatnonzero(lengths > scan.MAX_TARGET)


def _hits(profile: OptimizedProfile, block: DigitalSequenceBlock) -> NDArray[np.int64]:
    """Returns the numbers of the targets of a block that pass."""
    # With Z of 1 an E-value is a P-value, and none is above 1.
    found = scan.pipeline(E=1.0, Z=1, **LIMITS).search_hmm(profile, block)
    return np.array([int(hit.name) for hit in found], dtype=np.int64)
