"""Structures as mmCIF, one chain per file.

Owns which tables are written. Does not own the format's syntax (gemmi). Invariant:
`parsers.mmcif.entry.read_mmcif` reads back the same sequence, atoms, b-factors and numbers, bit by bit;
whoever reads the decimals as 32-bit floats gets the same, too. What the record knows of the entry (id,
method, resolution, release date, names of the chain, model) stands where the dictionary wants it. The
structure is written as it is stored: selenium of MSE is the sulphur of MET, other modified residues are
their parents or UNK, one alternate location is left.

Source: the mmCIF (PDBx) dictionary.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.exporters.rows import ExportRows, one_line
from foldfeed.feature_store.format.columns import RELEASE_DATE
from foldfeed.feature_store.format.structure import ATOM_NAMES, NO_NUMBER, Structure
from foldfeed.feature_store.parsers.mmcif.sequence import STANDARD
from foldfeed.feature_store.parsers.mmcif.tables import gemmi_module, is_plain_number

# Letters of no standard residue have names of their own in the dictionary of chemical components.
MONOMERS = {letter: name for name, letter in STANDARD.items()} | {
    "B": "ASX",
    "J": "XLE",
    "O": "PYL",
    "U": "SEC",
    "X": "UNK",
    "Z": "GLX",
}
_ENTITY = "1"
# An unquoted value of one character that some reader may take for something else is quoted by gemmi.
_PRINTABLE = range(33, 127)


def to_mmcif(rows: ExportRows) -> bytes:
    """Returns the structure of a record as mmCIF text.

    Raises:
      ExportError: it has no structure, or one without any atom, or with names that mmCIF cannot hold.
      MissingExtraError: gemmi is not installed.
    """
    structure = rows.structure
    if structure is None:
        raise rows.refuse("it has no structure; give it one with `foldfeed structures`")
    if not structure.atom_mask.any():
        raise rows.refuse("its structure has no atom, and mmCIF without atoms is no structure")
    cif = gemmi_module().cif
    source = {name: _ascii(text) for name, text in structure.source.items()}
    document = cif.Document()
    entry_id = source.get("entry_id") or rows.record_id
    block = document.add_new_block("".join(entry_id.split()) or rows.record_id)
    block.set_pair("_entry.id", cif.quote(entry_id))
    _write_facts(rows, source, block, cif)
    names = [MONOMERS[letter] for letter in rows.sequence]
    _write_sequence(rows, source, names, block, cif)
    _write_numbers(rows, structure, source, names, block, cif)
    _write_atoms(structure, source, names, block, cif)
    return document.as_string().encode("ascii")


def _write_facts(rows: ExportRows, source: Mapping[str, str], block: Any, cif: Any) -> None:
    if "method" in source:
        block.set_pair("_exptl.entry_id", cif.quote(source.get("entry_id") or rows.record_id))
        block.set_pair("_exptl.method", cif.quote(source["method"]))
    resolution = source.get("resolution_angstrom")
    if resolution is not None:
        if not is_plain_number(resolution):
            raise rows.refuse(f"its resolution {resolution!r} is no number")
        block.set_pair("_refine.ls_d_res_high", resolution)
    date = source.get(RELEASE_DATE)
    if date is not None:
        try:
            datetime.date.fromisoformat(date)
        except ValueError as error:
            raise rows.refuse(f"its release date {date!r} is no date (YYYY-MM-DD)") from error
        block.set_pair("_pdbx_audit_revision_history.revision_date", date)


def _write_sequence(
    rows: ExportRows, source: Mapping[str, str], names: Sequence[str], block: Any, cif: Any
) -> None:
    label = _label(source)
    kind = source.get("polymer_type", "")
    block.set_pair("_entity.id", _ENTITY)
    block.set_pair("_entity.type", "polymer")
    if one_line(rows.description):
        block.set_pair("_entity.pdbx_description", cif.quote(_ascii(one_line(rows.description))))
    block.set_pair("_struct_asym.id", cif.quote(label))
    block.set_pair("_struct_asym.entity_id", _ENTITY)
    block.set_pair("_entity_poly.entity_id", _ENTITY)
    known = kind if kind.lower().startswith("polypeptide") else "polypeptide(L)"
    block.set_pair("_entity_poly.type", cif.quote(known))
    # Read back by `parent` letters: B, J, O, U and Z stay what they are.
    block.set_pair("_entity_poly.pdbx_seq_one_letter_code_can", cif.quote(rows.sequence))
    numbers = [str(number) for number in range(1, len(names) + 1)]
    _write_loop(
        block, "_entity_poly_seq.", {"entity_id": [_ENTITY] * len(names), "num": numbers, "mon_id": names}
    )


def _write_numbers(
    rows: ExportRows,
    structure: Structure,
    source: Mapping[str, str],
    names: Sequence[str],
    block: Any,
    cif: Any,
) -> None:
    """Writes the author's numbers of all residues, those without atoms, too."""
    codes = [int(code) for code in np.unique(structure.insertion_code) if code and code not in _PRINTABLE]
    if codes:
        raise rows.refuse(f"its insertion code {codes[0]} is no printable ASCII character")
    length = len(names)
    _write_loop(
        block,
        "_pdbx_poly_seq_scheme.",
        {
            "asym_id": [cif.quote(_label(source))] * length,
            "entity_id": [_ENTITY] * length,
            "seq_id": [str(number) for number in range(1, length + 1)],
            "mon_id": names,
            "pdb_seq_num": _numbers(structure.residue_number),
            "pdb_strand_id": [cif.quote(_author(source))] * length,
            "pdb_ins_code": _codes(structure.insertion_code, cif),
        },
    )


def _write_atoms(
    structure: Structure, source: Mapping[str, str], names: Sequence[str], block: Any, cif: Any
) -> None:
    residue, slot = np.nonzero(structure.atom_mask)
    atoms = [ATOM_NAMES[at] for at in slot.tolist()]
    positions = structure.atom_positions[residue, slot]
    same = len(atoms)
    _write_loop(
        block,
        "_atom_site.",
        {
            "group_PDB": ["ATOM"] * same,
            "id": [str(number) for number in range(1, same + 1)],
            "type_symbol": [name[0] for name in atoms],
            "label_atom_id": atoms,
            "label_alt_id": ["."] * same,
            "label_comp_id": [names[at] for at in residue.tolist()],
            "label_asym_id": [cif.quote(_label(source))] * same,
            "label_entity_id": [_ENTITY] * same,
            "label_seq_id": [str(number) for number in (residue + 1).tolist()],
            "pdbx_PDB_ins_code": _codes(structure.insertion_code[residue], cif),
            "Cartn_x": decimals(positions[:, 0]),
            "Cartn_y": decimals(positions[:, 1]),
            "Cartn_z": decimals(positions[:, 2]),
            "occupancy": ["1.00"] * same,
            "B_iso_or_equiv": decimals(structure.b_factor[residue, slot]),
            "auth_seq_id": _numbers(structure.residue_number[residue]),
            "auth_asym_id": [cif.quote(_author(source))] * same,
            "pdbx_PDB_model_num": [_model(source)] * same,
        },
    )


def decimals(values: NDArray[np.float32]) -> list[str]:
    """Returns the shortest decimals that give the same 32-bit floats, however they are rounded on the way.

    Most readers round to 64 bits first; where that would end in another float, all digits are written.
    """
    texts = [np.format_float_positional(value, unique=True, trim="0") for value in values]
    twice = np.array([float(text) for text in texts], dtype=np.float64).astype(np.float32)
    for at in np.flatnonzero(twice != values):
        texts[at] = repr(float(values[at]))
    return texts


def _write_loop(block: Any, prefix: str, columns: Mapping[str, Sequence[str]]) -> None:
    loop = block.init_loop(prefix, list(columns))
    loop.set_all_values([list(column) for column in columns.values()])


def _numbers(values: NDArray[np.int32]) -> list[str]:
    return ["?" if number == NO_NUMBER else str(number) for number in values.tolist()]


def _codes(values: NDArray[np.uint8], cif: Any) -> list[str]:
    return [cif.quote(chr(code)) if code else "." for code in values.tolist()]


def _label(source: Mapping[str, str]) -> str:
    return source.get("label_asym_id") or "A"


def _author(source: Mapping[str, str]) -> str:
    return source.get("auth_asym_id") or _label(source)


def _model(source: Mapping[str, str]) -> str:
    model = source.get("model", "")
    return model if model.isdecimal() and len(model) <= 9 else "1"


def _ascii(text: str) -> str:
    return text.encode("ascii", errors="replace").decode()
