"""The loader: random crops from a feature store as training batches, the same on any number of ranks.

The data's way, one file each: sampling (which records, how often, as data) -> selection (in these stores)
-> order (which record is sample g, by a permutation or an alias_table; placement: in which shard) -> plan
(its rows, window and draws, before any read) -> fetch (the tiles of the plan; reader does these for a number,
cached_reader through the room cache/, and unreadable says what becomes of damage) -> reading (in threads
here, or in a reading_process, packed into a ring of shared memory, pieces of which are told by notes over
wire; early_start: slow ones first; supply is what either looks like) -> featurise (AlphaFold 2's features
from a raw sample, with clusters, structure_labels and slots for templates) -> draws (those of a sample's
recycling iterations, put together) -> prefetch (ahead of the consumer, in order) -> device (to the
accelerator). step_work is what a rank does of this for its steps.
samples gives single ones by number, loader a stream of steps, state says where that stands.
What all of them do with their time is counted in meters (durations in histogram, the wait of a GPU by stall),
told by meter_reports and metrics_server, and written event by event by trace.

featurise is the general path. On the CPU host_features gives the same (with bit_counters), on an accelerator
step_features does for a whole step, out of one step_block of a block_ring. feature_forms says what a compact
form leaves out.

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
