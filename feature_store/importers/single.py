"""Layouts of one alignment per file: A3M, A2M, Stockholm, ColabFold's A3M; one file or a tree of files.

Owns scanning and the record of one file. Does not own the texts (`foldfeed.feature_store.importers.texts`) or
taking complexes apart (`foldfeed.feature_store.importers.colabfold`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.colabfold import merged_chains
from foldfeed.feature_store.importers.rows import ImportOptions, build_record
from foldfeed.feature_store.importers.sources import (
    Found,
    Reject,
    name_of_file,
    relative,
    source_of,
    walk_files,
)
from foldfeed.feature_store.importers.texts import (
    ReadAlignment,
    first_header,
    lengths_and_copies,
    read_alignment,
)
from foldfeed.feature_store.parsers.bounded_files import read_blocks, read_head, stem_of
from foldfeed.feature_store.parsers.conventions import STOCKHOLM_SUFFIXES

SUFFIXES = {"a3m": (".a3m",), "a2m": (".a2m",), "sto": STOCKHOLM_SUFFIXES, "colabfold": (".a3m",)}
_HEAD_BYTES = 4096
# What ColabFold calls a query that it numbered itself.
_NUMBER = re.compile(r"[0-9]+")


def scan_single(kind: str, root: Path, options: ImportOptions) -> Found:
    """Yields one source per file, and per chain of a complex.

    Args:
      kind: ``a3m``, ``a2m``, ``sto`` or ``colabfold``.
      root: a file, or a folder that is walked.
      options: of the import.
    """
    paths = list(walk_files(root, SUFFIXES[kind]))
    if options.id_from == "auto":
        # The same name in every folder, as many tools write it, says nothing; the folders' names do.
        alike = len(paths) > 1 and len({stem_of(path) for path in paths}) == 1
        options = dataclasses.replace(options, id_from="folder" if alike else "file")
    for path in paths:
        where = relative(path, root)
        try:
            name = name_of_file(path, options, functools.partial(first_header, kind=kind))
            lengths, _ = lengths_and_copies(read_head(path, _HEAD_BYTES)) if kind == "colabfold" else ([], [])
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        if len(lengths) > 1:
            yield from merged_chains(path, where, name, lengths, options)
            continue
        yield source_of(name, where, functools.partial(_read, path, where, kind, options))


def _read(path: Path, where: str, kind: str, options: ImportOptions, record_id: str) -> MsaRecord:
    # ColabFold's file holds what its server found in several databases and does not say which row is whose.
    name = "colabfold" if kind == "colabfold" else stem_of(path)
    found = read_alignment(read_blocks(path, options.max_bytes), kind, name, options.a2m_columns)
    return build_record(
        record_id,
        [found.rows],
        description=_description(record_id, kind, found),
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra={"source": where, "source_format": kind, **found.extra},
    )


def _description(record_id: str, kind: str, found: ReadAlignment) -> str:
    """Returns the query's header without the record's own id, which an export puts before it.

    Where the query has another name, that name belongs to what is known about the record.
    """
    header = found.rows.alignment.names[0]
    if kind == "colabfold" and _NUMBER.fullmatch(header):
        return ""
    name, _, rest = header.partition(" ")
    own = rest.strip() if name == record_id else header
    return found.description or own
