"""An HH-suite database made of alignments: those of a feature store, or the files of a folder.

Owns the three tables that hhblits reads (alignments, their profiles, their sequences of 219 states), by
HH-suite's own programs, and their publication. Does not own those programs or the alignments. A table is two
files: data, entries that end with a NUL byte, and an index with one line per entry (name, start, length),
sorted by name.

The work is done in pieces of `PIECE` alignments, several at a time. Entries have numbers for names, because
HH-suite cuts names that are long; what hhblits prints is the first row's, which is the record's id. The data
are in the order of descending length, as HH-suite's manual says for speed.

Invariants: equal alignments and programs give equal bytes, whatever the number of CPUs (hhmake writes the
date, which is blanked); the files appear when all are whole, cs219, by which hhblits begins, last; every
alignment has an entry in each table, or nothing is published.

Source: HH-suite user guide, "Building customized databases"; ``ffindex`` (format of the index).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.exporters.rows import rows_of_record
from foldfeed.feature_store.exporters.texts import to_a3m
from foldfeed.feature_store.parsers.a3m import a3m_rows, alignment_of
from foldfeed.feature_store.parsers.stockholm import parse_stockholm
from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.feature_store.store.feature_store import FeatureStore
from foldfeed.pipelines.errors import DatabaseError, ToolNotFoundError, ToolOutputError
from foldfeed.pipelines.fasta import decompressed
from foldfeed.pipelines.programs.subprocess_runner import require_success, run_program
from foldfeed.pipelines.tools.hhblits import MAX_RESIDUES
from foldfeed.pipelines.tools.search_tool import find_binary

# Alignments that one run of each program takes; cstranslate reads its libraries anew in each.
PIECE = 64
TABLES = ("a3m", "hhm", "cs219")
ENDINGS = (".a3m", ".sto", ".stockholm")
# Rows of one alignment; AlphaFold 2's number for hhblits.
MAX_ROWS = 1_000_000

_DATE = re.compile(rb"(?<=\nDATE  )[^\n]+")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NamedAlignment:
    """One entry of a database.

    Attributes:
      name: what hhblits calls it.
      text: A3M, the first row is the query.
    """

    name: str
    text: bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HhPrograms:
    """HH-suite's programs, absolute paths, and the folder of its libraries."""

    hhmake: str
    ffindex_apply: str
    cstranslate: str
    library: str

    @classmethod
    def find(cls) -> HhPrograms:
        """Returns those on PATH.

        Raises:
          ToolNotFoundError: one of them, or the libraries, are not there.
        """
        hhmake = find_binary("hhmake")
        # Debian ships a cstranslate for this processor beside hhmake, but its own link is broken.
        beside = Path(hhmake).with_name(Path(hhmake).name.replace("hhmake", "cstranslate"))
        return cls(
            hhmake=hhmake,
            ffindex_apply=find_binary("ffindex_apply"),
            cstranslate=str(beside) if os.access(beside, os.X_OK) else find_binary("cstranslate"),
            library=_library(Path(hhmake)),
        )


def alignments_of_store(store: FeatureStore, record_ids: Sequence[str]) -> Iterator[NamedAlignment]:
    """Yields the alignments of records; inserted residues are x, a store keeps their number only."""
    for record_id in record_ids:
        yield NamedAlignment(name=record_id, text=to_a3m(rows_of_record(store[record_id])))


def alignments_of_folder(folder: str | os.PathLike[str]) -> Iterator[NamedAlignment]:
    """Yields the alignments of the A3M and Stockholm files of a folder, plain or compressed, by file name.

    An entry has the name of its file without endings, and so has its first row. Of Stockholm files inserted
    residues are x.

    Raises:
      DatabaseError: there is none, two have one name, or one cannot be read.
    """
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(Path(folder).iterdir()):
        stem = path.name.removesuffix(".gz").removesuffix(".zst")
        ending = next((one for one in ENDINGS if stem.endswith(one)), None)
        if ending is None:
            continue
        name = stem.removesuffix(ending)
        if name in found:
            raise DatabaseError(
                name, str(folder), f"{path.name} and {found[name][0].name} would be one entry"
            )
        found[name] = path, ending
    if not found:
        raise DatabaseError("", str(folder), f"there is no file that ends in {', '.join(ENDINGS)}")
    for name, (path, ending) in found.items():
        with path.open("rb") as raw:
            text = b"".join(decompressed(raw, str(path)))
        try:
            yield NamedAlignment(name=name, text=_as_a3m(name, text, ending == ".a3m"))
        except AlignmentParseError as error:
            raise DatabaseError(name, str(path), str(error)) from error


def build_hhsuite(
    alignments: Iterable[NamedAlignment],
    prefix: str | os.PathLike[str],
    *,
    cpus: int = 1,
    timeout_s: float = 6 * 3600.0,
) -> int:
    """Makes a database and returns how many entries it has.

    Args:
      alignments: of entries; one piece for each CPU is in memory at a time.
      prefix: of the database's files, e.g. ``/db/mine``; none of them may be there.
      cpus: pieces at a time.
      timeout_s: longest time of one program on one piece.
    Raises:
      DatabaseError: there is one already, no alignment, or one that HH-suite would cut.
      ToolNotFoundError: HH-suite is not installed.
      SearchError: one of its programs failed.
      StorageFullError: no space; nothing is visible.
    """
    target = Path(os.path.abspath(prefix))
    _refuse_existing(target)
    programs = HhPrograms.find()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        disk_full_is_typed(target),
        tempfile.TemporaryDirectory(prefix=".tmp-foldfeed-", dir=target.parent) as name,
        ThreadPoolExecutor(cpus, thread_name_prefix="foldfeed-hhsuite") as pool,
    ):
        pieces: list[Path] = []
        number = 0
        entries = iter(alignments)
        while batch := list(itertools.islice(entries, PIECE * cpus)):
            work = []
            for at in range(0, len(batch), PIECE):
                piece = Path(name) / f"piece{len(pieces)}"
                piece.mkdir()
                pieces.append(piece)
                work.append((piece, batch[at : at + PIECE], number + at))
            list(pool.map(lambda one: _make_piece(programs, *one, timeout_s=timeout_s), work))
            number += len(batch)
        if not number:
            raise DatabaseError("", str(prefix), "there is no alignment to make a database of")
        _join(pieces, Path(name), number)
        _refuse_existing(target)
        for table in TABLES:
            for ending in (".ffdata", ".ffindex"):
                os.replace(f"{name}/{table}{ending}", f"{target}_{table}{ending}")
    return number


def _refuse_existing(target: Path) -> None:
    for table in TABLES:
        path = Path(f"{target}_{table}.ffdata")
        if path.exists():
            raise DatabaseError(
                target.name, str(target), f"{path.name!r} is there; choose another prefix, or remove it"
            )


def _library(hhmake: Path) -> str:
    around = hhmake.resolve().parent.parent
    places = [Path(os.environ.get("HHLIB", "/nowhere")) / "data", around / "data"]
    places += [root / "hhsuite" / "data" for root in (around / "share", Path("/usr/share"), Path("/usr/lib"))]
    for place in places:
        if (place / "cs219.lib").exists() and (place / "context_data.lib").exists():
            return str(place)
    raise ToolNotFoundError(
        "cstranslate",
        f"cs219.lib and context_data.lib of HH-suite are in none of {', '.join(map(str, places))}; set "
        "HHLIB, or install them, e.g. 'apt-get install hhsuite-data'",
    )


def _as_a3m(name: str, text: bytes, is_a3m: bool) -> bytes:
    """Returns an alignment as A3M without annotations, its first row named as the entry.

    Raises:
      AlignmentParseError: the text breaks its own format.
    """
    if is_a3m:
        rows = list(a3m_rows(text))
        # Whether all have the query's columns.
        alignment_of(iter(rows))
        named = [(name, rows[0][1]), *((header, letters) for header, letters, _ in rows[1:])]
        return b"".join(b">%s\n%s\n" % (header.encode(), letters) for header, letters in named)
    parsed = parse_stockholm(text)
    lines = []
    deletions = parsed.deletions
    for place, header in enumerate([name, *parsed.names[1:]]):
        row = parsed.letters[place]
        pieces = [
            b"x" * count + bytes([letter])
            for letter, count in zip(row.tolist(), deletions[place].tolist(), strict=True)
        ]
        lines.append(b">%s\n%s\n" % (header.encode(), b"".join(pieces)))
    return b"".join(lines)


def _make_piece(
    programs: HhPrograms, folder: Path, alignments: Sequence[NamedAlignment], first: int, *, timeout_s: float
) -> None:
    """Makes the tables of some alignments, whose names are numbers from ``first`` on."""
    for alignment in alignments:
        query = alignment.text.split(b"\n", 2)[1]
        columns = sum(not letter.islower() for letter in query.decode("ascii"))
        if columns > MAX_RESIDUES:
            raise DatabaseError(
                alignment.name,
                str(folder),
                f"it has {columns} columns; HH-suite cuts what has more than {MAX_RESIDUES} without an "
                "error. Leave it out",
            )
    entries = [(f"{first + place:09d}", alignment.text + b"\0") for place, alignment in enumerate(alignments)]
    _write_table(folder / "a3m", entries)
    hhmake = [programs.hhmake, "-i", "stdin", "-o", "stdout", "-v", "0", "-maxseq", str(MAX_ROWS)]
    _run(
        [
            *(programs.ffindex_apply, "-q", "a3m.ffdata", "a3m.ffindex"),
            *("-i", "hhm.ffindex", "-d", "hhm.ffdata", "--", *hhmake),
        ],
        folder,
        timeout_s,
    )
    states = ("-A", f"{programs.library}/cs219.lib", "-D", f"{programs.library}/context_data.lib")
    _run(
        [
            # Its threads write entries in the order in which they end.
            *(_env(), "OMP_NUM_THREADS=1", programs.cstranslate, "-f", "-x", "0.3", "-c", "4", "-I", "a3m"),
            *(*states, "-i", "a3m", "-o", "cs219", "-b"),
        ],
        folder,
        timeout_s,
    )
    for table, program in (("hhm", "hhmake"), ("cs219", "cstranslate")):
        rows = _read_index(folder / f"{table}.ffindex")
        for (name, _), alignment in zip(entries, alignments, strict=True):
            # A NUL byte alone is what is left of a program that failed.
            if rows.get(name, (0, 0))[1] < 2:
                raise ToolOutputError(program, f"it made nothing of alignment {alignment.name!r}")


def _env() -> str:
    return shutil.which("env") or "/usr/bin/env"


def _run(argv: Sequence[str], folder: Path, timeout_s: float) -> None:
    done = run_program(argv, folder=folder, timeout_s=timeout_s)
    require_success(Path(argv[0]).name, done, folder)


def _join(pieces: Sequence[Path], folder: Path, number: int) -> None:
    """Writes the whole tables from those of the pieces, the longest entries first."""
    lengths: dict[str, tuple[int, int]] = {}
    for place, piece in enumerate(pieces):
        for name, (_, length) in _read_index(piece / "cs219.ffindex").items():
            lengths[name] = (length, place)
    assert len(lengths) == number, (len(lengths), number)
    order = sorted(lengths, key=lambda name: (-lengths[name][0], name))
    for table in TABLES:
        indexes = [_read_index(piece / f"{table}.ffindex") for piece in pieces]
        rows, start = {}, 0
        with (folder / f"{table}.ffdata").open("wb") as out:
            for name in order:
                place = lengths[name][1]
                at, length = indexes[place][name]
                with (pieces[place] / f"{table}.ffdata").open("rb") as data:
                    data.seek(at)
                    entry = data.read(length)
                if table == "hhm":
                    entry = _DATE.sub(lambda date: b"-" * len(date[0]), entry, count=1)
                out.write(entry)
                rows[name] = (start, length)
                start += length
        _write_index(folder / f"{table}.ffindex", rows)


def _write_table(stem: Path, entries: Sequence[tuple[str, bytes]]) -> None:
    stem.with_suffix(".ffdata").write_bytes(b"".join(entry for _, entry in entries))
    rows, start = {}, 0
    for name, entry in entries:
        rows[name] = (start, len(entry))
        start += len(entry)
    _write_index(stem.with_suffix(".ffindex"), rows)


def _write_index(path: Path, rows: dict[str, tuple[int, int]]) -> None:
    lines = [f"{name}\t{start}\t{length}\n" for name, (start, length) in sorted(rows.items())]
    path.write_text("".join(lines), encoding="ascii")


def _read_index(path: Path) -> dict[str, tuple[int, int]]:
    rows = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, start, length = line.split("\t")
        rows[name] = (int(start), int(length))
    return rows
