"""What a loader hands over: one rank's part of a step, as virtual shards.

Values only. The tensors belong to the consumer: nothing writes to them later.
"""

from __future__ import annotations

import dataclasses

import torch

from foldfeed.loader.unreadable import Substitution


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardBatch:
    """One virtual shard of a step.

    Attributes:
      v: its number, 0..virtual_shards-1.
      samples: global sample numbers, one per leading index of the features.
      features: tensors with a leading sample axis, see `features.featurise.featurise`.
      substitutions: those of its samples that are made from another record than the order says, because that
        one cannot be read; none unless the loader was told ``on_unreadable="substitute"``.
    """

    v: int
    samples: list[int]
    features: dict[str, torch.Tensor]
    substitutions: tuple[Substitution, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """One rank's part of a step.

    Attributes:
      step: its number, from 0.
      shards: this rank's virtual shards, ascending.
      num_recycles: recycling iterations of the step, 0..``Recipe.max_recycles``, equal on all ranks: the
        model runs once more than that. Where the recipe draws alignments for them, the features of
        `foldfeed.loader.recipe.RESAMPLED` have an axis of ``num_recycles + 1`` behind the sample axis.
    """

    step: int
    shards: list[ShardBatch]
    num_recycles: int = 0

    @property
    def num_samples(self) -> int:
        """Samples of this rank in this step."""
        return sum(len(shard.samples) for shard in self.shards)
