"""The loader: random crops from a feature store as training batches, the same on any number of ranks.

The data's way, one file each: sampling (which records, how often, as data) -> selection (in these stores)
-> order (which record is sample g, by a permutation or an alias_table) -> plan (its rows, window and draws,
before any read) -> fetch (the tiles of the plan; reader does these for a number) -> reading (in threads
here, or in a reading_process, over wire, into slots of a ring of shared memory) -> featurise (AlphaFold 2's
features from a raw sample, with clusters) -> prefetch (ahead of the consumer, in order) -> device (to the
accelerator). samples gives single ones by number, loader a stream of steps, state says where that stands.

Imports `foldfeed.feature_store` and torch; knows nothing of search tools or training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldfeed.feature_store import FeatureStore
    from foldfeed.loader.batch import ShardBatch, StepBatch
    from foldfeed.loader.errors import (
        LoaderConfigError,
        LoaderError,
        LoaderStateError,
        LoaderUseError,
        ReadingProcessError,
        SampleError,
        StateMismatchError,
    )
    from foldfeed.loader.loader import CropLoader
    from foldfeed.loader.plan import SamplePlan
    from foldfeed.loader.recipe import Recipe
    from foldfeed.loader.samples import SampleSource
    from foldfeed.loader.sampling import AF2_FILTERS, Component, Sampling

# Where each name lives. Found when it is asked for: a process that only reads samples needs no torch.
_HOMES = {
    "AF2_FILTERS": "loader.sampling",
    "Component": "loader.sampling",
    "CropLoader": "loader.loader",
    "FeatureStore": "feature_store",
    "LoaderConfigError": "loader.errors",
    "LoaderError": "loader.errors",
    "LoaderStateError": "loader.errors",
    "LoaderUseError": "loader.errors",
    "ReadingProcessError": "loader.errors",
    "Recipe": "loader.recipe",
    "SampleError": "loader.errors",
    "SamplePlan": "loader.plan",
    "SampleSource": "loader.samples",
    "Sampling": "loader.sampling",
    "ShardBatch": "loader.batch",
    "StateMismatchError": "loader.errors",
    "StepBatch": "loader.batch",
}

__all__ = [
    "AF2_FILTERS",
    "Component",
    "CropLoader",
    "FeatureStore",
    "LoaderConfigError",
    "LoaderError",
    "LoaderStateError",
    "LoaderUseError",
    "ReadingProcessError",
    "Recipe",
    "SampleError",
    "SamplePlan",
    "SampleSource",
    "Sampling",
    "ShardBatch",
    "StateMismatchError",
    "StepBatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"foldfeed.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
