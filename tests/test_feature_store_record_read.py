"""`Record.read`: a crop and other arrays at once are what each is by itself, in one round of reads."""

import threading

import numpy as np
import pytest
from records import make_record
from slow_blobs import slowed

from foldfeed.feature_store import FeatureStore, StoredRun, StoreSettings, write_part
from foldfeed.feature_store.format.structure import ARRAYS
from foldfeed.feature_store.parts.record import PER_RESIDUE

SHAPES = [(1, 1), (2, 9), (300, 33), (20, 12), (97, 64)]
ORDERS = {
    "rank": StoreSettings(tile_rows=16, tile_cols=8),
    "permuted": StoreSettings(tile_rows=16, tile_cols=8, row_order="permuted", row_order_seed=5),
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> dict[str, str]:
    found = {}
    for name, store_settings in ORDERS.items():
        store = FeatureStore.create(tmp_path_factory.mktemp("read") / name, store_settings)
        records = [make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(SHAPES)]
        part = write_part(store.url, records, store.settings)
        store.commit([part.part_id], job_id="1")
        found[name] = store.url
    return found


def drawn(rng: np.random.Generator, record):
    """A window and rows of a record: all, a slice, some, or a run of stored rows that may wrap around."""
    start = int(rng.integers(record.length))
    window = (start, int(rng.integers(start + 1, record.length + 1)))
    top = int(rng.integers(record.depth))
    rows = [
        None,
        slice(top, int(rng.integers(top + 1, record.depth + 1))),
        rng.integers(0, record.depth, 9),
        StoredRun(int(rng.integers(max(record.depth - 1, 1))), int(rng.integers(1, record.depth + 1))),
    ][int(rng.integers(4))]
    return window, rows


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_read_together_is_what_is_read_alone(urls, order):
    store = FeatureStore.open(urls[order])
    rng = np.random.default_rng(3)
    for _ in range(60):
        record = store.at(int(rng.integers(len(SHAPES))))
        window, rows = drawn(rng, record)
        names = [*PER_RESIDUE, *ARRAYS]
        wanted = {name: drawn(rng, record)[0] for name in names if rng.random() < 0.5}
        read = record.read(slice(*window), rows, list(wanted.items()))
        crop = record.crop(slice(*window), rows)
        np.testing.assert_array_equal(read.crop.msa, crop.msa)
        np.testing.assert_array_equal(read.crop.deletions, crop.deletions)
        assert type(read.crop) is type(crop)
        plan = record.plan(slice(*window), rows)
        assert (read.num_bytes, read.num_cells) == (plan.num_bytes, plan.num_cells)
        assert set(read.arrays) == set(wanted)
        for name, residues in wanted.items():
            if name in PER_RESIDUE:
                np.testing.assert_array_equal(read.arrays[name], record.per_residue(name, slice(*residues)))
            elif (structure := record.structure(slice(*residues))) is None:
                assert read.arrays[name] is None
            else:
                np.testing.assert_array_equal(read.arrays[name], getattr(structure, name))


@pytest.mark.parametrize("order", ORDERS)
def test_arrays_are_read_into_room_of_any_strides(urls, order):
    store = FeatureStore.open(urls[order])
    rng = np.random.default_rng(4)
    for number in range(40):
        record = store.at(number % len(SHAPES))
        wanted = {name: drawn(rng, record)[0] for name in (*PER_RESIDUE, *ARRAYS)}
        expected = record.read(slice(0, 1), slice(0, 1), list(wanted.items())).arrays
        room = {}
        for name, (start, stop) in wanted.items():
            spec = record.part.specs[name]
            whole = np.full((2 * (stop - start), *spec.chunk[1:]), 7, dtype=spec.dtype)
            if rng.random() < 0.7:
                room[name] = whole[::2]
        read = record.read(slice(0, 1), slice(0, 1), list(wanted.items()), into=room)
        for name, values in expected.items():
            if values is None:
                assert read.arrays[name] is None
                assert name not in room or (room[name] == 7).all()
            else:
                np.testing.assert_array_equal(read.arrays[name], values)
            if name in room:
                assert values is None or read.arrays[name] is room[name]
                assert (room[name].base[1::2] == 7).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_far_record_comes_in_one_round_once_the_indices_are_known(urls, order, monkeypatch):
    store, blobs = slowed(urls[order], 0.0)
    record = store["r2"]
    wanted = [("profile", (3, 20)), ("atom_positions", (2, 20)), ("atom_mask", (2, 20))]
    rows = StoredRun(40, 60) if order == "permuted" else slice(0, 40)
    window = slice(3, 11)

    def reads() -> list[tuple[str, int]]:
        blobs.reads.clear()
        read = record.read(window, rows, wanted)
        assert np.array_equal(read.arrays["profile"], truth)
        # Counts above 254 are asked for when the crop is seen to have some.
        return [(path, start) for path, start, _ in blobs.reads if "overflow" not in path]

    truth = FeatureStore.open(urls[order])["r2"].profile(slice(3, 20))
    first = reads()
    once = [found for found in record.ranges(window, rows, wanted) if "overflow" not in found.path]
    assert len(once) >= 5
    # The first time also the index of each shard.
    assert len(first) == len(once) + len({found.path for found in once})
    assert sorted(reads()) == sorted((found.path, found.start) for found in once)
    # No read is answered until all have been asked for.
    blobs.together = threading.Barrier(len(once), timeout=30)
    monkeypatch.setattr(record.part.tiles, "finish", lambda job: None)
    assert sorted(reads()) == sorted((found.path, found.start) for found in once)


def test_what_cannot_be_read_together_is_refused(urls):
    record = FeatureStore.open(urls["rank"])["r1"]
    with pytest.raises(ValueError, match=r"'msa' must be one of aatype, .*, once"):
        record.read(per_residue=[("msa", (0, 1))])
    with pytest.raises(ValueError, match=r"'profile' must be one of"):
        record.read(per_residue=[("profile", (0, 1)), ("profile", (1, 2))])
    with pytest.raises(IndexError, match=r"profile \[3, 10\) is outside of 0..9"):
        record.read(per_residue=[("profile", (3, 10))])
    with pytest.raises(ValueError, match="this crop needs"):
        record.read(out=(np.empty((1, 1), np.uint8), np.empty((1, 1), np.int32)))
    with pytest.raises(ValueError, match=r"'entropy' is not among the arrays that are read, \['profile'\]"):
        record.read(per_residue=[("profile", (0, 1))], into={"entropy": np.empty(1, np.float32)})
    for shape, dtype in (((2, 22), np.float32), ((3, 22), np.float64)):
        with pytest.raises(ValueError, match=r"into: profile is float.* its window needs <f4 \(3, 22\)"):
            record.read(per_residue=[("profile", (0, 3))], into={"profile": np.empty(shape, dtype)})
