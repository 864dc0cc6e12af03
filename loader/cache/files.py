"""A store's files with those of its parts read through the cache.

Owns which files are cached: those of parts, which never change and are named by what they say. Everything
else (the index, tags, sets) is somebody else's to read and passes through. Read only.
"""

from __future__ import annotations

import functools
from typing import Any

from foldfeed.feature_store.storage import LAST_FILE, Blobs, RangeReader
from foldfeed.loader.cache.tiers import FileOfPart, Tiers

PARTS_FOLDER = "parts"


class CachedFiles:
    """Access to a store's files (`Blobs`) whose parts come through `Tiers`.

    Attributes:
      answers_at_once: reads are done one after the other; what is read was brought into memory before.
    """

    answers_at_once = True

    def __init__(self, files: Blobs, tiers: Tiers) -> None:
        self._files = files
        self._tiers = tiers
        self.url = files.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read(self, path: str) -> bytes:
        """Returns a whole file; of a part's metadata, through the cache."""
        file = self.file_of(path)
        if file is None or not path.endswith(f"/{LAST_FILE}"):
            return self._files.read(path)
        pieces: list[bytes] = []
        while True:
            start, size = len(pieces) * self._tiers.block_bytes, self._tiers.block_bytes
            pieces.append(self._tiers.read(file, start, size))
            if len(pieces[-1]) < size:
                return b"".join(pieces)

    def open_range(self, path: str) -> RangeReader:
        """Returns a function ``(start, size) -> bytes`` over one file."""
        file = self.file_of(path)
        return self._files.open_range(path) if file is None else functools.partial(self._tiers.read, file)

    def file_of(self, path: str) -> FileOfPart | None:
        """Returns the file of a part under a path, None for any other file."""
        folder, _, rest = path.partition("/")
        part_id, _, file = rest.partition("/")
        if folder != PARTS_FOLDER or not part_id or not file:
            return None
        return FileOfPart(
            part_id=part_id, file=file, read=lambda start, size: self._files.open_range(path)(start, size)
        )
