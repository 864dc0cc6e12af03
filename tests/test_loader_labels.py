"""Labels of a sample: the structure's atoms in the window, and what AlphaFold 2's losses need of them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_record

from foldfeed.feature_store import FeatureStore, StoreSettings, Structure, write_part
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.structure import ATOM_NAMES, NO_NUMBER
from foldfeed.feature_store.parsers.mmcif.entry import load_mmcif
from foldfeed.loader import CropLoader, Recipe, SampleSource
from foldfeed.loader.features.structure_labels import label_features

# The textbook's side chains, written otherwise than the code has them: four atoms a torsion.
CHI = {
    "ARG": ["N CA CB CG", "CA CB CG CD", "CB CG CD NE", "CG CD NE CZ"],
    "ASN": ["N CA CB CG", "CA CB CG OD1"],
    "ASP": ["N CA CB CG", "CA CB CG OD1"],
    "CYS": ["N CA CB SG"],
    "GLN": ["N CA CB CG", "CA CB CG CD", "CB CG CD OE1"],
    "GLU": ["N CA CB CG", "CA CB CG CD", "CB CG CD OE1"],
    "HIS": ["N CA CB CG", "CA CB CG ND1"],
    "ILE": ["N CA CB CG1", "CA CB CG1 CD1"],
    "LEU": ["N CA CB CG", "CA CB CG CD1"],
    "LYS": ["N CA CB CG", "CA CB CG CD", "CB CG CD CE", "CG CD CE NZ"],
    "MET": ["N CA CB CG", "CA CB CG SD", "CB CG SD CE"],
    "PHE": ["N CA CB CG", "CA CB CG CD1"],
    "PRO": ["N CA CB CG", "CA CB CG CD"],
    "SER": ["N CA CB OG"],
    "THR": ["N CA CB OG1"],
    "TRP": ["N CA CB CG", "CA CB CG CD1"],
    "TYR": ["N CA CB CG", "CA CB CG CD1"],
    "VAL": ["N CA CB CG1"],
}
# fmt: off
THREE = {
    "A": "ALA", "R": "ARG", "N": "ASN", "D": "ASP", "C": "CYS", "Q": "GLN", "E": "GLU", "G": "GLY",
    "H": "HIS", "I": "ILE", "L": "LEU", "K": "LYS", "M": "MET", "F": "PHE", "P": "PRO", "S": "SER",
    "T": "THR", "W": "TRP", "Y": "TYR", "V": "VAL",
}
# fmt: on
SLOT = {name: slot for slot, name in enumerate(ATOM_NAMES)}
SAME_AFTER_HALF_A_TURN = {("ASP", 1), ("GLU", 2), ("PHE", 1), ("TYR", 1)}


def dihedral(points: list[np.ndarray]) -> float:
    """Radians, the angle between two planes (IUPAC: along the middle bond, clockwise is positive)."""
    a, b, c = (points[at + 1] - points[at] for at in range(3))
    left, right = np.cross(a, b), np.cross(b, c)
    return math.atan2(float(np.linalg.norm(b) * (a @ right)), float(left @ right))


def expected_torsions(sequence: str, positions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Angles in radians (L, 7), mask (L, 7), whether half a turn more is the same (L, 7)."""
    angles, exists = np.zeros((len(sequence), 7)), np.zeros((len(sequence), 7), bool)
    periodic = np.zeros((len(sequence), 7), bool)
    for i, letter in enumerate(sequence):
        before = [(i - 1, "CA"), (i - 1, "C")]
        named = {
            0: [*before, (i, "N"), (i, "CA")],
            1: [(i - 1, "C"), (i, "N"), (i, "CA"), (i, "C")],
            2: [(i, "N"), (i, "CA"), (i, "C"), (i, "O")],
        }
        name = THREE.get(letter, "UNK")
        for chi, atoms in enumerate(CHI.get(name, [])):
            named[3 + chi] = [(i, atom) for atom in atoms.split()]
            periodic[i, 3 + chi] = (name, chi) in SAME_AFTER_HALF_A_TURN
        for which, atoms in named.items():
            if all(at >= 0 and mask[at, SLOT[atom]] for at, atom in atoms):
                exists[i, which] = True
                angles[i, which] = dihedral([positions[at, SLOT[atom]].astype(float) for at, atom in atoms])
    # By O instead of the next residue's N, which lies opposite.
    angles[:, 2] += math.pi * exists[:, 2]
    return angles, exists, periodic


def labels_of(sequence: str, structure: Structure) -> dict[str, np.ndarray]:
    """Of the whole chain, in NumPy."""
    positions = torch.from_numpy(np.concatenate([np.zeros((1, 37, 3), "f4"), structure.atom_positions]))
    mask = torch.from_numpy(np.concatenate([np.zeros((1, 37), "u1"), structure.atom_mask]))
    found = label_features(
        torch.from_numpy(alphabet.encode(sequence)), positions, mask, torch.tensor([1.5], dtype=torch.float32)
    )
    return {name: tensor.numpy() for name, tensor in found.items()}


def check(sequence: str, structure: Structure) -> None:
    positions, mask = structure.atom_positions, structure.atom_mask
    found = labels_of(sequence, structure)
    np.testing.assert_array_equal(found["all_atom_positions"], positions)
    np.testing.assert_array_equal(found["all_atom_mask"], mask)
    assert found["resolution"] == np.float32(1.5)
    angles, exists, periodic = expected_torsions(sequence, positions, mask)
    np.testing.assert_array_equal(found["torsion_angles_mask"], exists)
    want = np.stack([np.sin(angles), np.cos(angles)], axis=-1) * exists[..., None]
    np.testing.assert_allclose(found["torsion_angles_sin_cos"], want, atol=1e-6)
    turned = np.where(periodic[..., None], -want, want)
    np.testing.assert_allclose(found["alt_torsion_angles_sin_cos"], turned, atol=1e-6)
    for i, letter in enumerate(sequence):
        beta = SLOT["CA" if letter == "G" else "CB"]
        np.testing.assert_array_equal(found["pseudo_beta"][i], positions[i, beta])
        assert found["pseudo_beta_mask"][i] == mask[i, beta]
        n, ca, c = (positions[i, SLOT[name]].astype(float) for name in ("N", "CA", "C"))
        frame = found["backbone_rigid_tensor"][i].astype(float)
        assert found["backbone_rigid_mask"][i] == all(mask[i, SLOT[name]] for name in ("N", "CA", "C"))
        if not found["backbone_rigid_mask"][i]:
            np.testing.assert_array_equal(frame, np.eye(4))
            continue
        rotation, origin = frame[:3, :3], frame[:3, 3]
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-6)
        assert np.linalg.det(rotation) > 0
        # In the residue's own frame C lies on the x axis and N in the x-y plane, on the positive side.
        local_c, local_n = rotation.T @ (c - origin), rotation.T @ (n - origin)
        np.testing.assert_array_equal(origin, ca)
        np.testing.assert_allclose(local_c, [np.linalg.norm(c - ca), 0, 0], atol=1e-4)
        assert abs(local_n[2]) < 1e-4
        assert local_n[1] > 0


@settings(max_examples=60, deadline=None)
@given(
    st.text("ARNDCQEGHILKMFPSTWYVX", min_size=1, max_size=40), st.integers(0, 2**32 - 1), st.floats(0.3, 1.0)
)
def test_random_atoms_give_the_textbooks_numbers(sequence, seed, share):
    rng = np.random.default_rng(seed)
    length = len(sequence)
    mask = rng.random((length, 37)) < share
    positions = np.where(mask[..., None], rng.normal(0, 30, (length, 37, 3)), 0).astype("f4")
    check(
        sequence,
        Structure(
            atom_positions=positions,
            atom_mask=mask.astype("u1"),
            b_factor=np.zeros((length, 37), "f4"),
            residue_number=np.full(length, NO_NUMBER, "i4"),
            insertion_code=np.zeros(length, "u1"),
        ),
    )


@pytest.mark.parametrize("name", ["5kc1.cif.gz", "1a8o.cif.gz", "6ydw.cif.gz"])
def test_real_chains_give_the_textbooks_numbers(real_file, name):
    pytest.importorskip("gemmi")
    for chain in load_mmcif(real_file(f"structures/{name}")):
        check(chain.sequence, chain.structure)


def labels_of_an_alanine(places: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    """Of one residue behind a copy of itself."""
    positions = np.zeros((2, 37, 3), "f4")
    mask = np.zeros((2, 37), "u1")
    for name, place in places.items():
        positions[:, SLOT[name]] = place
        mask[:, SLOT[name]] = 1
    return label_features(
        torch.tensor([0], dtype=torch.uint8),
        torch.from_numpy(positions),
        torch.from_numpy(mask),
        torch.zeros(1),
    )


def test_atoms_on_one_line_are_no_frame_and_no_torsion():
    found = labels_of_an_alanine({name: [at] * 3 for at, name in enumerate(["N", "CA", "C", "O"])})
    assert found["backbone_rigid_mask"].sum() == 0
    assert found["torsion_angles_mask"].sum() == 0
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_a_torsion_whose_last_atoms_are_on_one_line_is_none():
    found = labels_of_an_alanine({"N": [0.3, 1.2, -0.7], "CA": [0, 0, 0], "C": [1.1, 0, 0], "O": [2.2, 0, 0]})
    assert found["backbone_rigid_mask"].sum() == 1
    assert found["torsion_angles_mask"][0, 2] == 0
    assert not found["torsion_angles_sin_cos"][0, 2].any()


RECIPES = [
    Recipe.named("af2", crop_residues=9, num_clusters=3, num_extra=4, labels=True, unclamped_fraction=0.5),
    Recipe.named("crop_first", crop_residues=9, num_clusters=3, num_extra=4, labels=True),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Records shorter and longer than the crop, some without a structure, one with a resolution."""
    store = FeatureStore.create(
        tmp_path_factory.mktemp("labels") / "store", StoreSettings(tile_rows=16, tile_cols=8)
    )
    records = [make_record(f"r{n}", 1 + 3 * n, 4 + 5 * n, seed=n) for n in range(8)]
    found = records[3].structure
    assert found is not None
    facts = {**found.source, "resolution_angstrom": "2.25"}
    records[3] = dataclasses.replace(records[3], structure=dataclasses.replace(found, source=facts))
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    return store


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_sample_has_the_labels_of_its_window(store, recipe):
    ids = list(store)
    seen = set()
    loader = CropLoader(store, recipe, seed=5, global_batch=4)
    for sample in range(60):
        plan, features = loader.plan(sample), loader.sample(sample)
        record = store[ids[plan.address.record]]
        structure = record.structure()
        start, stop = plan.crop
        size = stop - start
        if structure is None:
            want = {
                name: np.zeros_like(value[:1].repeat(size, axis=0)) if value.ndim else np.zeros_like(value)
                for name, value in labels_of("A", make_record("x", 1, 5).structure.window(0, 1)).items()
            }
            want["backbone_rigid_tensor"][:] = np.eye(4)
        else:
            whole = labels_of(record.sequence, structure)
            want = {name: value[start:stop] if value.ndim else value for name, value in whole.items()}
        want["resolution"] = np.float32(2.25 if record.record_id == "r3" else 0.0)
        for name, value in want.items():
            have = features[name].numpy()
            assert have.dtype == np.float32
            np.testing.assert_array_equal(have[:size] if have.ndim else have, value, err_msg=name)
            if have.ndim:
                assert have.shape[0] == recipe.crop_residues
                assert not have[size:].any()
        assert features["use_clamped_fape"].dtype == torch.float32
        assert float(features["use_clamped_fape"]) == plan.clamped
        seen.add((structure is None, start > 0, plan.clamped))
    # With and without a structure, from the first residue and from others, clamped and not.
    assert len(seen) >= (8 if recipe.unclamped_fraction else 4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_labels_change_nothing_else(store, recipe):
    plain = CropLoader(store, dataclasses.replace(recipe, labels=False), seed=5, global_batch=4)
    with_labels = CropLoader(store, recipe, seed=5, global_batch=4)
    for sample in range(16):
        want, have = plain.sample(sample), with_labels.sample(sample)
        assert set(want) < set(have)
        assert all(torch.equal(have[name], want[name]) for name in want)


@pytest.mark.parametrize("text", ["high", "1.50(2)", "", "nan", "inf", "1e39", "-1", "1_0"])
def test_a_resolution_that_is_no_number_is_none(tmp_path, text):
    """mmCIF gives plain numbers; a program that makes its own structures may give anything."""
    store = FeatureStore.create(tmp_path / "store")
    record = make_record("a", 3, 9)
    facts = {**record.structure.source, "resolution_angstrom": text}
    record = dataclasses.replace(record, structure=dataclasses.replace(record.structure, source=facts))
    store.commit([write_part(store.url, [record], store.settings).part_id], job_id="1")
    for num_processes in (0, 1):
        with CropLoader(store, RECIPES[1], seed=1, global_batch=1, num_processes=num_processes) as loader:
            (shard,) = next(loader).shards
            assert shard.features["resolution"].tolist() == [0.0]


def test_labels_read_no_array_that_they_do_not_use(store, monkeypatch):
    read = []
    from foldfeed.feature_store.parts.shard_reader import ShardReader

    whole = ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, *words: read.append(self) or whole(self, *words))
    loader = CropLoader(store, RECIPES[1], seed=5, global_batch=4)
    loader.sample(0)
    with_labels = len(read)
    read.clear()
    CropLoader(store, dataclasses.replace(RECIPES[1], labels=False), seed=5, global_batch=4).sample(0)
    has_atoms = loader.plan(0) and store[list(store)[loader.plan(0).address.record]].structure() is not None
    assert with_labels - len(read) == 2 * has_atoms


def test_batches_and_sources_carry_labels(store):
    recipe = RECIPES[1]
    source = SampleSource(store, recipe, seed=5)
    for num_processes in (0, 1):
        with CropLoader(store, recipe, seed=5, global_batch=4, num_processes=num_processes) as loader:
            for _ in range(2):
                for shard in next(loader).shards:
                    for slot, sample in enumerate(shard.samples):
                        want = source[sample]
                        assert set(want) == set(shard.features)
                        for name, tensor in shard.features.items():
                            assert torch.equal(tensor[slot], want[name]), name
