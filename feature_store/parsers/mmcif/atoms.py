"""The atoms of an mmCIF entry, chain by chain, in the 37 slots of a `Structure`.

Owns which rows of ``_atom_site`` belong to a chain and a model, alternate locations, slots and the author's
numbers; the rules are told in `foldfeed.feature_store.parsers.mmcif.entry`. Invariant: a row that
contradicts the sequence or another row is an error, never a choice made in silence.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format.structure import ATOM_NAMES, NO_NUMBER, NUM_ATOMS
from foldfeed.feature_store.parsers.mmcif.sequence import SCHEME, Monomers, group
from foldfeed.feature_store.parsers.mmcif.tables import ATOM_SITE, Tables, integer_of, shorten

SLOT = {name: slot for slot, name in enumerate(ATOM_NAMES)}
_INT32 = 2**31 - 1


@dataclasses.dataclass(slots=True)
class PlacedAtoms:
    """Atoms of a chain in their slots, as in `Structure`, while they are being arranged."""

    positions: NDArray[np.float32]
    mask: NDArray[np.uint8]
    b_factor: NDArray[np.float32]
    residue_number: NDArray[np.int32]
    insertion_code: NDArray[np.uint8]
    altloc_residues: tuple[int, ...] = ()


class Atoms:
    """The rows of ``_atom_site`` in the chosen model."""

    def __init__(self, tables: Tables, model: int | None) -> None:
        self._tables = tables
        self._asym = tables.need(ATOM_SITE, "label_asym_id")
        self._entity = tables.need(ATOM_SITE, "label_entity_id")
        self._auth_asym = tables.column(ATOM_SITE, "auth_asym_id") or self._asym
        self._comp = tables.need(ATOM_SITE, "label_comp_id")
        self._atom = tables.need(ATOM_SITE, "label_atom_id")
        seq = tables.need(ATOM_SITE, "label_seq_id")
        self._seq = seq.each(self._seq_id, np.int64)
        self._alt = tables.column(ATOM_SITE, "label_alt_id")
        # For all chains at once: a hostile file can have as many chains as atoms.
        self._slot = self._slots()
        self._has_alt = np.zeros(len(self._seq), dtype=bool)
        if self._alt is not None:
            self._has_alt = self._alt.each(lambda text: text is not None, bool)
        self._comp_code = {name: code for code, name in enumerate(self._comp.values)}
        self._auth_seq = tables.column(ATOM_SITE, "auth_seq_id")
        self._ins_code = tables.column(ATOM_SITE, "pdbx_PDB_ins_code")
        self._xyz = np.stack([tables.numbers(ATOM_SITE, f"Cartn_{axis}") for axis in "xyz"], axis=1)
        self._occupancy = tables.numbers(ATOM_SITE, "occupancy", missing=1.0)
        self._b_factor = tables.numbers(ATOM_SITE, "B_iso_or_equiv", missing=0.0)
        number = tables.column(ATOM_SITE, "pdbx_PDB_model_num")
        models = number.values if number is not None else ("1",)
        self.num_models = len(models)
        self.model = self._choose(models, model)
        in_model = np.ones(len(self._seq), dtype=bool)
        if number is not None:
            in_model = number.each(lambda text: (text or "1") == self.model, bool)
        self._rows = group(self._asym, np.flatnonzero(in_model))
        self._scheme = _Scheme(tables)

    def entities(self) -> dict[str, str]:
        """Returns the entity of every chain that has atoms, in the order of the file."""
        found: dict[str, str] = {}
        for name, rows in self._rows.items():
            entity = self._entity.at(rows[0])
            other = np.flatnonzero(self._entity.codes[rows] != self._entity.codes[rows[0]])
            if len(other):
                raise self._error(
                    f"chain {shorten(name)} has atoms of entity {self._entity.at(rows[other[0]])} and of "
                    f"{entity}; a label_asym_id belongs to one entity",
                    rows[other[0]],
                )
            if entity is not None:
                found[name] = entity
        return found

    def has_chain(self, name: str) -> bool:
        """Returns whether a chain has atoms, whatever their entity."""
        return name in self._rows

    def auth_asym_id(self, name: str) -> str:
        """Returns the author's name of a chain; the file's own where there is none."""
        rows = self._rows[name]
        other = np.flatnonzero(self._auth_asym.codes[rows] != self._auth_asym.codes[rows[0]])
        if len(other):
            raise self._error(
                f"chain {shorten(name)} has two names of the author; auth_asym_id is one per label_asym_id",
                rows[other[0]],
            )
        return self._auth_asym.at(rows[0]) or name

    def place(self, name: str, monomers: Monomers) -> PlacedAtoms:
        """Returns the atoms of a chain in their slots.

        Raises:
          StructureParseError: a row contradicts the sequence or another row, or a number is none.
        """
        rows = self._rows[name]
        if (self._seq[rows] == 0).any():
            raise self._error(
                f"an atom of the polypeptide {shorten(name)} has no label_seq_id; it must say its residue",
                rows[self._seq[rows] == 0][0],
            )
        residue = self._seq[rows] - monomers.first_number
        outside = np.flatnonzero((residue < 0) | (residue >= len(monomers.names)))
        if len(outside):
            raise self._error(
                f"label_seq_id {self._seq[rows[outside[0]]]} is not in the sequence of entity "
                f"{monomers.entity}, which has {len(monomers.names)} residues",
                rows[outside[0]],
            )
        length = len(monomers.names)
        placed = PlacedAtoms(
            positions=np.zeros((length, NUM_ATOMS, 3), dtype=np.float32),
            mask=np.zeros((length, NUM_ATOMS), dtype=np.uint8),
            b_factor=np.zeros((length, NUM_ATOMS), dtype=np.float32),
            residue_number=np.full(length, NO_NUMBER, dtype=np.int32),
            insertion_code=np.zeros(length, dtype=np.uint8),
        )
        placed.altloc_residues = tuple(np.unique(residue[self._has_alt[rows]]).tolist())
        self._scheme.number(placed, name, monomers.first_number)
        self._number(placed, name, rows, residue)
        chosen = self._is_chosen(rows, residue, monomers)
        self._fill(placed, rows[chosen], residue[chosen])
        return placed

    def _is_chosen(
        self, rows: NDArray[np.int64], residue: NDArray[np.int64], monomers: Monomers
    ) -> NDArray[np.bool_]:
        """Returns bool (rows,), atoms of the monomer that the sequence has."""
        wanted = np.array([self._comp_code.get(name, -1) for name in monomers.names], dtype=np.int64)
        is_chosen = self._comp.codes[rows] == wanted[residue]
        for at in np.flatnonzero(~is_chosen):
            place, name = int(residue[at]), self._comp.at(rows[at])
            if name not in monomers.several.get(place, ()):
                raise self._error(
                    f"residue {self._seq[rows[at]]} is {shorten(str(name))} here and "
                    f"{shorten(monomers.names[place])} in {monomers.source}; they must agree",
                    rows[at],
                )
        return is_chosen

    def _fill(self, placed: PlacedAtoms, rows: NDArray[np.int64], residue: NDArray[np.int64]) -> None:
        """Puts atoms into their slots, of alternates the one of highest occupancy."""
        has_slot = self._slot[rows] >= 0
        rows, residue = rows[has_slot], residue[has_slot]
        slot = self._slot[rows]
        self._check_twice(rows, residue)
        occupancy = self._occupancy[rows]
        self._check_finite(rows, occupancy, "occupancy")
        cell = residue * NUM_ATOMS + slot
        order = np.lexsort((np.arange(len(rows)), -occupancy, cell))
        first = np.ones(len(order), dtype=bool)
        first[1:] = cell[order][1:] != cell[order][:-1]
        best = order[first]
        with np.errstate(over="ignore"):
            positions = self._xyz[rows[best]].astype(np.float32)
            b_factor = self._b_factor[rows[best]].astype(np.float32)
        self._check_finite(rows[best], positions.sum(axis=1, dtype=np.float64), "Cartn_x, y, z")
        self._check_finite(rows[best], b_factor, "B_iso_or_equiv")
        place = (residue[best], slot[best])
        placed.positions[place], placed.b_factor[place], placed.mask[place] = positions, b_factor, 1

    def _slots(self) -> NDArray[np.int64]:
        """Returns int64 (rows,), each atom's slot, -1 for atoms that have none."""
        slot = self._atom.each(lambda text: SLOT.get(text or "", -1), np.int64)
        is_selenium = self._atom.each(lambda text: text is not None and text.upper() == "SE", bool)
        slot[is_selenium & self._comp.each(lambda text: text == "MSE", bool)] = SLOT["SD"]
        return slot

    def _check_twice(self, rows: NDArray[np.int64], residue: NDArray[np.int64]) -> None:
        """Raises where an atom comes twice at the same alternate location: which one is meant?"""
        alt = self._alt.codes[rows] if self._alt is not None else np.zeros(len(rows), dtype=np.int64)
        order = np.lexsort((np.arange(len(rows)), alt, self._atom.codes[rows], residue))
        same = np.ones(max(len(rows) - 1, 0), dtype=bool)
        for key in (residue, self._atom.codes[rows], alt):
            same &= key[order][1:] == key[order][:-1]
        if same.any():
            row = rows[order[1:][same]].min()
            raise self._error(
                f"atom {shorten(str(self._atom.at(row)))} of residue {self._seq[row]} comes twice at one "
                "alternate location; label_alt_id must tell them apart",
                row,
            )

    def _number(
        self, placed: PlacedAtoms, name: str, rows: NDArray[np.int64], residue: NDArray[np.int64]
    ) -> None:
        """Sets the author's numbers and insertion codes of the residues that have atoms."""
        _, first, back = np.unique(residue, return_index=True, return_inverse=True)
        for column, target, convert in (
            (self._auth_seq, placed.residue_number, _author_number),
            (self._ins_code, placed.insertion_code, _insertion_code),
        ):
            if column is None or not len(rows):
                continue
            other = np.flatnonzero(column.codes[rows] != column.codes[rows[first]][back])
            if len(other):
                raise self._error(
                    f"residue {self._seq[rows[other[0]]]} of chain {shorten(name)} has two numbers of the "
                    "author; auth_seq_id and pdbx_PDB_ins_code are one per residue",
                    rows[other[0]],
                )
            target[residue[first]] = [
                convert(self._tables, column.at(row), ATOM_SITE, int(row)) for row in rows[first]
            ]

    def _seq_id(self, text: str | None) -> int:
        """Returns a ``label_seq_id``, 0 for what is no residue of a polymer."""
        if text is None:
            return 0
        number = integer_of(text)
        if number is None or not 1 <= number <= _INT32:
            raise self._tables.error(
                ATOM_SITE, f"label_seq_id {shorten(text)!r} is not a positive 32-bit integer"
            )
        return number

    def _choose(self, models: tuple[str | None, ...], model: int | None) -> str:
        names = [name or "1" for name in models]
        if model is None:
            return names[0]
        if str(model) not in names:
            raise self._tables.error(
                ATOM_SITE,
                f"there is no model {model}; the models are {shorten(', '.join(names))}",
            )
        return str(model)

    def _check_finite(self, rows: NDArray[np.int64], values: NDArray[np.floating], what: str) -> None:
        odd = np.flatnonzero(~np.isfinite(values))
        if len(odd):
            row = int(rows[odd[0]])
            raise self._error(
                f"{what} of atom {shorten(str(self._atom.at(row)))} of residue {self._seq[row]} is not a "
                "number that 32 bits can hold",
                row,
            )

    def _error(self, reason: str, row: int | np.integer) -> Exception:
        return self._tables.error(ATOM_SITE, reason, int(row))


class _Scheme:
    """``_pdbx_poly_seq_scheme``, which numbers residues that have no atoms, too. A file may lack it."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        asym = tables.column(SCHEME, "asym_id")
        self._seq = tables.column(SCHEME, "seq_id")
        self._number = tables.column(SCHEME, "pdb_seq_num")
        self._ins_code = tables.column(SCHEME, "pdb_ins_code")
        self._rows = {} if asym is None else group(asym, np.arange(len(asym.codes)))

    def number(self, placed: PlacedAtoms, name: str, first_number: int) -> None:
        """Sets the author's numbers and insertion codes of a chain."""
        for row in self._rows.get(name, np.zeros(0, dtype=np.int64)).tolist() if self._seq else ():
            number = integer_of(self._seq.at(row)) if self._seq else None
            if number is None or not 0 <= number - first_number < len(placed.mask):
                raise self._tables.error(
                    SCHEME, f"there is no residue {shorten(str(number))} in chain {shorten(name)}", row
                )
            place = number - first_number
            if self._number is not None:
                placed.residue_number[place] = _author_number(self._tables, self._number.at(row), SCHEME, row)
            if self._ins_code is not None:
                placed.insertion_code[place] = _insertion_code(
                    self._tables, self._ins_code.at(row), SCHEME, row
                )


def _author_number(tables: Tables, text: str | None, category: str, row: int) -> int:
    if text is None:
        return NO_NUMBER
    number = integer_of(text)
    if number is None or not -_INT32 <= number <= _INT32:
        raise tables.error(
            category, f"the author's residue number {shorten(text)!r} is not a 32-bit integer", row
        )
    return number


def _insertion_code(tables: Tables, text: str | None, category: str, row: int) -> int:
    if text is None:
        return 0
    if len(text) != 1 or not 0 < ord(text) < 128:
        raise tables.error(category, f"the insertion code {shorten(text)!r} is not one ASCII character", row)
    return ord(text)


def fix_arginines(placed: PlacedAtoms, monomers: tuple[str, ...]) -> int:
    """Exchanges NH1 and NH2 of arginines where NH2 is closer to CD; returns how many were exchanged.

    Source: AlphaFold 2 ``data/templates.py`` _get_atom_positions.
    """
    nh1, nh2, cd = SLOT["NH1"], SLOT["NH2"], SLOT["CD"]
    is_arginine = np.array([name == "ARG" for name in monomers], dtype=bool)
    there = np.flatnonzero(is_arginine & (placed.mask[:, [nh1, nh2, cd]] == 1).all(axis=1))
    atoms = placed.positions[there][:, [nh1, nh2, cd]].astype(np.float64)
    # Summed by hand: the order of a library's sum is its own.
    squares = (atoms[:, :2] - atoms[:, 2:]) ** 2
    distances = squares[..., 0] + squares[..., 1] + squares[..., 2]
    wrong = there[distances[:, 0] > distances[:, 1]]
    for array in (placed.positions, placed.b_factor):
        array[wrong, nh1], array[wrong, nh2] = array[wrong, nh2], array[wrong, nh1]
    return len(wrong)
