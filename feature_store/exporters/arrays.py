"""Alignments as array files: AlphaFold 2's feature dictionary and Boltz's processed alignment, both ``.npz``.

Neither holds pickles. Owns dtypes, codes and the limits of these formats. Equal records give equal bytes with
the same NumPy. Pure functions.

Source: AlphaFold 2 ``data/pipeline.py``; Boltz ``data/types.py``, ``data/const.py``.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.exporters.rows import ExportRows
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.parsers.conventions import (
    FIRST_RESIDUE_TOKEN,
    GAP_TOKEN,
    HHBLITS_CODES,
    UNKNOWN_TOKEN,
)
from foldfeed.feature_store.parsers.mmcif.tables import is_plain_number

BOLTZ_SEQUENCE = np.dtype(
    [
        ("seq_idx", "<i2"),
        ("taxonomy", "<i4"),
        ("res_start", "<i4"),
        ("res_end", "<i4"),
        ("del_start", "<i4"),
        ("del_end", "<i4"),
    ]
)
BOLTZ_DELETION = np.dtype([("res_idx", "<i2"), ("deletion", "<i2")])
BOLTZ_RESIDUE = np.dtype([("res_type", "i1")])
_INT16 = 2**15 - 1
_INT32 = 2**31 - 1

_HHBLITS_OF_CODE = np.array([HHBLITS_CODES.index(letter) for letter in alphabet.TOKENS], dtype=np.int32)
_BOLTZ_OF_CODE = np.array(
    [*range(FIRST_RESIDUE_TOKEN, UNKNOWN_TOKEN), UNKNOWN_TOKEN, GAP_TOKEN], dtype=np.int8
)


def to_alphafold2_npz(rows: ExportRows) -> bytes:
    """Returns AlphaFold 2's features of one chain (sequence, alignment, labels if there are; no templates).

    Shapes: aatype int32 (length, 21) one-hot; residue_index, between_segment_residues, seq_length,
    num_alignments int32 (length,); msa (HHblits codes), deletion_matrix_int int32 (depth, length);
    msa_species_identifiers bytes (depth,); sequence, domain_name bytes (1,), where AlphaFold 2 has object
    arrays. Of a record with a structure also all_atom_positions float32 (length, 37, 3), angstrom,
    all_atom_mask float32 (length, 37) and, where they are known, resolution float32 (1,), angstrom, and
    release_date bytes (1,).
    """
    length = rows.length
    aatype = np.zeros((length, len(alphabet.RESIDUES) + 1), dtype=np.int32)
    aatype[np.arange(length), rows.msa[0]] = 1
    labels = {} if rows.structure is None else _labels(rows.structure)
    return _npz(
        {
            "aatype": aatype,
            "between_segment_residues": np.zeros(length, dtype=np.int32),
            "domain_name": _bytes([rows.description or rows.record_id]),
            "residue_index": np.arange(length, dtype=np.int32),
            "seq_length": np.full(length, length, dtype=np.int32),
            "sequence": _bytes([rows.sequence]),
            "deletion_matrix_int": rows.deletions,
            "msa": _HHBLITS_OF_CODE[rows.msa],
            "num_alignments": np.full(length, rows.depth, dtype=np.int32),
            "msa_species_identifiers": _bytes(rows.species),
            **labels,
        }
    )


def _labels(structure: Structure) -> dict[str, NDArray[Any]]:
    """Returns what AlphaFold 2's training adds to the features of a chain that has atoms."""
    found: dict[str, NDArray[Any]] = {
        "all_atom_positions": structure.atom_positions,
        "all_atom_mask": structure.atom_mask.astype(np.float32),
    }
    resolution, date = structure.source.get("resolution_angstrom"), structure.source.get(RELEASE_DATE)
    if resolution is not None and is_plain_number(resolution):
        found["resolution"] = np.array([resolution], dtype=np.float32)
    if date is not None:
        found[RELEASE_DATE] = _bytes([date])
    return found


def to_boltz_npz(rows: ExportRows) -> bytes:
    """Returns Boltz's ``sequences``, ``deletions`` and ``residues``.

    Pairing keys that are numbers become the taxonomy of their rows, by which Boltz pairs; so do species
    that are (NCBI taxonomy ids, as Boltz has them). Other rows have -1.

    Raises:
      ExportError: more rows, residues or inserted residues than Boltz's 16-bit numbers can say.
    """
    row, column = np.nonzero(rows.deletions)
    counts = rows.deletions[row, column]
    for what, number, limit in (
        ("rows", rows.depth, _INT16 + 1),
        ("residues", rows.length, _INT16 + 1),
        ("inserted residues at one place", int(counts.max(initial=0)), _INT16),
        ("tokens", rows.msa.size, _INT32),
    ):
        if number > limit:
            raise rows.refuse(
                f"it has {number} {what} and Boltz's format holds {limit}; export fewer rows or use a3m"
            )
    deletions = np.empty(len(row), dtype=BOLTZ_DELETION)
    deletions["res_idx"], deletions["deletion"] = column, counts
    ends = np.cumsum(np.bincount(row, minlength=rows.depth))
    sequences = np.empty(rows.depth, dtype=BOLTZ_SEQUENCE)
    sequences["seq_idx"] = np.arange(rows.depth)
    sequences["taxonomy"] = [
        next((int(name) for name in names if _is_int32(name)), -1)
        for names in zip(rows.pairing_keys, rows.species, strict=True)
    ]
    sequences["res_start"] = np.arange(rows.depth) * rows.length
    sequences["res_end"] = sequences["res_start"] + rows.length
    sequences["del_start"], sequences["del_end"] = np.concatenate([[0], ends[:-1]]), ends
    residues = _BOLTZ_OF_CODE[rows.msa].ravel().view(BOLTZ_RESIDUE)
    return _npz({"sequences": sequences, "deletions": deletions, "residues": residues})


def _is_int32(name: str) -> bool:
    return name.isdecimal() and name.isascii() and len(name) <= 10 and int(name) <= _INT32


def _bytes(texts: Any) -> NDArray[np.bytes_]:
    return np.array([text.encode("utf-8", errors="replace") for text in texts], dtype=np.bytes_)


def _npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
