"""Fixtures that several test files share."""

import faulthandler
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from records import make_record
from s3_server import FOREIGN_VARIABLES, client_environment, running_server

from foldfeed.feature_store import FeatureStore, write_part

ROOT = Path(__file__).parents[1]
END_LIMIT_S = 60


def pytest_unconfigure() -> None:
    """Ends a process that hangs after its last test, with the stacks of the threads that hold it up."""
    faulthandler.dump_traceback_later(END_LIMIT_S, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_file() -> Callable[[str], Path]:
    """Returns a function that finds real data where FOLDFEED_TEST_DATA says, or skips by the file's name."""
    folder = Path(os.environ.get("FOLDFEED_TEST_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"no {name} in {folder}; set FOLDFEED_TEST_DATA to the folder of the real data")
        return folder / name

    return find


@pytest.fixture
def small_store(tmp_path) -> FeatureStore:
    """A store of three records of odd sizes in one part."""
    store = FeatureStore.create(tmp_path / "store")
    records = [
        make_record("a1", 1, 9),
        make_record("b2", 700, 130, seed=2),
        make_record("c3", 37, 65, seed=3),
    ]
    part = write_part(store.url, records, store.settings)
    store.commit([part.part_id], job_id="job-1", message="first")
    return store


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory) -> Iterator[str]:
    """URL of a real S3-compatible server, when one was built."""
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'foldfeed[s3]'")
    with running_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint, monkeypatch) -> str:
    """URL of an empty place in a bucket; clients of this process and its children find the server."""
    for name in FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in client_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"
