"""Opens the loader for one rank: the only place where the trainer meets store and loader.

Does not own: what a sample is or in which order samples come (loader).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from foldfeed.loader import CropLoader, FeatureStore, LoaderConfigError, Recipe
from foldfeed.loader.meter_reports import prometheus_text, scalars, table
from foldfeed.loader.metrics_server import MetricsServer
from foldfeed.loader.recipe import CLUSTERED
from foldfeed.trainer.config import DataConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.ranks import Ranks


@contextlib.contextmanager
def open_loader(
    config: DataConfig, seed: int, ranks: Ranks, trace: str = ""
) -> Iterator[tuple[CropLoader, str]]:
    """Opens the store and the loader of this rank; closes the loader's threads at the end.

    Args:
      config: which samples.
      seed: of the run.
      ranks: the joined groups.
      trace: file for the loader's trace; of the first rank, others add their number.
    Returns: the loader and the fingerprint of the records it reads.
    Raises:
      NotAStoreError: the URL holds no store.
      NameNotFoundError: the store has no such record set.
      TrainerConfigError: a recipe, or a value, that the loader refuses.
      OSError: the trace cannot be written.
    """
    if config.recipe not in CLUSTERED:
        raise TrainerConfigError(
            f"recipe {config.recipe!r} cannot be used here: the compact Evoformer learns from msa_feat, in "
            f"sizes that have options of their own; use one of {', '.join(CLUSTERED)}"
        )
    store = FeatureStore.open(config.store)
    records = store.subset(config.record_set) if config.record_set else store
    try:
        recipe = Recipe.named(
            config.recipe,
            crop_residues=config.crop_residues,
            num_clusters=config.num_clusters,
            num_extra=config.num_extra,
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
            trace=(trace if ranks.is_first else f"{trace}.rank{ranks.rank}") if trace else None,
        )
    except LoaderConfigError as error:
        # The values come from our command line, so it is wrong usage of ours.
        raise TrainerConfigError(str(error)) from error
    with loader:
        yield loader, records.fingerprint


class LoaderMeters:
    """What a loader counted, in the trainer's words, see `foldfeed.trainer.loop.SourceMeters`."""

    def __init__(self, loader: CropLoader) -> None:
        self._loader = loader

    def scalars(self) -> dict[str, float]:
        """Returns the few numbers that are worth a curve."""
        return scalars(self._loader.meters())

    def lines(self) -> list[str]:
        """Returns the table of a run's end."""
        return table(self._loader.meters())


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
