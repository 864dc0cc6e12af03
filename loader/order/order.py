"""Which record comes when: pure arithmetic from step numbers to records.

    g = step * global_batch + v * samples_per_shard + j        global sample number
    epoch, position = divmod(g, epoch_size)
    record = permutation(seed, epoch)[position]                each record once: keyed, O(1) memory
    record = table.draw(word(seed, g))                         weighted: alias table, counter RNG, O(1) time

A step's samples are cut into ``virtual_shards`` equal shards; ``world`` ranks own contiguous runs of shards,
for any world up to the number of shards. The samples of a step therefore do not depend on the world, and
neither does the shard that holds a sample: only who computes it does, and that may change at any step.

Invariant: without a table every epoch visits every record once, in an order that depends on (seed, epoch)
alone; with one, a record depends on (seed, g) alone, and an epoch is a number of draws. How an epoch ends is
a rule of the order. ``join``: epochs follow each other without a gap, so a step may hold the end of one and
the start of the next, and all steps are full. ``short``: the last step of an epoch holds the rest of it, cut
into shards that differ by one sample at most and may be empty. Nothing is dropped or repeated by either, and
sample g is the same by both. No I/O, no state: safe from any thread.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldfeed.feature_store.format.permutation import KeyedPermutation
from foldfeed.loader.errors import LoaderConfigError
from foldfeed.loader.order.alias_table import AliasTable
from foldfeed.loader.order.counter_rng import Purpose, stream, words_at
from foldfeed.loader.order.sampling import JOIN


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleAddress:
    """Where a global sample number points.

    Attributes:
      sample: global sample number g.
      epoch: epochs completed before it.
      position: place in that epoch's order.
      record: number of the record among those chosen (`order.selection`): for all records of one
        store its position in the sorted ids.
    """

    sample: int
    epoch: int
    position: int
    record: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleOrder:
    """The order of one run.

    Attributes:
      num_records: records to draw from.
      seed: of the run.
      global_batch: samples of one step over all ranks.
      virtual_shards: equal parts of a step that are summed in a fixed tree by the trainer.
      table: of weighted draws; None where every record comes once an epoch.
      epoch_samples: samples of an epoch of weighted draws; ``num_records`` when None.
      epoch_end: ``join`` or ``short``, see the module.
    """

    num_records: int
    seed: int
    global_batch: int
    virtual_shards: int
    table: AliasTable | None = dataclasses.field(default=None, repr=False)
    epoch_samples: int | None = None
    epoch_end: str = JOIN

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

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch."""
        return self.num_records if self.epoch_samples is None else self.epoch_samples

    def locate(self, sample: int) -> SampleAddress:
        """Returns where a sample comes from.

        Raises:
          LoaderConfigError: a negative number.
        """
        _check_integer("sample", sample, 0, "samples are counted from 0")
        epoch, position = divmod(sample, self.epoch_size)
        if self.table is None:
            record = _epoch_order(self.num_records, self.seed, epoch)[position]
        else:
            record = int(self.records([sample])[0])
        return SampleAddress(sample=sample, epoch=epoch, position=position, record=record)

    def substitute(self, sample: int, attempt: int) -> SampleAddress:
        """Returns where a sample comes from when the record that it points to, or others, cannot be read.

        Any record of those drawn from, by chance or by weight: a function of (seed, sample, attempt).

        Args:
          sample: its global number.
          attempt: 1, 2, ...; 0 is `locate`.
        """
        address = self.locate(sample)
        if not attempt:
            return address
        word = stream(self.seed, sample, Purpose.SUBSTITUTE).words(attempt)[-1:]
        record = (
            (int(word[0]) * self.num_records) >> 64 if self.table is None else int(self.table.draw(word)[0])
        )
        return dataclasses.replace(address, record=record)

    def records(self, samples: ArrayLike) -> NDArray[np.int64]:
        """Returns the record of each sample, as `locate` does for one.

        Args:
          samples: global sample numbers, 0 to 2**63 - 1, in any order.
        Returns: int64, the same shape.
        Raises:
          LoaderConfigError: a negative number.
          TypeError: samples are no integers.
        """
        numbers = np.asarray(samples)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"sample numbers must be integers, not {numbers.dtype}; use .astype(numpy.int64)")
        if numbers.size:
            _check_integer("sample", int(numbers.min()), 0, "samples are counted from 0")
        if self.table is not None:
            return self.table.draw(words_at(self.seed, numbers, Purpose.RECORD))
        if not numbers.size:
            return np.empty(numbers.shape, dtype=np.int64)
        flat, back = numbers.ravel(), None
        epoch = int(flat.min()) // self.num_records
        if int(flat.max()) // self.num_records == epoch:
            # As nearly always; spares a division of every number.
            positions = flat - epoch * self.num_records
            return _epoch_order(self.num_records, self.seed, epoch).forward(positions).reshape(numbers.shape)
        epochs = flat // self.num_records
        starts = _run_starts(epochs)
        if (np.diff(epochs[starts]) < 0).any():
            back = np.argsort(epochs, kind="stable")
            flat, epochs = flat[back], epochs[back]
            starts = _run_starts(epochs)
        found = np.empty(flat.size, dtype=np.int64)
        for first, last in itertools.pairwise([*starts.tolist(), flat.size]):
            epoch = int(epochs[first])
            positions = flat[first:last] - epoch * self.num_records
            found[first:last] = _epoch_order(self.num_records, self.seed, epoch).forward(positions)
        if back is not None:
            found[back] = found.copy()
        return found.reshape(numbers.shape)

    def samples_of(self, records: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Returns the sample of each record in an epoch, int64, where every record comes once an epoch."""
        assert self.table is None
        return epoch * self.epoch_size + _epoch_order(self.num_records, self.seed, epoch).inverse(records)

    def shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the virtual shard of each sample, int64: the one whose `shard_samples` it is among."""
        if self.epoch_end == JOIN:
            return samples % self.global_batch // self.samples_per_shard
        inside = samples % self.epoch_size
        place = inside % self.global_batch
        size = np.minimum(self.global_batch, self.epoch_size - (inside - place))
        # The last shard that begins at this place or before: v * size // V <= place.
        return ((place + 1) * self.virtual_shards - 1) // size

    def step_samples(self, step: int) -> range:
        """Returns the global sample numbers of a step."""
        assert step >= 0, step
        if self.epoch_end == JOIN:
            return range(step * self.global_batch, (step + 1) * self.global_batch)
        epoch, inside = divmod(step, -(-self.epoch_size // self.global_batch))
        first = epoch * self.epoch_size + inside * self.global_batch
        return range(first, min(first + self.global_batch, (epoch + 1) * self.epoch_size))

    def shard_samples(self, step: int, shard: int) -> range:
        """Returns the global sample numbers of a virtual shard of a step; none only where a step is short."""
        assert 0 <= shard < self.virtual_shards, (shard, self.virtual_shards)
        samples = self.step_samples(step)
        first, last = (len(samples) * end // self.virtual_shards for end in (shard, shard + 1))
        return samples[first:last]

    def epoch_of_step(self, step: int) -> int:
        """Returns the epoch of a step's first sample."""
        return self.step_samples(step).start // self.epoch_size

    def epoch_steps(self, epoch: int) -> range:
        """Returns the steps that begin in an epoch; none, by ``join``, where one step covers it."""
        if self.epoch_end == JOIN:
            first, last = (-(-end * self.epoch_size // self.global_batch) for end in (epoch, epoch + 1))
            return range(first, last)
        steps = -(-self.epoch_size // self.global_batch)
        return range(epoch * steps, (epoch + 1) * steps)


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


def _run_starts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns where runs of equal values begin."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


@functools.lru_cache(maxsize=8)
def _epoch_order(num_records: int, seed: int, epoch: int) -> KeyedPermutation:
    # A pure function of its arguments; the cache only saves hashing the key for every sample.
    return KeyedPermutation(num_records, (seed, epoch))


def _check_integer(field: str, value: object, minimum: int | None, rule: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise LoaderConfigError(field, value, f"must be an integer ({rule})")
    if minimum is not None and value < minimum:
        raise LoaderConfigError(field, value, f"must be at least {minimum}: {rule}")
