"""`LatencyHistogram`: how long things took, in memory that does not grow, with a stated error.

A duration falls into one of `NUM_BUCKETS` buckets whose upper bounds are powers of `GROWTH`, from 1 us to
about 2,700 s. A quantile is given as the middle of its bucket, so it is at most `RELATIVE_ERROR` of itself
off the exact one; durations outside that range count in the first or the last bucket. Number, sum, smallest
and largest are exact. What reading processes took is told to one histogram, beside every sample, so there is
nothing to merge and no further error.

Thread safe for one writer at a time; `meters.meters` holds the lock.

Source: C. Masson et al., "DDSketch: a fast and fully-mergeable quantile sketch with relative-error
guarantees", VLDB 12 (2019), with a fixed range in place of a collapsing store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RELATIVE_ERROR = 0.02
GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
SMALLEST_S = 1e-6
NUM_BUCKETS = 544
_SCALE = 1 / math.log(GROWTH)


class LatencyHistogram:
    """Counts of durations.

    Attributes:
      count: durations.
      sum_s: seconds, all of them together.
      min_s: the smallest; infinite when there is none.
      max_s: the largest; 0 when there is none.
    """

    __slots__ = ("_buckets", "count", "max_s", "min_s", "sum_s")

    def __init__(self) -> None:
        self._buckets = [0] * NUM_BUCKETS
        self.count = 0
        self.sum_s = 0.0
        self.min_s = math.inf
        self.max_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Counts a duration of at least 0, so many times."""
        at = 0 if seconds <= SMALLEST_S else math.ceil(math.log(seconds / SMALLEST_S) * _SCALE)
        self._buckets[min(at, NUM_BUCKETS - 1)] += times
        self.count += times
        self.sum_s += seconds * times
        self.min_s = min(self.min_s, seconds)
        self.max_s = max(self.max_s, seconds)

    def quantile(self, share: float) -> float:
        """Returns the duration that ``share`` of the durations do not exceed, 0 when there is none.

        Args:
          share: 0 to 1; 0.5 for the median. Of n durations it is that of rank ceil(share * n).
        """
        wanted = max(1, math.ceil(share * self.count))
        seen = 0
        for at, number in enumerate(self._buckets):
            seen += number
            if seen >= wanted and number:
                # The middle by ratio of the bucket's bounds; never beyond what was really there.
                middle = SMALLEST_S * GROWTH**at * 2 / (1 + GROWTH)
                return min(max(middle, self.min_s), self.max_s)
        return 0.0

    def summary(self) -> dict[str, float]:
        """Returns count, sum, smallest, largest and the quantiles that are reported, JSON-able."""
        return {
            "count": self.count,
            "sum_s": self.sum_s,
            "min_s": self.min_s if self.count else 0.0,
            "max_s": self.max_s,
            **{name: self.quantile(share) for name, share in QUANTILES.items()},
        }


QUANTILES: Mapping[str, float] = {"p50_s": 0.5, "p99_s": 0.99, "p999_s": 0.999}
