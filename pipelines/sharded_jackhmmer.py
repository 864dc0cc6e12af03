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

The price is that reported targets are searched twice. Behind the fast scan it is not paid: there the
candidates are what the scan lets through, and jackhmmer runs once.

It holds for one iteration (``-N 1``) only: with more, the profile depends on all shards.
"""

from __future__ import annotations

import dataclasses
import io
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.energy import EnergyMeter, total_joules
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.fast_jackhmmer import FastJackhmmer, describe_scan, run_on_candidates
from foldfeed.pipelines.jackhmmer import (
    FLAGS,
    NAME,
    Jackhmmer,
    read_table,
)
from foldfeed.pipelines.scan import thread_seconds
from foldfeed.pipelines.scan_choice import scan_kernel
from foldfeed.pipelines.scan_names import copy_named
from foldfeed.pipelines.search_tool import QUERY_NAME, SearchResult, Shard, ToolIdentity
from foldfeed.pipelines.subprocess_runner import Usage, require_success, run_program

# Part of the identity of answers and of candidates; raise it when either may become others.
JOIN_VERSION = 1

# What a search of one shard says: the table of reported targets and, in the report, how many it searched.
SCAN_FLAGS = tuple(
    {"/dev/null": "{report}"}.get(flag, flag) for flag in FLAGS if flag not in ("-A", "{alignment}")
)
_TARGETS = re.compile(rb"^Target sequences?:\s+(\d+)\s", re.MULTILINE)
# The line stands at the report's end; what is before grows with the hits.
_REPORT_END_BYTES = 8192


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
      fast: whether the shards are searched by the fast scan.
    """

    identity: ToolIdentity
    scan_identity: ToolIdentity
    binary: str
    shards: tuple[Shard, ...]
    cpus: int
    timeout_s: float
    fast: bool

    @classmethod
    def find(cls, *, shards: tuple[Shard, ...], cpus: int, timeout_s: float, fast: bool) -> ShardedJackhmmer:
        """Returns the JackHMMER on PATH.

        Raises:
          ToolNotFoundError, MissingExtraError, KernelError: as of `Jackhmmer.find` and `FastJackhmmer.find`.
        """
        words = {"database": shards[0].path, "cpus": cpus, "timeout_s": timeout_s}
        plain = (FastJackhmmer if fast else Jackhmmer).find(**words)  # type: ignore[arg-type]
        last = plain.identity.argv_template[-1].strip("{}")
        settings = plain.identity.argv_template[:-1]
        if not fast:
            settings = ("-Z", "{targets}", *settings)
        scan = settings if fast else tuple(flag for flag in SCAN_FLAGS if flag not in ("--cpu", "{cpus}"))
        return cls(
            identity=dataclasses.replace(
                plain.identity, argv_template=(*settings, f"{{candidates {JOIN_VERSION}:{last}}}")
            ),
            scan_identity=dataclasses.replace(
                plain.identity, argv_template=(*scan, f"{{candidates {JOIN_VERSION} of {last}}}")
            ),
            binary=plain.binary,
            shards=shards,
            cpus=cpus,
            timeout_s=timeout_s,
            fast=fast,
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

        Behind the fast scan the shard is read once for all of them, and the text of one query's candidates
        is in memory at a time.

        Returns: the text of FASTA records as the alignment; the shard's number of targets as the table.

        Raises:
          SearchError: no usable result; of a fast scan, for all that are still to come.
          StorageFullError: no space for the tool's files.
        """
        path = self.shards[number].path
        if self.fast:
            yield from self._scan_fast(sequences, path)
            return
        for sequence in sequences:
            with tempfile.TemporaryDirectory(prefix="foldfeed-jackhmmer-") as name:
                num_targets, usage = self._scan_binary(sequence, path, Path(name))
                found = (Path(name) / "candidates").read_bytes()
            yield self._found(found, num_targets, usage)

    def _found(self, candidates: bytes, num_targets: int, usage: Usage) -> SearchResult:
        return SearchResult(
            tool=self.scan_identity,
            format="fasta",
            alignment=candidates,
            table=f"{num_targets}\n".encode(),
            usage=usage,
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

    @property
    def kernel_name(self) -> str:
        """What computes the first filter on this machine; "" where that is jackhmmer itself."""
        return scan_kernel().name if self.fast else ""

    def describe_scan(self) -> str | None:
        """Returns kernel and libraries of the fast scan in words; None without it."""
        return describe_scan([shard.path for shard in self.shards]) if self.fast else None

    def _as_fast(self, path: str) -> FastJackhmmer:
        return FastJackhmmer(
            identity=self.scan_identity,
            binary=self.binary,
            database=path,
            cpus=self.cpus,
            timeout_s=self.timeout_s,
        )

    def _scan_fast(self, sequences: Sequence[str], path: str) -> Iterator[SearchResult]:
        started, started_cpu, meter = time.monotonic(), thread_seconds(), EnergyMeter()
        candidates = self._as_fast(path).candidates(sequences)
        cpu_s = thread_seconds() - started_cpu
        energy_j = meter.joules(cpu_s)
        # Of a scan for several queries each has its share.
        cost = Usage(
            wall_s=(time.monotonic() - started) / len(sequences),
            cpu_s=cpu_s / len(sequences),
            max_rss_bytes=0,
            energy_j=None if energy_j is None else energy_j / len(sequences),
        )
        for query in range(len(sequences)):
            text = io.BytesIO()
            candidates.copy(query, text)
            yield self._found(text.getvalue(), candidates.num_targets, cost)

    def _scan_binary(self, sequence: str, path: str, folder: Path) -> tuple[int, Usage]:
        paths = {key: folder / key for key in ("query", "report", "table")}
        paths["query"].write_text(f">{QUERY_NAME}\n{sequence}\n", encoding="ascii")
        words = {**{key: str(place) for key, place in paths.items()}, "database": path}
        argv = [flag.format(cpus=self.cpus, **words) for flag in SCAN_FLAGS]
        done = run_program([self.binary, *argv], folder=folder, timeout_s=self.timeout_s)
        require_success(NAME, done, folder)
        names = {line.split(maxsplit=1)[0] for line in read_table(paths["table"]).splitlines()}
        # A name may begin with the '#' of a comment; what only looks like one is found nowhere.
        perhaps = {
            line.split(maxsplit=1)[0]
            for line in paths["table"].read_bytes().splitlines()
            if line.startswith(b"#") and line[1:2].strip()
        }
        started, started_cpu = time.monotonic(), time.thread_time()
        with disk_full_is_typed(folder), (folder / "candidates").open("wb") as out:
            missing = names - copy_named(path, names | perhaps, out)
        if missing:
            shown = min(missing).decode("utf-8", errors="backslashreplace")
            raise ToolOutputError(
                NAME,
                f"it reported {shown!r}, which {path} does not hold: the file changed, or the name has a NUL",
            )
        return _num_targets(paths["report"]), dataclasses.replace(
            done.usage,
            wall_s=done.usage.wall_s + time.monotonic() - started,
            cpu_s=done.usage.cpu_s + time.thread_time() - started_cpu,
        )


def _num_targets(report: Path) -> int:
    """Returns how many targets HMMER says it searched.

    Raises:
      ToolOutputError: it does not say so.
    """
    with report.open("rb") as file:
        file.seek(max(0, report.stat().st_size - _REPORT_END_BYTES))
        found = _TARGETS.search(file.read())
    if found is None:
        raise ToolOutputError(NAME, "its report does not say how many target sequences it searched")
    return int(found.group(1))


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
