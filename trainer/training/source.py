"""What the training loop needs of a source of batches; the loader is one, tests have others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from foldfeed.loader.batch import StepBatch


class BatchSource(Protocol):
    """What the loop needs of a loader."""

    def __iter__(self) -> Iterator[StepBatch]:
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


class Source(NamedTuple):
    """Where a rank's batches come from.

    Attributes:
      batches: which can be divided anew.
      fingerprint: identity of the data behind them.
      meters: returns a loader's meters (`CropLoader.meters`); None where no loader makes the batches.
    """

    batches: BatchSource
    fingerprint: str
    meters: Callable[[], dict[str, Any]] | None = None
