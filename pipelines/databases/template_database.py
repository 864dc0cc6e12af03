"""A database of templates made from mmCIF files: sequences as FASTA, release dates as a table.

Owns the two files and what becomes of an entry that cannot be read. Does not own mmCIF
(`foldfeed.feature_store.parsers.mmcif`) or the registry. Invariants: chains are named as the layout ``mmcif``
of ``foldfeed ingest`` names its records (``4hhb_A``), so a hit can be found in a store that was made from the
same files; the same files give the same bytes, however many processes read them; both files appear whole or
not at all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.importers.mmcif import SUFFIXES, record_ids
from foldfeed.feature_store.importers.sources import relative, walk_files
from foldfeed.feature_store.parsers.mmcif.entry import load_mmcif
from foldfeed.feature_store.parsers.mmcif.tables import gemmi_module
from foldfeed.feature_store.parsers.release_dates import HEADER, Release, parse_release_dates, release_line
from foldfeed.feature_store.progress import Progress, silent
from foldfeed.feature_store.storage import LocalBlobs
from foldfeed.pipelines.databases.spec import DatabaseSpec
from foldfeed.pipelines.errors import DatabaseError
from foldfeed.pipelines.fasta import decompressed
from foldfeed.pipelines.tools import hhsearch
from foldfeed.pipelines.tools.hmmsearch import released_of

_LINE = 80
# Entries that a process reads before it is asked for the next: a few seconds of work.
_BATCH = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFiles:
    """What `make_template_files` wrote.

    Attributes:
      fasta: path of the sequences.
      dates: path of the table of release dates.
      num_chains: sequences.
      num_entries: entries that gave them.
      num_undated: of these, without a release date.
      rejects: files that gave nothing, each with the reason.
    """

    fasta: str
    dates: str
    num_chains: int
    num_entries: int
    num_undated: int
    rejects: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One file's chains (name, sequence, description) and release, or why there are none."""

    where: str
    chains: tuple[tuple[str, str, str], ...] = ()
    release: Release | None = None
    reason: str = ""


def make_template_files(
    name: str,
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_processes: int | None = None,
    tell: Progress = silent,
) -> TemplateFiles:
    """Writes ``TARGET/NAME.fasta`` and ``TARGET/NAME.dates.tsv`` from the mmCIF files at or below a folder.

    Args:
      name: of the database.
      folder: of files ending in .cif or .mmcif, plain or compressed.
      target: made when absent.
      num_processes: that read files at a time; the CPUs of this process when None.
      tell: called with what is done and files done and in all.
    Raises:
      DatabaseError: no file gave a chain, or two gave chains of one name.
      MissingExtraError: gemmi is not installed.
      StorageFullError: no space left; nothing is visible.
    """
    gemmi_module()
    root = Path(folder)
    paths = list(walk_files(root, SUFFIXES))
    sequences: dict[str, str] = {}
    lines: list[str] = []
    dates: dict[str, Release] = {}
    rejects: list[tuple[str, str]] = []
    num_entries = num_undated = 0
    for done, entry in enumerate(_entries(root, paths, num_processes), start=1):
        tell(f"reading {name}", done, len(paths))
        if entry.reason:
            rejects.append((entry.where, entry.reason))
            continue
        num_entries += 1
        num_undated += entry.release is None
        for chain, sequence, description in entry.chains:
            if chain in sequences:
                raise DatabaseError(
                    name,
                    str(root),
                    f"{entry.where} has a chain {chain!r}, as {sequences[chain]} has; "
                    "leave one of the files out",
                )
            sequences[chain] = entry.where
            lines.append(_fasta(chain, sequence, description))
            if entry.release is not None:
                dates[chain.rpartition("_")[0].lower()] = entry.release
    if not lines:
        raise DatabaseError(
            name,
            str(root),
            f"none of its {len(paths)} mmCIF files gave a protein chain"
            + (f"; {rejects[0][0]}: {rejects[0][1]}" if rejects else ""),
        )
    table = [HEADER, *(release_line(entry, dates[entry]) for entry in sorted(dates))]
    blobs = LocalBlobs(Path(target))
    Path(target).mkdir(parents=True, exist_ok=True)
    blobs.write_atomic(f"{name}.dates.tsv", "".join(line + "\n" for line in table).encode())
    blobs.write_atomic(f"{name}.fasta", "".join(lines).encode())
    return TemplateFiles(
        fasta=str(Path(target).absolute() / f"{name}.fasta"),
        dates=str(Path(target).absolute() / f"{name}.dates.tsv"),
        num_chains=len(lines),
        num_entries=num_entries,
        num_undated=num_undated,
        rejects=tuple(rejects),
    )


def count_dated(spec: DatabaseSpec) -> tuple[int, int]:
    """Returns how many sequences of a database of templates have a release date, and how many there are."""
    place, dates = spec.paths
    releases = parse_release_dates(Path(dates).read_bytes())
    names = _index_names(place) if spec.tool == hhsearch.NAME else _fasta_names(place)
    found = [released_of(name, releases) is not None for name in names]
    return sum(found), len(found)


def _index_names(prefix: str) -> Iterator[str]:
    for line in Path(f"{prefix}_a3m.ffindex").read_bytes().splitlines():
        yield line.split(b"\t")[0].decode("latin-1").removesuffix(".a3m")


def _fasta_names(path: str) -> Iterator[str]:
    with open(path, "rb") as raw:
        rest = b""
        for chunk in decompressed(raw, path):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line[1:].split()[0].decode("latin-1") for line in lines if line.startswith(b">"))


def _entries(root: Path, paths: list[Path], num_processes: int | None) -> Iterator[_Entry]:
    """Yields what each file gave, in order."""
    count = num_processes or len(os.sched_getaffinity(0))
    work = [(str(path), relative(path, root)) for path in paths]
    if count == 1 or len(work) <= _BATCH:
        yield from map(_read, work)
        return
    # Started anew rather than forked: other threads of this process may hold locks.
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=start) as pool:
        yield from pool.map(_read, work, chunksize=_BATCH)


def _read(work: tuple[str, str]) -> _Entry:
    path, where = work
    try:
        entry = load_mmcif(Path(path))
        chains = tuple(
            (name, entry.sequence_of(label), entry.description_of(label))
            for label, name in record_ids(entry).items()
        )
    except (FoldfeedError, OSError) as error:
        return _Entry(where=where, reason=str(error))
    date, resolution = entry.facts.get("release_date"), entry.facts.get("resolution_angstrom")
    release = (
        None
        if date is None
        else Release(datetime.date.fromisoformat(date), None if resolution is None else float(resolution))
    )
    return _Entry(where=where, chains=chains, release=release)


def _fasta(name: str, sequence: str, description: str) -> str:
    words = f">{name} mol:protein length:{len(sequence)}  {description}".rstrip()
    return "\n".join([words, *_wrapped(sequence)]) + "\n"


def _wrapped(sequence: str) -> Iterable[str]:
    return (sequence[start : start + _LINE] for start in range(0, len(sequence), _LINE))
