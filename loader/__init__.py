"""The loader: random crops from a feature store as training batches, the same on any number of ranks.

The data's way, one file each: sampling (which records, how often, as data) -> selection (in these stores) ->
order (which record is sample g, by a permutation or an alias_table) -> plan (its rows, window and draws,
before any read) -> fetch (the tiles of the plan) -> featurise (AlphaFold 2's features, with clusters) ->
prefetch (ahead of the consumer, in order) -> device (to the accelerator). samples gives single ones by
number, loader a stream of steps, state says where that stands.

Imports `foldfeed.feature_store` and torch; knows nothing of search tools or training.
"""

from foldfeed.feature_store import FeatureStore
from foldfeed.loader.batch import ShardBatch, StepBatch
from foldfeed.loader.errors import (
    LoaderConfigError,
    LoaderError,
    LoaderStateError,
    LoaderUseError,
    SampleError,
    StateMismatchError,
)
from foldfeed.loader.loader import CropLoader
from foldfeed.loader.plan import SamplePlan
from foldfeed.loader.recipe import Recipe
from foldfeed.loader.samples import SampleSource
from foldfeed.loader.sampling import AF2_FILTERS, Component, Sampling

__all__ = [
    "AF2_FILTERS",
    "Component",
    "CropLoader",
    "FeatureStore",
    "LoaderConfigError",
    "LoaderError",
    "LoaderStateError",
    "LoaderUseError",
    "Recipe",
    "SampleError",
    "SamplePlan",
    "SampleSource",
    "Sampling",
    "ShardBatch",
    "StateMismatchError",
    "StepBatch",
]
