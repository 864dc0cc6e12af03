"""Which record comes when: pure arithmetic from step numbers to records.

    g = step * global_batch + v * samples_per_shard + j        global sample number
    epoch, position = divmod(g, num_records)
    record = permutation(seed, epoch)[position]                keyed, O(1) memory

A step's samples are cut into ``virtual_shards`` equal shards; ``world`` ranks own contiguous runs of shards,
for any world up to the number of shards. The samples of a step therefore do not depend on the world, and
neither does the shard that holds a sample: only who computes it does.

Invariant: every epoch visits every record once, in an order that depends on (seed, epoch) alone. Epochs
follow each other without a gap, so a step may hold the end of one and the start of the next; nothing is
dropped or repeated. No I/O, no state: safe from any thread.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from foldfeed.feature_store.format.permutation import KeyedPermutation
from foldfeed.loader.errors import LoaderConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleAddress:
    """Where a global sample number points.

    Attributes:
      sample: global sample number g.
      epoch: passes over the store completed before it.
      position: place in that epoch's order.
      record: position of the record in the store's sorted ids.
    """

    sample: int
    epoch: int
    position: int
    record: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleOrder:
    """The order of one run.

    Attributes:
      num_records: records in the store.
      seed: of the run.
      global_batch: samples of one step over all ranks.
      virtual_shards: equal parts of a step that are summed in a fixed tree by the trainer.
    """

    num_records: int
    seed: int
    global_batch: int
    virtual_shards: int

    def __post_init__(self) -> None:
        _check_integer("seed", self.seed, None, "any integer")
        _check_integer("num_records", self.num_records, 1, "an empty store has nothing to draw from")
        _check_integer("global_batch", self.global_batch, 1, "a step has at least one sample")
        _check_integer("virtual_shards", self.virtual_shards, 1, "a step has at least one shard")
        if self.global_batch % self.virtual_shards:
            raise LoaderConfigError(
                "virtual_shards",
                self.virtual_shards,
                f"must divide global_batch={self.global_batch}, because shards hold equally many samples; "
                f"{math.gcd(self.virtual_shards, self.global_batch)} would do",
            )

    @property
    def samples_per_shard(self) -> int:
        """Samples in one virtual shard."""
        return self.global_batch // self.virtual_shards

    def locate(self, sample: int) -> SampleAddress:
        """Returns where a sample comes from.

        Raises:
          LoaderConfigError: a negative number.
        """
        _check_integer("sample", sample, 0, "samples are counted from 0")
        epoch, position = divmod(sample, self.num_records)
        record = _epoch_order(self.num_records, self.seed, epoch)[position]
        return SampleAddress(sample=sample, epoch=epoch, position=position, record=record)

    def shard_samples(self, step: int, shard: int) -> range:
        """Returns the global sample numbers of a virtual shard of a step."""
        assert step >= 0, step
        assert 0 <= shard < self.virtual_shards, (shard, self.virtual_shards)
        first = step * self.global_batch + shard * self.samples_per_shard
        return range(first, first + self.samples_per_shard)


def rank_shards(virtual_shards: int, rank: int, world: int) -> range:
    """Returns the virtual shards of a rank, ``[V*rank // W, V*(rank+1) // W)``.

    With 8 shards, 3 ranks own 2, 3 and 3 of them.

    Raises:
      LoaderConfigError: world is not in 1..V, or rank not in 0..world-1.
    """
    _check_integer("world", world, 1, "there is at least one rank")
    _check_integer("rank", rank, 0, "ranks are counted from 0")
    if world > virtual_shards:
        raise LoaderConfigError(
            "world",
            world,
            f"there are only {virtual_shards} virtual shards and every rank needs one; "
            "start fewer ranks or use more shards",
        )
    if rank >= world:
        raise LoaderConfigError("rank", rank, f"must be below world={world}")
    return range(virtual_shards * rank // world, virtual_shards * (rank + 1) // world)


@functools.lru_cache(maxsize=8)
def _epoch_order(num_records: int, seed: int, epoch: int) -> KeyedPermutation:
    # A pure function of its arguments; the cache only saves hashing the key for every sample.
    return KeyedPermutation(num_records, (seed, epoch))


def _check_integer(field: str, value: object, minimum: int | None, rule: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise LoaderConfigError(field, value, f"must be an integer ({rule})")
    if minimum is not None and value < minimum:
        raise LoaderConfigError(field, value, f"must be at least {minimum}: {rule}")
