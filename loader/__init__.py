"""The loader: random crops from a feature store as training batches, the same on any number of ranks.

The data's way: order.sampling (which records, how often, as data) -> order.selection (in these stores)
-> order.order (which record is sample g, by a permutation or an alias table; order.placement: in which shard)
-> reading.plan (its rows, window and draws, before any read) -> reading.fetch (the tiles of the plan;
reading.reader does these for a number, reading.cached_reader through cache/, and unreadable says what becomes
of damage) -> reading.reading (in threads here, or in processes of reading.process, packed into a ring of
shared memory, pieces of which are told by notes over reading.wire; reading.early_start: slow ones
first; reading.supply is what either looks like) -> features.featurise (AlphaFold 2's features from a raw
sample, with clusters, labels and slots for templates) -> features.draws (the alignments of a sample's
recycling iterations, put together) -> prefetch (ahead of the consumer, in order) -> features.device (to the
accelerator). step_work is what a rank does of this for its steps. samples gives
single ones by number, loader a stream of steps, order.state says where that stands. What all of them do with
their time is counted in meters.

features.featurise is the general path. On the CPU features.host_features gives the same, on an accelerator
features.step_features does for a whole step, out of one features.step_block. features.forms says what a
compact form leaves out.

Imports `foldfeed.feature_store` and torch; knows nothing of search tools or training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foldfeed.feature_store.lazy_names import lazy_names

if TYPE_CHECKING:
    from foldfeed.feature_store import FeatureStore
    from foldfeed.loader.batch import ShardBatch, StepBatch
    from foldfeed.loader.cache.config import CacheConfig
    from foldfeed.loader.errors import (
        LoaderConfigError,
        LoaderError,
        LoaderStateError,
        LoaderUseError,
        ReadingProcessError,
        SampleError,
        StateMismatchError,
    )
    from foldfeed.loader.features.forms import expand_features
    from foldfeed.loader.loader import CropLoader
    from foldfeed.loader.meters.reports import prometheus_text
    from foldfeed.loader.meters.server import MetricsServer
    from foldfeed.loader.order.sampling import AF2_FILTERS, Component, Sampling
    from foldfeed.loader.reading.plan import SamplePlan
    from foldfeed.loader.recipe import Recipe
    from foldfeed.loader.samples import SampleSource
    from foldfeed.loader.unreadable import Substitution

# Where each name lives. Found when it is asked for: a process that only reads samples needs no torch.
_HOMES = {
    "AF2_FILTERS": "order.sampling",
    "CacheConfig": "cache.config",
    "Component": "order.sampling",
    "CropLoader": "loader",
    "FeatureStore": ".feature_store",
    "LoaderConfigError": "errors",
    "LoaderError": "errors",
    "LoaderStateError": "errors",
    "LoaderUseError": "errors",
    "MetricsServer": "meters.server",
    "ReadingProcessError": "errors",
    "Recipe": "recipe",
    "SampleError": "errors",
    "SamplePlan": "reading.plan",
    "SampleSource": "samples",
    "Sampling": "order.sampling",
    "ShardBatch": "batch",
    "StateMismatchError": "errors",
    "StepBatch": "batch",
    "Substitution": "unreadable",
    "expand_features": "features.forms",
    "prometheus_text": "meters.reports",
}

__all__ = [
    "AF2_FILTERS",
    "CacheConfig",
    "Component",
    "CropLoader",
    "FeatureStore",
    "LoaderConfigError",
    "LoaderError",
    "LoaderStateError",
    "LoaderUseError",
    "MetricsServer",
    "ReadingProcessError",
    "Recipe",
    "SampleError",
    "SamplePlan",
    "SampleSource",
    "Sampling",
    "ShardBatch",
    "StateMismatchError",
    "StepBatch",
    "Substitution",
    "expand_features",
    "prometheus_text",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
