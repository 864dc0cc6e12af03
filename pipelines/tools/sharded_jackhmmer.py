"""JackHMMER in a database of several FASTA files, file by file, with the answer of one search in all of them.

Owns how the parts of such a search make the whole. First every shard is searched alone and gives its
*candidates*: all targets that a search in the whole could report. Then stock jackhmmer searches the
candidates of all shards, in their order, with ``-Z`` of all targets.

Why that is jackhmmer's own answer, byte for byte:
- Scores, P-values and filters of a target depend on the query and on that target alone. An E-value is the
  P-value times Z, so a target that is not reported among the sequences of one shard (a smaller Z) is not
  reported in the
  whole: the candidates are a superset of what is reported.
- A target that is not reported contributes nothing to the output. Z is given; domZ, by which further domains
  of a target enter the alignment, is HMMER's own count of reported targets, which the last search makes
  itself. So neither has to be put together from parts. (Of the published rules for sharded searches,
  AlphaFold 3's ``--domZ Z`` loses such domains and a domZ per shard invents them.)
- The candidates do not depend on the other shards. So a release that adds shards to a database searches those
  alone, and then the candidates.

What finds the candidates of a shard is an engine (`tools.scanner`). The price of ``binary`` is
that reported targets are searched twice. Behind the fast scan it is not paid: there the candidates are what
the scan lets through, and jackhmmer runs once. Engines that take many queries through a file together are
used so for a database of one file, too: it is one shard then.

It holds for one iteration (``-N 1``) only: with more, the profile depends on all shards.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.programs.energy import total_joules
from foldfeed.pipelines.programs.subprocess_runner import Usage
from foldfeed.pipelines.tools.fast_jackhmmer import run_on_candidates
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer
from foldfeed.pipelines.tools.scanner import Scanner
from foldfeed.pipelines.tools.search_tool import SearchResult, Shard, ToolIdentity

# Part of the identity of answers and of candidates; raise it when either may become others.
JOIN_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardedJackhmmer:
    """A JackHMMER that is ready to search a database of several files.

    Attributes:
      identity: program and settings of the whole search; the number of shards is not part of it.
      scan_identity: of the search of one shard.
      binary: absolute path of the executable.
      shards: the files in order.
      cpus: worker threads of one search.
      timeout_s: longest wall time of one search: of a shard, and of the candidates.
      scanner: what finds the candidates of a shard.
    """

    identity: ToolIdentity
    scan_identity: ToolIdentity
    binary: str
    shards: tuple[Shard, ...]
    cpus: int
    timeout_s: float
    scanner: Scanner

    @classmethod
    def of(cls, plain: Jackhmmer, shards: tuple[Shard, ...], scanner: Scanner) -> ShardedJackhmmer:
        """Returns a JackHMMER for a database of several files.

        Args:
          plain: whose program and settings; its database is not used.
          shards: the files in order.
          scanner: what finds the candidates of a shard.
        """
        settings = ("-Z", "{targets}", *plain.identity.argv_template[:-1])
        scan = settings if scanner.flags is None else scanner.flags
        return cls(
            identity=dataclasses.replace(
                plain.identity, argv_template=(*settings, f"{{candidates {JOIN_VERSION}:{scanner.source}}}")
            ),
            scan_identity=dataclasses.replace(
                plain.identity, argv_template=(*scan, f"{{candidates {JOIN_VERSION} of {scanner.source}}}")
            ),
            binary=plain.binary,
            shards=shards,
            cpus=plain.cpus,
            timeout_s=plain.timeout_s,
            scanner=scanner,
        )

    @property
    def max_residues(self) -> int | None:
        """None, as of JackHMMER itself."""
        return None

    def search(self, sequence: str) -> SearchResult:
        """Searches one sequence in all shards, one after the other."""
        return self.join(sequence, [self.scan(sequence, number) for number in range(len(self.shards))])

    def scan(self, sequence: str, number: int) -> SearchResult:
        """Returns the candidates of one shard; see `scan_many`."""
        (found,) = self.scan_many([sequence], number)
        return found

    def scan_many(self, sequences: Sequence[str], number: int) -> Iterator[SearchResult]:
        """Yields the candidates of some queries in one shard, in their order.

        The text of one query's candidates is in memory at a time.

        Returns: the text of FASTA records as the alignment; the shard's number of targets as the table.

        Raises:
          SearchError: no usable result; for all that are still to come where they are scanned together.
          StorageFullError: no space for the tool's files.
        """
        for found in self.scanner.candidates(sequences, self.shards[number].path):
            yield SearchResult(
                tool=self.scan_identity,
                format="fasta",
                alignment=found.records,
                table=f"{found.num_targets}\n".encode(),
                usage=found.usage,
            )

    def join(self, sequence: str, candidates: Sequence[SearchResult]) -> SearchResult:
        """Returns the answer of the whole database.

        Args:
          sequence: the query.
          candidates: of all shards, in their order.
        Raises:
          SearchError: no usable result for this query.
          StorageFullError: no space for the tool's files.
        """
        assert len(candidates) == len(self.shards), (len(candidates), len(self.shards))
        num_targets = sum(int(one.table) for one in candidates)
        costs = [one.usage for one in candidates]
        with tempfile.TemporaryDirectory(prefix="foldfeed-jackhmmer-") as name:
            folder = Path(name)
            with disk_full_is_typed(folder), (folder / "targets").open("wb") as out:
                for one in candidates:
                    out.write(one.alignment)
            found = run_on_candidates(self._as_plain(), sequence, folder, num_targets)
        return dataclasses.replace(found, usage=_total([*costs, found.usage]))

    def _as_plain(self) -> Jackhmmer:
        """Returns what runs the last search; its database is given with each run."""
        return Jackhmmer(
            identity=self.identity, binary=self.binary, database="", cpus=self.cpus, timeout_s=self.timeout_s
        )


def _total(costs: Sequence[Usage]) -> Usage:
    """Returns the cost of all of them; the memory is that of the largest."""
    return Usage(
        wall_s=sum(cost.wall_s for cost in costs),
        cpu_s=sum(cost.cpu_s for cost in costs),
        max_rss_bytes=max(cost.max_rss_bytes for cost in costs),
        bytes_read=sum(cost.bytes_read for cost in costs),
        bytes_from_disk=sum(cost.bytes_from_disk for cost in costs),
        energy_j=total_joules(cost.energy_j for cost in costs),
    )
