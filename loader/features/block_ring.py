"""`BlockRing`: memory for step blocks, a few pieces that are used in turns.

A piece belongs to a step from its first sample until the copy to the device was started, and can be taken for
another step once that copy has happened: an event behind it on the copying stream says so. On a GPU the
memory is page-locked, which costs more to get than to fill, so it is got once and kept. Where a step does not
fit it gets larger memory, and the size is remembered for all.

Thread safe. A thread waits for an event only where as many pieces as allowed wait for theirs.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from foldfeed.loader.features.step_block import StepBlock, StepSizes

# What a step may be larger than the largest before it without new memory, as a divisor of that.
SLACK = 4


class Event(Protocol):
    """What `torch.cuda.Event` has."""

    def query(self) -> bool:
        """Returns whether it has happened."""
        ...

    def synchronize(self) -> None:
        """Waits until it has happened."""
        ...


class BlockRing:
    """The blocks of the steps under way."""

    def __init__(self, new_memory: Callable[[int], torch.Tensor], num_pieces: int) -> None:
        """Gets no memory yet.

        Args:
          new_memory: gives uint8 tensors of so many bytes.
          num_pieces: with fewer, new memory is got instead of waiting for an event.
        """
        self._new_memory = new_memory
        self._num_pieces = num_pieces
        self._bytes = 0
        self._blocks: dict[int, StepBlock] = {}
        # The piece that was given back first comes first, as do their events.
        self._free: collections.deque[tuple[torch.Tensor, Event | None]] = collections.deque()
        self._lock = threading.Lock()

    def block(self, step: int, num_samples: int) -> StepBlock:
        """Returns the block of a step, the same at each call until `copied`."""
        with self._lock:
            if step not in self._blocks:
                self._blocks[step] = StepBlock(self._take(), num_samples)
            return self._blocks[step]

    def whole(self, step: int) -> tuple[torch.Tensor, StepSizes]:
        """Returns a block whose samples are all there, see `StepBlock.whole`."""
        with self._lock:
            block = self._blocks[step]
        return block.whole(self._more)

    def copied(self, step: int, event: Event | None) -> None:
        """Says that the copy of a block was started.

        Args:
          step: of the block.
          event: behind the copy; None where the copy is finished.
        """
        with self._lock:
            self._free.append((self._blocks.pop(step).memory, event))

    def drop(self) -> None:
        """Takes back the blocks of steps that will not be finished; nobody may write to one any more."""
        with self._lock:
            for block in self._blocks.values():
                self._free.append((block.memory, None))
            self._blocks.clear()

    def _take(self) -> torch.Tensor:
        if not self._free:
            return self._new_memory(self._bytes)
        memory, event = self._free[0]
        if event is not None and not event.query():
            if len(self._free) + len(self._blocks) < self._num_pieces:
                return self._new_memory(self._bytes)
            event.synchronize()
        self._free.popleft()
        return memory if len(memory) >= self._bytes else self._new_memory(self._bytes)

    def _more(self, size: int) -> torch.Tensor:
        with self._lock:
            self._bytes = max(self._bytes, size + size // SLACK)
            size = self._bytes
        return self._new_memory(size)
