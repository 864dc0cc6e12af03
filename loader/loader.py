"""`CropLoader`: batches from a store, the same for any number of threads, ranks and restarts.

Order (which record) -> plan (what to read) -> fetch (I/O) -> featurise -> steps in order. This module ties
them together and owns the position in the stream; every step of the way lives in a module of its own.

Invariants: ``sample(g)`` is a function of (store fingerprint, sampling, recipe, seed, g); the position counts
steps that the consumer has received, never steps made ahead; a sample that cannot be made raises, it is never
skipped or replaced by another. One consumer thread per loader. A loader does not survive a fork (its threads
would be missing in the child) and cannot be pickled: make it in the process that uses it, ``spawn`` is fine.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from foldfeed.loader.batch import StepBatch
from foldfeed.loader.device import ReadyStep, feature_maker, features_of, resolve_device
from foldfeed.loader.errors import LoaderConfigError, LoaderUseError
from foldfeed.loader.feature_forms import FORMS, FULL
from foldfeed.loader.order import rank_shards
from foldfeed.loader.plan import SamplePlan
from foldfeed.loader.prefetch import StepPrefetcher
from foldfeed.loader.reader import SampleReader
from foldfeed.loader.reading import OwnThreads, ReadingProcesses, SampleSupply
from foldfeed.loader.recipe import Recipe
from foldfeed.loader.sampling import Sampling
from foldfeed.loader.selection import Store
from foldfeed.loader.state import LoaderState

# A sample of AlphaFold 2's sizes takes 0.4 to 0.7 MB as read.
READ_AHEAD_BYTES = 256 << 20
READ_AHEAD_SAMPLES = 256


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
            bfloat16, a quarter of the bytes, see `foldfeed.loader.feature_forms`.
          num_threads: threads that read and prepare samples; no effect on the numbers.
          prefetch_steps: steps kept ready ahead of the consumer; bounds memory.
          num_processes: processes that read samples into shared memory, with ``num_threads`` threads each, so
            that reading leaves this interpreter alone (Linux); 0 reads in the threads here. No effect on the
            numbers.
          read_ahead_bytes: shared memory of those processes together: samples read and not yet prepared.
        Raises:
          LoaderConfigError: a value that cannot work.
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
        self._num_processes = num_processes
        self._read_ahead_bytes = read_ahead_bytes
        self._supply: SampleSupply | None = None
        self._asked_step = 0
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
        return self._reader.planned(sample).plan

    def sample(self, sample: int) -> dict[str, torch.Tensor]:
        """Returns one sample, a pure function of its global number: no leading axis, on this loader's device.

        Raises:
          LoaderConfigError: a negative number.
          SampleError: it could not be read.
        """
        self._check_usable()
        return features_of(self._reader.read(sample), self.recipe, self.device, self.features)

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
            self._supply = self._new_supply()
            self._asked_step = self._step
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

    def _new_supply(self) -> SampleSupply:
        if not self._num_processes:
            return OwnThreads(self._reader, time.perf_counter)
        return ReadingProcesses(self._reader, self._num_processes, self._num_threads, self._read_ahead_bytes)

    def _ask(self, supply: SampleSupply, step: int) -> None:
        """Lets processes read some `READ_AHEAD_SAMPLES` behind a step, as far as their memory goes."""
        num_samples = max(1, sum(len(numbers) for _, numbers in self._layout(step)))
        stop = step + -(-READ_AHEAD_SAMPLES // num_samples)
        steps = range(max(step, self._asked_step), stop)
        wanted = [sample for later in steps for _, numbers in self._layout(later) for sample in numbers]
        self._asked_step = stop
        supply.ask(wanted)

    def _tasks(self, step: int) -> Sequence[Callable[[], Any]]:
        assert self._supply is not None
        self._ask(self._supply, step)
        samples = [sample for _, numbers in self._layout(step) for sample in numbers]
        return [
            functools.partial(self._prepared, self._supply, sample, (step, index, len(samples)))
            for index, sample in enumerate(samples)
        ]

    def _layout(self, step: int) -> list[tuple[int, range]]:
        samples = ((shard, self.order.shard_samples(step, shard)) for shard in self.shards)
        return [(shard, numbers) for shard, numbers in samples if numbers]

    def _prepared(self, supply: SampleSupply, sample: int, place: tuple[int, int, int]) -> Any:
        read = supply.get(sample)
        num_bytes = read.arrays.num_bytes
        started = time.perf_counter()
        try:
            prepared = self._maker.prepare(*place, read.arrays)
        finally:
            read.release()
        self._add(bytes=num_bytes, fetch_s=read.read_s, prepare_s=time.perf_counter() - started)
        return prepared

    def _state(self, step: int) -> LoaderState:
        return LoaderState(
            step=step,
            seed=self.order.seed,
            global_batch=self.order.global_batch,
            recipe_digest=self.recipe.digest,
            store_fingerprint=self._reader.selection.store_fingerprint,
            sampling_digest="" if self.sampling == Sampling() else self.sampling.digest,
            selection_fingerprint=self._reader.selection.fingerprint,
        )

    def _add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counters[name] += amount

    def _stop(self) -> None:
        if self._supply is not None:
            # First, so that threads that wait for a sample learn that none will come.
            self._supply.close()
            self._supply = None
        if self._steps is not None:
            self._steps.close()
            self._waited_s += self._steps.wait_s
            self._steps = None
        self._maker.drop()

    def _check_usable(self) -> None:
        if self._closed:
            raise LoaderUseError("this CropLoader is closed; make a new one")
        if self._pid != os.getpid():
            raise LoaderUseError(
                f"this CropLoader was made in process {self._pid} and inherited by process {os.getpid()} "
                "over a fork, where its threads do not exist; make it in the process that uses it"
            )
