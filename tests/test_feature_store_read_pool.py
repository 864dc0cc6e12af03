"""Reads in flight: when `run_tasks` is over, so are its tasks, whatever went wrong."""

import threading
import time

import google_crc32c
import pytest
from records import make_record

from foldfeed.feature_store import CorruptDataError, FeatureStore, StoreSettings, write_part
from foldfeed.feature_store.parts.reader import PartReader
from foldfeed.feature_store.storage.read_pool import run_tasks


def test_no_task_runs_on_when_a_thread_cannot_be_started(monkeypatch):
    """Tasks write into the caller's arrays: one that runs later would change what the caller has by then."""
    running, begun = [], threading.Event()

    def task() -> None:
        begun.set()
        running.append(1)
        time.sleep(0.2)
        running.pop()

    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_tasks([task] * 6, 37)  # a pool of its own
    assert begun.is_set()
    assert running == []
    time.sleep(0.3)
    assert running == []


def test_a_chunk_that_is_no_zstd_frame_is_damage_though_its_checksum_is_right(tmp_path):
    store = FeatureStore.create(tmp_path / "s", StoreSettings())
    part = write_part(store.url, [make_record("a", 3, 5)], store.settings)
    array = PartReader(store._blobs, part.part_id).arrays["msa"]
    data = b"abc" + google_crc32c.value(b"abc").to_bytes(4, "little")
    with pytest.raises(CorruptDataError, match="zstd"):
        array.decode(0, data, 0, len(data))
