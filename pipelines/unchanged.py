"""The database under a search is the one that the build was planned with, before the search and after it.

Owns the check and what is known of files in this process. Does not own digests
(`foldfeed.pipelines.databases`). A search result is kept under the digest of its database, for ever and for
every build, so a file that was replaced since the plan, or differs on one worker, must not get into it.

Invariant: a file is read at most once per process and state; nothing is read where the plan, or a worker that
sees the same file, left its hash in the result store. Safe from several threads.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.databases import cached_sha256, digest_of, shard_digest_of
from foldfeed.pipelines.errors import DatabaseChangedError
from foldfeed.pipelines.manifest import file_state, num_bytes_of
from foldfeed.pipelines.search_tool import SearchedDatabase, Shard

# One thread reads a large file; the others wait for what it finds.
_reading = threading.Lock()


@contextlib.contextmanager
def as_planned(database: SearchedDatabase, results_url: str) -> Iterator[None]:
    """Checks around a search that the files of a database are those of its digest.

    Args:
      database: of the build.
      results_url: the result store, where content hashes are remembered.
    Raises:
      DatabaseChangedError: they are not, or did not stay so.
    """
    before = [_state(path) for path in database.files]
    contents = [
        (path, num_bytes_of(state), _sha256(path, state, results_url))
        for path, state in zip(database.files, before, strict=True)
    ]
    if contents and digest_of(database.tool.identity.name, contents) != database.digest:
        raise _another(", ".join(database.files))
    yield
    for path, state in zip(database.files, before, strict=True):
        _require_state(path, state)


@contextlib.contextmanager
def shard_as_planned(database: SearchedDatabase, shard: Shard, results_url: str) -> Iterator[None]:
    """Checks the same around the search of one shard.

    Args:
      database: of the build.
      shard: of that database.
      results_url: as of `as_planned`.
    Raises:
      DatabaseChangedError: it is another file, or did not stay the same.
    """
    state = _state(shard.path)
    sha256 = _sha256(shard.path, state, results_url)
    if shard_digest_of(database.tool.identity.name, num_bytes_of(state), sha256) != shard.digest:
        raise _another(shard.path)
    yield
    _require_state(shard.path, state)


def _state(path: str) -> str:
    try:
        return file_state(path)
    except OSError as error:
        raise DatabaseChangedError(path, f"cannot be read on {socket.gethostname()} ({error})") from error


def _require_state(path: str, state: str) -> None:
    if _state(path) != state:
        raise DatabaseChangedError(path, "was changed while it was searched")


def _another(paths: str) -> DatabaseChangedError:
    return DatabaseChangedError(
        paths, f"holds something else on {socket.gethostname()} than when the build was planned"
    )


def _sha256(path: str, state: str, results_url: str) -> str:
    with _reading:
        return _sha256_of_state(path, state, results_url)


@functools.lru_cache(maxsize=1 << 17)
def _sha256_of_state(path: str, state: str, results_url: str) -> str:
    try:
        return cached_sha256(path, open_blobs(results_url), check=False)
    except OSError as error:
        raise DatabaseChangedError(path, f"cannot be read on {socket.gethostname()} ({error})") from error
