"""The bucket plan: which run of the flat gradient buffer is exchanged as one message.

The plan is a function of the parameter sizes and two byte limits. It does not depend on the world size, on
timing, or on the order in which gradients became ready in some first step, so it never changes during a run
and a restart makes the same one. Buckets follow the flat buffer's order (reverse registration), which is
about the order in which backward finishes them; the last bucket is kept small, because its exchange starts
when backward has ended and nothing hides it.

`plan_ramp` is for a link that was measured: full buckets first, then ever smaller ones, each `RAMP` of the
one before. While one is sent, backward makes the next; with sizes that fall no faster than the link is
quicker than backward, nothing piles up before the end, and what is left to wait for is the last bucket, as
small as latency allows. The first full one is split, so that the link need not wait for all of it: where it
is slower than backward, every moment that it stands still at the beginning is one of the step's.

Source: the mechanism of Megatron-core's static reversed buckets; DDP's first-step rebuild is what it avoids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# Of fp32 gradients.
ELEMENT_BYTES = 4
MIN_AUTO_BYTES = 64 * 1024
MAX_AUTO_BYTES = 16 * 1024 * 1024
# Enough buckets for most of the exchange to start before backward ends, few enough for latency not to count.
AUTO_BUCKETS = 8
# The exposed tail, as a share of a full bucket.
TAIL_SHARE = 4
# Of a first full bucket: this share leaves by itself, then twice as much.
HEAD_SHARE = 8
# A link may need up to this share of backward's time before the ramp leaves a backlog.
RAMP = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A contiguous run of parameters in the flat buffer.

    Attributes:
      index: position in the exchange order.
      start: first element in the flat buffer.
      stop: one past the last element.
      segments: positions of its parameters in the frozen parameter order.
    """

    index: int
    start: int
    stop: int
    segments: range

    @property
    def numel(self) -> int:
        """Elements in this bucket."""
        return self.stop - self.start


def auto_bucket_bytes(total_bytes: int) -> int:
    """Returns a bucket limit that gives about `AUTO_BUCKETS` buckets, within sane message sizes."""
    return min(MAX_AUTO_BYTES, max(MIN_AUTO_BYTES, total_bytes // AUTO_BUCKETS))


def plan_buckets(sizes: Sequence[int], *, bucket_bytes: int) -> list[Bucket]:
    """Returns buckets that cover every segment once, in order.

    A bucket holds at most ``bucket_bytes``, the last one at most a quarter of that, unless a single segment
    is larger. Segments of 10, 10, 10, 2 and 1 elements with 80-byte buckets:
    the tail takes 2 and 1 together (12 bytes <= 20), so the result is [10, 10], [10], [2, 1].

    Args:
      sizes: elements of each segment in flat-buffer order, padding included.
      bucket_bytes: limit of a bucket.
    """
    if not sizes:
        return []
    limit = max(1, bucket_bytes // ELEMENT_BYTES)
    tail_start = len(sizes) - 1
    tail_numel = sizes[-1]
    while tail_start > 0 and tail_numel + sizes[tail_start - 1] <= limit // TAIL_SHARE:
        tail_start -= 1
        tail_numel += sizes[tail_start]

    runs: list[range] = []
    first, numel = 0, 0
    for position in range(tail_start):
        if numel and numel + sizes[position] > limit:
            runs.append(range(first, position))
            first, numel = position, 0
        numel += sizes[position]
    if tail_start > first:
        runs.append(range(first, tail_start))
    runs.append(range(tail_start, len(sizes)))

    return _lay_out(sizes, runs)


def plan_ramp(sizes: Sequence[int], *, bucket_bytes: int, least_bytes: int) -> list[Bucket]:
    """Returns buckets that cover every segment once, in order, full ones first and then a ramp down.

    With segments of 100 elements, a limit of 400 and a least of 100 elements the last buckets hold 400, 300,
    200, 100 and 100 elements: whole segments, no more than the ramp allows.

    Args:
      sizes: elements of each segment in flat-buffer order, padding included.
      bucket_bytes: limit of a bucket; a single larger segment is one of its own.
      least_bytes: of the last bucket.
    """
    limit, least = bucket_bytes / ELEMENT_BYTES, least_bytes / ELEMENT_BYTES
    allowed = max(1.0, least)
    runs: list[range] = []
    stop = len(sizes)
    while stop:
        start, numel = stop - 1, sizes[stop - 1]
        while start and numel + sizes[start - 1] <= allowed:
            start -= 1
            numel += sizes[start]
        runs.append(range(start, stop))
        stop, allowed = start, min(limit, max(allowed, numel) / RAMP)
    return _lay_out(sizes, [*_split(sizes, runs.pop(), least), *runs[::-1]] if runs else [])


def _split(sizes: Sequence[int], run: range, least: float) -> list[range]:
    """Returns the first bucket in pieces that double, the first of ``least`` elements or more."""
    piece = max(least, sum(sizes[position] for position in run) / HEAD_SHARE)
    pieces: list[range] = []
    first, numel = run.start, 0
    for position in run:
        numel += sizes[position]
        if numel >= piece and position + 1 < run.stop:
            pieces.append(range(first, position + 1))
            first, numel, piece = position + 1, 0, 2 * piece
    return [*pieces, range(first, run.stop)]


def _lay_out(sizes: Sequence[int], runs: Sequence[range]) -> list[Bucket]:
    buckets, offset = [], 0
    for index, run in enumerate(runs):
        stop = offset + sum(sizes[position] for position in run)
        buckets.append(Bucket(index=index, start=offset, stop=stop, segments=run))
        offset = stop
    return buckets
