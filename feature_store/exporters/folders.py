"""Alignments as one file per record and database: OpenProteinSet's folders, OpenFold's alignment database.

    1a02_F/uniref90_hits.a3m      the query, then the rows that came from uniref90
    1a02_F/mgnify_hits.a3m
    alignments.db                 the same files of all records, end to end
    alignments.index              JSON: where each of them is

Owns which rows go into which file, and the database's two files. What was searched and gave no row has a
file with the query alone. Files of databases that are meant for pairing chains (uniprot) are written like
all others; an import takes them only with ``--paired``, and says what it left out. Reading them again
merges the files in AlphaFold 2's order, or as ``--databases`` says; rows come back in the order they had if
those of one database were neighbours. A record with equal rows gets one more file, `KEEPS_REPEATS`, by
which an import knows that they are all meant; without it equal rows come once, as in AlphaFold 2.

Source: OpenProteinSet, "alignment directory"; OpenFold ``data/data_pipeline.py`` _parse_msa_data,
``scripts/alignment_db_scripts/create_alignment_db.py``.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from foldfeed.feature_store.exporters.rows import ExportRows
from foldfeed.feature_store.exporters.texts import to_a3m
from foldfeed.feature_store.parsers.conventions import KEEPS_REPEATS, database_name
from foldfeed.feature_store.storage import TEMPORARY_PREFIX, open_blobs

DATABASE_FILE = "alignments.db"
DATABASE_INDEX = "alignments.index"
_SUFFIX = "_hits.a3m"
_FILE_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*")


def to_openproteinset(rows: ExportRows) -> dict[str, bytes]:
    """Returns A3M files by name, one per database.

    Raises:
      ExportError: no database, a database whose name cannot be a file's or means a file of templates, or text
        that would be too large.
    """
    names = list(dict.fromkeys([*rows.searched, *rows.databases[1:]]))
    if not names:
        raise rows.refuse("no database was searched, and a file of this layout is named by one; use a3m")
    of_row = np.array(["", *rows.databases[1:]], dtype=object)
    files = {}
    for name in names:
        file_name = f"{name}{_SUFFIX}"
        if not _FILE_STEM.fullmatch(name) or database_name(file_name) != (name, "a3m"):
            raise rows.refuse(
                f"its database {name!r} cannot name a file of alignments in this layout; use another format"
            )
        chosen = np.concatenate([[0], np.flatnonzero(of_row == name)])
        files[file_name] = to_a3m(rows.take(chosen))
    if _has_repeats(rows):
        files[KEEPS_REPEATS] = b"rows of equal letters are all meant\n"
    return files


def _has_repeats(rows: ExportRows) -> bool:
    """Returns whether an import would take a row for a repetition: of another, or of the query."""
    seen = {rows.msa[0].tobytes()}
    for row in rows.msa[1:]:
        seen.add(row.tobytes())
    return len(seen) < rows.depth


def write_openfold_db(folder: Path, records: Iterable[ExportRows]) -> int:
    """Writes an alignment database, one record in memory at a time; returns how many files it holds.

    The index comes last, so a reader that finds it finds all that it names.

    Args:
      folder: exists.
      records: each id once.
    Raises:
      FileExistsError: the folder has such a database; two of them cannot share a name.
      ExportError: see `to_openproteinset`; nothing is published.
    """
    for name in (DATABASE_FILE, DATABASE_INDEX):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists; export the database to another folder")
    index: dict[str, dict[str, object]] = {}
    num_files = size = 0
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as out:
            for rows in records:
                members = []
                for name, data in to_openproteinset(rows).items():
                    out.write(data)
                    members.append([name, size, len(data)])
                    size += len(data)
                index[rows.record_id] = {"db": DATABASE_FILE, "files": members}
                num_files += len(members)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(folder / DATABASE_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    open_blobs(folder).write_atomic(DATABASE_INDEX, (json.dumps(index, indent=1) + "\n").encode())
    return num_files
