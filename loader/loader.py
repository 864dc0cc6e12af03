"""`CropLoader`: batches from a store, the same for any number of threads, ranks and restarts.

Order (which record) -> plan (what to read) -> fetch (I/O) -> featurise -> steps in order. This module ties
them together and owns the position in the stream; every step of the way lives in a module of its own.

Invariants: ``sample(g)`` is a function of (store fingerprint, sampling, recipe, seed, g); the position counts
steps that the consumer has received, never steps made ahead; a sample that cannot be made raises, it is never
skipped, nor replaced by another unless the loader was told so (``on_unreadable``). One consumer thread per
loader. A loader does not survive a fork (its threads would be missing in the child) and cannot be pickled:
make it in the process that uses it, ``spawn`` is fine.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from foldfeed.loader.batch import StepBatch
from foldfeed.loader.cache.config import CacheConfig
from foldfeed.loader.cache.tiers import COUNTERS, check_cache
from foldfeed.loader.errors import LoaderConfigError, LoaderUseError
from foldfeed.loader.features.device import ReadyStep, feature_maker, resolve_device
from foldfeed.loader.features.draws import whole_sample
from foldfeed.loader.features.forms import FORMS, FULL
from foldfeed.loader.meters.meters import ASSEMBLE, PREPARE, TRAIN, WAIT, Meters
from foldfeed.loader.meters.stall import DeviceStall
from foldfeed.loader.order.order import rank_shards
from foldfeed.loader.order.placement import ORDER, PLACEMENTS, STORAGE, StoragePlacement
from foldfeed.loader.order.sampling import Sampling
from foldfeed.loader.order.selection import Store
from foldfeed.loader.order.state import LoaderState
from foldfeed.loader.prefetch import StepPrefetcher
from foldfeed.loader.reading.cached_reader import CachedReader
from foldfeed.loader.reading.plan import SamplePlan, draw_num_recycles
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.reading.reading import OwnThreads, ReadingProcesses
from foldfeed.loader.reading.supply import SampleSupply
from foldfeed.loader.recipe import Recipe
from foldfeed.loader.step_work import StepWork
from foldfeed.loader.unreadable import STOP

# A sample of AlphaFold 2's sizes takes 0.4 to 0.7 MB as read.
READ_AHEAD_BYTES = 256 << 20
# Of the names in `CropLoader.stats` that count what caches did.
CACHE_PREFIX = "cache_"


class CropLoader:
    """An endless stream of training steps.

    Example:
      >>> store = FeatureStore.open("demo-output/store")
      >>> with CropLoader(store, Recipe.named("af2", crop_residues=64), seed=1, global_batch=4) as loader:
      ...     for batch in loader:
      ...         train(batch.shards)
      ...         checkpoint(loader.state_dict())

    Attributes:
      store: what it reads.
      recipe: how samples are made.
      sampling: which records are drawn, and how often.
      order: which record comes when.
      shards: the virtual shards of this rank.
      device: where the tensors of a batch are.
      features: their form.
    """

    def __init__(
        self,
        store: Store | Mapping[str, Store],
        recipe: Recipe,
        *,
        seed: int,
        global_batch: int,
        sampling: Sampling | None = None,
        virtual_shards: int | None = None,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        features: str = FULL,
        num_threads: int = 2,
        prefetch_steps: int = 2,
        num_processes: int = 0,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        cache: CacheConfig | None = None,
        on_unreadable: str = STOP,
        placement: str = ORDER,
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        """Checks everything and reads nothing; threads start with the first batch.

        Args:
          store: one version of a store, or a view of it such as ``store.subset(name)``; or several, by the
            names that the sampling uses.
          recipe: how samples are made.
          seed: of the run.
          global_batch: samples of one step over all ranks.
          sampling: which records, how often; every record once an epoch when None.
          virtual_shards: equal parts of a step, a divisor of global_batch; global_batch when None.
          rank: this process, 0..world-1.
          world: processes that share a step, at most virtual_shards.
          device: ``cpu`` or ``cuda[:N]``.
          features: ``full`` as models take them, or ``compact``: codes instead of one-hot channels and
            bfloat16, a quarter of the bytes, see `features.forms`.
          num_threads: threads that read and prepare samples; no effect on the numbers.
          prefetch_steps: steps kept ready ahead of the consumer; bounds memory.
          num_processes: processes that read samples into shared memory, with ``num_threads`` threads each, so
            that reading leaves this interpreter alone (Linux); 0 reads in the threads here. No effect on the
            numbers.
          read_ahead_bytes: shared memory of those processes together: samples read and not yet prepared.
          cache: where to keep what was read of a store behind a network; None for nowhere. No effect on the
            numbers.
          on_unreadable: ``stop`` raises where a record is damaged; ``substitute`` makes the sample from
            another record, a function of (seed, sample, attempt), says so in the batch and warns. Part of the
            stream's identity.
          placement: ``order``, or ``storage`` to give each machine mostly records that are stored together,
            see `order.placement`. A step's samples are the same; part of the stream's identity.
          trace: a file to write what every thread did when, see `tracing`, until `close`.
        Raises:
          LoaderConfigError: a value that cannot work; a cache's folder or server that cannot be used.
          MissingExtraError: the cache needs a package that is not installed.
          OSError: the trace cannot be written.
        """
        for field, value in (("num_threads", num_threads), ("prefetch_steps", prefetch_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LoaderConfigError(field, value, "must be an integer of at least 1")
        self._reader = SampleReader(
            store,
            recipe,
            sampling,
            seed=seed,
            global_batch=global_batch,
            virtual_shards=global_batch if virtual_shards is None else virtual_shards,
            on_unreadable=on_unreadable,
        )
        self.store = store
        self.recipe = recipe
        self.sampling = self._reader.selection.sampling
        self.order = self._reader.order
        self.shards = rank_shards(self.order.virtual_shards, rank, world)
        self.device = resolve_device(device)
        if features not in FORMS:
            raise LoaderConfigError("features", features, f"must be one of {', '.join(map(repr, FORMS))}")
        self.features = features
        self._maker = feature_maker(recipe, self.device, features, prefetch_steps)
        for field, value, least in (
            ("num_processes", num_processes, 0),
            ("read_ahead_bytes", read_ahead_bytes, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise LoaderConfigError(field, value, f"must be an integer of at least {least}")
        if cache is not None:
            if not isinstance(cache, CacheConfig):
                raise LoaderConfigError(
                    "cache", cache, "is no CacheConfig; pass e.g. CacheConfig(folder='...')"
                )
            check_cache(cache, self._reader.selection.urls)
        if placement not in PLACEMENTS:
            raise LoaderConfigError("placement", placement, f"must be one of {', '.join(PLACEMENTS)}")
        self._placement = placement
        self._shard_samples: Callable[[int, int], Sequence[int]] = self.order.shard_samples
        if placement == STORAGE:
            placed = StoragePlacement(self.order, self._reader.selection.places())
            self._shard_samples = placed.shard_samples
        self._cache = cache
        self._cache_counts: Counter[str] = Counter()
        self._num_processes = num_processes
        self._read_ahead_bytes = read_ahead_bytes
        self._supply: SampleSupply | None = None
        self._work: StepWork | None = None
        self._num_threads = num_threads
        self._prefetch_steps = prefetch_steps
        self._step = 0
        # A step of which this rank makes other virtual shards than its own, and which.
        self._odd_step: tuple[int, Sequence[int]] = (-1, ())
        self._steps: StepPrefetcher[Any, ReadyStep] | None = None
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._counters = {"steps": 0, "samples": 0, "bytes": 0, "fetch_s": 0.0, "prepare_s": 0.0}
        self._counters["substituted"] = 0
        self._waited_s = 0.0
        self._meters = Meters()
        self._stall = DeviceStall(self.device) if self.device.type == "cuda" else None
        if trace is not None:
            self._meters.begin_trace(trace)

    def plan(self, sample: int, draw: int = 0) -> SamplePlan:
        """Returns what a sample reads, without reading it.

        Args:
          sample: global number.
          draw: which of its alignments, where the recipe draws one for every recycling iteration.
        Raises:
          LoaderConfigError: a negative number, or a draw that the recipe has not.
          SampleError: the store cannot find the record's part.
        """
        if not 0 <= draw < self.recipe.num_draws:
            raise LoaderConfigError("draw", draw, f"must be in 0..{self.recipe.num_draws - 1} of this recipe")
        return self._reader.planned(sample * self.recipe.num_draws + draw).plan

    def sample(self, sample: int) -> dict[str, torch.Tensor]:
        """Returns one sample, a pure function of its global number: no leading axis, on this loader's device.

        Read here and now, past the cache. With ``resample_msa_in_recycling`` it holds the alignments of all
        ``max_recycles + 1`` iterations; a step holds the first ``num_recycles + 1`` of them.

        Raises:
          LoaderConfigError: a negative number.
          SampleError: it could not be read.
        """
        self._check_usable()
        return whole_sample(self._reader, sample, self.device, self.features)

    def num_recycles(self, step: int) -> int:
        """Returns the recycling iterations of a step, on every rank, see `StepBatch`."""
        return draw_num_recycles(self.recipe, self.order.seed, step)

    def __iter__(self) -> CropLoader:
        return self

    def __next__(self) -> StepBatch:
        """Returns the next step.

        Raises:
          SampleError: one of its samples could not be read. The position stays: asking again tries again.
          LoaderUseError: the loader is closed or was inherited over a fork.
        """
        self._check_usable()
        consumer = self._meters.stage(TRAIN).worker()
        started = consumer.mark("")
        if self._stall is not None:
            self._stall.asked()
        try:
            batch = self._maker.hand_over(self._started().next())
        except BaseException:
            self._stop()
            raise
        if self._stall is not None:
            self._stall.arrived()
        assert batch.step == self._step, (batch.step, self._step)
        self._step += 1
        self._add(steps=1, samples=batch.num_samples)
        self._meters.count(steps=1, samples=batch.num_samples)
        waited_s = consumer.mark(TRAIN) - started
        self._meters.took("step_wait", waited_s)
        self._meters.event(WAIT, started, waited_s, {"step": batch.step})
        batch = dataclasses.replace(batch, num_recycles=self.num_recycles(batch.step))
        return self._with_substitutions(batch)

    def epoch(self) -> Iterator[StepBatch]:
        """Yields the steps from the position to the end of its epoch (those that begin in it).

        Called again it goes on with the next epoch; after a resume it yields what was left. How an epoch ends
        where its size is no multiple of the batch is the sampling's ``epoch_end``.
        """
        stop = self.order.epoch_steps(self.order.epoch_of_step(self._step)).stop
        while self._step < stop:
            yield next(self)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Returns the position as JSON-able values: the next step to be consumed, and what it counts.

        Steps made ahead but not received do not count. The position does not depend on rank, world, virtual
        shards or threads, so any number of ranks may go on from it.

        Args:
          step: another position: what comes first after a resume. For those who hold back steps they have
            received, as Lightning does; ``batch.step + 1`` when ``batch`` is the last one trained on.
        Raises:
          LoaderConfigError: a negative step.
        """
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise LoaderConfigError(
                "step", step, "must be an integer of at least 0: steps are counted from 0"
            )
        return self._state(self._step if step is None else step).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position; what was made ahead is dropped.

        Raises:
          StateMismatchError: it belongs to another store, recipe, seed or global batch.
          LoaderStateError: it is no such position.
        """
        self._check_usable()
        found = LoaderState.from_dict(state)
        found.check_same_stream(self._state(found.step))
        self._stop()
        self._step = found.step

    def redivide(self, step: int, rank: int, world: int, first: Sequence[int] | None = None) -> None:
        """Goes to a position as another part of the ranks; what was made ahead is dropped.

        Args:
          step: the next step to be consumed.
          rank: this process, 0..world-1.
          world: processes that share a step from now on.
          first: virtual shards that this process makes of that step alone, for instance those that a lost one
            did not; its own when None.
        Raises:
          LoaderConfigError: a value that cannot work. Nothing has changed then.
        """
        self._check_usable()
        shards = rank_shards(self.order.virtual_shards, rank, world)
        if first is not None and not set(first) <= set(range(self.order.virtual_shards)):
            raise LoaderConfigError(
                "first", list(first), f"must be virtual shards, 0..{self.order.virtual_shards - 1}"
            )
        state = self.state_dict(step)
        # First, because what is under way belongs to the part that this was.
        self._stop()
        self.shards = shards
        self._odd_step = (step, sorted(first)) if first is not None else (-1, ())
        self.load_state_dict(state)

    @property
    def stats(self) -> dict[str, float]:
        """Counters since the loader was made.

        ``steps`` and ``samples`` received; ``bytes`` of raw samples read, decoded; ``fetch_s`` and
        ``prepare_s`` spent in worker threads on reading and on features, made-ahead samples included;
        ``wait_s`` that the consumer waited; ``substituted`` samples received that are made from another
        record. With a cache also `foldfeed.loader.cache.tiers.COUNTERS`: hits and bytes of each tier (those
        of ``store`` were read from it), evictions, damaged entries, and what became of Redis and of second
        requests.
        """
        steps = self._steps
        running = steps.wait_s if steps is not None else 0.0
        with self._lock:
            counts = Counter(self._cache_counts)
            if self._supply is not None:
                counts.update(self._supply.counters())
            cached = {} if self._cache is None else {name: float(counts[name]) for name in COUNTERS}
            return {**self._counters, "wait_s": self._waited_s + running, **cached}

    def meters(self) -> dict[str, Any]:
        """Returns what was counted since the loader was made, as plain data (JSON-able).

        What `meters.meters.Meters.report` says, and: ``bytes`` of raw samples; ``substituted``, how
        many samples received are made from another record; ``wait_s`` inside of ``next()`` and ``stall_s``
        that the consumer's work stood still (`meters.stall`); ``queues`` now; ``cache``, the
        counters of tiers. `meters.reports` makes tables and text of it.
        """
        steps, supply, stats, report = self._steps, self._supply, self.stats, self._meters.report()
        queues = {"steps_ready": steps.num_ready(), "steps_ahead": self._prefetch_steps} if steps else {}
        wait_s = report["latencies"]["step_wait"]["sum_s"]
        return {
            **report,
            "bytes": stats["bytes"],
            "substituted": stats["substituted"],
            "wait_s": wait_s,
            "stall_s": wait_s if self._stall is None else self._stall.seconds,
            "queues": queues | (supply.queued() if supply else {}),
            "cache": {
                name.removeprefix(CACHE_PREFIX): value
                for name, value in stats.items()
                if name.startswith(CACHE_PREFIX)
            },
        }

    def tracing(self, path: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """Returns a context in which what every thread and reading process does is written, see `Tracer`.

        Raises:
          LoaderUseError: a trace is written already, or the loader is closed.
          OSError: the file cannot be written.
        """
        self._check_usable()
        return self._meters.tracing(path)

    def close(self) -> None:
        """Ends all threads and the trace. Idempotent; the loader cannot be used afterwards.

        Raises:
          OSError: the trace was cut short; all else has ended.
        """
        if self._pid == os.getpid():
            self._stop()
            self._closed = True
            self._meters.end_trace()
        self._closed = True

    def __enter__(self) -> CropLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise LoaderUseError(
            "a CropLoader holds threads and cannot be pickled; pass the store and the recipe to the other "
            "process and make the loader there"
        )

    def _started(self) -> StepPrefetcher[Any, ReadyStep]:
        """Returns the steps to come; their threads and processes are started if there are none."""
        if self._steps is None:
            self._supply = self._new_supply()
            work = self._work = StepWork(
                *(self._reader, self._supply, self._maker, self._layout, self._meters, self._add, self._step)
            )
            self._steps = StepPrefetcher(
                work.tasks,
                work.assembled,
                first_step=self._step,
                depth=self._prefetch_steps,
                num_threads=self._num_threads,
                # Processes have an order of their own; room that they fill must be emptied in that order.
                costs=None if self._num_processes else work.costs,
                begin_worker=self._meters.stage(PREPARE).join,
                begin_assembler=self._meters.stage(ASSEMBLE).join,
            )
        return self._steps

    def _new_supply(self) -> SampleSupply:
        # By storage any rank may get any sample: then the next use by all of them is the best that is known.
        shards = self.shards if self._placement == ORDER else range(self.order.virtual_shards)
        cache = None if self._cache is None else (self._cache, tuple(shards))
        if self._num_processes:
            sizes = (self._num_processes, self._num_threads, self._read_ahead_bytes)
            return ReadingProcesses(self._reader, *sizes, self._meters, cache)
        reader = self._reader if cache is None else CachedReader(self._reader, *cache)
        return OwnThreads(reader, self._meters)

    def _with_substitutions(self, batch: StepBatch) -> StepBatch:
        """Returns a batch that says which of its samples are made from another record."""
        assert self._work is not None
        found = [self._work.taken(shard.samples) for shard in batch.shards]
        if not any(found):
            return batch
        self._add(substituted=sum(map(len, found)))
        shards = [
            dataclasses.replace(shard, substitutions=replaced)
            for shard, replaced in zip(batch.shards, found, strict=True)
        ]
        return dataclasses.replace(batch, shards=shards)

    def _layout(self, step: int) -> list[tuple[int, Sequence[int]]]:
        odd_step, odd_shards = self._odd_step
        shards = odd_shards if step == odd_step else self.shards
        samples = ((shard, self._shard_samples(step, shard)) for shard in shards)
        return [(shard, numbers) for shard, numbers in samples if numbers]

    def _state(self, step: int) -> LoaderState:
        return LoaderState(
            step=step,
            seed=self.order.seed,
            global_batch=self.order.global_batch,
            recipe_digest=self.recipe.digest,
            store_fingerprint=self._reader.selection.store_fingerprint,
            sampling_digest="" if self.sampling == Sampling() else self.sampling.digest,
            selection_fingerprint=self._reader.selection.fingerprint,
            on_unreadable=self._reader.on_unreadable,
            placement=self._placement,
        )

    def _add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counters[name] += amount

    def _stop(self) -> None:
        supply = self._supply
        if supply is not None:
            # First, so that threads that wait for a sample learn that none will come.
            supply.close()
        if self._steps is not None:
            self._steps.close()
            self._waited_s += self._steps.wait_s
            self._steps = None
        self._work = None
        if supply is not None:
            with self._lock:
                self._cache_counts.update(supply.counters())
                self._supply = None
        self._maker.drop()
        self._meters.leave()

    def _check_usable(self) -> None:
        if self._closed:
            raise LoaderUseError("this CropLoader is closed; make a new one")
        if self._pid != os.getpid():
            raise LoaderUseError(
                f"this CropLoader was made in process {self._pid} and inherited by process {os.getpid()} "
                "over a fork, where its threads do not exist; make it in the process that uses it"
            )
