"""Samples are a function of store, recipe, seed and number, whatever reads them and what goes wrong."""

import errno
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from range_server import range_server
from records import make_record
from slow_blobs import SlowBlobs
from test_loader_stream import assert_equal, build_store, by_sample, make_loader, take

from foldfeed.feature_store import FeatureStore, write_part
from foldfeed.loader import CacheConfig, SampleError, StateMismatchError

BATCH, STEPS = 14, 2
OFF, COLD, WARM = "off", "cold", "warm"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return build_store(tmp_path_factory.mktemp("purity") / "store")


@pytest.fixture(scope="module")
def truth(store):
    with make_loader(store, global_batch=BATCH) as loader:
        return {g: loader.sample(g) for g in reversed(range(BATCH * STEPS))}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world", "workers", "caches"),
    [
        (1, 4, (OFF,)),
        (1, 1, (COLD, WARM)),
        (2, 1, (OFF,)),
        (3, 0, (COLD, WARM)),
        (4, 0, (WARM,)),
        (7, 0, (OFF,)),
    ],
)
def test_workers_caches_and_ranks_do_not_matter(store, truth, tmp_path, world, workers, caches):
    with range_server(Path(store.url)) as (url, _):
        far = FeatureStore.open(url)
        for cache in (COLD, *caches) if caches == (WARM,) else caches:
            values = (
                {} if cache == OFF else {"cache": CacheConfig(folder=tmp_path / "cache", block_bytes=2048)}
            )
            found = {}
            for rank in range(world):
                values |= {"rank": rank, "world": world, "num_processes": workers, "global_batch": BATCH}
                with make_loader(store if cache == OFF else far, **values) as loader:
                    found |= by_sample(take(loader, STEPS))
                    stats = loader.stats
            assert_equal(found, truth)
            if cache != OFF:
                assert (stats["cache_store_hits"] == 0) == (cache == WARM or world > 1), stats


@pytest.mark.parametrize("num_processes", [0, 1])
def test_commits_while_training_change_nothing_of_the_version_at_hand(store, truth, tmp_path, num_processes):
    url = tmp_path / "store"
    shutil.copytree(store.url, url)
    values = {"global_batch": BATCH, "num_processes": num_processes, "read_ahead_bytes": 1}
    with make_loader(FeatureStore.open(url), **values) as loader:
        batches = take(loader, 1)
        writer = FeatureStore.open(url)
        others = [make_record(f"r{n:02}", 2 + n, 6 + 3 * n, seed=90 + n) for n in range(9)]
        part = write_part(writer.url, others, writer.settings)
        writer.commit([part.part_id], job_id="2", on_existing="replace")
        FeatureStore.open(url).delete(["r09", "r10"])
        batches += take(loader, STEPS - 1)
        assert_equal(by_sample(batches), truth)
        state = loader.state_dict(1)
    with make_loader(FeatureStore.open(url, version=1), **values) as loader:
        loader.load_state_dict(state)
        assert_equal(by_sample(take(loader, 1)), {g: truth[g] for g in range(BATCH, 2 * BATCH)})
    with (
        make_loader(FeatureStore.open(url), **values) as loader,
        pytest.raises(StateMismatchError, match="store"),
    ):
        loader.load_state_dict(state)


class FailingBlobs(SlowBlobs):
    """Files of a disk that is slow, and fails while it is told to.

    Attributes:
      fails: whether it does.
    """

    fails = False

    def _late(self, path, start, read):
        if self.fails and "/deletion/" in path:
            raise OSError(errno.EIO, "Input/output error", path)
        return super()._late(path, start, read)


def test_an_error_of_a_slow_disk_names_sample_record_and_cause_and_may_pass(store, truth):
    mine = FeatureStore.open(store.url)
    blobs = mine._blobs = FailingBlobs(mine._blobs, 0.002)
    with make_loader(mine, global_batch=BATCH, prefetch_steps=1) as loader:
        batches = take(loader, 1)
        blobs.fails = True
        with pytest.raises(SampleError, match=r"sample \d+ \(record 'r\d\d'\).*Input/output error") as caught:
            take(loader, 2)
        assert caught.value.__cause__.errno == errno.EIO
        assert 1 <= loader.state_dict()["step"] <= 2
        blobs.fails = False
        batches += take(loader, 2)
    found = by_sample(batches)
    assert_equal({g: found[g] for g in found if g in truth}, truth)


class TransformFailed(Exception):
    """Raised by a user's code."""


def test_an_exception_in_the_users_code_ends_the_loader_and_is_theirs(store):
    before = set(threading.enumerate())

    def transform(batch):
        if batch.step == 1:
            raise TransformFailed
        return batch

    with pytest.raises(TransformFailed), make_loader(store, num_processes=1) as loader:  # noqa: PT012
        for _ in map(transform, loader):
            pids = loader._supply.pids
    assert set(threading.enumerate()) <= before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


TINY = """
import os, sys
from foldfeed.feature_store import FeatureStore
from foldfeed.loader import CropLoader, Recipe

size = os.statvfs("/dev/shm")
assert size.f_blocks * size.f_frsize <= 65536, size
recipe = Recipe.named("crop_first", crop_residues=64, num_clusters=30, num_extra=60)
with CropLoader(FeatureStore.open(sys.argv[1]), recipe, seed=1, global_batch=8, num_processes=1) as loader:
    for _ in range(4):
        next(loader)
print("read", loader.stats["samples"], os.listdir("/dev/shm"))
"""


@pytest.mark.timeout(120)
def test_the_size_of_dev_shm_does_not_matter(store):
    """A ring is memory without a name, which no mounted file system limits (containers: 64 MB)."""
    shell = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", shell, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system of its own")
    done = subprocess.run(
        [*command, sys.executable, "-c", TINY, store.url], capture_output=True, text=True, check=False
    )
    assert done.stdout == "read 32 []\n", done.stderr
