"""Protein chains of an mmCIF entry: sequence as deposited, atoms in 37 slots, numbering, facts of the entry.

Owns the rules by which an entry becomes sequences and `Structure`s. Does not own syntax
(`parsers.mmcif.tables`), letters (`parsers.mmcif.sequence`), rows (`parsers.mmcif.atoms`), nor records.
Invariants: residue i of a structure is monomer i of the chain's entity, observed or not; what cannot be read
without a guess is a `StructureParseError`; one chain is built at a time.

The rules, and where they come from:

- A chain is a ``label_asym_id`` whose entity is a polypeptide (``_entity_poly.type``) and that has atoms in
  the chosen model; waters, ligands, sugars and nucleic acids are other entities. The sequence is
  ``_entity_poly_seq``; ``_pdbx_poly_seq_scheme`` stands in for a file without it (``sequence_from`` in
  ``Structure.source`` says which). mmCIF dictionary.
- The model is the first of the file unless one is asked for (AlphaFold 2 takes model 1).
- Where a position lists several monomers (microheterogeneity), the first is the sequence's, and only its
  atoms count; if it alone was not modelled, the residue is not observed.
- Among alternate locations, each atom is the one of highest occupancy, the first of the file on a tie; atoms
  of one residue may thus come from different locations. This is Biopython's ``DisorderedAtom``, which
  AlphaFold 2 reads. Atoms of occupancy zero count. An occupancy that is not given (``?``, ``.``) is 1, as in
  a file without the column, and such a b-factor 0.
- Atoms with one of the 37 names go to their slot in any residue, selenium of MSE to SD, all others are left
  out (AlphaFold 2 ``data/templates.py`` _get_atom_positions). Hydrogens are never among the 37.
- In arginine, NH1 and NH2 change places (positions and b-factors) where NH2 is closer to CD, as there.
- The release date is the earliest ``_pdbx_audit_revision_history.revision_date`` (AlphaFold 2
  ``data/mmcif_parsing.py``). The resolution is the first number above 0 among those of the refinement, of
  the reconstruction and of the reflections; AlphaFold 2 takes the last of all.

Source: J. Jumper et al., Nature 596 (2021), supplementary information 1.2.1; the mmCIF (PDBx) dictionary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.format.structure import Structure
from foldfeed.feature_store.parsers.bounded_files import read_file
from foldfeed.feature_store.parsers.mmcif.atoms import Atoms, fix_arginines
from foldfeed.feature_store.parsers.mmcif.sequence import MODIFIED, SCHEME, STANDARD, Sequences, polypeptides
from foldfeed.feature_store.parsers.mmcif.tables import (
    ATOM_SITE,
    Tables,
    day_of,
    is_plain_number,
    shorten,
)

# The largest entries of the PDB are about 400 MB of text; reading takes twelve times the size (measured on
# 49 MB).
DEFAULT_MAX_BYTES = 1 << 30
# The largest entry of the PDB, 3J3Q, has 1,356 chains with some 313,000 residues. A small text can name a
# long entity many times.
MAX_ENTRY_CHAINS = 50_000
MAX_ENTRY_RESIDUES = 2_000_000
MAX_DESCRIPTION = 1000

_REVISION_DATE = ("_pdbx_audit_revision_history", "revision_date")
_RESOLUTIONS = (
    ("_refine", "ls_d_res_high"),
    ("_em_3d_reconstruction", "resolution"),
    ("_reflns", "d_resolution_high"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MmcifChain:
    """One protein chain of one model.

    Attributes:
      label_asym_id: the chain's name in the file's own scheme, unique in an entry.
      auth_asym_id: the author's name, as in ``1abc_A``.
      entity_id: of the polymer.
      sequence: upper-case one-letter residues, one per monomer.
      monomers: three-letter names, one per residue; the first where a position lists several.
      description: of the entity, free text.
      microheterogeneity: all names by residue (0-based) where there are several.
      altloc_residues: residues (0-based) with alternate locations.
      structure: the atoms; its ``source`` holds the facts of the entry.
    """

    label_asym_id: str
    auth_asym_id: str
    entity_id: str
    sequence: str
    monomers: tuple[str, ...]
    description: str
    microheterogeneity: dict[int, tuple[str, ...]]
    altloc_residues: tuple[int, ...]
    structure: Structure

    @property
    def modified(self) -> NDArray[np.bool_]:
        """Which residues, bool (length,), have a monomer whose letter does not name it."""
        return np.array([name not in STANDARD for name in self.monomers], dtype=bool)


def read_mmcif(
    data: bytes,
    where: str = "mmCIF text",
    *,
    model: int | None = None,
    modified: str = "parent",
    fix_arginine: bool = True,
) -> MmcifEntry:
    """Returns the protein chains of an entry, to be built one after the other.

    Args:
      data: mmCIF text, not compressed.
      where: for messages.
      model: ``pdbx_PDB_model_num``; the first of the file when None.
      modified: letter of a modified residue: ``parent`` (of the residue it was made from: what AlphaFold 2
        and most databases of sequences do) or ``X``. MSE is M in both. See `parsers.mmcif.sequence`.
      fix_arginine: exchange NH1 and NH2 where NH2 is closer to CD; False keeps the names of the file.
    Raises:
      StructureParseError: the text breaks a rule, or holds no protein chain with atoms.
      MissingExtraError: gemmi is not installed.
    """
    if modified not in MODIFIED:
        raise ValueError(f"modified {modified!r} is not one of {', '.join(MODIFIED)}")
    return MmcifEntry(Tables(data, where), model, modified, fix_arginine)


def load_mmcif(path: Path, max_bytes: int = DEFAULT_MAX_BYTES, **options: Any) -> MmcifEntry:
    """Returns `read_mmcif` of a file, plain or compressed.

    Raises:
      SourceTooLargeError, SourceFileError: as `parsers.bounded_files.read_file`.
      StructureParseError, MissingExtraError: as `read_mmcif`.
      OSError: it cannot be read.
    """
    return read_mmcif(read_file(path, max_bytes), path.name, **options)


class MmcifEntry:
    """An entry that was read: an iterable of its `MmcifChain`s, in the order of the file.

    Attributes:
      entry_id: ``_entry.id``, or the name of the data block.
      facts: entry_id, method, resolution_angstrom, release_date, model, num_models, where given.
      chain_ids: label_asym_id -> auth_asym_id of the protein chains that have atoms in the model.
      without_atoms: label_asym_id of protein chains that have none.
      without_entity: label_asym_id of protein chains whose atoms do not say so: their label_entity_id is not
        given, or is not that of a polypeptide.
    """

    def __init__(self, tables: Tables, model: int | None, modified: str, fix_arginine: bool) -> None:
        """Use `read_mmcif`."""
        self._modified = modified
        self._fix_arginine = fix_arginine
        self.entry_id: str = next(iter(tables.texts("_entry", "id")), tables.name)
        proteins = polypeptides(tables)
        self._sequences = Sequences(tables, modified)
        self._atoms = Atoms(tables, model)
        self._types = proteins
        self._descriptions = _descriptions(tables)
        self._entities = {
            name: entity for name, entity in self._atoms.entities().items() if entity in proteins
        }
        if not self._entities:
            raise tables.error(
                ATOM_SITE,
                f"model {self._atoms.model} has no atom whose label_entity_id is that of a polypeptide; "
                "there is nothing to take",
            )
        if len(self._entities) > MAX_ENTRY_CHAINS:
            raise tables.error(
                ATOM_SITE, f"it has {len(self._entities)} protein chains; the most is {MAX_ENTRY_CHAINS}"
            )
        num_residues = sum(self._sequences.num_rows(entity) for entity in self._entities.values())
        if num_residues > MAX_ENTRY_RESIDUES:
            raise tables.error(
                self._sequences.source,
                f"its chains have {num_residues} residues; the most that an entry may have is "
                f"{MAX_ENTRY_RESIDUES}",
            )
        self.chain_ids = {name: self._atoms.auth_asym_id(name) for name in self._entities}
        left_out = [name for name in _named_chains(tables, set(proteins)) if name not in self._entities]
        self.without_atoms = tuple(name for name in left_out if not self._atoms.has_chain(name))
        self.without_entity = tuple(name for name in left_out if self._atoms.has_chain(name))
        self.facts: dict[str, str] = _facts(tables) | {
            "entry_id": self.entry_id,
            "model": self._atoms.model,
            "num_models": str(self._atoms.num_models),
        }

    def __len__(self) -> int:
        """Number of protein chains with atoms."""
        return len(self.chain_ids)

    def __iter__(self) -> Iterator[MmcifChain]:
        """Builds one chain after the other."""
        return (self.chain(name) for name in self.chain_ids)

    def sequence_of(self, label_asym_id: str) -> str:
        """Returns the one-letter sequence of a chain, without a look at its atoms.

        Raises:
          KeyError: no protein chain of that name has atoms.
          StructureParseError: its table breaks a rule.
        """
        return self._sequences.of(self._entities[label_asym_id]).sequence

    def description_of(self, label_asym_id: str) -> str:
        """Returns what the entry calls a chain's entity, "" where it says nothing."""
        return self._descriptions.get(self._entities[label_asym_id], "")

    def chain(self, label_asym_id: str) -> MmcifChain:
        """Returns one chain.

        Raises:
          KeyError: no protein chain of that name has atoms.
          StructureParseError: its rows contradict each other or the sequence.
        """
        entity = self._entities[label_asym_id]
        monomers = self._sequences.of(entity)
        placed = self._atoms.place(label_asym_id, monomers)
        swaps = fix_arginines(placed, monomers.names) if self._fix_arginine else 0
        auth = self.chain_ids[label_asym_id]
        source = self.facts | {
            "entity_id": entity,
            "label_asym_id": label_asym_id,
            "auth_asym_id": auth,
            "polymer_type": self._types[entity],
            "modified": self._modified,
            "sequence_from": monomers.source,
            **({"arginine_swaps": str(swaps)} if swaps else {}),
        }
        return MmcifChain(
            label_asym_id=label_asym_id,
            auth_asym_id=auth,
            entity_id=entity,
            sequence=monomers.sequence,
            monomers=monomers.names,
            description=self._descriptions.get(entity, ""),
            microheterogeneity=monomers.several,
            altloc_residues=placed.altloc_residues,
            structure=Structure(
                atom_positions=placed.positions,
                atom_mask=placed.mask,
                b_factor=placed.b_factor,
                residue_number=placed.residue_number,
                insertion_code=placed.insertion_code,
                source=source,
            ),
        )


def _facts(tables: Tables) -> dict[str, str]:
    """Returns method, resolution and release date, those that the file gives."""
    facts: dict[str, str] = {}
    methods = tables.texts("_exptl", "method")
    if methods:
        facts["method"] = ", ".join(shorten(text) for text in methods)
    for category, item in _RESOLUTIONS:
        resolution = _resolution(tables, category, item)
        if resolution is not None:
            facts["resolution_angstrom"] = resolution
            break
    dates = [_date(tables, text) for text in tables.texts(*_REVISION_DATE)]
    if dates:
        facts["release_date"] = min(dates)
    return facts


def _resolution(tables: Tables, category: str, item: str) -> str | None:
    """Returns the first number above 0 of a column, as it is spelled if that is plain; None without one.

    Files of several experiments have several rows, and some say 0 or -1 for what is not known.
    """
    column, numbers = tables.column(category, item), tables.numbers(category, item, missing=np.nan)
    for row in np.flatnonzero(np.isfinite(numbers) & (numbers > 0)).tolist():
        assert column is not None
        text = column.at(row) or ""
        if not is_plain_number(text):
            # Without a standard uncertainty or an exponent, so that anybody's parser takes it.
            text = np.format_float_positional(numbers[row], precision=10, trim="0")
        if is_plain_number(text) and float(text) > 0:
            return text
    return None


def _descriptions(tables: Tables) -> dict[str, str]:
    """Returns entity id -> description, on one line."""
    ids, texts = tables.column("_entity", "id"), tables.column("_entity", "pdbx_description")
    if ids is None or texts is None:
        return {}
    rows = range(len(ids.codes))
    return {str(ids.at(row)): " ".join((texts.at(row) or "").split())[:MAX_DESCRIPTION] for row in rows}


def _date(tables: Tables, text: str) -> str:
    try:
        return day_of(text)
    except ValueError as error:
        raise tables.error(_REVISION_DATE[0], f"{shorten(text)!r} is no date (YYYY-MM-DD)") from error


def _named_chains(tables: Tables, proteins: set[str]) -> list[str]:
    """Returns the chains of protein entities that the tables name, with atoms or without."""
    names: dict[str, None] = {}
    for category, asym in (("_struct_asym", "id"), (SCHEME, "asym_id")):
        chains, entities = tables.column(category, asym), tables.column(category, "entity_id")
        if chains is None or entities is None:
            continue
        is_protein = entities.each(lambda text: text in proteins, bool)
        for code in dict.fromkeys(chains.codes[is_protein].tolist()):
            name = chains.values[code]
            if name is not None:
                names[name] = None
    return list(names)
