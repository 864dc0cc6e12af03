"""One contract for local files and for objects behind fsspec."""

import importlib.util
import os
import re
import subprocess
import uuid

import numpy as np
import pytest
from click.testing import CliRunner
from records import make_record

from foldfeed.feature_store import (
    FeatureStore,
    MissingExtraError,
    StorageFullError,
    StoreSettings,
    StoreUrlError,
    write_part,
)
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.format.grid import resolve_rows
from foldfeed.feature_store.parts.reader import PartReader, RecordLocation
from foldfeed.feature_store.storage import open_blobs, open_files


@pytest.fixture(params=["local", "file-url", "memory"])
def url(request, tmp_path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(tmp_path / "root") if request.param == "local" else f"file://{tmp_path}/root"


def test_files_are_published_whole(url):
    blobs = open_blobs(url)
    assert not blobs.exists("a/b")
    assert blobs.list("a") == []
    blobs.write_atomic("a/b", b"one")
    blobs.write_atomic("a/b", b"second")
    assert blobs.read("a/b") == b"second"
    assert blobs.read_range("a/b", 2, 3) == b"con"
    assert blobs.read_range("a/b", 4, 100) == b"nd"
    assert blobs.open_range("a/b")(1, 2) == b"ec"
    assert blobs.create_exclusive("a/c", b"first") is True
    assert blobs.create_exclusive("a/c", b"late") is False
    assert blobs.read("a/c") == b"first"
    assert blobs.list("a") == ["b", "c"]
    with pytest.raises(FileNotFoundError):
        blobs.read("a/none")


def test_a_part_reads_back_through_any_of_them(url):
    record = make_record("x", 70, 33)
    settings = StoreSettings(tile_rows=16, tile_cols=16)
    part = write_part(url, [record], settings)
    assert write_part(url, [record], settings) == part
    reader = PartReader(open_blobs(url), part.part_id)
    (row,) = reader.index_rows()
    at = RecordLocation(**{name: row[name] for name in RecordLocation.__slots__})
    crop = reader.crop(at, (3, 30), resolve_rows(slice(5, 69), 70))
    np.testing.assert_array_equal(crop.msa, record.msa[5:69, 3:30])
    np.testing.assert_array_equal(crop.deletions, record.deletions[5:69, 3:30])
    assert open_blobs(url).list("parts") == [part.part_id]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 512 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let root mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_a_typed_error_and_leaves_the_store_as_it_was(tiny_disk):
    store = FeatureStore.create(tiny_disk / "s")
    small = write_part(store.url, [make_record("small", 5, 10)], store.settings)
    store.commit([small.part_id], job_id="1")
    with pytest.raises(StorageFullError, match="no space left"):
        write_part(store.url, [make_record("big", 3000, 400)], store.settings)
    again = FeatureStore.open(store.url)
    assert again.ids == ["small"]
    assert [path.name for path in (tiny_disk / "s" / "parts").iterdir()] == [small.part_id]
    np.testing.assert_array_equal(again["small"].msa(), make_record("small", 5, 10).msa)


@pytest.mark.parametrize(
    ("url", "package", "error"),
    [
        ("foo://bucket/store", "", StoreUrlError("foo://bucket/store", "Protocol not known: foo")),
        ("s3://bucket/store", "s3fs", MissingExtraError("s3fs", "s3")),
        ("gs://bucket/store", "gcsfs", MissingExtraError("gcsfs", "gcs")),
    ],
)
def test_a_kind_of_storage_that_is_not_there_is_named(url, package, error):
    """These packages are no dependency of foldfeed; where one is installed its URL opens."""
    if package and importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(type(error), match=re.escape(str(error))):
        FeatureStore.open(url)
    result = CliRunner().invoke(main, ["show", url])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_a_file_is_closed_when_the_interpreter_has_taken_modules_apart(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    handle = open_files._Handle(tmp_path / "file")
    number = handle.number
    monkeypatch.setattr(open_files, "os", None)
    # An exception in there would be a warning, and warnings are errors.
    del handle
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
