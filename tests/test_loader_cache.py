"""The loader's cache: the same batches whatever its tiers hold, lose or break."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from fault_proxy import BEFORE, BODY, fault_proxy
from range_server import range_server
from records import make_record
from redis_server import PASSWORD, running_redis
from test_loader_stream import RECIPE, assert_equal, build_store, by_sample, make_loader, take

from foldfeed.feature_store import FeatureStore, StoreSettings, write_part
from foldfeed.feature_store.care.copy import copy_store
from foldfeed.feature_store.cli.main import main
from foldfeed.loader import CacheConfig, Component, CropLoader, LoaderConfigError, Recipe, Sampling
from foldfeed.loader.cache import redis_server as tier
from foldfeed.loader.cache.config import cache_of_options
from foldfeed.loader.cache.eviction import unknown_uses
from foldfeed.loader.reading import cached_reader
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.trainer.config import DataConfig, RunConfig

pytestmark = pytest.mark.timeout(200)
needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name is Linux's")
BLOCK = 1024
# Less memory than the store has: blocks go and come again.
SMALL = {"block_bytes": BLOCK, "memory_bytes": 24 * BLOCK}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return build_store(tmp_path_factory.mktemp("cache") / "store")


@pytest.fixture(scope="module")
def truth(local):
    with make_loader(local) as loader:
        return {g: loader.sample(g) for g in range(48)}


@pytest.fixture
def far(local):
    """The store behind HTTP, and the requests so far."""
    with range_server(Path(local.url)) as (url, requests):
        yield FeatureStore.open(url), requests


def part_requests(requests) -> int:
    return sum("/parts/" in path for _, path in requests)


def run(store, truth, cache, steps: int = 6, **ways) -> dict[str, float]:
    with make_loader(store, cache=cache, **ways) as loader:
        assert_equal(by_sample(take(loader, steps)), {g: truth[g] for g in range(8 * steps)})
        return loader.stats


@pytest.mark.parametrize(
    "ways", [{"num_threads": 3}, pytest.param({"num_processes": 2}, marks=needs_memfd)], ids=str
)
def test_batches_are_those_without_a_cache_and_a_warm_one_asks_the_store_for_nothing(
    far, truth, tmp_path, ways
):
    store, requests = far
    cache = CacheConfig(folder=tmp_path / "cache", **SMALL)
    cold = run(store, truth, cache, **ways)
    assert cold["cache_store_hits"] > 0
    assert cold["cache_memory_evictions"] > 0
    before = part_requests(requests)
    warm = run(store, truth, cache, **ways)
    assert part_requests(requests) == before
    assert warm["cache_store_hits"] == warm["cache_damaged"] == 0
    assert warm["cache_folder_bytes"] > 0
    assert warm["cache_memory_hits"] > 0
    # Nothing but memory, and enough of it: every block is read once.
    alone = run(store, truth, CacheConfig(block_bytes=BLOCK), num_threads=1)
    assert alone["cache_store_hits"] <= cold["cache_store_hits"]
    assert alone["cache_memory_evictions"] == 0
    # A loop that is left early, twice in one process, leaves nothing behind.
    with make_loader(store, cache=cache) as one, make_loader(store, cache=cache) as other:
        take(one, 1)
        take(other, 1)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("foldfeed-")]


def test_what_is_damaged_in_the_folder_is_removed_and_read_from_the_store(far, truth, tmp_path, caplog):
    store, _ = far
    cache = CacheConfig(folder=tmp_path / "cache", **SMALL)
    run(store, truth, cache)
    files = sorted(path for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file())
    choice = random.Random(4)
    contents = {}
    for number, path in enumerate(files):
        contents[path] = data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
        elif number % 3 == 1:
            del data[choice.randrange(len(data)) :]
        else:
            # A whole block under the name of another.
            data[:] = files[number - 1].read_bytes() + b"!"
        path.write_bytes(data)
    stats = run(store, truth, cache)
    assert stats["cache_damaged"] == len(files)
    assert stats["cache_store_hits"] >= len(files)
    assert stats["cache_folder_hits"] <= stats["cache_store_hits"]
    assert caplog.text.count("is damaged; it is removed") == 1
    assert run(store, truth, cache)["cache_damaged"] == 0


def test_a_network_that_fails_and_a_cache_give_the_same_batches(local, truth, tmp_path, monkeypatch):
    """Wrong bytes of the right length come, too: they are not kept as if they were the store's."""
    monkeypatch.setenv("FOLDFEED_STORAGE_ATTEMPTS", "20")
    monkeypatch.setenv("FOLDFEED_STORAGE_PAUSE_S", "0.002")
    with range_server(Path(local.url)) as (url, _), fault_proxy(url) as proxy:
        store = FeatureStore.open(proxy.url)
        proxy.inject(0.3, 5, kinds=(*BEFORE, *BODY, "cut after", "slow"))
        cache = CacheConfig(folder=tmp_path / "cache", **SMALL)
        run(store, truth, cache)
        assert proxy.done.total() - proxy.done["requests"] > 5
        proxy.calm()
        assert run(store, truth, cache)["cache_store_hits"] == 0


def test_bytes_that_were_wrong_when_they_came_are_replaced_in_every_tier(local, truth, tmp_path):
    """The checksum of a tier vouches for what came; only the store's own checksums know that it was wrong."""
    with range_server(Path(local.url)) as (url, _):
        store = FeatureStore.open(url)
        cache = CacheConfig(folder=tmp_path / "cache", **SMALL)
        other = build_store(tmp_path / "copy")
        for path in Path(other.url).rglob("parts/*/msa/c/0/0/0"):
            data = bytearray(path.read_bytes())
            data[len(data) // 4] ^= 0x10
            path.write_bytes(data)
        with range_server(Path(other.url)) as (bad_url, _):
            bad = FeatureStore.open(bad_url)
            with make_loader(bad, cache=cache, on_unreadable="substitute") as loader:
                take(loader, 6)
                assert loader.stats["substituted"] > 0
        run(store, truth, cache)
        assert run(store, truth, cache)["cache_store_hits"] == 0


def test_redis_fills_and_serves_and_its_loss_only_slows_things_down(far, local, truth, tmp_path, monkeypatch):
    monkeypatch.setattr(tier, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(tier, "LONGEST_PAUSE_S", 0.02)
    store, requests = far
    with running_redis(tmp_path / "redis", "--requirepass", PASSWORD) as server:
        cache = CacheConfig(
            redis_url=f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0",
            block_bytes=BLOCK,
            memory_bytes=6 * BLOCK,
        )
        run(store, truth, cache)
        before = part_requests(requests)
        stats = run(store, truth, cache)
        assert part_requests(requests) == before
        assert stats["cache_redis_bytes"] > 0
        with make_loader(local) as plain, make_loader(store, cache=cache, prefetch_steps=1) as loader:

            def steps_until(name: str, least: float) -> None:
                for _ in range(200):
                    assert_equal(by_sample(take(loader, 1)), by_sample(take(plain, 1)))
                    if loader.stats[name] >= least:
                        return
                raise AssertionError(f"{name} stays below {least}: {loader.stats}")

            steps_until("cache_redis_hits", 1)
            server.kill()
            steps_until("cache_redis_outages", 1)
            server.start()
            # It is empty now: it is filled again, and serves what memory has let go.
            steps_until("cache_redis_hits", loader.stats["cache_redis_hits"] + 5)
            assert loader.stats["cache_redis_refused"] == 0


def test_a_wrong_password_is_an_error_at_the_start_that_does_not_show_it(local, tmp_path):
    with running_redis(tmp_path / "redis", "--requirepass", PASSWORD) as server:
        for secret in ("wrong-secret", ""):
            url = f"redis://{f':{secret}@' if secret else ''}127.0.0.1:{server.port}"
            with pytest.raises(LoaderConfigError, match="refuses user or password") as caught:
                make_loader(local, cache=CacheConfig(redis_url=url, **SMALL))
            assert not secret or secret not in str(caught.value)
            assert not secret or secret not in repr(CacheConfig(redis_url=url))
    # Nobody there: lost from the beginning, and nothing more.
    with make_loader(
        local, cache=CacheConfig(redis_url=f"redis://127.0.0.1:{server.port}", **SMALL)
    ) as loader:
        take(loader, 1)
        assert loader.stats["cache_redis_outages"] == 1


def test_a_weighted_order_and_ranks_through_one_folder(far, local, tmp_path):
    store, _ = far
    sampling = Sampling(kind="weighted", epoch_samples=16)
    cache = CacheConfig(folder=tmp_path / "cache", folder_bytes=40 * BLOCK, **SMALL)
    with make_loader(local, sampling=sampling) as loader:
        want = by_sample(take(loader, 4))
    found = {}
    for rank in range(3):
        with make_loader(store, sampling=sampling, cache=cache, rank=rank, world=3) as loader:
            found |= by_sample(take(loader, 4))
    assert_equal(found, want)
    blocks = [path for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in blocks) <= 40 * BLOCK


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory_bytes": 3}, "four blocks"),
        ({"folder": "s3://bucket/x"}, "local disk"),
        ({"redis_url": "http://user:secret@host"}, r"http://\*\*\*@host.*rediss://"),
        ({"in_flight": 0}, "from 1 to"),
        ({"prefetch_bytes": 1 << 40}, "fit into memory_bytes"),
        ({"hedge": 1}, "True or False"),
        ({"redis_timeout_s": float("nan")}, "seconds above 0"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(LoaderConfigError, match=message):
        CacheConfig(**values)


def test_a_folder_that_is_no_place_for_a_cache_is_refused_and_left_alone(local, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("my only copy")
    inside = Path(local.url) / "parts" / "cache"
    cases = {tmp_path / "mine": "other things, e.g. 'thesis.txt'", inside: "overlaps the store"}
    cases |= {Path(local.url).parent: "overlaps the store"}
    other = build_store(tmp_path / "other")
    cases[Path(other.url) / "cache"] = "lies in the store"
    for folder, message in cases.items():
        with pytest.raises(LoaderConfigError, match=message):
            CropLoader(local, RECIPE, seed=1, global_batch=1, cache=CacheConfig(folder=folder))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not inside.exists()
    with make_loader(local, cache=CacheConfig(folder=tmp_path / "new", block_bytes=2048)):
        pass
    with pytest.raises(LoaderConfigError, match="2048"):
        make_loader(local, cache=CacheConfig(folder=tmp_path / "new", block_bytes=4096))


def test_options_take_the_password_from_the_environment_and_refuse_it_in_the_url(monkeypatch):
    assert cache_of_options("", 0, 0, "") is None
    monkeypatch.setenv("FOLDFEED_REDIS_PASSWORD", "a:b@c/%")
    cache = cache_of_options("", 0, 5.0, "rediss://reader@host:6380/2?ssl_ca_certs=/ca.pem")
    assert cache.redis_url == "rediss://reader:a%3Ab%40c%2F%25@host:6380/2?ssl_ca_certs=/ca.pem"
    assert cache.memory_bytes == 5_000_000
    assert "a%3A" not in repr(cache)
    assert "a%3A" not in json.dumps(cache.facts())
    for url in ("redis://:secret@host", "redis://host?password=secret"):
        with pytest.raises(LoaderConfigError, match="FOLDFEED_REDIS_PASSWORD") as caught:
            cache_of_options("", 0, 0, url)
        assert "secret" not in str(caught.value)
    with pytest.raises(LoaderConfigError, match="give --cache-folder"):
        cache_of_options("", 1.0, 0, "")


def test_bench_loader_and_trainer_take_a_cache(far, tmp_path):
    store, _ = far
    options = [
        "bench",
        "loader",
        store.url,
        "--crop-residues",
        "12",
        "--num-clusters",
        "5",
        "--num-extra",
        "7",
    ]
    options += ["--seconds", "0.3", "--step-ms", "1", "--cache-folder", str(tmp_path / "cache")]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert re.search(r"blocks from memory \d+ .*, folder \d+ .*, redis 0 .*, store [1-9]", result.output)
    # Where blocks are kept decides no number, and what happens to damage does.
    plain = RunConfig(output="o", data=DataConfig(store="s"))
    cached = dataclasses.replace(plain, data=DataConfig(store="s", cache_folder="c", cache_redis="redis://h"))
    other = dataclasses.replace(plain, data=DataConfig(store="s", on_unreadable="substitute"))
    assert plain.digest() == cached.digest() != other.digest()


def test_the_order_of_the_loader_saves_reads_of_the_store(tmp_path, monkeypatch):
    """One thread and nothing brought ahead, so that both runs ask for the same blocks in the same order."""
    store = FeatureStore.create(tmp_path / "store", StoreSettings(tile_rows=16, tile_cols=8))
    records = [make_record(f"r{n:02}", 60, 30, seed=n) for n in range(40)]
    store.commit([write_part(store.url, records, store.settings).part_id], job_id="1")
    recipe = Recipe.named("crop_first", crop_residues=12, num_clusters=5, num_extra=40)
    cache = CacheConfig(block_bytes=BLOCK, memory_bytes=32 * BLOCK, prefetch_bytes=0, hedge=False)
    reads = {}
    for name in ("the future", "least recently used"):
        if name != "the future":
            monkeypatch.setattr(cached_reader, "BlockUse", lambda *arguments: unknown_uses)
        with make_loader(store, recipe, cache=cache, num_threads=1, prefetch_steps=1) as loader:
            take(loader, 15)
            reads[name] = loader.stats["cache_store_hits"]
    assert reads["the future"] < 0.8 * reads["least recently used"], reads


@needs_memfd
def test_a_store_in_a_bucket_and_processes_that_die_beside_a_folder(local, truth, s3, tmp_path):
    copy_store(local.url, s3)
    store = FeatureStore.open(s3)
    cache = CacheConfig(folder=tmp_path / "cache", **SMALL)
    with make_loader(store, cache=cache, num_processes=2, read_ahead_bytes=30_000) as loader:
        batches = take(loader, 1)
        for _ in range(3):
            os.kill(loader._supply.pids[0], signal.SIGKILL)
            batches += take(loader, 1)
        assert_equal(by_sample(batches), {g: truth[g] for g in range(32)})
        assert loader.stats["cache_damaged"] == 0
    stats = run(store, truth, cache)
    assert stats["cache_folder_hits"] > 0
    assert stats["cache_damaged"] == 0


def test_tls_is_spoken_and_a_certificate_that_nobody_knows_is_an_error(local, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on PATH to make a certificate with")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate)
    with running_redis(
        tmp_path / "redis",
        *map(str, options),
        "--tls-auth-clients",
        "no",
        "--requirepass",
        PASSWORD,
        tls=True,
    ) as server:
        url = f"rediss://:{PASSWORD}@127.0.0.1:{server.port}"
        with pytest.raises(LoaderConfigError, match=r"not trusted.*ssl_ca_certs=FILE") as caught:
            make_loader(local, cache=CacheConfig(redis_url=url, **SMALL))
        assert PASSWORD not in str(caught.value)
        with make_loader(
            local, cache=CacheConfig(redis_url=f"{url}?ssl_ca_certs={certificate}", **SMALL)
        ) as one:
            take(one, 1)
            assert one.stats["cache_redis_outages"] == 0


@pytest.mark.parametrize("row_order", ["rank", "permuted"])
@pytest.mark.parametrize("name", ["af2_initial", "crop_first", "af3", "masked_lm"])
def test_everything_that_a_sample_reads_is_brought_before_it_is_read(tmp_path, row_order, name):
    settings = dataclasses.replace(
        StoreSettings.with_row_order(row_order, 3 if row_order == "permuted" else None),
        tile_rows=16,
        tile_cols=8,
    )
    store = FeatureStore.create(tmp_path / "store", settings)
    records = [make_record(f"r{n}", 9 + 20 * n, 13 + 6 * n, seed=n) for n in range(5)]
    store.commit([write_part(store.url, records, settings).part_id], job_id="1")
    sizes = {"crop_residues": 12, "num_clusters": 9, "labels": True}
    recipe = Recipe.named(
        name, **sizes, **({"num_extra": 7} if name in ("af2_initial", "crop_first") else {})
    )
    sampling = None
    if name == "crop_first":
        # Labels by confidence read more, other alignments of a sample none.
        recipe = dataclasses.replace(recipe, max_recycles=1, resample_msa_in_recycling=True)
        sampling = Sampling(components=(Component(min_plddt=50.0),))
    reader = SampleReader(store, recipe, sampling, seed=2, global_batch=1, virtual_shards=1)
    through = cached_reader.CachedReader(reader, CacheConfig(block_bytes=BLOCK), [0])
    for sample in range(15):
        with through._ahead.reading(sample):
            brought = through.counters()["cache_store_hits"]
            through._reader.read(sample)
            assert through.counters()["cache_store_hits"] == brought, sample
        # What other records brought must not hide what this one did not.
        through.tiers.memory.clear()
    through.close()
