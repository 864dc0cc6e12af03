"""One file copied so that a kill costs a second of work: its partial copy, and what is known of that.

Owns the bytes of ``parts/NAME`` and the note ``notes/NAME.json`` that says how many of them are right, of
which version of the source, and their hash. Does not own locks or publication (`databases.staging`).

Invariants: a note is written after its bytes are on the disk and the source was seen to be the version that
the copy began with, so bytes of two versions never meet; what a note does not vouch for is cut off; bytes
that do not have the hash of the note are copied anew.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from foldfeed.feature_store.errors import FoldfeedError
from foldfeed.feature_store.storage import LocalBlobs, disk_full_is_typed
from foldfeed.pipelines.databases.staging_source import Identity, SourceFile
from foldfeed.pipelines.errors import StagingError

# One request; so many are under way at once, because a single stream of an object store is slow.
PIECE_BYTES = 8 << 20
NUM_AHEAD = 4
# Between two notes: an fsync and a look at the source.
NOTE_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileCopy:
    """A file and where its copy grows.

    Attributes:
      source: the file.
      seen: what it looked like when the copy was begun.
      folder: holds ``parts`` and ``notes``.
    """

    source: SourceFile
    seen: Identity
    folder: Path

    @property
    def part(self) -> Path:
        """The partial copy."""
        return self.folder / "parts" / self.source.name

    def num_kept(self) -> int:
        """Returns how many bytes an earlier attempt left, by its note alone."""
        note = self._note()
        return note["num_bytes"] if note else 0

    def run(self, tell: Callable[[int], None]) -> str:
        """Copies what is missing and returns the sha256 (hex) of the whole.

        Args:
          tell: called with how many bytes of the file are there.
        Raises:
          StagingError: the source changed, or went; nothing is kept.
          StorageFullError: no space left; what was copied is kept.
          StorageError: the source cannot be read; what was copied is kept.
        """
        length, digest = self._kept()
        with disk_full_is_typed(self.part), open(self.part, "ab", buffering=0) as file:
            file.truncate(length)
            tell(length)
            noted, noted_s = length, time.monotonic()
            before = now = length, digest.hexdigest()
            try:
                with contextlib.closing(self._pieces(length)) as pieces:
                    for piece in pieces:
                        before, now = now, (length, digest.hexdigest())
                        _write(file.fileno(), piece)
                        digest.update(piece)
                        length += len(piece)
                        tell(length)
                        if time.monotonic() - noted_s >= NOTE_S:
                            self._take_note(file.fileno(), length, digest.hexdigest())
                            noted, noted_s = length, time.monotonic()
                self._take_note(file.fileno(), length, digest.hexdigest())
            except StagingError:
                for path in (self._note_path, self.part):
                    path.unlink(missing_ok=True)
                raise
            except (OSError, FoldfeedError):
                # The error that stopped the copy is raised, whatever comes of the attempt to save the last
                # second of it: the note before this one still holds. Without the last whole piece, which
                # makes room for the note on a full disk; never less than the note before vouches for.
                with contextlib.suppress(OSError, FoldfeedError):
                    if before[0] > noted:
                        file.truncate(before[0])
                        self._take_note(file.fileno(), *before)
                raise
        return digest.hexdigest()

    def _pieces(self, start: int) -> Generator[bytes]:
        """Yields the file from a byte on, some pieces read ahead."""
        try:
            read = self.source.open().open_range(self.source.name)
        except FileNotFoundError as error:
            raise self._changed() from error
        size = self.seen.num_bytes
        waiting: collections.deque[tuple[int, Future[bytes]]] = collections.deque()
        pool = ThreadPoolExecutor(NUM_AHEAD, thread_name_prefix="foldfeed-staging")
        try:
            while waiting or start < size:
                while start < size and len(waiting) < NUM_AHEAD:
                    wanted = min(PIECE_BYTES, size - start)
                    waiting.append((wanted, pool.submit(read, start, wanted)))
                    start += wanted
                wanted, future = waiting.popleft()
                try:
                    piece = future.result()
                except FileNotFoundError as error:
                    raise self._changed() from error
                if len(piece) != wanted:
                    raise self._changed()
                yield piece
        finally:
            pool.shutdown(cancel_futures=True)

    def _kept(self) -> tuple[int, Any]:
        """Returns length and running hash of what an earlier attempt left and what is still as it was."""
        note, digest = self._note(), hashlib.sha256()
        if not note or not self.part.exists():
            return 0, digest
        left = note["num_bytes"]
        with self.part.open("rb") as file:
            while left and (piece := file.read(min(left, PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
        if left or digest.hexdigest() != note["sha256"]:
            return 0, hashlib.sha256()
        return note["num_bytes"], digest

    def _note(self) -> dict[str, Any]:
        """Returns the note of an earlier attempt at this version of the source; {} where there is none."""
        # A source that tells only its size may have changed since, and nobody would see it.
        if not self.seen.is_told or not self._note_path.exists():
            return {}
        note = json.loads(self._note_path.read_bytes())
        return note if note["source"] == self.seen.state else {}

    def _take_note(self, handle: int, length: int, sha256: str) -> None:
        os.fsync(handle)
        try:
            now = self.source.identity()
        except FileNotFoundError as error:
            raise self._changed() from error
        if now != self.seen:
            raise self._changed()
        note = {"source": self.seen.state, "num_bytes": length, "sha256": sha256}
        LocalBlobs(self._note_path.parent).write_atomic(self._note_path.name, json.dumps(note).encode())

    @property
    def _note_path(self) -> Path:
        return self.folder / "notes" / f"{self.source.name}.json"

    def _changed(self) -> StagingError:
        return StagingError(
            self.source.shown,
            "it changed while it was copied; nothing of the copy is used. Run the same command again when "
            "it is whole",
        )


def _write(handle: int, piece: bytes) -> None:
    """Writes all of a piece; the system may take less at a time."""
    view = memoryview(piece)
    while view:
        view = view[os.write(handle, view) :]
