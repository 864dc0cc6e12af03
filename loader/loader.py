"""`CropLoader`: batches from a store, the same for any number of threads, ranks and restarts.

Order (which record) -> plan (what to read) -> fetch (I/O) -> featurise -> steps in order. This module ties
them together and owns the position in the stream; every step of the way lives in a module of its own.

Invariants: ``sample(g)`` is a function of (store fingerprint, recipe, seed, g); the position counts steps
that the consumer has received, never steps made ahead; a sample that cannot be made raises, it is never
skipped or replaced by another. One consumer thread per loader. A loader does not survive a fork (its threads
would be missing in the child) and cannot be pickled: make it in the process that uses it, ``spawn`` is fine.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foldfeed.feature_store import FoldfeedError, Record, RecordSource
from foldfeed.loader.batch import StepBatch
from foldfeed.loader.device import ReadyStep, feature_maker, resolve_device
from foldfeed.loader.errors import LoaderConfigError, LoaderUseError, SampleError
from foldfeed.loader.featurise import featurise
from foldfeed.loader.fetch import RawSample, fetch
from foldfeed.loader.order import SampleOrder, rank_shards
from foldfeed.loader.plan import SamplePlan, make_plan
from foldfeed.loader.prefetch import StepPrefetcher
from foldfeed.loader.recipe import Recipe
from foldfeed.loader.state import LoaderState


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
      order: which record comes when.
      shards: the virtual shards of this rank.
      device: where the tensors of a batch are.
    """

    def __init__(
        self,
        store: RecordSource[Record],
        recipe: Recipe,
        *,
        seed: int,
        global_batch: int,
        virtual_shards: int | None = None,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        num_threads: int = 2,
        prefetch_steps: int = 2,
    ) -> None:
        """Checks everything and reads nothing; threads start with the first batch.

        Args:
          store: one version of a store, or a view of it such as ``store.subset(name)``.
          recipe: how samples are made.
          seed: of the run.
          global_batch: samples of one step over all ranks.
          virtual_shards: equal parts of a step, a divisor of global_batch; global_batch when None.
          rank: this process, 0..world-1.
          world: processes that share a step, at most virtual_shards.
          device: ``cpu`` or ``cuda[:N]``.
          num_threads: threads that read and prepare samples; no effect on the numbers.
          prefetch_steps: steps kept ready ahead of the consumer; bounds memory.
        Raises:
          LoaderConfigError: a value that cannot work.
        """
        if isinstance(store, str | os.PathLike):
            raise LoaderConfigError("store", str(store), "is a place; pass FeatureStore.open(...) of it")
        if not isinstance(recipe, Recipe):
            raise LoaderConfigError("recipe", recipe, "is no recipe; pass e.g. Recipe.named('af2')")
        for field, value in (("num_threads", num_threads), ("prefetch_steps", prefetch_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LoaderConfigError(field, value, "must be an integer of at least 1")
        self.store = store
        self.recipe = recipe
        self.order = SampleOrder(
            num_records=len(store),
            seed=seed,
            global_batch=global_batch,
            virtual_shards=global_batch if virtual_shards is None else virtual_shards,
        )
        self.shards = rank_shards(self.order.virtual_shards, rank, world)
        self.device = resolve_device(device)
        self._maker = feature_maker(recipe, self.device)
        self._num_threads = num_threads
        self._prefetch_steps = prefetch_steps
        self._step = 0
        self._steps: StepPrefetcher[Any, ReadyStep] | None = None
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._counters = {"steps": 0, "samples": 0, "bytes": 0, "fetch_s": 0.0, "prepare_s": 0.0}
        self._waited_s = 0.0

    def plan(self, sample: int) -> SamplePlan:
        """Returns what a sample reads, without reading it.

        Raises:
          LoaderConfigError: a negative number.
          SampleError: the store cannot find the record's part.
        """
        return self._planned(sample)[0]

    def sample(self, sample: int) -> dict[str, torch.Tensor]:
        """Returns one sample, a pure function of its global number: no leading axis, on this loader's device.

        Raises:
          LoaderConfigError: a negative number.
          SampleError: it could not be read.
        """
        self._check_usable()
        return featurise(self._fetched(sample).to(self.device), self.recipe)

    def __iter__(self) -> CropLoader:
        return self

    def __next__(self) -> StepBatch:
        """Returns the next step.

        Raises:
          SampleError: one of its samples could not be read. The position stays: asking again tries again.
          LoaderUseError: the loader is closed or was inherited over a fork.
        """
        self._check_usable()
        if self._steps is None:
            self._steps = StepPrefetcher(
                self._tasks,
                lambda step, parts: self._maker.assemble(step, self._layout(step), parts),
                first_step=self._step,
                depth=self._prefetch_steps,
                num_threads=self._num_threads,
            )
        try:
            batch = self._maker.hand_over(self._steps.next())
        except BaseException:
            self._stop()
            raise
        assert batch.step == self._step, (batch.step, self._step)
        self._step += 1
        self._add(steps=1, samples=batch.num_samples)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position as JSON-able values: the next step to be consumed, and what it counts.

        Steps made ahead but not received do not count. The position does not depend on rank, world, virtual
        shards or threads, so any number of ranks may go on from it.
        """
        return self._state(self._step).to_dict()

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

    @property
    def stats(self) -> dict[str, float]:
        """Counters since the loader was made.

        ``steps`` and ``samples`` received; ``bytes`` of raw samples read, decoded; ``fetch_s`` and
        ``prepare_s`` spent in worker threads on reading and on features, made-ahead samples included;
        ``wait_s`` that the consumer waited.
        """
        running = self._steps.wait_s if self._steps is not None else 0.0
        with self._lock:
            return {**self._counters, "wait_s": self._waited_s + running}

    def close(self) -> None:
        """Ends all threads. Idempotent; the loader cannot be used afterwards."""
        if self._pid == os.getpid():
            self._stop()
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

    def _tasks(self, step: int) -> Sequence[Callable[[], Any]]:
        return [
            functools.partial(self._prepared, sample)
            for _, samples in self._layout(step)
            for sample in samples
        ]

    def _layout(self, step: int) -> list[tuple[int, range]]:
        return [(shard, self.order.shard_samples(step, shard)) for shard in self.shards]

    def _prepared(self, sample: int) -> Any:
        started = time.perf_counter()
        raw = self._fetched(sample)
        fetched = time.perf_counter()
        prepared = self._maker.prepare(raw)
        self._add(bytes=raw.num_bytes, fetch_s=fetched - started, prepare_s=time.perf_counter() - fetched)
        return prepared

    def _fetched(self, sample: int) -> RawSample:
        plan, record = self._planned(sample)
        try:
            return fetch(record, plan)
        except (FoldfeedError, OSError) as error:
            raise SampleError(sample, record.record_id, str(error)) from error

    def _planned(self, sample: int) -> tuple[SamplePlan, Any]:
        address = self.order.locate(sample)
        try:
            record = self.store.at(address.record)
        except (FoldfeedError, OSError) as error:
            raise SampleError(sample, self.store.ids[address.record], str(error)) from error
        order = self.store.settings.row_order
        return make_plan(self.recipe, self.order.seed, address, record.length, record.depth, order), record

    def _state(self, step: int) -> LoaderState:
        return LoaderState(
            step=step,
            seed=self.order.seed,
            global_batch=self.order.global_batch,
            recipe_digest=self.recipe.digest,
            store_fingerprint=self.store.fingerprint,
        )

    def _add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counters[name] += amount

    def _stop(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._waited_s += self._steps.wait_s
            self._steps = None

    def _check_usable(self) -> None:
        if self._closed:
            raise LoaderUseError("this CropLoader is closed; make a new one")
        if self._pid != os.getpid():
            raise LoaderUseError(
                f"this CropLoader was made in process {self._pid} and inherited by process {os.getpid()} "
                "over a fork, where its threads do not exist; make it in the process that uses it"
            )
