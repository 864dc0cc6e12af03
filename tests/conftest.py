"""Fixtures that several test files share."""

import os
import shutil
from pathlib import Path

import pytest
from records import make_record

from foldfeed.feature_store import FeatureStore, write_part

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real proteins, when they lie beside the project."""
    path = Path(os.environ.get("FOLDFEED_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set FOLDFEED_TEST_DATA to its folder")
    return path


@pytest.fixture
def needs_tool():
    """Returns a function that skips the test unless a program is on PATH."""

    def check(*names: str) -> None:
        missing = [name for name in names if shutil.which(name) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not on PATH; apt-get install hmmer hhsuite")

    return check


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
