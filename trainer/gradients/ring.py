"""The plain transport: every rank sums its own shards, and the backend's all-reduce sums the ranks.

What every other trainer does, kept to compare with: the order of the additions over ranks is the backend's,
so bits depend on the number of ranks and on the bucket plan. Use `exchange.TreeExchange` for equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from foldfeed.trainer.gradients.buckets import Bucket
from foldfeed.trainer.gradients.exchange import Exchange
from foldfeed.trainer.groups.ranks import Ranks, TorchGroup


class RingExchange(Exchange):
    """One all-reduce per bucket, in place in the output; each rank must bring something."""

    def __init__(self, ranks: Ranks, output: torch.Tensor) -> None:
        """Keeps the output; there are no message buffers of its own.

        Args:
          ranks: the groups.
          output: fp32 (flat numel,), receives the summed buckets.
        """
        assert ranks.world == 1 or isinstance(ranks.gather, TorchGroup), "only torch's groups all-reduce"
        self._ranks = ranks
        self._group = ranks.gather
        self._output = output
        self._in_flight: list[tuple[Callable[[], None], Bucket]] = []

    def reduce(self, bucket: Bucket, blocks: Sequence[torch.Tensor]) -> None:
        """Exchanges one bucket, see `exchange.Exchange.reduce`."""
        first, *others = blocks
        mine = self._output[bucket.start : bucket.stop]
        mine.copy_(first)
        for block in others:
            mine.add_(block)
        if not isinstance(self._group, TorchGroup):
            return
        with self._ranks.guard(f"the all-reduce of gradient bucket {bucket.index}"):
            wait = self._group.all_reduce(mine)
        self._in_flight.append((wait, bucket))

    def drain(self) -> None:
        """Finishes the all-reduces that are under way."""
        under_way, self._in_flight = self._in_flight, []
        for wait, bucket in under_way:
            with self._ranks.guard(f"the all-reduce of gradient bucket {bucket.index}"):
                wait()
