"""An HH-suite database made from alignments, with the suite's own tools.

Owns the recipe and the ffindex files. Does not own parsing or the registry. These programs run, once each,
over all entries: hhmake (through ffindex_apply) makes a profile of every alignment, cstranslate its sequence
of context states, which HHblits' prefilter reads. Invariants: an entry is called as its file, and so is its
first sequence, which HHblits and HHsearch print; a database is whole, every entry in all three parts, or
there is none; equal alignments give equal bytes, however many threads worked (entries lie by length, as
HH-suite wants, then by name; the time that hhmake writes is left out).

Source: HH-suite user guide, "Building customized databases".
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.importers.sources import walk_files
from foldfeed.feature_store.parsers.a3m import a3m_rows
from foldfeed.feature_store.parsers.bounded_files import kind_of, read_file
from foldfeed.feature_store.parsers.stockholm import stockholm_as_a3m
from foldfeed.feature_store.storage import disk_full_is_typed
from foldfeed.pipelines.databases import HH_PARTS
from foldfeed.pipelines.errors import DatabaseError, ToolNotFoundError
from foldfeed.pipelines.search_tool import find_binary
from foldfeed.pipelines.subprocess_runner import require_success, run_program

SUFFIXES = (".a3m", ".sto", ".stockholm")
DEFAULT_TIMEOUT_S = 24 * 3600.0

_HHMAKE = ("-i", "stdin", "-o", "stdout", "-v", "0", "-maxseq", "65535")
_CSTRANSLATE = ("-f", "-x", "0.3", "-c", "4", "-I", "a3m", "-i", "db_a3m", "-o", "db_cs219", "-b")
_DATE = re.compile(rb"(?<=\nDATE  )[^\n]+")
# What ffindex and HH-suite take for a name without cutting it.
_NAME = re.compile(r"[A-Za-z0-9_.|:+=@-]{1,60}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HhsuiteDatabase:
    """What `make_hhsuite_database` wrote.

    Attributes:
      prefix: of its files.
      num_entries: alignments.
    """

    prefix: str
    num_entries: int


def make_hhsuite_database(
    name: str,
    alignments: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> HhsuiteDatabase:
    """Writes ``TARGET/NAME_{a3m,hhm,cs219}.{ffdata,ffindex}`` of the alignments at or below a folder.

    Args:
      name: of the database.
      alignments: folder of A3M and Stockholm files, plain or compressed; the first row of each is its query.
      target: made when absent.
      timeout_s: longest wall time of each of the two programs.
    Raises:
      DatabaseError: no alignment, one that cannot be read, two of one name, or an entry that a program left
        out; or a database of that name is there. Nothing is visible.
      ToolNotFoundError: a program of HH-suite is not installed.
      StorageFullError: no space left; nothing is visible.
    """
    programs = [find_binary("ffindex_apply"), find_binary("hhmake"), _cstranslate()]
    libraries = _libraries()
    folder = Path(target)
    files = [f"{name}_{part}.{kind}" for part in HH_PARTS for kind in ("ffdata", "ffindex")]
    there = [file for file in files if (folder / file).exists()]
    if there:
        raise DatabaseError(name, str(folder / there[0]), "it exists; choose another name or folder")
    with disk_full_is_typed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-foldfeed-") as temporary:
            work = Path(temporary)
            keys = _write_alignments(name, Path(alignments), work)
            _run(programs, libraries, work, timeout_s)
            order = _order(name, work, keys)
            for part in HH_PARTS:
                _write_in_order(work, part, order)
            # The index of cs219 last: HH-suite opens nothing without it.
            for part in HH_PARTS:
                for kind in ("ffdata", "ffindex"):
                    os.replace(work / f"sorted_{part}.{kind}", folder / f"{name}_{part}.{kind}")
    return HhsuiteDatabase(prefix=str(folder.absolute() / name), num_entries=len(order))


def _write_alignments(name: str, root: Path, work: Path) -> set[str]:
    """Writes the part of alignments and returns the names of its entries."""
    found: dict[str, Path] = {}
    index = []
    start = 0
    with (work / "db_a3m.ffdata").open("wb") as data:
        for path in walk_files(root, SUFFIXES):
            stem, suffix = kind_of(path)
            if not _NAME.fullmatch(stem):
                raise DatabaseError(
                    name, str(path), "an entry's name is 1 to 60 of A-Z a-z 0-9 _ . | : + = @ -"
                )
            if stem in found:
                raise DatabaseError(name, str(path), f"{found[stem]} gives an entry of that name, too")
            found[stem] = path
            try:
                rows = list(_rows(path, suffix))
            except (FoldfeedError, OSError) as error:
                raise DatabaseError(name, str(path), f"it is no alignment: {error}") from error
            head = rows[0][0]
            rows[0] = (head if head.split()[:1] == [stem] else f"{stem} {head}".strip(), rows[0][1])
            entry = b"".join(b">%s\n%s\n" % (header.encode(), row) for header, row in rows) + b"\0"
            data.write(entry)
            index.append((stem, start, len(entry)))
            start += len(entry)
    if not index:
        raise DatabaseError(name, str(root), f"no file there ends in {', '.join(SUFFIXES)} (or compressed)")
    _write_index(work / "db_a3m.ffindex", index)
    return set(found)


def _rows(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    text = read_file(path)
    if suffix == ".a3m":
        yield from ((header, row.replace(b".", b"")) for header, row, _ in a3m_rows(text))
    else:
        yield from stockholm_as_a3m(text)


def _run(programs: Sequence[str], libraries: Sequence[str], work: Path, timeout_s: float) -> None:
    apply, hhmake, cstranslate = programs
    make = [apply, "-q", "db_a3m.ffdata", "db_a3m.ffindex", "-i", "db_hhm.ffindex", "-d", "db_hhm.ffdata"]
    for tool, argv in (
        ("hhmake", [*make, "--", hhmake, *_HHMAKE]),
        ("cstranslate", [cstranslate, *_CSTRANSLATE, "-A", libraries[0], "-D", libraries[1]]),
    ):
        require_success(tool, run_program(argv, folder=work, timeout_s=timeout_s), work)


def _order(name: str, work: Path, keys: set[str]) -> list[str]:
    """Returns the names of all entries, the longest first, after a look at what the programs left out."""
    sizes = {}
    for part in HH_PARTS:
        sizes = {key: size for key, _, size in _read_index(work / f"db_{part}.ffindex")}
        # An entry that is nothing but its closing byte is none.
        missing = sorted(key for key in keys if sizes.get(key, 0) <= 1)
        if missing:
            raise DatabaseError(
                name,
                missing[0],
                f"HH-suite made no {part} of this alignment and {len(missing) - 1} others; its rows may be "
                "too long, or its first row may have gaps",
            )
    return sorted(keys, key=lambda key: (-sizes[key], key))


def _write_in_order(work: Path, part: str, order: Sequence[str]) -> None:
    places = {key: (start, size) for key, start, size in _read_index(work / f"db_{part}.ffindex")}
    index = []
    with (work / f"db_{part}.ffdata").open("rb") as file, (work / f"sorted_{part}.ffdata").open("wb") as new:
        at = 0
        for key in order:
            entry = _entry(file, *places[key])
            if part == "hhm":
                # A constant of equal length in place of the time.
                entry = _DATE.sub(lambda date: b"-" * len(date[0]), entry, count=1)
            new.write(entry)
            index.append((key, at, len(entry)))
            at += len(entry)
    _write_index(work / f"sorted_{part}.ffindex", index)


def _entry(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _write_index(path: Path, entries: Sequence[tuple[str, int, int]]) -> None:
    """Writes an index, which ffindex wants sorted by the bytes of its keys."""
    lines = sorted((key.encode(), start, size) for key, start, size in entries)
    path.write_bytes(b"".join(b"%s\t%d\t%d\n" % line for line in lines))


def _read_index(path: Path) -> Iterator[tuple[str, int, int]]:
    for line in path.read_text(encoding="ascii").splitlines():
        key, start, size = line.split("\t")
        yield key, int(start), int(size)


def _cstranslate() -> str:
    """Returns cstranslate for this processor; Debian ships it beside hhblits, but its own link is broken."""
    hhblits = Path(find_binary("hhblits"))
    beside = hhblits.with_name(hhblits.name.replace("hhblits", "cstranslate"))
    return str(beside) if beside.exists() else find_binary("cstranslate")


def _libraries() -> tuple[str, str]:
    """Returns HH-suite's libraries of context states: of their letters, and of contexts."""
    around = Path(find_binary("hhblits")).resolve().parent.parent
    places = [Path(os.environ.get("HHLIB", "/nowhere")) / "data", Path("/usr/share/hhsuite/data")]
    places += [around / "data", around / "share" / "hhsuite" / "data", Path("/usr/lib/hhsuite/data")]
    for place in places:
        if (place / "cs219.lib").exists() and (place / "context_data.lib").exists():
            return str(place / "cs219.lib"), str(place / "context_data.lib")
    raise ToolNotFoundError(
        "cstranslate", f"cs219.lib of HH-suite is in none of {[str(place) for place in places]}; set HHLIB"
    )
