"""A wrapper of a store's files that answers late and counts: real bytes, as from far away."""

import threading
import time

from foldfeed.feature_store import FeatureStore


class SlowBlobs:
    """The files of a store behind a latency.

    Attributes:
      reads: (path, start, bytes) of every read so far.
      most_in_flight: reads that were open at the same time, at most.
      together: where given, a read is answered when so many are asked for (and breaks when they never are).
    """

    def __init__(self, blobs, latency_s: float = 0.01) -> None:
        self._blobs = blobs
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._in_flight = 0
        self.together: threading.Barrier | None = None
        self.most_in_flight = 0
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str):
        return getattr(self._blobs, name)

    def read(self, path: str) -> bytes:
        return self._late(path, 0, lambda: self._blobs.read(path))

    def open_range(self, path: str):
        source = self._blobs.open_range(path)
        return lambda start, size: self._late(path, start, lambda: source(start, size))

    def _late(self, path: str, start: int, read) -> bytes:
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            time.sleep(self._latency_s)
            if self.together is not None:
                self.together.wait()
            data = read()
        finally:
            with self._lock:
                self._in_flight -= 1
        with self._lock:
            self.reads.append((path, start, len(data)))
        return data


def slowed(url: str, latency_s: float = 0.01) -> tuple[FeatureStore, SlowBlobs]:
    """Returns a store whose parts are read through a `SlowBlobs`, and that wrapper."""
    store = FeatureStore.open(url)
    blobs = store._blobs = SlowBlobs(store._blobs, latency_s)
    return store, blobs
