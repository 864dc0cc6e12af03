"""Damage is found, never returned as data: every file of a part, single flips and truncations."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, StoreSettings, write_part

# Enough to hit every file of the part many times; the seed makes a failure repeatable.
NUM_DAMAGES = 400


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    store = FeatureStore.create(
        tmp_path_factory.mktemp("pristine") / "s", StoreSettings(tile_rows=16, tile_cols=8)
    )
    records = [make_record(f"r{n}", 40 + n, 21, seed=n) for n in range(3)]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id="1")
    return store, part.part_id


def read_everything(url: str) -> list:
    store = FeatureStore.open(url)
    found: list = []
    for name in store.ids:
        record = store[name]
        found += [record.msa(), record.deletions(), record.profile(), record.aatype()]
        found += [record.deletion_mean(), record.gap_fraction(), record.rows().to_pylist()]
        found += [record.entropy(), record.neff_per_residue()]
        structure = record.structure()
        if structure is not None:
            found += [*structure.arrays.values(), dict(structure.source)]
    return found


def same(a: list, b: list) -> bool:
    for x, y in zip(a, b, strict=True):
        if isinstance(x, np.ndarray):
            if not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                return False
        elif x != y:
            return False
    return True


def test_damage_is_detected_or_harmless_and_never_a_wrong_value(pristine, tmp_path):
    store, part_id = pristine
    truth = read_everything(store.url)
    copy = tmp_path / "copy"
    shutil.copytree(store.url, copy)
    files = sorted(path for path in (copy / "parts" / part_id).rglob("*") if path.is_file())
    rng = random.Random(7)
    detected = 0
    for number in range(NUM_DAMAGES):
        path = files[number % len(files)]
        original = path.read_bytes()
        if number % 5 == 0:
            damaged = original[: rng.randrange(len(original))]
        else:
            position = rng.randrange(len(original))
            flipped = original[position] ^ rng.randrange(1, 256)
            damaged = original[:position] + bytes([flipped]) + original[position + 1 :]
        path.write_bytes(damaged)
        try:
            assert same(read_everything(str(copy)), truth), f"wrong values after damage to {path}"
        except CorruptDataError as error:
            detected += part_id in error.where
        path.write_bytes(original)
    # Harmless ones exist: array metadata that our reader does not need, and record_json after the commit.
    assert detected > NUM_DAMAGES * 0.4


def test_a_missing_file_is_named(pristine, tmp_path):
    store, part_id = pristine
    shutil.copytree(store.url, tmp_path / "copy")
    victim = tmp_path / "copy" / "parts" / part_id / "msa" / "c" / "0" / "0" / "0"
    victim.unlink()
    copy = FeatureStore.open(tmp_path / "copy")
    with pytest.raises(CorruptDataError, match="msa/c/0/0/0: the file is missing"):
        copy["r1"].msa()
    assert copy["r1"].aatype().shape == (21,)


def test_a_part_under_another_name_is_refused(pristine, tmp_path):
    store, part_id = pristine
    shutil.copytree(store.url, tmp_path / "copy")
    parts = Path(tmp_path / "copy" / "parts")
    shutil.move(parts / part_id, parts / ("f" * 40))
    copy = FeatureStore.open(tmp_path / "copy")
    with pytest.raises(CorruptDataError, match="does not hash to the name"):
        copy.commit(["f" * 40], job_id="2")
    with pytest.raises(CorruptDataError, match="missing"):
        copy["r0"].msa()


def test_a_swap_of_two_intact_chunks_is_detected(pristine, tmp_path):
    """Each chunk's own checksum still agrees; the index of the shard does not."""
    store, part_id = pristine
    shutil.copytree(store.url, tmp_path / "copy")
    path = tmp_path / "copy" / "parts" / part_id / "msa" / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    num_tiles = 3 * 3 * 3
    index = data[-16 * num_tiles - 4 : -4]
    index[0:16], index[16:32] = index[16:32], index[0:16]
    data[-16 * num_tiles - 4 : -4] = index
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptDataError, match="shard index does not match"):
        FeatureStore.open(tmp_path / "copy")["r0"].msa()
