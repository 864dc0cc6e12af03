"""A store that was moved or deleted while it was open says so; one that lost a file is damaged."""

import functools
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from range_server import range_server
from records import make_record

from foldfeed.feature_store import (
    CorruptDataError,
    CropRequest,
    FeatureStore,
    HistoryChangedError,
    NameNotFoundError,
    NotAStoreError,
    StoreGoneError,
    StoreSettings,
    write_part,
)
from foldfeed.feature_store.care import verify as verify_module
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.cli import records as records_cli
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.index.tags import set_tag
from foldfeed.feature_store.parts import presence
from foldfeed.feature_store.storage import open_blobs

SETTINGS = StoreSettings(tile_rows=16, tile_cols=16)
RECORDS = [make_record("a1", 3, 9), make_record("b2", 40, 33, seed=2)]


def filled(url: str) -> str:
    """Two records in a part each."""
    store = FeatureStore.create(url, SETTINGS)
    for number, record in enumerate(RECORDS):
        store.commit([write_part(url, [record], SETTINGS).part_id], job_id=f"job-{number}")
    store.save_set("all", "from records")
    set_tag(store.url, "paper")
    return store.url


@pytest.fixture
def url(tmp_path) -> str:
    return filled(str(tmp_path / "s"))


# Everything that a person may ask of an open store and that reads something of it.
READS: dict[str, Callable[[FeatureStore], object]] = {
    "crop": lambda store: store["b2"].crop(residues=slice(0, 9), rows=slice(0, 9)),
    "crops": lambda store: store.crops([CropRequest("a1", slice(0, 5)), CropRequest("b2", slice(0, 5))]),
    "msa": lambda store: store["b2"].msa(),
    "deletions": lambda store: store["b2"].deletions(),
    "profile": lambda store: store["b2"].profile(),
    "rows": lambda store: store["b2"].rows(),
    "structure": lambda store: store["b2"].structure(),
    "query": lambda store: store.query("select record_id, sequence from records"),
    "rows table": lambda store: store.row_table(["hit_id"]),
    "sets table": lambda store: store.query("from sets"),
    "splits table": lambda store: store.query("from splits"),
    "fingerprint": lambda store: store.fingerprint,
    "set": lambda store: store.subset("all"),
    "names": lambda store: store.set_names(),
    "log": lambda store: store.log(),
    "annotate": lambda store: store.annotate(pa.table({"record_id": ["a1"], "year": [1999]})),
    "delete": lambda store: store.delete(["a1"]),
}


@pytest.mark.parametrize("how", ["moved", "deleted", "emptied"])
def test_a_store_that_went_away_is_gone_and_not_corrupt(url, tmp_path, how):
    stores = {name: FeatureStore.open(url) for name in READS}
    for store in stores.values():
        store["a1"].msa()
        store.find("b2")
    if how == "moved":
        Path(url).rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(url)
    if how == "emptied":
        # As where a file system was unmounted.
        Path(url).mkdir()
    for name, read in READS.items():
        with pytest.raises(StoreGoneError) as caught:
            read(stores[name])
        error = caught.value
        assert isinstance(error, NotAStoreError)
        assert not isinstance(error, CorruptDataError)
        assert error.url == url
        for word in (repr(url), repr(error.path), "moved, deleted or unmounted", "again at its new place"):
            assert word in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (StoreGoneError, str(error), vars(error))
    if how == "moved":
        there = FeatureStore.open(tmp_path / "elsewhere")
        np.testing.assert_array_equal(there["b2"].msa(), RECORDS[1].msa)
        for read in READS.values():
            read(there)


def test_what_was_open_may_be_read_on(url, tmp_path):
    """A file that was opened before stays readable on a disk; whatever is returned is right."""
    store = FeatureStore.open(url)
    store["a1"].msa()
    Path(url).rename(tmp_path / "elsewhere")
    np.testing.assert_array_equal(store["a1"].msa(), RECORDS[0].msa)


@pytest.mark.parametrize("lost", ["zarr.json", "msa/c/0/0/0", "the part"])
def test_a_missing_file_of_a_store_that_is_there_is_damage(url, lost):
    part_id = FeatureStore.open(url).table(["part_id"], "record_id = 'b2'")["part_id"][0].as_py()
    folder = Path(url, "parts", part_id)
    if lost == "the part":
        shutil.rmtree(folder)
    else:
        (folder / lost).unlink()
    store = FeatureStore.open(url)
    with pytest.raises(CorruptDataError, match="the file is missing"):
        store["b2"].msa()
    assert verify(url).damaged_records == ["b2"]
    np.testing.assert_array_equal(store["a1"].msa(), RECORDS[0].msa)


@pytest.mark.parametrize("left", ["foldfeed.json", "index", "parts"])
def test_as_long_as_anything_is_left_it_is_damage(url, left):
    """Who has lost the settings and half of the parts needs `verify` and `repair`, not another path."""
    store = FeatureStore.open(url)
    store.find("a1")
    part_id = store.table(["part_id"], "record_id = 'b2'")["part_id"][0].as_py()
    for path in (Path(url, "foldfeed.json"), Path(url, "index"), Path(url, "parts")):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "parts":
        shutil.rmtree(Path(url, "parts", part_id))
    with pytest.raises(CorruptDataError, match="the file is missing"):
        store["b2"].msa()
    assert verify(url).problems


def test_a_missing_index_file_and_a_missing_log_file_are_no_moved_store(url):
    store = FeatureStore.open(url)
    for file in Path(url, "index").glob("*.parquet"):
        file.unlink()
    with pytest.raises(CorruptDataError, match="the file is missing"):
        store.query("from records")
    Path(url, "index/_delta_log/00000000000000000002.json").unlink()
    with pytest.raises(HistoryChangedError):
        store.delete(["a1"])
    with pytest.raises(NameNotFoundError):
        store.set("other")


def test_a_writer_whose_store_went_away_is_told_so(url, tmp_path):
    """Writing a part makes its folders anew; that makes no store of them."""
    store = FeatureStore.open(url)
    Path(url).rename(tmp_path / "elsewhere")
    part = write_part(url, [make_record("c3", 2, 9)], SETTINGS)
    with pytest.raises(StoreGoneError):
        store.commit([part.part_id], job_id="late")
    assert FeatureStore.open(tmp_path / "elsewhere").ids == ["a1", "b2"]


def test_a_view_and_a_worker_say_so_too(url, tmp_path):
    view = FeatureStore.open(url).subset("all")
    packed = pickle.dumps(view)
    Path(url).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreGoneError):
        view["b2"].msa()
    with pytest.raises(NotAStoreError, match="nothing at that path"):
        pickle.loads(packed)


def test_verify_does_not_report_a_store_that_goes_away_as_damage(url, monkeypatch):
    honest = verify_module.check_part

    def late(*args):
        shutil.rmtree(url, ignore_errors=True)
        return honest(*args)

    monkeypatch.setattr(verify_module, "check_part", late)
    with pytest.raises(StoreGoneError):
        verify(url)


def test_the_command_line_says_it_in_one_line(url, tmp_path, monkeypatch):
    honest = records_cli.open_store

    def opened(*args):
        store = honest(*args)
        store.find("b2")
        Path(url).rename(tmp_path / "elsewhere")
        return store

    monkeypatch.setattr(records_cli, "open_store", opened)
    result = CliRunner().invoke(main, ["crop", url, "b2"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: the store at {url!r} is gone: 'parts/")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def no_questions(monkeypatch):
    """Fails a test in which anybody asks whether the store is there."""

    def asked(blobs):
        raise AssertionError("a read that succeeds asks for nothing else")

    monkeypatch.setattr(presence, "anything_left", asked)


def test_reads_that_succeed_do_not_ask(url, no_questions):
    store = FeatureStore.open(url)
    for name, read in READS.items():
        # An empty list of names is no success: a store that is gone has none either.
        if name != "splits table":
            read(store)


# The same behind a network: other files, other answers.
def gone_from(url: str, remove: Callable[[], object], names: tuple[str, ...]) -> None:
    store = FeatureStore.open(url)
    store["a1"].msa()
    store.find("b2")
    remove()
    for name in names:
        with pytest.raises(StoreGoneError) as caught:
            READS[name](store)
        assert caught.value.url == url


REMOTE_READS = ("crop", "crops", "msa", "rows", "query", "set", "log", "delete")


@pytest.fixture
def memory():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://s"
    MemoryFileSystem.store.clear()


def test_in_any_file_system_of_fsspec(memory, url):
    for file in open_blobs(url).walk(""):
        open_blobs(memory).write_atomic(file.path, open_blobs(url).read(file.path))
    gone_from(memory, MemoryFileSystem.store.clear, REMOTE_READS)


def test_in_a_bucket(s3):
    url = filled(s3)
    blobs = open_blobs(url)
    part_id = FeatureStore.open(url).table(["part_id"], "record_id = 'b2'")["part_id"][0].as_py()
    store = FeatureStore.open(url)
    shard = f"parts/{part_id}/msa/c/0/0/0"
    whole = blobs.read(shard)
    blobs.delete(shard)
    with pytest.raises(CorruptDataError, match="the file is missing"):
        store["b2"].msa()
    blobs.write_atomic(shard, whole)
    gone_from(url, functools.partial(blobs.delete, ""), (*REMOTE_READS, "names"))


def test_on_a_web_server(url, tmp_path):
    with range_server(tmp_path) as (address, requests):
        store = FeatureStore.open(f"{address}/s")
        store["a1"].msa()
        store.find("b2")
        requests.clear()
        np.testing.assert_array_equal(store["b2"].msa(), RECORDS[1].msa)
        assert {path.split("/")[2] for _, path in requests} == {"parts"}
        Path(url).rename(tmp_path / "elsewhere")
        gone = FeatureStore.open(f"{address}/elsewhere")
        gone.find("b2")
        with pytest.raises(StoreGoneError):
            store.row_table(["hit_id"])
        part = next(Path(tmp_path, "elsewhere", "parts").glob("*"))
        shutil.rmtree(part)
        with pytest.raises(CorruptDataError, match="the file is missing"):
            gone.crops([CropRequest("a1", slice(0, 5)), CropRequest("b2", slice(0, 5))])
