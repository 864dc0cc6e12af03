"""hmmsearch of a profile against sequences of known structures, with the flags of AlphaFold 3.

Owns the two command lines (hmmbuild, hmmsearch), the checks of their output, and the look at the database for
what they do not print: sequences of whole chains and release dates. Does not own the processes
(`subprocess_runner`), the profile's alignment (`template_profile`) or parsing (`parsers.hmmsearch`).
AlphaFold 2's multimer pipeline uses the same flags. Invariant: a result is returned only if both tables end
as HMMER ends them (``# [ok]``, ``//``) and every row of the alignment is the domain that the table has in its
place.

Source: AlphaFold 3 ``data/tools/hmmsearch.py``, ``hmmbuild.py``, ``data/msa_config.py``; HMMER user guide.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import mmap
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.parsers.hmmsearch import AlignedChain, is_of, parse_domains, parse_hmmsearch
from foldfeed.feature_store.parsers.release_dates import Release, parse_release_dates
from foldfeed.pipelines.errors import ToolNotFoundError, ToolOutputError, ToolTimeoutError
from foldfeed.pipelines.manifest import file_state
from foldfeed.pipelines.programs.subprocess_runner import (
    Completed,
    Usage,
    require_success,
    run_program,
    sum_usages,
)
from foldfeed.pipelines.tools.search_tool import (
    SearchResult,
    ToolIdentity,
    binary_sha256,
    find_binary,
    identity_of,
)
from foldfeed.pipelines.tools.template_profile import to_stockholm
from foldfeed.pipelines.tools.template_tool import fact_line

NAME = "hmmsearch"
BUILDER = "hmmbuild"

BUILD = ("-o", "/dev/null", "--informat", "stockholm", "--hand", "--amino", "{profile}", "{alignment}")
# E-values so high and filters so open: where nothing closer is known, a distant template is the best one.
SEARCH = (
    *("-o", "/dev/null", "--noali", "--cpu", "{cpus}", "--F1", "0.1", "--F2", "0.1", "--F3", "0.1"),
    *("-E", "100", "--incE", "100", "--domE", "100", "--incdomE", "100"),
    *("-A", "{hits}", "--domtblout", "{table}", "{profile}", "{database}"),
)

_VERSION = re.compile(r"^# HMMER (\S+)", re.MULTILINE)
_HEADER = re.compile(rb"^>[ \t]*(\S+)[^\n]*\n?", re.MULTILINE)
_NO_LETTER = re.compile(r"[^A-Z]")
_SPACE = b" \t\r\n\v\f"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hmmsearch:
    """An hmmsearch that is ready to search one database of templates.

    Attributes:
      identity: programs and settings.
      binary: absolute path of hmmsearch.
      builder: absolute path of hmmbuild.
      builder_sha256: of that file; part of the identity, too.
      database: path of a FASTA file.
      dates: path of the table of release dates.
      cpus: worker threads of one search.
      timeout_s: longest wall time of one search, profile and all.
    """

    identity: ToolIdentity
    binary: str
    builder: str
    builder_sha256: str
    database: str
    dates: str
    cpus: int
    timeout_s: float

    @classmethod
    def find(cls, *, database: str, dates: str, cpus: int, timeout_s: float) -> Hmmsearch:
        """Returns the hmmsearch on PATH.

        Raises:
          ToolNotFoundError: it or hmmbuild is not there, or does not say its version.
        """
        binary, builder = find_binary(NAME), find_binary(BUILDER)
        builder_sha256 = binary_sha256(builder)
        words = (BUILDER, builder_sha256, *BUILD, NAME, *SEARCH)
        identity = identity_of(NAME, binary, _VERSION, words)
        return cls(
            identity=identity,
            binary=binary,
            builder=builder,
            builder_sha256=builder_sha256,
            database=database,
            dates=dates,
            cpus=cpus,
            timeout_s=timeout_s,
        )

    def check(self) -> None:
        """Checks that hmmbuild here is the planned one; see `TemplateTool`."""
        try:
            same = binary_sha256(self.builder) == self.builder_sha256
        except OSError as error:
            raise ToolNotFoundError(BUILDER, f"{self.builder} is not on this worker ({error})") from error
        if not same:
            raise ToolNotFoundError(
                BUILDER, f"{self.builder} is not the program the build was planned with; install the same one"
            )

    def search(self, sequence: str, rows: Sequence[bytes]) -> SearchResult:
        """Searches one alignment; see `tools.template_tool.TemplateTool`."""
        with tempfile.TemporaryDirectory(prefix="foldfeed-hmmsearch-") as name:
            folder = Path(name)
            usage = self._run(folder, to_stockholm(rows))
            table = _table(folder / "table")
            hits = (folder / "hits").read_bytes() if (folder / "hits").exists() else b""
        try:
            chains = parse_hmmsearch(hits, len(sequence))
            domains = parse_domains(table)
        except AlignmentParseError as error:
            raise ToolOutputError(NAME, f"its output cannot be read: {error}") from error
        if len(chains) != len(domains) or not all(map(is_of, chains, domains)):
            raise ToolOutputError(
                NAME, f"its alignment of {len(chains)} rows is not that of its table's {len(domains)} domains"
            )
        sequences = self._sequences(chains, [domain.num_residues for domain in domains])
        dates = dates_of(self.dates, file_state(self.dates))
        facts = b"".join(
            fact_line(
                sequence=whole,
                e_value=domain.e_value,
                score=domain.score,
                **released(chain.target, dates),
            )
            for chain, domain, whole in zip(chains, domains, sequences, strict=True)
        )
        return SearchResult(tool=self.identity, format="stockholm", alignment=hits, table=facts, usage=usage)

    def _run(self, folder: Path, alignment: bytes) -> Usage:
        """Runs both programs within the time of one search; returns their cost."""
        (folder / "alignment.sto").write_bytes(alignment)
        words = {
            "alignment": str(folder / "alignment.sto"),
            "profile": str(folder / "query.hmm"),
            "hits": str(folder / "hits"),
            "table": str(folder / "table"),
            "database": self.database,
            "cpus": self.cpus,
        }
        until = time.monotonic() + self.timeout_s
        usages = []
        for name, program, flags in ((BUILDER, self.builder, BUILD), (NAME, self.binary, SEARCH)):
            argv = [program, *(flag.format(**words) for flag in flags)]
            done = _run_until(argv, folder, until, self.timeout_s)
            require_success(name, done, folder)
            usages.append(done.usage)
        return sum_usages(usages)

    def _sequences(self, chains: Sequence[AlignedChain], sizes: Sequence[int]) -> list[str]:
        """Returns the whole sequence of every row's chain.

        Raises:
          ToolOutputError: the database has no entry of that name with these residues.
        """
        entries = sequences_in(self.database, {chain.target for chain in chains})
        found = []
        for chain, size in zip(chains, sizes, strict=True):
            residues, stop = letters_of(chain.residues), chain.first + len(chain.residues)
            fitting = [
                sequence
                for sequence in entries.get(chain.target, ())
                if len(sequence) == size and sequence[chain.first : stop] == residues
            ]
            if not fitting:
                raise ToolOutputError(
                    NAME,
                    f"the database has no {chain.target!r} with its residues {chain.first + 1} to {stop}",
                )
            found.append(fitting[0])
        return found


def letters_of(residues: str) -> str:
    """Returns upper-case letters, X for what is none (a stop, ``*``), as no residue of a structure is one."""
    return _NO_LETTER.sub("X", residues.upper())


def sequences_in(path: str, names: set[str]) -> dict[str, list[str]]:
    """Returns the sequences of some entries of a FASTA file, by name; several where a name comes again.

    Args:
      path: of the file.
      names: first words of their headers.
    """
    found: dict[str, list[str]] = {}
    if not names:
        return found
    hashes, places = _headers_of(path, file_state(path))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name in names:
            key = hash(name.encode())
            first, last = np.searchsorted(hashes, key), np.searchsorted(hashes, key, side="right")
            for place in sorted(places[first:last].tolist()):
                header = _HEADER.match(data, place)
                if header is None or header[1] != name.encode():
                    continue
                end = data.find(b"\n>", header.end() - 1)
                body = data[header.end() : end if end >= 0 else len(data)].translate(None, _SPACE)
                found.setdefault(name, []).append(letters_of(body.decode("latin-1")))
    return found


@functools.lru_cache(maxsize=2)
def _headers_of(path: str, state: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the hash of every entry's name, sorted, and where the entry begins; read once per process.

    16 bytes an entry; a dictionary of the PDB's million chains would take ten times as much.
    """
    numbers = array.array("q")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for header in _HEADER.finditer(data):
            numbers.append(hash(header[1]))
            numbers.append(header.start())
    pairs = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 2)
    order = np.argsort(pairs[:, 0], kind="stable")
    return pairs[order, 0], pairs[order, 1]


def _run_until(argv: list[str], folder: Path, until: float, timeout_s: float) -> Completed:
    try:
        return run_program(argv, folder=folder, timeout_s=max(0.0, until - time.monotonic()))
    except ToolTimeoutError as error:
        raise ToolTimeoutError(NAME, timeout_s) from error


def _table(path: Path) -> bytes:
    lines = path.read_bytes().splitlines() if path.exists() else []
    if not lines or lines[-1].strip() != b"# [ok]":
        raise ToolOutputError(NAME, "its table does not end with '# [ok]': the search is not complete")
    return b"".join(line + b"\n" for line in lines if not line.startswith(b"#"))


def released_of(target: str, dates: dict[str, Release]) -> Release | None:
    """Returns what is known of a chain's entry: of the whole name, else of what stands before its last _."""
    name = target.lower()
    return dates.get(name) or dates.get(name.rpartition("_")[0])


def released(target: str, dates: dict[str, Release]) -> dict[str, object]:
    """Returns what is known of a chain's entry as facts of a hit."""
    release = released_of(target, dates)
    return {
        "release_date": None if release is None else release.date.isoformat(),
        "resolution_angstrom": None if release is None else release.resolution_angstrom,
    }


@functools.lru_cache(maxsize=4)
def dates_of(path: str, state: str) -> dict[str, Release]:
    """Returns the table of a file; read once per process and state."""
    return parse_release_dates(Path(path).read_bytes())
