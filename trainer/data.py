"""Opens the loader for one rank: the only place where the trainer meets store and loader.

Does not own: what a sample is or in which order samples come (loader).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from foldfeed.loader import CropLoader, FeatureStore, LoaderConfigError, Recipe
from foldfeed.loader.cache.config import cache_of_options
from foldfeed.loader.recipe import CLUSTERED
from foldfeed.trainer.config import DataConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.ranks import Ranks


@contextlib.contextmanager
def open_loader(config: DataConfig, seed: int, ranks: Ranks) -> Iterator[tuple[CropLoader, str]]:
    """Opens the store and the loader of this rank; closes the loader's threads at the end.

    Returns: the loader and the fingerprint of the records it reads.
    Raises:
      NotAStoreError: the URL holds no store.
      NameNotFoundError: the store has no such record set.
      TrainerConfigError: a recipe, or a value, that the loader refuses.
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
        )
    except LoaderConfigError as error:
        # The values come from our command line, so it is wrong usage of ours.
        raise TrainerConfigError(str(error)) from error
    with loader:
        yield loader, records.fingerprint
