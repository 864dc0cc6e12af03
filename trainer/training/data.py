"""Opens all that a run reads on one rank: the loaders of its samples and of what is held out.

Does not own: what a sample is or in which order samples come (loader).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from foldfeed.loader import CropLoader, FeatureStore, LoaderConfigError, Recipe
from foldfeed.loader.cache.config import cache_of_options
from foldfeed.loader.meters.reports import prometheus_text
from foldfeed.loader.meters.server import MetricsServer
from foldfeed.loader.order.selection import Store
from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.task import Task
from foldfeed.trainer.training.held_out import HeldOut
from foldfeed.trainer.training.source import Source


@contextlib.contextmanager
def open_data(
    config: RunConfig, task: Task, recipe: Recipe, ranks: Ranks, local_rank: int, trace: str
) -> Iterator[Source]:
    """Opens the store and its loaders, whose threads end with the context; answers Prometheus meanwhile.

    Args:
      config: settings.
      task: what is trained.
      recipe: how its samples are made.
      ranks: which part of a step is this rank's.
      local_rank: of this process on its node.
      trace: file for the loader's trace; of the first rank, others add their number; none when empty.
    Raises:
      NotAStoreError: the URL holds no store.
      NameNotFoundError: the store has no such record set.
      TrainerConfigError: a value that the loader refuses, a port that is taken, or held-out records that are
        trained on.
      OSError: the trace cannot be written.
    """
    store = FeatureStore.open(config.data.store)
    trained = store.subset(config.data.record_set) if config.data.record_set else store
    held_out = None
    with contextlib.ExitStack() as stack:
        if trace and not ranks.is_first:
            trace = f"{trace}.rank{ranks.rank}"
        loader = stack.enter_context(_loader(config, trained, recipe, ranks, trace))
        if name := config.held_out.eval_set:
            records = store.subset(name)
            _require_apart(name, records, trained)
            looked_at = stack.enter_context(_loader(config, records, recipe, ranks))
            num_samples = config.held_out.eval_samples or len(records)
            held_out = HeldOut(looked_at, num_samples, task, ranks, config.seed)
        if config.metrics_port:
            stack.enter_context(_metrics_server(loader, config.metrics_port, local_rank, ranks))
        yield Source(loader, trained.fingerprint, loader.meters, held_out)


def _loader(config: RunConfig, records: Store, recipe: Recipe, ranks: Ranks, trace: str = "") -> CropLoader:
    data = config.data
    try:
        return CropLoader(
            records,
            recipe,
            seed=config.seed,
            global_batch=data.global_batch,
            virtual_shards=data.num_shards,
            rank=ranks.rank,
            world=ranks.world,
            device=ranks.device,
            num_threads=data.loader_threads,
            prefetch_steps=data.prefetch_steps,
            cache=cache_of_options(data.cache_folder, data.cache_gb, data.cache_memory_mb, data.cache_redis),
            on_unreadable=data.on_unreadable,
            trace=trace or None,
        )
    except LoaderConfigError as error:
        # The values come from our command line, so it is wrong usage of ours.
        raise TrainerConfigError(str(error)) from error


def _require_apart(name: str, held_out: Store, trained: Store) -> None:
    if shared := sorted(set(held_out.ids) & set(trained.ids)):
        raise TrainerConfigError(
            f"record set {name!r} shares {len(shared)} records with what is trained on (the first is "
            f"{shared[0]!r}); a held-out loss needs others: give --record-set, a set without them."
        )


def _metrics_server(loader: CropLoader, port: int, local_rank: int, ranks: Ranks) -> MetricsServer:
    labels = {"rank": str(ranks.rank)}
    try:
        return MetricsServer(lambda: prometheus_text(loader.meters(), labels), port + local_rank)
    except LoaderConfigError as error:
        raise TrainerConfigError(f"--metrics-port {port}: {error}") from error
