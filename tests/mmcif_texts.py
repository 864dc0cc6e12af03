"""mmCIF texts for tests: a small model of an entry, its text by gemmi, and its structure by plain loops.

The loops are a second writing of the rules in `foldfeed.feature_store.parsers.mmcif.entry`, by residue.
"""

from __future__ import annotations

import dataclasses
import math
import random

import gemmi
import numpy as np

# fmt: off
NAMES = (
    "N", "CA", "C", "CB", "O", "CG", "CG1", "CG2", "OG", "OG1", "SG", "CD", "CD1", "CD2", "ND1", "ND2",
    "OD1", "OD2", "SD", "CE", "CE1", "CE2", "CE3", "NE", "NE1", "NE2", "OE1", "OE2", "CH2", "NH1",
    "NH2", "OH", "CZ", "CZ2", "CZ3", "NZ", "OXT",
)
ATOM_ITEMS = (
    "group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id",
    "label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z",
    "occupancy", "B_iso_or_equiv", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num",
)
# fmt: on
LETTERS = {"ALA": "A", "ARG": "R", "GLY": "G", "SER": "S", "MET": "M", "TRP": "W", "MSE": "M"}
PARENTS = {"HYP": "P", "SEP": "S", "UNK": "X", "NH2": "X"}


@dataclasses.dataclass
class Atom:
    name: str
    comp: str
    alt: str
    xyz: tuple[str, str, str]
    occupancy: str
    b_factor: str


@dataclasses.dataclass
class Residue:
    monomers: list[str]
    auth: int
    ins: str
    # By model, in the order of the file.
    atoms: list[list[Atom]]


@dataclasses.dataclass
class Entry:
    chains: dict[str, list[Residue]]
    auth_names: dict[str, str]
    models: list[int]
    has_scheme: bool


def random_entry(rng: random.Random) -> Entry:
    """Returns an entry with everything that entries have: gaps, alternates, several models and monomers."""
    models = sorted(rng.sample(range(1, 30), rng.randint(1, 3)), key=lambda _: rng.random())
    chains = {}
    for name in rng.sample(["A", "B", "AA", "x-1"], rng.randint(1, 2)):
        number = rng.randint(-40, 2000)
        residues = []
        for _ in range(rng.randint(1, 7)):
            kinds = rng.sample([*LETTERS, *PARENTS], rng.choice([1, 1, 1, 1, 2]))
            ins = rng.choice(["", "", "", "A", "b", "'", "?"])
            seen = rng.random() < 0.75
            atoms = [_random_atoms(rng, kinds) if seen else [] for _ in models]
            residues.append(Residue(kinds, number, ins, atoms))
            number += rng.choice([0, 1, 1, 1, 7])
        if not any(len(atoms) for residue in residues for atoms in residue.atoms):
            residues[0].atoms = [
                _random_atoms(rng, residues[0].monomers[:1])
                or [_atom(rng, "CA", residues[0].monomers[0], "")]
                for _ in models
            ]
        chains[name] = residues
    return Entry(chains, {name: rng.choice([name, "Z"]) for name in chains}, models, rng.random() < 0.5)


def _atom(rng: random.Random, name: str, comp: str, alt: str) -> Atom:
    def number(low: float, high: float, digits: int) -> str:
        return f"{rng.uniform(low, high):.{digits}f}"

    xyz = (number(-99, 999, 3), number(-9, 9, rng.randint(0, 6)), number(-999, 99, 3))
    return Atom(name, comp, alt, xyz, rng.choice(["1.00", "0.50", "0.50", "0.0", "0.25"]), number(0, 99, 2))


def _random_atoms(rng: random.Random, kinds: list[str]) -> list[Atom]:
    found = []
    for kind in kinds:
        names = rng.sample(
            ["N", "CA", "C", "O", "CB", "CD", "NH1", "NH2", "SE", "SD", "H", "HA", "P", "O5'"], 8
        )
        for name in names:
            if name == "SD" and "SE" in names:
                continue
            alternates = rng.choice([[""], [""], ["A", "B"], ["B", "A", "C"], ["A"]])
            found += [_atom(rng, name, kind, alt) for alt in alternates]
    rng.shuffle(found)
    return found


def text_of(entry: Entry) -> bytes:
    """Returns the text of an entry, with DNA, an ion and a water beside the chains."""
    document = gemmi.cif.Document()
    block = document.add_new_block("TEST")
    block.set_pair("_entry.id", "9TST")
    entities = {asym: str(number) for number, asym in enumerate(entry.chains, start=1)}
    poly = [[entity, "polypeptide(L)"] for entity in entities.values()]
    add_table(block, "_entity_poly.", ("entity_id", "type"), [*poly, ["8", "polydeoxyribonucleotide"]])
    sequence, scheme = [["8", "1", "DA"]], []
    for asym, residues in entry.chains.items():
        for seq, residue in enumerate(residues, start=1):
            sequence += [[entities[asym], str(seq), comp] for comp in residue.monomers]
            number, first = str(residue.auth), residue.monomers[0]
            scheme.append([asym, entities[asym], str(seq), first, number, residue.ins or None])
    add_table(block, "_entity_poly_seq.", ("entity_id", "num", "mon_id"), sequence)
    if entry.has_scheme:
        names = ("asym_id", "entity_id", "seq_id", "mon_id", "pdb_seq_num", "pdb_ins_code")
        add_table(block, "_pdbx_poly_seq_scheme.", names, scheme)
    rows: list[list[str | None]] = []
    for at, model in enumerate(entry.models):
        for asym, residues in entry.chains.items():
            for seq, residue in enumerate(residues, start=1):
                for atom in residue.atoms[at]:
                    head = ["ATOM", str(len(rows)), atom.name[0], atom.name, atom.alt or None, atom.comp]
                    place = [asym, entities[asym], str(seq), residue.ins or None]
                    numbers = [*atom.xyz, atom.occupancy, atom.b_factor]
                    rows.append(
                        [*head, *place, *numbers, str(residue.auth), entry.auth_names[asym], str(model)]
                    )
        for comp, name, seq, entity in (
            ("HOH", "O", None, "9"),
            ("CA", "CA", None, "10"),
            ("DA", "P", "1", "8"),
        ):
            place = [comp, f"W{entity}", entity, seq, None]
            rows.append(["HETATM", str(len(rows)), "X", name, None, *place, *"12319", "1", "Z", str(model)])
    add_table(block, "_atom_site.", ATOM_ITEMS, rows)
    return document.as_string().encode()


def add_table(block, prefix: str, names, rows) -> None:
    """Adds a loop; None is written as ``?`` or ``.``."""
    loop = block.init_loop(prefix, list(names))
    for number, row in enumerate(rows):
        loop.add_row(["?."[number % 2] if cell is None else gemmi.cif.quote(cell) for cell in row])


def expected(entry: Entry, asym: str, at: int) -> dict[str, object]:
    """Returns the sequence and arrays of a chain in the model at that place, by the rules, in plain loops."""
    residues = entry.chains[asym]
    length = len(residues)
    found = {
        "atom_positions": np.zeros((length, 37, 3), np.float32),
        "atom_mask": np.zeros((length, 37), np.uint8),
        "b_factor": np.zeros((length, 37), np.float32),
        "residue_number": np.full(length, -(2**31), np.int32),
        "insertion_code": np.zeros(length, np.uint8),
    }
    swaps = 0
    for place, residue in enumerate(residues):
        if entry.has_scheme or residue.atoms[at]:
            found["residue_number"][place] = residue.auth
            found["insertion_code"][place] = ord(residue.ins) if residue.ins else 0
        best: dict[str, Atom] = {}
        for atom in residue.atoms[at]:
            name = "SD" if atom.comp == "MSE" and atom.name == "SE" else atom.name
            if atom.comp != residue.monomers[0] or name not in NAMES:
                continue
            if name not in best or float(atom.occupancy) > float(best[name].occupancy):
                best[name] = atom
        if residue.monomers[0] == "ARG" and {"CD", "NH1", "NH2"} <= set(best):
            points = {
                name: [float(np.float32(value)) for value in best[name].xyz] for name in ("CD", "NH1", "NH2")
            }
            if math.dist(points["NH1"], points["CD"]) > math.dist(points["NH2"], points["CD"]):
                best["NH1"], best["NH2"] = best["NH2"], best["NH1"]
                swaps += 1
        for name, atom in best.items():
            found["atom_positions"][place, NAMES.index(name)] = [float(value) for value in atom.xyz]
            found["b_factor"][place, NAMES.index(name)] = float(atom.b_factor)
            found["atom_mask"][place, NAMES.index(name)] = 1
    letters = LETTERS | PARENTS
    return found | {
        "parent": "".join(letters[residue.monomers[0]] for residue in residues),
        "X": "".join(LETTERS.get(residue.monomers[0], "X") for residue in residues),
        "several": {
            place: tuple(residue.monomers)
            for place, residue in enumerate(residues)
            if len(residue.monomers) > 1
        },
        "altlocs": tuple(
            place for place, residue in enumerate(residues) if any(atom.alt for atom in residue.atoms[at])
        ),
        "swaps": swaps,
    }
