"""torch's DistributedDataParallel behind the reducer's interface: the oracle and the control.

Nobody needs to believe our reducer: ``--reducer ddp`` trains the same model with torch's own, and the tests
compare the two. DDP sums in ring order, so its bits depend on the world size and, over a restart with four
ranks or more, on the buckets it rebuilt; the results agree to rounding, not to the bit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from foldfeed.trainer.gradients.dyadic import owned_shards
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.groups.ranks import Ranks


class DdpReducer:
    """Averages with DDP and scales back to a sum; gradients land in the flat buffer's views."""

    def __init__(
        self,
        flat: FlatParameters,
        ranks: Ranks,
        num_shards: int,
        bucket_bytes: int,
        find_unused_parameters: bool = False,
    ) -> None:
        """Keeps the settings; `wrap` builds DDP around the model.

        Args:
          flat: the model's flat buffers.
          ranks: the groups; a process group must exist even for one rank.
          num_shards: V, at least the world size.
          bucket_bytes: DDP's ``bucket_cap_mb``, in bytes.
          find_unused_parameters: DDP's option; without it a parameter that gets no gradient is an error.
        """
        self.gradient = torch.zeros_like(flat.params)
        self.times: dict[str, float] = {"exposed": 0.0, "total": 0.0}
        self._flat = flat
        self._ranks = ranks
        self._owned = owned_shards(num_shards, ranks.world, ranks.rank)
        self._bucket_bytes = bucket_bytes
        self._find_unused = find_unused_parameters
        self._module: DistributedDataParallel | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model inside DDP; call this one in the forward pass."""
        # They are constants (`FlatParameters.check`), and DDP's broadcast would write to them.
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        self._module = DistributedDataParallel(
            model,
            bucket_cap_mb=self._bucket_bytes / 2**20,
            find_unused_parameters=self._find_unused,
        )
        return self._module

    def begin(self) -> None:
        """Zeroes the gradient."""
        self._flat.zero_gradients()

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[None]:
        """Surrounds forward and backward; only the last shard's backward communicates."""
        assert self._module is not None, "wrap() first"
        if number == self._owned.stop - 1:
            yield
        else:
            with self._module.no_sync():
                yield

    def finish(self, scalars: Sequence[float]) -> list[list[float]]:
        """Scales DDP's mean over ranks to the sum over shards and exchanges the scalars."""
        started = time.perf_counter()
        self._flat.check()
        torch.mul(self._flat.grads, self._ranks.world, out=self.gradient)
        rows = self._ranks.gather_floats(scalars, "the commit of a step")
        self.times["exposed"] = time.perf_counter() - started
        return rows

    def not_finite(self) -> list[str]:
        """Returns nothing: DDP has summed over the ranks before anybody can look."""
        return []

    def close(self, *, wait: bool = True) -> None:
        """Drops DDP, which holds a reference to the process group."""
        self._module = None
