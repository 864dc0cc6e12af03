"""Opens the loaders for one rank: the only place where the trainer meets store and loader.

Does not own: what a sample is or in which order samples come (loader).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from foldfeed.loader import CropLoader, FeatureStore, LoaderConfigError, Recipe
from foldfeed.loader.cache.config import cache_of_options
from foldfeed.loader.meters.reports import prometheus_text, scalars, table
from foldfeed.loader.meters.server import MetricsServer
from foldfeed.trainer.config import DataConfig, RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.task import Task
from foldfeed.trainer.training.held_out import HeldOut
from foldfeed.trainer.training.source import Source, SourceMeters


@contextlib.contextmanager
def open_loader(
    config: DataConfig,
    recipe: Recipe,
    seed: int,
    ranks: Ranks,
    *,
    record_set: str | None = None,
    trace: str = "",
) -> Iterator[tuple[CropLoader, str]]:
    """Opens the store and the loader of this rank; closes the loader's threads at the end.

    Args:
      config: the store, what is drawn from it, and the batch.
      recipe: how samples are made, from the task.
      seed: of the order and of every draw.
      ranks: which part of a step is this rank's.
      record_set: instead of the one that the settings name.
      trace: file for the loader's trace; of the first rank, others add their number.
    Returns: the loader and the fingerprint of the records it reads.
    Raises:
      NotAStoreError: the URL holds no store.
      NameNotFoundError: the store has no such record set.
      TrainerConfigError: a value that the loader refuses.
      OSError: the trace cannot be written.
    """
    store = FeatureStore.open(config.store)
    name = config.record_set if record_set is None else record_set
    records = store.subset(name) if name else store
    try:
        cache = cache_of_options(
            config.cache_folder, config.cache_gb, config.cache_memory_mb, config.cache_redis
        )
        loader = CropLoader(
            records,
            recipe,
            seed=seed,
            global_batch=config.global_batch,
            virtual_shards=config.num_shards,
            rank=ranks.rank,
            world=ranks.world,
            device=ranks.device,
            num_threads=config.loader_threads,
            prefetch_steps=config.prefetch_steps,
            cache=cache,
            on_unreadable=config.on_unreadable,
            trace=(trace if ranks.is_first else f"{trace}.rank{ranks.rank}") if trace else None,
        )
    except LoaderConfigError as error:
        # The values come from our command line, so it is wrong usage of ours.
        raise TrainerConfigError(str(error)) from error
    with loader:
        yield loader, records.fingerprint


@contextlib.contextmanager
def open_held_out(config: RunConfig, task: Task, recipe: Recipe, ranks: Ranks) -> Iterator[HeldOut | None]:
    """Opens the held-out records; None where the run looks at none.

    Raises:
      NameNotFoundError: the store has no such record set.
      TrainerConfigError: it shares records with what is trained on.
    """
    name = config.held_out.eval_set
    if not name:
        yield None
        return
    store = FeatureStore.open(config.data.store)
    trained = store.subset(config.data.record_set) if config.data.record_set else store
    held_out = store.subset(name)
    if shared := sorted(set(held_out.ids) & set(trained.ids)):
        raise TrainerConfigError(
            f"record set {name!r} shares {len(shared)} records with what is trained on (the first is "
            f"{shared[0]!r}); a held-out loss needs others: give --record-set, a set without them."
        )
    num_samples = config.held_out.eval_samples or len(held_out)
    with open_loader(config.data, recipe, config.seed, ranks, record_set=name) as (loader, _):
        yield HeldOut(loader, num_samples, task, ranks, config.seed)


@contextlib.contextmanager
def serving(loader: CropLoader, port: int, ranks: Ranks, local_rank: int) -> Iterator[None]:
    """Answers Prometheus with the loader's meters while the context lasts; does nothing when ``port`` is 0.

    Raises:
      TrainerConfigError: the port is taken.
    """
    if not port:
        yield
        return
    labels = {"rank": str(ranks.rank)}
    try:
        server = MetricsServer(lambda: prometheus_text(loader.meters(), labels), port + local_rank)
    except LoaderConfigError as error:
        raise TrainerConfigError(f"--metrics-port {port}: {error}") from error
    with server:
        yield


@contextlib.contextmanager
def open_data(
    config: RunConfig, task: Task, recipe: Recipe, ranks: Ranks, local_rank: int, trace: str
) -> Iterator[tuple[Source, HeldOut | None]]:
    """Opens all that a run reads; answers Prometheus meanwhile.

    Args:
      config: settings.
      task: what is trained.
      recipe: how its samples are made.
      ranks: which part of a step is this rank's.
      local_rank: of this process on its node.
      trace: see `open_loader`.
    Raises: as `open_loader`, `open_held_out` and `serving`.
    """
    with (
        open_loader(config.data, recipe, config.seed, ranks, trace=trace) as (loader, fingerprint),
        open_held_out(config, task, recipe, ranks) as held_out,
        serving(loader, config.metrics_port, ranks, local_rank),
    ):
        meters = SourceMeters(lambda: scalars(loader.meters()), lambda: table(loader.meters()))
        yield Source(loader, fingerprint, meters), held_out
