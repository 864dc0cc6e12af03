"""The database under a search is the one that the build was planned with, before the search and after it.

Owns the check and what is known of files in this process. Does not own digests
(`databases.spec`). A search result is kept under the digest of its database, for ever and for
every build, so a file that was replaced since the plan, or differs on one worker, must not get into it.

Invariant: a file is read at most once per process and state; nothing is read where the plan, or a worker that
sees the same file, left its hash in the result store. Safe from several threads.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines.databases.spec import cached_sha256, digest_of, shard_digest_of
from foldfeed.pipelines.errors import DatabaseChangedError
from foldfeed.pipelines.manifest import file_state, num_bytes_of
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, Shard
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

# (path, bytes, content hash) of every file.
Contents: TypeAlias = Sequence[tuple[str, int, str]]

# One thread reads a large file; the others wait for what it finds.
_reading = threading.Lock()
# Digests, each with the states of the files that were found to have it.
_found: set[tuple[str, tuple[str, ...]]] = set()


@contextlib.contextmanager
def as_planned(database: SearchedDatabase | TemplateDatabase, results_url: str) -> Iterator[None]:
    """Checks around a search that the files of a database are those of its digest.

    Args:
      database: of the build.
      results_url: the result store, where content hashes are remembered.
    Raises:
      DatabaseChangedError: they are not, or did not stay so.
    """
    with _unchanged(database.files, database.digest, results_url, database.tool.identity.name, digest_of):
        yield


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
    tool = database.tool.identity.name
    with _unchanged((shard.path,), shard.digest, results_url, tool, _digest_of_shard):
        yield


def _digest_of_shard(tool: str, contents: Contents) -> str:
    ((_, num_bytes, sha256),) = contents
    return shard_digest_of(tool, num_bytes, sha256)


@contextlib.contextmanager
def _unchanged(
    files: tuple[str, ...],
    digest: str,
    results_url: str,
    tool: str,
    digest_of_contents: Callable[[str, Contents], str],
) -> Iterator[None]:
    before = tuple(map(_state, files))
    with _reading:
        if files and (digest, before) not in _found:
            contents = [
                (path, num_bytes_of(state), _sha256(path, results_url))
                for path, state in zip(files, before, strict=True)
            ]
            if digest_of_contents(tool, contents) != digest:
                raise DatabaseChangedError(
                    ", ".join(files),
                    f"holds something else on {socket.gethostname()} than when the build was planned",
                )
            _found.add((digest, before))
    yield
    for path, state in zip(files, before, strict=True):
        if _state(path) != state:
            raise DatabaseChangedError(path, "was changed while it was searched")


def _state(path: str) -> str:
    try:
        return file_state(path)
    except OSError as error:
        raise DatabaseChangedError.unreadable(path, error) from error


def _sha256(path: str, results_url: str) -> str:
    try:
        return cached_sha256(path, open_blobs(results_url), check=False)
    except OSError as error:
        raise DatabaseChangedError.unreadable(path, error) from error
