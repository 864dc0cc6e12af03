"""What the training loop needs of a source of batches; the loader is one, tests have others.

Shapes only: nothing here reads or trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch


class ShardLike(Protocol):
    """One virtual shard of a step, as the loader makes it."""

    @property
    def v(self) -> int:
        """Its number, 0 .. V-1."""

    @property
    def samples(self) -> Sequence[int]:
        """Global sample numbers, one per leading index of the features."""

    @property
    def features(self) -> Mapping[str, torch.Tensor]:
        """Tensors with a leading sample axis."""


class StepLike(Protocol):
    """This rank's part of a step."""

    @property
    def step(self) -> int:
        """Number of the step, from 0."""

    @property
    def shards(self) -> Sequence[ShardLike]:
        """This rank's virtual shards, ascending."""


class NoShards(NamedTuple):
    """A step of which this rank computes nothing."""

    step: int
    shards: tuple[ShardLike, ...] = ()


class BatchSource(Protocol):
    """What the loop needs of a loader."""

    def __iter__(self) -> Iterator[StepLike]:
        """Returns an endless iterator of steps."""

    def state_dict(self) -> dict[str, Any]:
        """Returns JSON-able state: the next step to be consumed and what it depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a state; raises when it belongs to other data."""

    def redivide(self, step: int, rank: int, world: int, first: Sequence[int] | None = None) -> None:
        """Goes to a step as another part of the ranks; only an elastic run does this.

        Args:
          step: the next one.
          rank: this process.
          world: how many there are.
          first: this rank's virtual shards of that step alone, at least one; as usual when None.
        """


class SourceMeters(NamedTuple):
    """What a source of batches says about itself.

    Attributes:
      scalars: returns numbers for a step's metrics, by name.
      lines: returns a table for the end of a run.
    """

    scalars: Callable[[], dict[str, float]]
    lines: Callable[[], list[str]]


class Source(NamedTuple):
    """Where a rank's batches come from.

    Attributes:
      batches: which can be divided anew.
      fingerprint: identity of the data behind them.
      meters: of the batches.
    """

    batches: BatchSource
    fingerprint: str
    meters: SourceMeters | None = None
