"""Layouts of one folder (or one index entry) per chain and one file per database: OpenProteinSet, OpenFold.

    ROOT/1a02_F/bfd_uniclust_hits.a3m             flattened, as OpenFold trains on it
    ROOT/1a02_F/a3m/bfd_uniclust_hits.a3m         as the OpenProteinSet bucket has it
    ROOT/alignments.index + ROOT/alignments_0.db  an alignment database: files end to end, offsets in JSON

Owns which files are databases, in which order they merge, and the index. Invariant: the order is AlphaFold
2's (uniref90, BFD, mgnify, then others by name) and never that of the file system. OpenFold itself merges in
the order of ``os.listdir``.

Source: OpenFold ``data/data_pipeline.py`` _parse_msa_data, ``scripts/alignment_db_scripts``; AlphaFold 2
``data/pipeline.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.exchange_errors import SourceFileError, UnsupportedSourceError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.rows import DatabaseRows, ImportOptions, build_record
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    load_json,
    relative,
    source_of,
    sub_folders,
)
from foldfeed.feature_store.importers.texts import ReadAlignment, is_blank, read_alignment
from foldfeed.feature_store.parsers.bounded_files import read_blocks, read_file, read_range, unpack
from foldfeed.feature_store.parsers.conventions import KEEPS_REPEATS, PAIRED_DATABASES, database_name
from foldfeed.feature_store.parsers.hit_names import make_id

# AlphaFold 2's order; what it does not know comes after, by name.
MERGE_ORDER = ("uniref90", "bfd_uniref", "bfd_uniclust", "uniclust30", "small_bfd", "mgnify")

# An index of 600,000 chains with four files each has about 17 million values.
MAX_INDEX_ITEMS = 60_000_000

# Name, and what gives its decompressed blocks up to a number of bytes.
AlignmentFile = tuple[str, Callable[[int], Iterable[bytes]]]


def choose_databases(names: Sequence[str], options: ImportOptions) -> list[str]:
    """Returns the databases to merge, in order.

    Raises:
      UnsupportedSourceError: none is left, or one that was asked for is missing.
    """
    if options.databases:
        missing = [name for name in options.databases if name not in names]
        if missing:
            raise UnsupportedSourceError(
                f"it has no database {missing[0]!r}, only {', '.join(sorted(names)) or 'none'}"
            )
        return list(options.databases)
    usable = [name for name in names if options.paired or name not in PAIRED_DATABASES]
    if not usable:
        raise UnsupportedSourceError(
            f"it has no alignment to use (there is {', '.join(sorted(names)) or 'none'}; uniprot and "
            "pairing files "
            "are used only with the option for paired alignments)"
        )
    return sorted(usable, key=lambda name: (name in PAIRED_DATABASES, _rank(name), name))


def left_out_of(file_names: Iterable[str], options: ImportOptions) -> tuple[str, ...]:
    """Returns the databases among alignment files that are left out because they are for pairing chains.

    None where the user named the databases to take: the others are left out on purpose.
    """
    if options.paired or options.databases:
        return ()
    found = (database_name(name) for name in file_names)
    return tuple(sorted({one[0] for one in found if one is not None and one[0] in PAIRED_DATABASES}))


def _rank(name: str) -> int:
    return MERGE_ORDER.index(name) if name in MERGE_ORDER else len(MERGE_ORDER)


def merge_files(
    record_id: str,
    files: Sequence[AlignmentFile],
    options: ImportOptions,
    *,
    description: str = "",
    extra: Mapping[str, str] | None = None,
) -> MsaRecord:
    """Returns the record of the alignment files of one chain, merged as AlphaFold 2 does.

    Args:
      record_id: its id.
      files: name and reader of each file.
      options: of the import.
      description: free text.
      extra: further facts.
    Raises:
      UnsupportedSourceError: nothing to merge, two files for a database, or they disagree about the query.
      SourceFileError, AlignmentParseError: a file cannot be used.
    """
    known: dict[str, tuple[str, str, Callable[[int], Iterable[bytes]]]] = {}
    for file_name, read in files:
        found = database_name(file_name)
        if found is None:
            continue
        name, kind = found
        if name in known:
            raise UnsupportedSourceError(
                f"two files for database {name!r}: {known[name][0]} and {file_name}; keep one"
            )
        known[name] = (file_name, kind, read)
    rows: list[DatabaseRows] = []
    empty: list[str] = []
    facts = dict(extra or {})
    for name in choose_databases(list(known), options):
        file_name, kind, read = known[name]
        blank, blocks = is_blank(iter(read(options.max_bytes)))
        if blank:
            empty.append(name)
            continue
        try:
            found_here = read_alignment(blocks, kind, name)
        except FoldfeedError as error:
            raise SourceFileError(file_name, str(error)) from error
        rows.append(found_here.rows)
        facts = found_here.extra | facts
        description = description or described(record_id, found_here)
    keeps_repeats = any(name == KEEPS_REPEATS for name, _ in files)
    return _merged(record_id, rows, empty, options, keeps_repeats, description, facts)


def described(record_id: str, found: ReadAlignment) -> str:
    """Returns what a file says about a query that is called like its record; else ""."""
    name, _, rest = found.rows.alignment.names[0].partition(" ")
    return (found.description or rest.strip()) if name == record_id else ""


def _merged(
    record_id: str,
    rows: list[DatabaseRows],
    empty: list[str],
    options: ImportOptions,
    keeps_repeats: bool,
    description: str,
    extra: dict[str, str],
) -> MsaRecord:
    if empty and not (options.empty_as_no_hits and rows):
        raise UnsupportedSourceError(
            f"the alignment of {', '.join(empty)} is empty: the search may have failed. If it found "
            "nothing, import "
            "with the option that takes empty files as no hits"
        )
    if empty:
        extra["databases_without_hits"] = ",".join(empty)
    return build_record(
        record_id,
        rows,
        description=description,
        drop_repeats=options.dedup == "rows" or (options.dedup == "source" and not keeps_repeats),
        # Each file of an export begins with the query, which is one row of the record.
        keep_query_rows=not (keeps_repeats and options.dedup == "source"),
        max_hits=options.max_hits,
        extra=extra,
    )


def folder_files(folder: Path) -> list[AlignmentFile]:
    """Returns the alignment files of a chain's folder and of its ``a3m`` sub-folder."""
    paths = list(folder.iterdir())
    if (folder / "a3m").is_dir():
        paths += (folder / "a3m").iterdir()
    return [
        (path.name, functools.partial(read_blocks, path))
        for path in sorted(paths)
        if (database_name(path.name) is not None or path.name == KEEPS_REPEATS) and path.is_file()
    ]


def scan_openproteinset(root: Path, options: ImportOptions) -> Found:
    """Yields one source per folder that holds alignment files: the root itself, or those below it."""
    pending = [root]
    while pending:
        folder = pending.pop()
        where = relative(folder, root)
        try:
            files = folder_files(folder)
            if not files:
                # The published root has the chains one level down, in pdb/ and uniclust30/.
                pending += reversed(sub_folders(folder))
                continue
        except OSError as error:
            yield Reject("", where, str(error))
            continue
        name = folder.resolve().name
        facts = {"source": where, "source_format": "openproteinset"}
        read = functools.partial(merge_files, files=files, options=options, extra=facts)
        left_out = left_out_of((file for file, _ in files), options)
        yield source_of(name, where, read, left_out)


def scan_openfold_db(root: Path, options: ImportOptions) -> Found:
    """Yields one source per chain of the index files at or in ``root``."""
    for path in index_files(root):
        entries = load_json(read_file(path, options.max_bytes), path.name, MAX_INDEX_ITEMS)
        if not isinstance(entries, dict):
            raise SourceFileError(path.name, "an index of an alignment database is a JSON object of chains")
        for chain, entry in entries.items():
            where = f"{path.name}:{chain}"
            if not make_id(chain):
                yield Reject("", where, "no record id can be made from the name of the chain")
                continue
            read = functools.partial(_read_entry, path, where, entry, options)
            left_out = left_out_of(_member_names(entry), options)
            yield source_of(chain, where, read, left_out)


def _member_names(entry: Any) -> list[str]:
    """Returns the names of an index entry's files; those of a damaged entry are refused when it is read."""
    members = entry.get("files") if isinstance(entry, dict) else entry
    if not isinstance(members, list):
        return []
    firsts = (member[0] for member in members if isinstance(member, list) and member)
    return [name for name in firsts if isinstance(name, str)]


def index_files(root: Path) -> list[Path]:
    """Returns the index files at or in ``root``; a unified index stands for all others."""
    if not root.is_dir():
        return [root]
    paths = sorted(path for path in root.iterdir() if path.suffix == ".index" and path.is_file())
    return [path for path in paths if path.name == "super.index"] or paths


def _read_entry(path: Path, where: str, entry: Any, options: ImportOptions, record_id: str) -> MsaRecord:
    database: Any = f"{path.stem}.db"
    members: Any = entry
    if isinstance(entry, dict):
        database, members = entry.get("db"), entry.get("files")
    if not isinstance(database, str) or not isinstance(members, list) or not _is_file_name(database):
        raise SourceFileError(where, "its entry is not {'db': a file beside the index, 'files': [...]}")
    files: list[AlignmentFile] = []
    for member in members:
        if not (
            isinstance(member, list)
            and len(member) == 3
            and isinstance(member[0], str)
            and all(type(number) is int for number in member[1:])
        ):
            raise SourceFileError(where, "a file of its entry is not [name, offset, size]")
        name, start, size = member
        files.append((name, functools.partial(_read_member, path.parent / database, where, start, size)))
    facts = {"source": where, "source_format": "openfold-db"}
    return merge_files(record_id, files, options, extra=facts)


def _is_file_name(name: str) -> bool:
    return bool(name) and Path(name).name == name and name != ".."


def _read_member(database: Path, where: str, start: int, size: int, max_bytes: int) -> Iterable[bytes]:
    return [unpack(read_range(database, start, size, max_bytes), where, max_bytes)]
