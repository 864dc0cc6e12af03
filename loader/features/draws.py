"""The alignments of a sample, where a recipe draws one for every recycling iteration, put together.

Each is planned, read and made into features by itself, as a sample of its own would be, under the number
``sample * num_draws + draw``. Here the features that differ get an axis for the iterations; the others are
those of the first. So a step reads and makes only the iterations that it was drawn, and what a sample has for
an iteration does not depend on how many there are.

Pure functions of tensors; knows nothing of order or reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foldfeed.loader.features.featurise import featurise
from foldfeed.loader.features.forms import COMPACT, FULL, Features, compact_features
from foldfeed.loader.features.host_features import host_features
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.reading.fetch import SampleArrays
from foldfeed.loader.reading.reader import SampleReader
from foldfeed.loader.recipe import RESAMPLED, Recipe


def draw_numbers(recipe: Recipe, sample: int, num_recycles: int) -> range:
    """Returns the numbers under which the alignments of a sample are read, see `SampleReader.planned`."""
    first = sample * recipe.num_draws
    return range(first, first + min(num_recycles + 1, recipe.num_draws))


def stacked_draws(recipe: Recipe, features: Sequence[Features], num_samples: int) -> Features:
    """Returns features with a leading sample axis, and behind it one for the draws where they differ.

    Args:
      recipe: that made the features.
      features: the alignments of the first sample, of the second, and so on, equally many of each.
      num_samples: at least 1.
    """
    num_draws, rest = divmod(len(features), num_samples)
    assert num_draws >= 1, (len(features), num_samples)
    assert rest == 0, (len(features), num_samples)
    stacked = {}
    for name in features[0]:
        if _differs(recipe, name):
            whole = _stack([draw[name] for draw in features])
            stacked[name] = whole.unflatten(0, (num_samples, num_draws))
        else:
            stacked[name] = _stack([draw[name] for draw in features[::num_draws]])
    return stacked


def split_draws(recipe: Recipe, features: Features, num_samples: int) -> Features:
    """Returns what `stacked_draws` does, from features that lie on one leading axis already.

    Args:
      recipe: that made the features.
      features: with a leading axis for the alignments, in the order of `stacked_draws`.
      num_samples: at least 1.
    Returns: contiguous tensors, views where nothing is left out.
    """
    found = {}
    for name, tensor in features.items():
        num_draws, rest = divmod(len(tensor), num_samples)
        assert rest == 0, (name, len(tensor), num_samples)
        if _differs(recipe, name):
            found[name] = tensor.unflatten(0, (num_samples, num_draws)).contiguous()
        else:
            found[name] = tensor[::num_draws].contiguous()
    return found


def whole_sample(reader: SampleReader, sample: int, device: torch.device, form: str = FULL) -> Features:
    """Reads a sample with the alignments of all iterations that a step may have.

    Args:
      reader: what reads it.
      sample: its global number.
      device: where its features are made.
      form: of them, one of `features.forms.FORMS`.
    Raises:
      LoaderConfigError: a negative number.
      SampleError: it could not be read.
    """
    recipe = reader.recipe
    numbers = draw_numbers(recipe, sample, recipe.max_recycles)
    features = [_features_of(read.arrays, recipe, device, form) for read in reader.read_together(numbers)]
    return {name: tensor[0] for name, tensor in stacked_draws(recipe, features, 1).items()}


def _features_of(arrays: SampleArrays, recipe: Recipe, device: torch.device, form: str) -> Features:
    raw = RawSample.of(arrays)
    if device.type == "cpu":
        return host_features(raw, recipe, form)
    features = featurise(raw.to(device), recipe)
    return compact_features(features) if form == COMPACT else features


def _differs(recipe: Recipe, name: str) -> bool:
    return recipe.resample_msa_in_recycling and name in RESAMPLED


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    # Most shards have one sample, which then lies where it was made.
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
