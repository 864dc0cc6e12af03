"""Candidates as jackhmmer itself reports them: the engine ``binary`` in a database of several files.

Owns the command line of such a search and the copy of what it reports. Does not own why these are all that
the whole may report (`sharded_jackhmmer`).
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.errors import ToolOutputError
from foldfeed.pipelines.fast_scan.names import copy_named
from foldfeed.pipelines.programs.subprocess_runner import Usage, require_success, run_program
from foldfeed.pipelines.tools.jackhmmer import FLAGS, NAME, read_table
from foldfeed.pipelines.tools.scanner import Found
from foldfeed.pipelines.tools.search_tool import QUERY_NAME

# What a search of one shard says: the table of reported targets and, in the report, how many it searched.
SCAN_FLAGS = tuple(
    {"/dev/null": "{report}"}.get(flag, flag) for flag in FLAGS if flag not in ("-A", "{alignment}")
)
_TARGETS = re.compile(rb"^Target sequences?:\s+(\d+)\s", re.MULTILINE)
# The line stands at the report's end; what is before grows with the hits.
_REPORT_END_BYTES = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JackhmmerScanner:
    """Stock jackhmmer, one query at a time.

    Attributes:
      binary: absolute path of the executable.
      cpus: worker threads of one search.
      timeout_s: longest wall time of one search.
    """

    binary: str
    cpus: int
    timeout_s: float

    source = "database"
    flags = tuple(flag for flag in SCAN_FLAGS if flag not in ("--cpu", "{cpus}"))
    num_together = 1
    few_batches = False
    name_here = ""

    def describe(self, paths: Sequence[str]) -> None:
        """Returns None: it is jackhmmer alone."""

    def candidates(self, sequences: Sequence[str], path: str) -> Iterator[Found]:
        """Yields what jackhmmer reports; see `tools.scanner.Scanner`."""
        for sequence in sequences:
            with tempfile.TemporaryDirectory(prefix="foldfeed-jackhmmer-") as name:
                num_targets, usage = self._search(sequence, path, Path(name))
                records = (Path(name) / "candidates").read_bytes()
            yield Found(records=records, num_targets=num_targets, usage=usage)

    def _search(self, sequence: str, path: str, folder: Path) -> tuple[int, Usage]:
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
        return num_targets_of(paths["report"]), dataclasses.replace(
            done.usage,
            wall_s=done.usage.wall_s + time.monotonic() - started,
            cpu_s=done.usage.cpu_s + time.thread_time() - started_cpu,
        )


def num_targets_of(report: Path) -> int:
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
