"""Alignments as the inputs of structure predictors: AlphaFold 3's JSON and Chai's aligned Parquet.

Owns which rows go where in these formats. Inserted residues are ``x``, as in
`foldfeed.feature_store.exporters.texts`. Pure functions.

Source: AlphaFold 3 ``docs/input.md``; Chai-1 ``data/parsing/msas/aligned_pqt.py``, ``data_source.py``.
"""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foldfeed.feature_store.exporters.rows import ExportRows, one_line
from foldfeed.feature_store.exporters.texts import to_a3m
from foldfeed.feature_store.parsers.conventions import CHAI_QUERY, PAIRED_DATABASES

# What Chai-1 reads; its other names are for its own training.
CHAI_SOURCES = ("uniprot", "uniref90", "bfd_uniclust", "mgnify")
# AlphaFold 2's and OpenFold's other names for what Chai calls bfd_uniclust.
_CHAI_NAMES = {"bfd_uniref": "bfd_uniclust", "small_bfd": "bfd_uniclust", "uniclust30": "bfd_uniclust"}


def to_alphafold3_json(rows: ExportRows) -> bytes:
    """Returns an AlphaFold 3 job of one protein chain A with its alignment and without templates.

    Rows of databases that are meant for pairing (uniprot, paired) go to ``pairedMsa``, the others to
    ``unpairedMsa``. ``templates`` is empty; remove it to let AlphaFold 3 search for some.

    Raises:
      ExportError: the text would be too large.
    """
    is_paired = np.array([name in PAIRED_DATABASES for name in rows.databases])
    keep = np.arange(rows.depth)
    paired = to_a3m(rows.take(keep[is_paired | (keep == 0)])) if is_paired.any() else b""
    protein: dict[str, object] = {
        "id": "A",
        "sequence": rows.sequence,
        "unpairedMsa": to_a3m(rows.take(keep[~is_paired])).decode("utf-8"),
        "pairedMsa": paired.decode("utf-8"),
        "templates": [],
    }
    if one_line(rows.description):
        protein["description"] = one_line(rows.description)
    # The description of a chain came with version 4 of the format; the rest is version 1.
    document = {
        "dialect": "alphafold3",
        "version": 4 if "description" in protein else 1,
        "name": rows.record_id,
        "modelSeeds": [1],
        "sequences": [{"protein": protein}],
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def to_chai_pqt(rows: ExportRows, other_source: str | None = None) -> bytes:
    """Returns Chai's aligned Parquet; a row without a pairing key has its species in that column.

    Args:
      rows: of the record.
      other_source: the source that rows of databases unknown to Chai get, one of `CHAI_SOURCES`.
    Raises:
      ExportError: a database that Chai does not know, and no ``other_source``.
    """
    text = to_a3m(rows).split(b"\n")
    sources = [CHAI_QUERY, *(_chai_source(rows, name, other_source) for name in rows.databases[1:])]
    table = pa.table(
        {
            "sequence": pa.array([line.decode("ascii") for line in text[1::2]], type=pa.string()),
            "source_database": pa.array(sources, type=pa.string()),
            "pairing_key": pa.array(
                [key or name for key, name in zip(rows.pairing_keys, rows.species, strict=True)],
                type=pa.string(),
            ),
            "comment": pa.array([rows.record_id, *rows.hit_ids[1:]], type=pa.string()),
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def chai_file_name(sequence: str) -> str:
    """Returns the name under which Chai looks for the alignment of a sequence."""
    return hashlib.sha256(sequence.upper().encode()).hexdigest() + ".aligned.pqt"


def _chai_source(rows: ExportRows, name: str, other: str | None) -> str:
    known = _CHAI_NAMES.get(name, name)
    if known in CHAI_SOURCES:
        return known
    if other is None:
        raise rows.refuse(
            f"Chai does not know the database {name!r}, only {', '.join(CHAI_SOURCES)}; say with "
            "--chai-source what its rows count as"
        )
    return other
