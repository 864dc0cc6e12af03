"""mmCIF entries: answers from their tables, OpenFold's templates, Biopython as AlphaFold 2 uses it."""

import gzip
import io
import json
import warnings

import numpy as np
import pytest
from mmcif_samples import sample

from foldfeed.feature_store import StructureParseError
from foldfeed.feature_store.format.structure import ATOM_NAMES
from foldfeed.feature_store.parsers.mmcif.entry import load_mmcif, read_mmcif

pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")

# Entries with alternate locations, insertion codes, several models, MSE, HYP and missing residues.
SECOND_OPINION = ("102l 1a8o 1as5 1dix 1o1z 3jqh 3o5r 4cup 4i39 4zey 4zhl 5kc1 5ugo").split()  # noqa: SIM905
CA = ATOM_NAMES.index("CA")


def chain_of(entry, auth_asym_id: str):
    (chain,) = [chain for chain in entry if chain.auth_asym_id == auth_asym_id]
    return chain


def test_every_answer_is_met_of_all_entries(real_file):
    # 102l lies only in the folder that has all of them.
    assert_answers(real_file("structures/102l.cif.gz").parent)


def assert_answers(structures) -> None:
    answers = json.loads((structures / "answers.json").read_text())
    assert {answer["file"] for answer in answers} == {path.name for path in structures.glob("*.cif*")}
    for answer in answers:
        entry = load_mmcif(structures / answer["file"], modified="X")
        wanted = {
            "entry_id": answer["id"],
            "method": ", ".join(answer["method"]),
            "resolution_angstrom": answer["resolution"],
            "release_date": answer["first_revision_date"],
            "num_models": str(answer["n_models"]),
        }
        assert {name: entry.facts.get(name) for name in wanted} == wanted
        chains = list(entry)
        assert [chain.label_asym_id for chain in chains] == [one["label_asym_id"] for one in answer["chains"]]
        for chain, one in zip(chains, answer["chains"], strict=True):
            assert_chain(chain, one)


def assert_chain(chain, answer) -> None:
    structure = chain.structure
    found = {
        "auth_asym_id": chain.auth_asym_id,
        "entity_id": chain.entity_id,
        "length": structure.length,
        "sequence_1letter": chain.sequence,
        "microheterogeneity": {str(at + 1): list(names) for at, names in chain.microheterogeneity.items()},
        "observed_mask": "".join("01"[seen] for seen in structure.observed.astype(int)),
        "n_observed": int(structure.observed.sum()),
        "n_residues_with_altloc": len(chain.altloc_residues),
        "n_residues_with_insertion_code": int((structure.insertion_code != 0).sum()),
        "n_ca": int(structure.atom_mask[:, CA].sum()),
    }
    assert found == {name: answer[name] for name in found}
    alphas = structure.atom_positions[structure.atom_mask[:, CA] == 1, CA].astype(np.float64)
    np.testing.assert_allclose(
        alphas.sum(axis=0), answer["ca_sum_xyz"], rtol=0, atol=1e-3 * len(alphas) ** 0.5
    )
    # Three decimals of the file, at the precision of 32 bits.
    np.testing.assert_array_equal(alphas[0].astype(np.float32), np.float32(answer["ca_first"]))
    np.testing.assert_array_equal(alphas[-1].astype(np.float32), np.float32(answer["ca_last"]))
    names = {str(at + 1): [name] for at, name in enumerate(chain.monomers) if chain.modified[at]}
    several = answer["microheterogeneity"]
    assert names == {at: name for at, name in answer["non_standard"].items() if at not in several}


def test_entries_whose_sequence_is_not_there_are_refused_with_the_reason():
    whole = sample("9ABC", {"A": "A"}).decode()
    # Hand-made and extracted files often have the atoms alone.
    only_atoms = "data_9ABC\nloop_\n_atom_site" + whole.split("loop_\n_atom_site", 1)[1]
    # An assembly's atoms keep numbers of a longer sequence than its own table has.
    shorter = whole.replace("1 5 HYP\n", "")
    for text, reason in (
        (only_atoms, "_entity_poly: the file has no such table"),
        (shorter, "_atom_site row 9: label_seq_id 5 is not in the sequence of entity 1"),
    ):
        with pytest.raises(StructureParseError) as caught:
            list(read_mmcif(text.encode()))
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "chain_id", "num_atoms", "start"),
    [("2crb", "A", 157, 32), ("4zey", "A", 151, 26), ("1psm", "A", 129, 14), ("2q2k", "A", 123, 54)],
)
def test_every_atom_of_openfold_s_templates(real_file, name, chain_id, num_atoms, start):
    with np.load(real_file("golden/openfold_short/expected.npz")) as features:
        at = features["template_domain_names"].tolist().index(f"{name}_{chain_id}")
        positions = features["template_all_atom_positions"][at]
        mask = features["template_all_atom_masks"][at]
        aligned = str(features["template_sequence"][at])
    chain = chain_of(load_mmcif(real_file(f"structures/{name}.cif.gz")), chain_id)
    columns = [column for column, letter in enumerate(aligned) if letter != "-"]
    letters = aligned.replace("-", "")
    offset = chain.sequence.index(letters)
    assert offset + 1 == start
    residues = slice(offset, offset + len(letters))
    assert int(mask.sum()) == num_atoms == int(chain.structure.atom_mask[residues].sum())
    np.testing.assert_array_equal(chain.structure.atom_mask[residues], mask[columns])
    np.testing.assert_array_equal(chain.structure.atom_positions[residues], positions[columns])


def test_biopython_reads_generated_entries_as_we_do(tmp_path):
    for number in range(5):
        path = tmp_path / f"{number}.cif.gz"
        skip = {"A": number, "BB": 2}
        path.write_bytes(gzip.compress(sample("9ABC", {"A": "A", "BB": "x"}, shift=number * 7.3, skip=skip)))
        assert_second_opinion(path)


@pytest.mark.parametrize("name", ["2q2k", "7rye"])
def test_biopython_read_as_alphafold_2_reads_it(real_file, name):
    assert_second_opinion(real_file(f"structures/{name}.cif.gz"))


def test_biopython_reads_entries_with_every_oddity_as_we_do(real_file):
    for name in SECOND_OPINION:
        assert_second_opinion(real_file(f"structures/{name}.cif.gz"))


def assert_second_opinion(path) -> None:
    pytest.importorskip("Bio", reason="Biopython is not installed")
    from Bio.PDB.MMCIFParser import MMCIFParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = next(
            MMCIFParser(QUIET=True)
            .get_structure(path.name, io.StringIO(gzip.decompress(path.read_bytes()).decode()))
            .get_models()
        )
    for chain in load_mmcif(path, fix_arginine=False):
        structure = chain.structure
        place_of = {
            (int(number), chr(code) if code else " "): at
            for at, (number, code) in enumerate(
                zip(structure.residue_number, structure.insertion_code, strict=True)
            )
            if structure.observed[at]
        }
        positions, mask = np.zeros_like(structure.atom_positions), np.zeros_like(structure.atom_mask)
        b_factor = np.zeros_like(structure.b_factor)
        for residue in model[chain.auth_asym_id]:
            at = place_of.get(residue.id[1:])
            if at is None or residue.id[0] == "W":
                continue
            if residue.is_disordered() == 2:
                # Biopython selects the last monomer of several; the sequence has the first.
                residue.disordered_select(chain.monomers[at])
            if residue.get_resname() != chain.monomers[at]:
                continue
            for atom in residue:
                atom_name = "SD" if (atom.name, residue.get_resname()) == ("SE", "MSE") else atom.name
                if atom_name in ATOM_NAMES:
                    slot = ATOM_NAMES.index(atom_name)
                    positions[at, slot], mask[at, slot], b_factor[at, slot] = atom.coord, 1, atom.bfactor
        np.testing.assert_array_equal(structure.atom_mask, mask)
        np.testing.assert_array_equal(structure.atom_positions, positions)
        np.testing.assert_array_equal(structure.b_factor, b_factor)


def test_parent_letters_are_biopython_s():
    data = pytest.importorskip("Bio.Data.PDBData", reason="Biopython is not installed")
    letters = {name.strip(): letter for name, letter in data.protein_letters_3to1_extended.items()}
    whole = (
        sample("9ABC", {"A": "A"}).decode().replace("_entity_poly.pdbx_seq_one_letter_code_can AGMSP\n", "")
    )
    for name in ("MSE", "HYP", "SEP", "TPO", "CSO", "MLY", "NH2", "ACE"):
        (chain,) = read_mmcif(whole.replace("MSE", name).encode())
        assert chain.monomers[2] == name
        assert chain.sequence == "".join(letters.get(name, "X") for name in chain.monomers)
        assert chain.modified.tolist() == [False, False, True, False, True]
