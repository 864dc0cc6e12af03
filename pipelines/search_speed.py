"""What a JackHMMER search costs on this machine, engine by engine, and would in databases of other sizes.

Owns the measurement and the projection; `cli.search_speed` owns their words. A search
costs something for its query (a process, a calibrated profile), measured on a database of one target, and the
rest grows with query residues times database residues (cells).
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from foldfeed.pipelines.errors import ConfigError
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.choice import seconds_per_cell
from foldfeed.pipelines.fast_scan.database import ScanDatabase, open_database
from foldfeed.pipelines.fast_scan.kernels import Kernel
from foldfeed.pipelines.fasta import read_fasta
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.fast_jackhmmer import F1, FastJackhmmer, forget_profiles
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer

# Sequences of the databases that AlphaFold 3's documentation of sharded searches names (docs/performance.md).
KNOWN_SIZES = {"uniref90": 153_742_194, "mgnify": 623_796_864, "small_bfd": 65_984_053}
TIMEOUT_S = 3600.0

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpeed:
    """The first filter on a device (`fast_scan.choice`), by the clock, all queries together.

    Attributes:
      name: of kernel and device.
      gcells_per_s: query residues times database residues, 1e9 a second.
      core_name: kernel of one core.
      core_gcells_per_s: what that does, CPU seconds.
      cores_fed: cores that one device keeps busy with all that it leaves to them.
    """

    name: str
    gcells_per_s: float
    core_name: str
    core_gcells_per_s: float
    cores_fed: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpeed:
    """What one engine took.

    Attributes:
      engine: ``binary`` or ``fast``.
      cpu_s: user plus system seconds of all queries, child processes included.
      fixed_s: of the CPU seconds, what the queries cost in a database of one target.
      wall_s: seconds of all queries, one after another.
      stages: CPU seconds by stage, where there are several.
      share_passing: targets that the first filter lets through, as a share; None where nobody counts.
      answers: alignment and words of the table of each query, to compare engines.
      device: where one computed the first filter; its seconds are in no other number here.
    """

    engine: str
    cpu_s: float
    fixed_s: float
    wall_s: float
    stages: dict[str, float]
    share_passing: float | None
    answers: tuple[tuple[bytes, tuple[bytes, ...]], ...]
    device: DeviceSpeed | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpeed:
    """A measurement.

    Attributes:
      num_targets: sequences of the database.
      target_residues: of all of them.
      query_residues: of each query.
      engines: in the order asked for.
    """

    num_targets: int
    target_residues: int
    query_residues: tuple[int, ...]
    engines: tuple[EngineSpeed, ...]

    @property
    def num_cells(self) -> int:
        """Residues of all queries times residues of the database."""
        return sum(self.query_residues) * self.target_residues

    @property
    def is_equal(self) -> bool:
        """Whether all engines gave equal alignments and tables."""
        return len({one.answers for one in self.engines}) == 1

    def cpu_s_in(self, engine: EngineSpeed, num_targets: int, query_residues: int) -> float:
        """Returns CPU seconds of one query in a database of so many sequences, as long as those measured."""
        cells = query_residues * num_targets * (self.target_residues / self.num_targets)
        growing_s = max(0.0, engine.cpu_s - engine.fixed_s)
        return engine.fixed_s / len(self.query_residues) + growing_s * cells / self.num_cells


def read_queries(url: str, number: int) -> list[str]:
    """Returns the first valid sequences of a FASTA file.

    Raises:
      QueryFileError: it cannot be opened.
      ConfigError: it holds none.
    """
    entries = (entry for entry in read_fasta(url) if isinstance(entry, QuerySequence))
    found = [entry.sequence for entry in itertools.islice(entries, number)]
    if not found:
        raise ConfigError(f"{url!r} holds no valid sequence to search")
    return found


def measure_search(
    database: str, counts: tuple[int, int], queries: Sequence[str], engines: Sequence[str]
) -> SearchSpeed:
    """Searches every query with every engine, one thread each.

    Args:
      database: path of a FASTA file.
      counts: its sequences and residues.
      queries: sequences.
      engines: of ``binary`` and ``fast``.
    Raises:
      ToolNotFoundError, MissingExtraError: an engine is not there.
      SearchError: a search failed, or the database cannot be read.
    """
    measured = {"binary": _measure_binary, "fast": _measure_fast}
    with tempfile.TemporaryDirectory(prefix="foldfeed-bench-") as name:
        tiny = Path(name) / "tiny.fasta"
        tiny.write_text(">one\nACDEFGHIKLMNPQRSTVWY\n", encoding="ascii")
        return SearchSpeed(
            num_targets=counts[0],
            target_residues=counts[1],
            query_residues=tuple(map(len, queries)),
            engines=tuple(measured[engine](database, str(tiny), queries) for engine in engines),
        )


def _fixed_s(tool: Jackhmmer | FastJackhmmer, tiny: str, queries: Sequence[str]) -> float:
    small = dataclasses.replace(tool, database=tiny)
    small.search(queries[0][:1])
    return timed(lambda: [small.search(query) for query in queries])[1]


def _measure_binary(database: str, tiny: str, queries: Sequence[str]) -> EngineSpeed:
    tool = Jackhmmer.find(database=database, cpus=1, timeout_s=TIMEOUT_S)
    # Once before, so that the file is in the page cache for both engines.
    tool.search(queries[0][:1])
    found, cpu_s, wall_s = timed(lambda: [tool.search(query) for query in queries])
    return EngineSpeed(
        engine="binary",
        cpu_s=cpu_s,
        fixed_s=_fixed_s(tool, tiny, queries),
        wall_s=wall_s,
        stages={},
        share_passing=None,
        answers=tuple((one.alignment, tuple(one.table.split())) for one in found),
    )


def _measure_fast(database: str, tiny: str, queries: Sequence[str]) -> EngineSpeed:
    tool = FastJackhmmer.find(database=database, cpus=1, timeout_s=TIMEOUT_S)
    opened = open_database(database)
    _, read_s, _ = timed(lambda: sum(1 for _ in opened.chunks()))
    forget_profiles()
    found, cpu_s, wall_s = timed(lambda: [tool.search(query) for query in queries])
    # Profiles are kept for a while, so both are measured with fresh ones.
    forget_profiles()
    fixed_s = _fixed_s(tool, tiny, queries)
    profiles, profile_s, _ = timed(lambda: [scan.profile_of(query) for query in queries])

    def passing() -> Iterator[int]:
        for profile in profiles:
            for chunk in opened.chunks():
                through = scan.survivors([profile], chunk, f1=F1, kernel=opened.kernel)[0]
                yield len(through.records)

    count, scan_s, _ = timed(lambda: sum(passing()))
    return EngineSpeed(
        engine="fast",
        cpu_s=cpu_s,
        fixed_s=fixed_s,
        wall_s=wall_s,
        stages={
            "reading the database once": read_s,
            "profiles": profile_s,
            "first filter": scan_s,
            "jackhmmer on what passes": max(0.0, cpu_s - profile_s - scan_s),
        },
        share_passing=count / len(queries) / max(1, opened.num_records),
        answers=tuple((one.alignment, tuple(one.table.split())) for one in found),
        device=_measure_device(opened, profiles, cpu_s),
    )


def _measure_device(
    database: ScanDatabase, profiles: Sequence[scan.FilterProfile], cpu_s: float
) -> DeviceSpeed | None:
    """Returns the rate of the device that scans here; None where the processor does."""
    kernel = database.kernel
    if isinstance(kernel, Kernel):
        return None
    # Once before: kernels are compiled and memory is filled.
    wall_s = [
        timed(lambda: [scan.best_cells(profiles, chunk, kernel=kernel) for chunk in database.chunks()])[2]
        for _ in range(2)
    ][-1]
    residues = sum(chunk.num_residues for chunk in database.chunks())
    return DeviceSpeed(
        name=kernel.name,
        gcells_per_s=residues * sum(map(len, profiles)) / wall_s / 1e9,
        core_name=kernel.host.name,
        core_gcells_per_s=1e-9 / seconds_per_cell(kernel.host),
        cores_fed=cpu_s / wall_s,
    )


def timed(function: Callable[[], T]) -> tuple[T, float, float]:
    """Returns the answer, CPU seconds (children included) and wall seconds of a call."""
    started, started_cpu = time.monotonic(), cpu_seconds()
    answer = function()
    return answer, cpu_seconds() - started_cpu, time.monotonic() - started


def cpu_seconds() -> float:
    """Returns user plus system seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
