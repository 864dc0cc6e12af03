"""The loader: random crops from a feature store as training batches, the same on any number of ranks.

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

__all__ = [
    "CropLoader",
    "FeatureStore",
    "LoaderConfigError",
    "LoaderError",
    "LoaderStateError",
    "LoaderUseError",
    "Recipe",
    "SampleError",
    "SamplePlan",
    "ShardBatch",
    "StateMismatchError",
    "StepBatch",
]
