"""`SampleSupply`: where a loader's samples come from, whoever reads them (`reading.reading`).

Values and protocols only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from foldfeed.loader.reading.fetch import SampleArrays
from foldfeed.loader.reading.pieces import Piece
from foldfeed.loader.unreadable import Substitution


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReadSample:
    """A sample that was read.

    Attributes:
      arrays: what was read; views of shared memory, valid until `release`.
      read_s: seconds that planning and reading took.
      release: gives the memory back; to be called once.
      substitution: which record took the place of which, None where none did.
    """

    arrays: SampleArrays
    read_s: float
    release: Callable[[], None]
    substitution: Substitution | None = None


class SampleSupply(Protocol):
    """What a loader needs of a source of samples."""

    def ask(self, samples: Sequence[int], together: int = 1) -> None:
        """Says which samples will be taken next, in that order.

        Args:
          samples: of one step, best.
          together: so many are never in different groups, where there are groups.
        """
        ...

    def get(self, sample: int) -> ReadSample:
        """Returns a sample that was asked for; waits for it.

        Raises:
          SampleError: it could not be read.
          ReadingProcessError: no process can read it.
        """
        ...

    def queued(self) -> dict[str, int]:
        """Returns how many samples wait where, by a name for people."""
        ...

    def counters(self) -> dict[str, float]:
        """Returns what the cache counted so far; nothing without one."""
        ...

    def close(self) -> None:
        """Ends everything that was started. Idempotent."""
        ...


@runtime_checkable
class PackedSupply(SampleSupply, Protocol):
    """A supply that also gives some samples at once, as they lie together."""

    def take(self, sample: int) -> tuple[Sequence[int], Iterator[Piece]]:
        """Returns the samples that were asked for together, and the pieces that they come in.

        Args:
          sample: the first of them; `get` is asked for none of them.
        Raises:
          SampleError: the first of them that could not be read; by the iterator, after all pieces.
          ReadingProcessError: no process can read them; likewise.
        """
        ...
