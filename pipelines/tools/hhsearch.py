"""HHsearch of an alignment against a database of profiles of known structures, with the flags of AlphaFold 2.

Owns the command line, the checks of its output, and the look at the database for what it does not print:
sequences of whole chains and release dates. Does not own the process (`subprocess_runner`) or parsing
(`parsers.hhr`). The database is an HH-suite prefix like the PDB70's: the first sequence of an entry's
alignment is the chain, and its name that of the entry. Invariants: a result is
returned only if all alignments of its table are there and every hit's residues are those of its chain; a
query longer than HH-suite holds is refused, because it would be cut.

Source: AlphaFold 2 ``data/tools/hhsearch.py``; HH-suite user guide.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.a3m import a3m_rows
from foldfeed.feature_store.parsers.hhr import HhrHit, parse_hhr
from foldfeed.pipelines.errors import QueryTooLongError, ToolOutputError
from foldfeed.pipelines.manifest import file_state
from foldfeed.pipelines.programs.subprocess_runner import require_success, run_program
from foldfeed.pipelines.tools.hhblits import MAX_RESIDUES
from foldfeed.pipelines.tools.hmmsearch import dates_of, letters_of, released
from foldfeed.pipelines.tools.search_tool import (
    QUERY_NAME,
    SearchResult,
    ToolIdentity,
    find_binary,
    identity_of,
)
from foldfeed.pipelines.tools.template_tool import fact_line

NAME = "hhsearch"

FLAGS = ("-i", "{alignment}", "-o", "{hits}", "-maxseq", "1000000", "-cpu", "{cpus}", "-d", "{database}")
# When and where it ran, which is not what it found.
_VARYING = (b"Date ", b"Command ")
_VERSION = re.compile(r"^HHsearch (\S+?):?$", re.MULTILINE)
_GAPS = str.maketrans("", "", "-.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hhsearch:
    """An HHsearch that is ready to search one database of templates.

    Attributes:
      identity: program and settings.
      binary: absolute path of the executable.
      database: prefix of an HH-suite database.
      dates: path of the table of release dates.
      cpus: threads of one search.
      timeout_s: longest wall time of one search.
    """

    identity: ToolIdentity
    binary: str
    database: str
    dates: str
    cpus: int
    timeout_s: float

    @classmethod
    def find(cls, *, database: str, dates: str, cpus: int, timeout_s: float) -> Hhsearch:
        """Returns the HHsearch on PATH.

        Raises:
          ToolNotFoundError: there is none, or it does not say its version.
        """
        binary = find_binary(NAME)
        identity = identity_of(NAME, binary, _VERSION, FLAGS)
        return cls(
            identity=identity, binary=binary, database=database, dates=dates, cpus=cpus, timeout_s=timeout_s
        )

    def check(self) -> None:
        """There is nothing beside `binary`; see `TemplateTool`."""

    def search(self, sequence: str, rows: Sequence[bytes]) -> SearchResult:
        """Searches one alignment; see `tools.template_tool.TemplateTool`."""
        if len(sequence) > MAX_RESIDUES:
            raise QueryTooLongError(NAME, len(sequence), MAX_RESIDUES)
        with tempfile.TemporaryDirectory(prefix="foldfeed-hhsearch-") as name:
            folder = Path(name)
            alignment, hits = folder / "query.a3m", folder / "hits.hhr"
            alignment.write_bytes(
                b"".join(b">%s\n%s\n" % (_name(number), row) for number, row in enumerate(rows))
            )
            words = {"alignment": alignment, "hits": hits, "database": self.database, "cpus": self.cpus}
            argv = [self.binary, *(flag.format(**words) for flag in FLAGS)]
            done = run_program(argv, folder=folder, timeout_s=self.timeout_s)
            require_success(NAME, done, folder)
            text = _without_time(hits.read_bytes() if hits.exists() else b"")
        try:
            found = parse_hhr(text, len(sequence))
        except AlignmentParseError as error:
            raise ToolOutputError(NAME, f"its output cannot be read: {error}") from error
        sequences = self._sequences(found)
        dates = dates_of(self.dates, file_state(self.dates))
        facts = b"".join(
            fact_line(sequence=sequences[hit.target], **released(hit.target, dates)) for hit in found
        )
        return SearchResult(tool=self.identity, format="hhr", alignment=text, table=facts, usage=done.usage)

    def _sequences(self, hits: Sequence[HhrHit]) -> dict[str, str]:
        """Returns the whole sequence of every hit's chain, by name.

        Raises:
          ToolOutputError: the database has no entry of that name, or with other residues.
        """
        index = f"{self.database}_a3m.ffindex"
        places = _places_of(index, file_state(index))
        found: dict[str, str] = {}
        with (
            open(f"{self.database}_a3m.ffdata", "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            for hit in hits:
                if hit.target not in found:
                    place = places.get(hit.target.encode())
                    if place is None:
                        raise ToolOutputError(NAME, f"the database has no entry {hit.target!r}")
                    found[hit.target] = _first_sequence(data[place[0] : place[0] + place[1]])
                _require_same(hit, found[hit.target])
        return found


def _name(number: int) -> bytes:
    return str(number or QUERY_NAME).encode("ascii")


def _without_time(text: bytes) -> bytes:
    return b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(_VARYING))


def _first_sequence(entry: bytes) -> str:
    """Returns the first sequence of an alignment that is no annotation, with its insertions."""
    for _, row, _ in a3m_rows(entry):
        return letters_of(row.decode("latin-1").translate(_GAPS))
    return ""


def _require_same(hit: HhrHit, sequence: str) -> None:
    shown = letters_of(hit.residues)
    there = sequence[hit.first : hit.first + len(shown)]
    # HH-suite shows X for what it does not know.
    same = len(there) == len(shown) and all(
        a == b or "X" in (a, b) for a, b in zip(there, shown, strict=True)
    )
    if not same or len(sequence) != hit.num_residues:
        raise ToolOutputError(
            NAME,
            f"the first sequence of the database's entry {hit.target!r} is not what it aligned; the match "
            "states of a template must be its residues (hhmake -M first)",
        )


@functools.lru_cache(maxsize=4)
def _places_of(path: str, state: str) -> dict[bytes, tuple[int, int]]:
    """Returns key -> (start, size) of an ffindex; read once per process and state."""
    found = {}
    for line in Path(path).read_bytes().splitlines():
        key, start, size = line.split(b"\t")
        # An entry ends with a NUL byte.
        found[key.removesuffix(b".a3m")] = int(start), int(size) - 1
    return found
