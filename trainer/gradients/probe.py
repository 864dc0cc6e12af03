"""What the link between the ranks gives, measured at the start, and the bucket plan that follows from it.

A bucket costs one latency a plus its bytes over the bandwidth b. Small buckets pay the latency often; large
ones are late, because nothing of them leaves before all of it is there. So a full bucket is as long as
1 / `LATENCY_SHARE` latencies, which then cost that share of the exchange, and the last one as long as one
latency: two latencies are all that must be waited for behind a backward that takes longer than the exchange.

What a bucket costs is measured with several under way, as in a step: where they overtake each other's waits
(stream.py) it is far below the time of one alone, and a plan from that one had too few, too large buckets.
The least of a few repeats counts: whatever else runs on the machine only adds to them.

The plan changes no bits: sums are made element by element. All ranks agree on the slowest rank's numbers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from foldfeed.trainer.gradients.buckets import MAX_AUTO_BYTES, MIN_AUTO_BYTES, Bucket
from foldfeed.trainer.gradients.exchange import Exchange
from foldfeed.trainer.groups.ranks import Ranks

# Small enough for latency alone to count, large enough for the bandwidth to show through it.
SMALL_BYTES, LARGE_BYTES = 4 * 1024, 1024 * 1024
REPEATS = 5
# Small buckets, one after another.
UNDER_WAY = 8
MIN_BUCKETS = 4
# Of full size. A bucket also costs CPU, which no latency shows. Two cores, 16 MB, 2 nodes at 1000 Mbit/s: a
# step 10 to 13 ms longer than backward with 32, 6 with 20 or 24. 4 nodes at 400: as quick with 20.
MAX_BUCKETS = 24
# A full bucket that costs little beside its bytes: there may be more of these. 40 MB, 4 nodes at 400 Mbit/s:
# 1,367 ms a step with them, 1,414 with 24; at 1000 19 and 30 ms longer than backward.
CHEAP_BYTES = 1 << 20
LATENCY_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What an exchange of a bucket between all ranks costs.

    Attributes:
      latency_s: of a bucket without bytes, where others are under way.
      bytes_per_s: bucket bytes per second beyond that (not those on the wire, which are up to twice as many).
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Returns how long a bucket takes."""
        return self.latency_s + num_bytes / self.bytes_per_s

    @property
    def least_bytes(self) -> int:
        """What passes in one latency: the last bucket's size."""
        return int(self.latency_s * self.bytes_per_s)

    def bucket_bytes(self, total_bytes: int) -> int:
        """Returns the limit of a bucket, see the module; several even of little, few even of much."""
        wanted = max(self.least_bytes / LATENCY_SHARE, min(CHEAP_BYTES, total_bytes / MAX_BUCKETS))
        wanted = min(wanted, total_bytes / MIN_BUCKETS)
        return int(min(MAX_AUTO_BYTES, max(MIN_AUTO_BYTES, wanted)))

    def __str__(self) -> str:
        return f"{1e6 * self.latency_s:.0f} us + {8e-9 * self.bytes_per_s:.2f} Gbit/s of gradients"


def measure(ranks: Ranks, make_exchange: Callable[[torch.Tensor, int], Exchange], num_blocks: int) -> Link:
    """Measures exchanges of a small and of a large bucket. A collective.

    Args:
      ranks: the run.
      make_exchange: from (output, elements of the largest bucket), as the reducer's.
      num_blocks: of this rank.
    Raises:
      CommunicationError: a peer died or stalled.
    """
    numel = LARGE_BYTES // 4
    output = torch.zeros(numel, dtype=torch.float32, device=ranks.device)
    exchange = make_exchange(output, numel)
    # The first one also opens connections.
    _seconds(exchange, output, SMALL_BYTES // 4, num_blocks)
    sizes = [(SMALL_BYTES, 1), (SMALL_BYTES, UNDER_WAY), (LARGE_BYTES, 1)]
    mine = [
        min(_seconds(exchange, output, num_bytes // 4, num_blocks, number) for _ in range(REPEATS))
        for num_bytes, number in sizes
    ]
    rows = ranks.gather_floats(mine, "the measurement of the link")
    small_s, several_s, large_s = (max(row[column] for row in rows) for column in range(3))
    # On a busy machine a large one may have been as quick; then the bandwidth does not count.
    bytes_per_s = (LARGE_BYTES - SMALL_BYTES) / max(large_s - small_s, 1e-6)
    return Link(
        latency_s=max(several_s / UNDER_WAY - SMALL_BYTES / bytes_per_s, 1e-6), bytes_per_s=bytes_per_s
    )


def _seconds(exchange: Exchange, output: torch.Tensor, numel: int, num_blocks: int, number: int = 1) -> float:
    """Times exchanges of the first elements, one after another."""
    bucket = Bucket(index=0, start=0, stop=numel, segments=range(1))
    blocks = [output[:numel].clone() for _ in range(num_blocks)]
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    started = time.perf_counter()
    for _ in range(number):
        exchange.reduce(bucket, blocks)
    exchange.drain()
    if output.is_cuda:
        torch.cuda.synchronize(output.device)
    return time.perf_counter() - started
