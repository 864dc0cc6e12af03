"""Sequences of an mmCIF entry: which entities are polypeptides, their monomers, one letter for each.

Owns how a monomer becomes a letter. Does not own atoms. Pure functions of the tables.

Letters: the twenty standard monomers have theirs, MSE is M, UNK is X. What becomes of other modified residues
is the caller's choice:

- ``parent``: the letter of the residue it was made from, as in AlphaFold 2 and in the sequences of the PDB.
  It is the letter that the entry itself gives in ``_entity_poly.pdbx_seq_one_letter_code_can``, where that
  text has one letter per monomer (a chromophore made of three residues takes three letters there); else
  gemmi's table of monomers; else X. AlphaFold 2 looks names up in Biopython's table instead: the two differ
  in few names (PCA: the PDB says Q, Biopython E).
- ``X``: X.

Source: the mmCIF (PDBx) dictionary, ``_entity_poly``, ``_entity_poly_seq``; AlphaFold 2
``data/mmcif_parsing.py``.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format.record import MAX_RESIDUES
from foldfeed.feature_store.parsers.mmcif.tables import Column, Tables, gemmi_module, integer_of, shorten

MODIFIED = ("parent", "X")
# fmt: off
STANDARD = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E", "GLY": "G",
    "HIS": "H", "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F", "PRO": "P", "SER": "S",
    "THR": "T", "TRP": "W", "TYR": "Y", "VAL": "V",
}
# fmt: on
ENTITY_POLY = "_entity_poly"
POLY_SEQ = "_entity_poly_seq"
SCHEME = "_pdbx_poly_seq_scheme"
_NO_SEQUENCE = (
    "a sequence cannot be told from atoms alone, which leave out what was not observed; take a file with "
    f"{POLY_SEQ} or {SCHEME}, e.g. the entry as the PDB gives it"
)


def polypeptides(tables: Tables) -> dict[str, str]:
    """Returns entity id -> type of every polypeptide, e.g. ``polypeptide(L)``.

    Raises:
      StructureParseError: there is no table of polymers.
    """
    ids = tables.need(ENTITY_POLY, "entity_id", _NO_SEQUENCE)
    types = tables.need(ENTITY_POLY, "type", _NO_SEQUENCE)
    found: dict[str, str] = {}
    for row in range(len(ids.codes)):
        entity, kind = ids.at(row), types.at(row)
        if entity is not None and kind is not None and kind.lower().startswith("polypeptide"):
            found[entity] = kind
    return found


class Sequences:
    """The monomers of every entity, grouped once."""

    def __init__(self, tables: Tables, modified: str) -> None:
        """Reads the tables.

        Raises:
          StructureParseError: the entry has no table of monomers.
        """
        self._tables = tables
        self._modified = modified
        self.source = POLY_SEQ if tables.num_rows(POLY_SEQ) else SCHEME
        number, monomer = ("num", "mon_id") if self.source == POLY_SEQ else ("seq_id", "mon_id")
        self._entity = tables.need(self.source, "entity_id", _NO_SEQUENCE)
        self._number = tables.need(self.source, number, _NO_SEQUENCE)
        self._monomer = tables.need(self.source, monomer, _NO_SEQUENCE)
        # The scheme lists monomers once per chain, all chains of an entity alike: the first stands for all.
        self._asym = None if self.source == POLY_SEQ else tables.need(SCHEME, "asym_id", _NO_SEQUENCE)
        self._rows = group(self._entity, np.arange(len(self._entity.codes)))
        self._canonical = self._canonical_texts() if modified == "parent" else {}
        self._made: dict[str, Monomers] = {}

    def num_rows(self, entity: str) -> int:
        """Returns an upper bound of the residues of an entity, without reading them."""
        return len(self._rows.get(entity, ()))

    def of(self, entity: str) -> Monomers:
        """Returns the monomers of an entity.

        Raises:
          StructureParseError: there are none, or their numbers are not consecutive.
        """
        if entity not in self._made:
            self._made[entity] = self._make(entity)
        return self._made[entity]

    def _make(self, entity: str) -> Monomers:
        rows = self._rows.get(entity)
        if rows is None or not len(rows):
            raise self._tables.error(
                self.source, f"it has no monomer of entity {shorten(entity)}; {_NO_SEQUENCE}"
            )
        if self._asym is not None:
            rows = rows[self._asym.codes[rows] == self._asym.codes[rows[0]]]
        names: list[str] = []
        several: defaultdict[int, list[str]] = defaultdict(list)
        first = before = 0
        for row in rows.tolist():
            number, name = self._positive(row), self._monomer.at(row)
            if name is None:
                raise self._tables.error(self.source, "a monomer without a name (mon_id)", row)
            if not names:
                first = before = number
            elif number == before + 1:
                before = number
            elif number != before:
                raise self._tables.error(
                    self.source,
                    f"monomer {number} of entity {shorten(entity)} follows {before}; numbers are consecutive",
                    row,
                )
            else:
                several[len(names) - 1].append(name)
                continue
            if len(names) == MAX_RESIDUES:
                raise self._tables.error(
                    self.source, f"entity {shorten(entity)} has more than {MAX_RESIDUES} residues"
                )
            names.append(name)
        canonical = self._canonical.get(entity, "")
        letters = [
            self._letter(name, canonical[place] if len(canonical) == len(names) else "")
            for place, name in enumerate(names)
        ]
        return Monomers(
            entity,
            self.source,
            tuple(names),
            "".join(letters),
            first,
            {place: (names[place], *more) for place, more in several.items()},
        )

    def _letter(self, name: str, canonical: str) -> str:
        if name in STANDARD:
            return STANDARD[name]
        if name == "MSE":
            return "M"
        if name == "UNK" or self._modified == "X":
            return "X"
        if canonical:
            return canonical
        found = gemmi_module().find_tabulated_residue(name)
        letter = found.one_letter_code.strip().upper() if found.is_amino_acid() else ""
        return letter or "X"

    def _canonical_texts(self) -> dict[str, str]:
        ids = self._tables.column(ENTITY_POLY, "entity_id")
        texts = self._tables.column(ENTITY_POLY, "pdbx_seq_one_letter_code_can")
        found: dict[str, str] = {}
        for row in range(len(ids.codes)) if ids is not None and texts is not None else ():
            assert ids is not None
            assert texts is not None
            entity, text = ids.at(row), "".join((texts.at(row) or "").split()).upper()
            if entity is not None and text.isascii() and text.isalpha():
                found[entity] = text
        return found

    def _positive(self, row: int) -> int:
        text = self._number.at(row)
        number = integer_of(text)
        if number is None or number < 1:
            raise self._tables.error(
                self.source, f"the number {shorten(str(text))!r} of a monomer is no positive integer", row
            )
        return number


@dataclasses.dataclass(frozen=True, slots=True)
class Monomers:
    """The residues of one entity.

    Attributes:
      entity: its id.
      source: the table they are from.
      names: three-letter names, one per residue.
      sequence: one-letter residues.
      first_number: ``label_seq_id`` of the first residue, 1 but for odd files.
      several: all names by residue (0-based) where there are several.
    """

    entity: str
    source: str
    names: tuple[str, ...]
    sequence: str
    first_number: int
    several: dict[int, tuple[str, ...]]


def group(column: Column, rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Returns the rows of every value of a column, each in the order given, but for rows without one."""
    ordered = rows[np.argsort(column.codes[rows], kind="stable")]
    starts = np.searchsorted(column.codes[ordered], np.arange(len(column.values) + 1))
    return {
        value: ordered[starts[code] : starts[code + 1]]
        for code, value in enumerate(column.values)
        if value is not None and starts[code] < starts[code + 1]
    }
