"""Faults while a loader runs: every sample must be that of a quiet run, and nothing may hang or be left.

    python tests/campaigns/loader_faults.py --runs 40 --seed 1

Each run reads a small store (a folder, or HTTP through a proxy that breaks requests) with drawn recipe,
ranks, threads, reading processes and cache tiers; at random steps the stream changes hands, to another number
of ranks. Meanwhile faults happen: SIGKILL and SIGSTOP of reading processes, flipped and cut blocks in the
cache's folder, blocks that vanish, a Redis server that is killed and comes back. A digest of every sample is
compared with that of a loader without cache and processes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from fault_proxy import BEFORE, BODY, fault_proxy  # noqa: E402
from range_server import range_server  # noqa: E402
from redis_server import RedisServer, running_redis  # noqa: E402
from test_loader_stream import build_store  # noqa: E402

from foldfeed.feature_store import FeatureStore  # noqa: E402
from foldfeed.loader import CacheConfig, CropLoader, Recipe, StepBatch  # noqa: E402

SIZES = {"crop_residues": 12, "num_clusters": 5}
RECIPES = {
    "af2": Recipe.named("af2", **SIZES, num_extra=7),
    "crop_first": Recipe.named("crop_first", **SIZES, num_extra=7, labels=True),
    "recycled": Recipe.named(
        "crop_first", **SIZES, num_extra=7, max_recycles=2, resample_msa_in_recycling=True
    ),
    "af3": Recipe.named("af3", **SIZES),
}
SEED, BATCH, STEPS = 3, 6, 30
LIMIT_S = 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """How one run reads.

    Attributes:
      recipe: name in `RECIPES`.
      worlds: numbers of ranks, one after the other; the stream changes hands at random steps.
      processes: reading processes of each rank.
      threads: of each rank or process.
      far: the store is read over HTTP.
      tiers: of the cache; none for no cache.
    """

    recipe: str
    worlds: tuple[int, ...]
    processes: int
    threads: int
    far: bool
    tiers: frozenset[str]


def draw_setup(draw: random.Random) -> Setup:
    """Returns one drawn way of reading."""
    tiers = frozenset(tier for tier in ("folder", "redis") if draw.random() < 0.6)
    return Setup(
        recipe=draw.choice(sorted(RECIPES)),
        worlds=tuple(draw.choice([1, 2, 3]) for _ in range(draw.choice([1, 2, 3]))),
        processes=draw.choice([0, 0, 1, 2]),
        threads=draw.choice([1, 2, 4]),
        far=draw.random() < 0.5,
        tiers=tiers,
    )


def digest_of(features: dict[str, torch.Tensor]) -> str:
    """Returns a digest of names, dtypes, shapes and bytes."""
    made = hashlib.sha256()
    for name, tensor in sorted(features.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        made.update(tensor.contiguous().numpy().tobytes())
    return made.hexdigest()


def digests(batch: StepBatch) -> Iterator[tuple[int, str]]:
    """Yields (sample, digest)."""
    for shard in batch.shards:
        for slot, sample in enumerate(shard.samples):
            yield sample, digest_of({name: tensor[slot] for name, tensor in shard.features.items()})


def truth_of(store: FeatureStore, recipe: Recipe) -> dict[int, str]:
    """Returns the digests of a quiet run on one rank."""
    with CropLoader(store, recipe, seed=SEED, global_batch=BATCH, num_threads=1) as loader:
        return dict(pair for _ in range(STEPS) for pair in digests(next(loader)))


class Trouble:
    """Makes faults in the background until it is closed."""

    def __init__(self, draw: random.Random, folder: Path, redis: RedisServer | None) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        # Steps that came: a process that is killed thrice before a sample comes gives up, and says so.
        self.steps = 0
        self._killed_at = -1
        self._draw, self._folder, self._redis = draw, folder, redis
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trouble")
        self._thread.start()

    def close(self) -> None:
        """Ends the trouble."""
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        kinds: list[Callable[[], str]] = [self._kill, self._stop, self._flip, self._cut, self._remove]
        if self._redis is not None:
            kinds.append(self._lose_redis)
        while not self._done.wait(self._draw.uniform(0.02, 0.3)):
            if happened := self._draw.choice(kinds)():
                self.counts[happened] += 1

    def _reader(self) -> int | None:
        """Returns the pid of one of this process's reading processes."""
        found = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (task / "children").read_text().split()]
        readers = []
        for pid in found:
            with contextlib.suppress(OSError):
                if b"reading_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    readers.append(pid)
        return self._draw.choice(readers) if readers else None

    def _kill(self) -> str:
        if self.steps == self._killed_at or (pid := self._reader()) is None:
            return ""
        self._killed_at = self.steps
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return "killed"

    def _stop(self) -> str:
        if (pid := self._reader()) is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._draw.uniform(0.01, 0.3))
            os.kill(pid, signal.SIGCONT)
        return "stopped"

    def _block(self) -> Path | None:
        found = [path for path in self._folder.rglob("*") if path.is_file() and path.stat().st_size > 200]
        return self._draw.choice(found) if found else None

    def _flip(self) -> str:
        with contextlib.suppress(OSError):
            if path := self._block():
                raw = bytearray(path.read_bytes())
                raw[self._draw.randrange(len(raw))] ^= 1 << self._draw.randrange(8)
                path.write_bytes(raw)
                return "flipped"
        return ""

    def _cut(self) -> str:
        with contextlib.suppress(OSError):
            if path := self._block():
                os.truncate(path, self._draw.randrange(path.stat().st_size))
                return "cut"
        return ""

    def _remove(self) -> str:
        with contextlib.suppress(OSError):
            if path := self._block():
                path.unlink()
                return "removed"
        return ""

    def _lose_redis(self) -> str:
        assert self._redis is not None
        self._redis.kill()
        self._done.wait(self._draw.uniform(0.0, 0.5))
        self._redis.start()
        return "redis lost"


def read_all(
    store: FeatureStore, setup: Setup, cache: CacheConfig | None, draw: random.Random, trouble: Trouble
) -> dict[int, str]:
    """Returns the digests of all steps, read by the drawn ranks one after another."""
    found: dict[int, str] = {}
    cuts = sorted(draw.sample(range(1, STEPS), len(setup.worlds) - 1))
    state: dict[str, Any] | None = None
    for world, first, stop in zip(setup.worlds, [0, *cuts], [*cuts, STEPS], strict=True):
        states = []
        for rank in range(world):
            with CropLoader(
                store,
                RECIPES[setup.recipe],
                seed=SEED,
                global_batch=BATCH,
                rank=rank,
                world=world,
                num_threads=setup.threads,
                num_processes=setup.processes,
                prefetch_steps=draw.choice([1, 2, 4]),
                cache=cache,
            ) as loader:
                if state is not None:
                    loader.load_state_dict(state)
                for _ in range(first, stop):
                    for sample, digest in digests(next(loader)):
                        assert sample not in found, f"sample {sample} came twice"
                        found[sample] = digest
                    trouble.steps += 1
                states.append(loader.state_dict())
        assert all(other == states[0] for other in states)
        state = states[0]
    return found


@contextlib.contextmanager
def opened(local: FeatureStore, far: bool, seed: int) -> Iterator[FeatureStore]:
    """Gives the store as it is, or behind HTTP and a proxy that breaks one request in twelve."""
    if not far:
        yield local
        return
    with range_server(Path(local.url).parent) as (server, _), fault_proxy(server) as proxy:
        store = FeatureStore.open(f"{proxy.url}/{Path(local.url).name}")
        proxy.inject(0.08, seed, kinds=(*BEFORE, *BODY))
        yield store


def one_run(
    local: FeatureStore, truths: dict[str, dict[int, str]], work: Path, seed: int
) -> collections.Counter[str]:
    """Runs one drawn setup under trouble; returns what happened.

    Raises:
      AssertionError: a sample is wrong, missing or came twice; something was left behind.
    """
    draw = random.Random(seed)
    setup = draw_setup(draw)
    folder = work / f"cache{seed}"
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(running_redis(work / "redis")) if "redis" in setup.tiers else None
        cache = None
        if setup.tiers:
            cache = CacheConfig(
                memory_bytes=24 << 10,
                block_bytes=1 << 10,
                folder=folder if "folder" in setup.tiers else "",
                folder_bytes=48 << 10,
                redis_url=f"redis://127.0.0.1:{redis.port}" if redis else "",
            )
        store = stack.enter_context(opened(local, setup.far, seed))
        trouble = Trouble(draw, folder, redis)
        stack.callback(trouble.close)
        found = read_all(store, setup, cache, random.Random(seed + 1), trouble)
    wrong = [sample for sample, digest in truths[setup.recipe].items() if found.get(sample) != digest]
    assert not wrong, f"{setup}: samples {wrong[:5]} are wrong or missing"
    assert len(found) == len(truths[setup.recipe])
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("foldfeed")]
    assert not left, f"{setup}: threads are left: {left}"
    return trouble.counts


def main() -> int:
    """Runs the campaign; returns 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"FOLDFEED_STORAGE_ATTEMPTS": "20", "FOLDFEED_STORAGE_PAUSE_S": "0.002"}
    # What is lost and found again is said once each; here it happens all the time.
    logging.disable(logging.WARNING)
    started = time.monotonic()
    counts: collections.Counter[str] = collections.Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        local = build_store(work / "store")
        truths = {name: truth_of(local, recipe) for name, recipe in RECIPES.items()}
        for run in range(options.runs):
            seed = 1000 * options.seed + run
            begun = time.monotonic()
            try:
                counts += one_run(local, truths, work, seed)
                assert time.monotonic() - begun < LIMIT_S, "it took too long"
            except Exception as error:  # noqa: BLE001 - counted and told, with what makes it happen again
                failed += 1
                print(f"run {run} (seed {seed}): {type(error).__name__}: {error}", flush=True)
    print(
        f"{options.runs} runs, {failed} failed, {STEPS * BATCH} samples each; "
        + ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        + f" ({time.monotonic() - started:.0f} s)"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
