"""What a run reads, and what its loop needs of a source of batches; the loader is one, tests have others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from foldfeed.loader.batch import StepBatch
from foldfeed.trainer.training.held_out import HeldOut


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
    """What one rank of a run reads.

    Attributes:
      batches: to train on; they can be divided anew.
      fingerprint: identity of the data behind them.
      meters: returns a loader's meters (`CropLoader.meters`); None where no loader makes the batches.
      held_out: whose loss is looked at now and then; None for nobody's.
    """

    batches: BatchSource
    fingerprint: str
    meters: Callable[[], dict[str, Any]] | None = None
    held_out: HeldOut | None = None
