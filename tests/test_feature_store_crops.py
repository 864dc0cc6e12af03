"""Crops of many records: equal to one by one, planned before, many in flight, straight into a batch."""

import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from records import make_record
from slow_blobs import slowed

from foldfeed.feature_store import (
    CorruptDataError,
    CropRequest,
    FeatureStore,
    RecordNotFoundError,
    Slab,
    StoredRun,
    StoreSettings,
    write_part,
)
from foldfeed.feature_store.errors import ForkedProcessError
from foldfeed.feature_store.format.grid import plan_crop
from foldfeed.feature_store.storage import read_pool

SHAPES = [(1, 1), (2, 9), (3, 5), (300, 33), (20, 12), (97, 64), (130, 7)]
RECORDS = {f"r{n}": make_record(f"r{n}", *shape, seed=n) for n, shape in enumerate(SHAPES)}
ORDERS = {
    "rank": StoreSettings(tile_rows=16, tile_cols=8),
    "permuted": StoreSettings(tile_rows=16, tile_cols=8, row_order="permuted", row_order_seed=5),
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> dict[str, str]:
    """A store of three parts in each row order."""
    found = {}
    for name, store_settings in ORDERS.items():
        store = FeatureStore.create(tmp_path_factory.mktemp("crops") / name, store_settings)
        records = list(RECORDS.values())
        parts = [write_part(store.url, records[k::3], store.settings).part_id for k in range(3)]
        store.commit(parts, job_id="1")
        found[name] = store.url
    return found


def draw(rng: np.random.Generator, count: int) -> list[CropRequest]:
    """Returns windows, slices, lists of ranks and runs of stored rows; records repeat."""
    found = []
    for number in range(count):
        name = str(rng.choice(list(RECORDS)))
        depth, length = RECORDS[name].msa.shape
        a = int(rng.integers(length))
        residues = slice(a, int(rng.integers(a + 1, length + 1)))
        top = int(rng.integers(depth))
        rows = [
            None,
            slice(top, int(rng.integers(top + 1, depth + 1))),
            rng.integers(0, depth, 25),
            StoredRun(int(rng.integers(max(depth - 1, 1))), int(rng.integers(1, depth + 1))),
        ][number % 4]
        found.append(CropRequest(name, residues, rows))
    return found


def expected(store: FeatureStore, request: CropRequest) -> tuple[np.ndarray, np.ndarray]:
    """Returns a crop from the record as it was before it was stored."""
    record = RECORDS[request.record_id]
    rows = request.rows
    if isinstance(rows, StoredRun):
        rows = store[request.record_id].slab(start=rows.start, num_rows=rows.num_rows).ranks
    rows = slice(None) if rows is None else rows
    return record.msa[rows, request.residues], record.deletions[rows, request.residues]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("in_flight", [None, 1, 5])
def test_many_crops_equal_the_records(urls, order, in_flight):
    store = FeatureStore.open(urls[order])
    requests = draw(np.random.default_rng(7), 120)
    crops = store.crops(requests, in_flight=in_flight)
    for request, crop in zip(requests, crops, strict=True):
        msa, deletions = expected(store, request)
        np.testing.assert_array_equal(crop.msa, msa)
        np.testing.assert_array_equal(crop.deletions, deletions)
        assert isinstance(crop, Slab) == isinstance(request.rows, StoredRun)
    assert store.crops([]) == []


@pytest.mark.parametrize("order", ORDERS)
def test_crops_fill_the_slots_of_a_batch_in_place(urls, order):
    """Slots are larger than crops and strided; what a crop does not cover is left alone."""
    store = FeatureStore.open(urls[order])
    requests = draw(np.random.default_rng(8), 60)
    msa = np.full((60, 310, 140), 77, np.uint8)[:, 5:, ::2]
    deletions = np.full((305, 60, 70), -9, np.int32).swapaxes(0, 1)
    crops = store.crops(requests, out=(msa, deletions), in_flight=4)
    for number, (request, crop) in enumerate(zip(requests, crops, strict=True)):
        want = expected(store, request)
        num_rows, num_cols = want[0].shape
        assert np.shares_memory(crop.msa, msa)
        for slot, values, untouched in ((msa[number], want[0], 77), (deletions[number], want[1], -9)):
            np.testing.assert_array_equal(slot[:num_rows, :num_cols], values)
            assert (slot[num_rows:] == untouched).all()
            assert (slot[:, num_cols:] == untouched).all()
    single = requests[1]
    want = expected(store, single)
    out = np.full(want[0].shape, 3, np.uint8), np.full(want[0].shape, 3, np.int32)
    store[single.record_id].crop(single.residues, single.rows, out=out)
    np.testing.assert_array_equal(out[0], want[0])
    np.testing.assert_array_equal(out[1], want[1])


def test_buffers_that_do_not_fit_are_refused(urls):
    store = FeatureStore.open(urls["rank"])
    requests = [CropRequest("r4"), CropRequest("r3")]
    good = np.zeros((2, 300, 33), np.uint8), np.zeros((2, 300, 33), np.int32)
    for out, message in (
        ((good[0][:1], good[1]), r"msa is uint8 \(1, 300, 33\); it must be uint8 \(batch, rows, residues\)"),
        ((good[0], good[1].astype(np.int64)), "deletions is int64"),
        (
            (good[0][:, :299], good[1]),
            "request 1, record 'r3', is 300 x 33 and does not fit into a slot of 299",
        ),
        ((good[0], good[1][:, :, :32]), "does not fit into a slot of 300 x 32 of deletions"),
    ):
        with pytest.raises(ValueError, match=message):
            store.crops(requests, out=out)
    for wrong, message in (
        (good[0], r"out is a uint8 \(2, 300, 33\) array; it must be a pair of arrays \(msa, deletions\)"),
        ((*good, good[0]), "out holds 3 arrays; it must be a pair"),
        ([good[0], None], "out is a list; it must be a pair"),
        ({"msa": good[0]}, "out is a dict; it must be a pair"),
    ):
        with pytest.raises(ValueError, match=message):
            store.crops(requests, out=wrong)
        with pytest.raises(ValueError, match=message):
            store["r4"].crop(out=wrong)
    with pytest.raises(ValueError, match=r"msa is uint8 \(20, 11\); this crop needs uint8 \(20, 12\)"):
        store["r4"].crop(out=(np.zeros((20, 11), np.uint8), np.zeros((20, 12), np.int32)))
    for wrong in (0, 1025, 2.0):
        with pytest.raises(ValueError, match="in_flight"):
            store.crops(requests, in_flight=wrong)


def test_requests_that_cannot_be_met_name_the_record(urls):
    store = FeatureStore.open(urls["rank"])
    with pytest.raises(RecordNotFoundError, match="r33"):
        store.crops([CropRequest("r3"), CropRequest("r33")])
    with pytest.raises(IndexError, match="record 'r4': residues 13:14 is an empty window of 0:12"):
        store.crops([CropRequest("r3"), CropRequest("r4", slice(13, 14))])


def test_a_view_reads_many_crops_of_its_records_only(urls):
    store = FeatureStore.open(urls["permuted"])
    view = store.view("depth > 90", "deep ones")
    assert view.ids == ["r3", "r5", "r6"]
    requests = [CropRequest("r5", slice(1, 4)), CropRequest("r3")]
    for crop, other in zip(view.crops(requests), store.crops(requests), strict=True):
        np.testing.assert_array_equal(crop.msa, other.msa)
    assert [plan.record_id for plan in view.plan(requests)] == ["r5", "r3"]
    with pytest.raises(RecordNotFoundError, match="r4"):
        view.crops([CropRequest("r3"), CropRequest("r4")])


@pytest.mark.parametrize("order", ORDERS)
def test_the_fast_path_equals_the_general_path(urls, order):
    """Chunk by chunk through `ShardReader.chunks`, box by box, against `crop`."""
    store = FeatureStore.open(urls[order])
    rng = np.random.default_rng(3)
    for _ in range(60):
        name = str(rng.choice(list(RECORDS)))
        record = store[name]
        tiled = record.tiled
        ranks = rng.integers(0, record.depth, 30)
        a = int(rng.integers(record.length))
        window = (a, int(rng.integers(a + 1, record.length + 1)))
        boxes = plan_crop(tiled.grid, window, tiled.order.stored(ranks))
        found = {}
        for array, fill in (("msa", 255), ("deletion", 0)):
            out = found[array] = np.full((30, window[1] - window[0]), fill, np.uint8)
            chunks = record.part.arrays[array].chunks([box.tile for box in boxes])
            for box, (number, chunk) in zip(boxes, chunks, strict=True):
                assert number == box.tile
                if chunk is not None:
                    out[box.out_rows, box.out_cols] = chunk[0][box.tile_rows, box.tile_cols]
        crop = record.crop(slice(*window), ranks)
        np.testing.assert_array_equal(crop.msa, found["msa"])
        np.testing.assert_array_equal(crop.deletions.clip(max=255), found["deletion"])


@pytest.mark.parametrize("order", ORDERS)
def test_a_plan_says_what_will_be_read(urls, order):
    rng = np.random.default_rng(5)
    for request in draw(rng, 24):
        store, blobs = slowed(urls[order], 0.0)
        (plan,) = store.plan([request])
        # The metadata of the part and the indices of its two shards, nothing else.
        assert len(blobs.reads) == 3
        assert store.plan([request])[0].num_bytes == plan.num_bytes
        assert len(blobs.reads) == 3
        crop = store.crops([request])[0]
        read = [entry for entry in blobs.reads[3:] if "/msa/" in entry[0] or "/deletion/" in entry[0]]
        assert len(read) == plan.num_reads
        # What lies between two tiles is read with them when it is short.
        assert sum(size for _, _, size in read) >= plan.num_bytes
        assert (plan.num_rows, plan.num_residues) == crop.msa.shape
        grid = store[request.record_id].tiled.grid
        assert plan.num_cells == (len(plan.msa_tiles) + len(plan.deletion_tiles)) * 16 * 8
        assert np.all(np.diff(plan.msa_tiles) > 0)
        assert grid.first_tile <= plan.msa_tiles.min(initial=grid.first_tile)
        assert plan.msa_tiles.max(initial=0) < grid.first_tile + grid.num_tiles
        if request.rows is None and request.residues == slice(0, grid.length):
            assert sum(size for _, _, size in read) == plan.num_bytes


def test_all_reads_of_a_far_store_are_in_flight_together_and_bounded(urls):
    requests = [CropRequest(name) for name in RECORDS] * 3
    for in_flight in (2, 6):
        store, blobs = slowed(urls["rank"])
        crops = store.crops(requests, in_flight=in_flight)
        assert 1 < blobs.most_in_flight <= in_flight
        for request, crop in zip(requests, crops, strict=True):
            np.testing.assert_array_equal(crop.msa, RECORDS[request.record_id].msa)
    store, blobs = slowed(urls["rank"])
    store.crops(requests)
    assert 1 < blobs.most_in_flight <= read_pool.DEFAULT_IN_FLIGHT
    # Records of a part share their reads: one for each array, besides metadata, indices and large counts.
    tiles = [entry for entry in blobs.reads if "/msa/" in entry[0]]
    assert len(tiles) == 2 * 3
    # A single far crop has both its arrays in flight.
    store, blobs = slowed(urls["rank"])
    np.testing.assert_array_equal(store["r3"].crop().msa, RECORDS["r3"].msa)
    assert blobs.most_in_flight == 2


def test_a_local_store_uses_no_threads(urls):
    store = FeatureStore.open(urls["rank"])
    before = set(threading.enumerate())
    store.crops([CropRequest(name) for name in RECORDS])
    store["r3"].crop()
    assert set(threading.enumerate()) <= before


def test_a_failed_read_names_the_record_and_leaves_nobody_writing(urls):
    store, blobs = slowed(urls["rank"])
    store.crops([CropRequest("r3")])
    real, failures = blobs._late, []

    def failing(path, start, read):
        if "/msa/" in path:
            failures.append(path)
            raise ConnectionResetError("the line was cut")
        return real(path, start, read)

    blobs._late = failing
    with pytest.raises(ConnectionResetError, match="the line was cut") as caught:
        store.crops([CropRequest("r3"), CropRequest("r6")], in_flight=4)
    assert failures
    assert any("while reading record r" in note for note in caught.value.__notes__)
    assert blobs._in_flight == 0


@pytest.fixture
def copied(urls, tmp_path) -> Path:
    return Path(shutil.copytree(urls["rank"], tmp_path / "copy"))


def test_damage_names_the_record(copied):
    store = FeatureStore.open(copied)
    part = store.table(["part_id"], "record_id = 'r3'")["part_id"][0].as_py()
    path = copied / "parts" / part / "msa/c/0/0/0"
    data = bytearray(path.read_bytes())
    plan = store["r3"].plan(slice(0, 8), slice(0, 16))
    offset = int(store["r3"].part.arrays["msa"]._open()[1][plan.msa_tiles[0], 0])
    data[offset + 5] ^= 1
    path.write_bytes(data)
    for read in (
        lambda fresh: fresh["r3"].crop(slice(0, 8), slice(0, 16)),
        lambda fresh: fresh.crops([CropRequest("r0"), CropRequest("r3")], in_flight=3),
    ):
        with pytest.raises(
            CorruptDataError, match=r"msa/c/0/0/0, chunk \d+ \(record r3\): it does not match"
        ):
            read(FeatureStore.open(copied))


@pytest.mark.parametrize("name", ["msa/c/0/0/0", "profile/c/0/0", "zarr.json"])
def test_a_file_that_vanishes_under_a_reader_is_damage(copied, name):
    """`gc` may remove a part that only an old reader still knows."""
    store = FeatureStore.open(copied)
    part = store.table(["part_id"], "record_id = 'r3'")["part_id"][0].as_py()
    if name != "zarr.json":
        store["r3"].crop()
        store["r3"].profile()
        for array in store["r3"].part.arrays.values():
            if array._opened is not None:
                # As when this process has too many files open.
                array._opened[0].release()
    (copied / "parts" / part / name).unlink()

    def read_again() -> None:
        store["r3"].profile()
        store.crops([CropRequest("r3")])

    with pytest.raises(CorruptDataError, match=rf"{part}/{name}( \(record r3\))?: the file is missing"):
        read_again()


def test_threads_may_share_a_store_and_its_pool(urls):
    store, _ = slowed(urls["permuted"], 0.0)
    problems = []

    def read(seed: int) -> None:
        requests = draw(np.random.default_rng(seed), 30)
        for request, crop in zip(requests, store.crops(requests, in_flight=3), strict=True):
            if not np.array_equal(crop.msa, expected(store, request)[0]):
                problems.append(request)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []


def read_all(store: FeatureStore, in_flight: int) -> bool:
    crops = store.crops([CropRequest(name) for name in RECORDS], in_flight=in_flight)
    pairs = zip(crops, RECORDS.values(), strict=True)
    return all(np.array_equal(crop.msa, record.msa) for crop, record in pairs)


def in_a_fork(function) -> int:
    """Returns how a forked child ended: 0 the function returned true, 1 it returned false, 2 it raised."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    deadline = threading.Timer(60, os.kill, (child, 9))
    deadline.start()
    _, status = os.waitpid(child, 0)
    deadline.cancel()
    return os.waitstatus_to_exitcode(status)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_reads_on_with_threads_of_its_own(urls):
    store, _ = slowed(urls["rank"], 0.0)
    assert read_all(store, 3)
    # A pool that was inherited would wait for its threads forever.
    assert in_a_fork(lambda: read_all(store, 3) and read_all(store, 5)) == 0
    assert read_all(store, 3)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_that_it_cannot_open_a_local_store(urls):
    """Delta's library would panic; the message says what to do."""
    store = FeatureStore.open(urls["rank"])

    def refused() -> bool:
        for use in (lambda: FeatureStore.open(store.url), lambda: store.delete(["r0"])):
            with pytest.raises(ForkedProcessError, match=r"was forked from .*'spawn' or 'forkserver'"):
                use()
        return True

    assert in_a_fork(refused) == 0
    assert FeatureStore.open(urls["rank"]).ids == store.ids


def test_stores_and_records_go_to_spawned_processes(urls):
    store = FeatureStore.open(urls["permuted"])
    record = store["r3"]
    record.crop()
    again = pickle.loads(pickle.dumps(record))
    np.testing.assert_array_equal(again.msa(), RECORDS["r3"].msa)
    assert again.rows().equals(record.rows())
    assert (again.fingerprint, again.description) == (record.fingerprint, record.description)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (store, 2))
        np.testing.assert_array_equal(pool.apply(type(record).msa, (record,)), RECORDS["r3"].msa)


@pytest.mark.parametrize("order", ORDERS)
def test_tensorstore_reads_the_same(urls, order):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    store = FeatureStore.open(urls[order])
    rng = np.random.default_rng(2)
    for name, record in RECORDS.items():
        stored = store[name]
        grid, order_of = stored.tiled.grid, stored.tiled.order
        found = {}
        for array in ("msa", "deletion"):
            path = f"{store.url}/{stored.part.path}/{array}/"
            tiles = tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, read=True
            ).result()
            tiles = tiles[grid.first_tile : grid.first_tile + grid.num_tiles].read().result()
            tiles = tiles.reshape(grid.row_tiles, grid.col_tiles, 16, 8).swapaxes(1, 2)
            whole = tiles.reshape(grid.row_tiles * 16, -1)[: record.depth, : record.length]
            found[array] = whole[order_of.stored(np.arange(record.depth))]
        np.testing.assert_array_equal(found["msa"], record.msa)
        for _ in range(5):
            a = int(rng.integers(record.length))
            rows = rng.integers(0, record.depth, 9)
            crop = stored.crop(slice(a, record.length), rows)
            np.testing.assert_array_equal(crop.msa, found["msa"][rows, a:])
            np.testing.assert_array_equal(crop.deletions.clip(max=255), found["deletion"][rows, a:])
