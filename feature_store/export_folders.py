"""Alignments as a folder of files per record: OpenProteinSet's and OpenFold's layout.

    1a02_F/uniref90_hits.a3m      the query, then the rows that came from uniref90
    1a02_F/mgnify_hits.a3m

Owns which rows go into which file. A database that was searched and gave no row has a file with the query
alone. Reading the folder again merges the files in AlphaFold 2's order, or as ``--databases`` says; rows come
back in the order they had if those of one database were neighbours, equal rows once.

Source: OpenProteinSet, "alignment directory"; OpenFold ``data/data_pipeline.py`` _parse_msa_data.
"""

from __future__ import annotations

import re

import numpy as np

from foldfeed.feature_store.export_rows import ExportRows
from foldfeed.feature_store.export_text import to_a3m
from foldfeed.feature_store.import_openfold import database_name

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
        files[file_name] = to_a3m(rows.take(np.concatenate([[0], np.flatnonzero(of_row == name)])))
    return files
