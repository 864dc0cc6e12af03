"""Fixtures that several test files share."""

import faulthandler
import gc
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from records import make_record
from s3_server import FOREIGN_VARIABLES, client_environment, running_server

from foldfeed.feature_store import FeatureStore, write_part

ROOT = Path(__file__).parents[1]
END_LIMIT_S = 60
# The pool of the store's reads lives as long as its process, and ends with the interpreter: its threads wait
# for work and keep nothing alive.
POOL_FOR_LIFE = "feature-store-read"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that hold slow tests, so that the processes of `make test` end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection() -> None:
    """Imports the test files without rounds of the garbage collector: nothing of them is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leaves the half million objects that were imported out of all later rounds."""
    gc.collect()
    gc.freeze()
    gc.enable()


# Threads that outlived the tests, of all processes of `make test`.
LEFT_THREADS: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session that leaves threads which would keep its process alive, and names them.

    A process of `make test` is ended by the one that started it, which would hide such threads; so it tells.
    """
    LEFT_THREADS.extend(_threads_that_stay())
    if LEFT_THREADS and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_threads"] = LEFT_THREADS
    elif LEFT_THREADS:
        print(f"\nthreads are still there after the last test: {LEFT_THREADS}", file=sys.__stderr__)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what a process of `make test` has to tell at its end (a hook of pytest-xdist)."""
    LEFT_THREADS.extend(getattr(node, "workeroutput", {}).get("left_threads", []))


def _threads_that_stay() -> list[str]:
    deadline = time.monotonic() + END_LIMIT_S
    while left := [t for t in threading.enumerate() if _keeps_alive(t)]:
        if time.monotonic() > deadline:
            faulthandler.dump_traceback(file=sys.__stderr__)
            break
        time.sleep(0.1)
    return [thread.name for thread in left]


def _keeps_alive(thread: threading.Thread) -> bool:
    return not (thread is threading.main_thread() or thread.daemon or thread.name.startswith(POOL_FOR_LIFE))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends a process that hangs after its last test, with the stacks of the threads that hold it up."""
    # The interpreter takes its modules apart at its end; libraries tell of objects that are left then.
    gc.unfreeze()
    # A process of `make test` that is done waits until the other one is.
    if hasattr(config, "workerinput"):
        return
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
