"""Layouts of one alignment per record: A3M, A2M, Stockholm, ColabFold's A3M; one file or a tree of files.

Owns scanning and the record of one file. Does not own the texts (`foldfeed.feature_store.importers.texts`).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.format.record import MsaRecord
from foldfeed.feature_store.importers.rows import ImportOptions, build_record
from foldfeed.feature_store.importers.sources import Found, Reject, Source, id_of_file, relative, walk_files
from foldfeed.feature_store.importers.texts import first_header, read_alignment
from foldfeed.feature_store.parsers.bounded_files import read_file, stem_of
from foldfeed.feature_store.parsers.conventions import STOCKHOLM_SUFFIXES

SUFFIXES = {"a3m": (".a3m",), "a2m": (".a2m",), "sto": STOCKHOLM_SUFFIXES, "colabfold": (".a3m",)}


def scan_single(kind: str, root: Path, options: ImportOptions) -> Found:
    """Yields one source per file.

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
            record_id = id_of_file(path, options, functools.partial(first_header, kind=kind))
        except (FoldfeedError, OSError) as error:
            yield Reject("", where, str(error))
            continue
        yield Source(record_id, where, functools.partial(_read, path, where, kind, record_id, options))


def _read(path: Path, where: str, kind: str, record_id: str, options: ImportOptions) -> MsaRecord:
    text = read_file(path, options.max_bytes)
    # ColabFold's file holds what its server found in several databases and does not say which row is whose.
    name = "colabfold" if kind == "colabfold" else stem_of(path)
    found = read_alignment(text, kind, name, options.a2m_columns)
    return build_record(
        record_id,
        [found.rows],
        description=found.rows.alignment.names[0],
        drop_repeats=options.dedup == "rows",
        max_hits=options.max_hits,
        extra={"source": where, "source_format": kind, **found.extra},
    )
