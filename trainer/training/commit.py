"""What all ranks agree on at the commit point of a step: the scalars that ride behind the gradients.

Losses come per virtual shard and are added in shard order, so they have equal bits for every number of ranks.
Pure functions of numbers; the exchange is the reducer's, the decisions are the loop's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from foldfeed.loader.batch import ShardBatch
from foldfeed.trainer.models.losses import Loss


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What all ranks agree on at the commit point.

    Attributes:
      mean_loss: over the counted samples, summed in shard order (equal bits for every world size).
      max_loss: of a sample.
      num_samples: counted samples.
      stop: some rank was asked to stop.
      all_stop: all were.
      save_failed: a snapshot could not be written; the run ends.
      data_s: the wait for data of each rank.
      compute_s: forward and backward of each rank.
      num_residues: that exist in the step's crops, padding left out.
      bad_shards: virtual shards whose loss is not finite.
      parts: mean of each part of the loss over its own counted samples.
      regroup: a rank wants to join an elastic run.
    """

    mean_loss: float
    max_loss: float
    num_samples: float
    stop: bool
    all_stop: bool
    save_failed: bool
    data_s: list[float]
    compute_s: list[float]
    num_residues: int
    bad_shards: list[int]
    parts: dict[str, float]
    regroup: bool


class ShardResult(NamedTuple):
    """What a virtual shard leaves besides its gradient, in tensors of its own: the batch may go.

    Attributes:
      samples: global numbers.
      finite: bool (b,), whether each sample's loss is.
      scalars: 0-d each: sum of the losses, count, largest loss, then sum and count of each part.
      num_residues: 0-d, that exist in the shard's crops.
    """

    samples: list[int]
    finite: torch.Tensor
    scalars: list[torch.Tensor]
    num_residues: torch.Tensor

    @classmethod
    def of(cls, shard: ShardBatch, loss: Loss, parts: Sequence[str]) -> ShardResult:
        """Returns the result of a shard; no value is read back from the device."""
        scalars = [loss.total.detach(), loss.num_samples, loss.per_sample.max()]
        for name in parts:
            scalars += [loss.parts[name].values.sum(), loss.parts[name].counted.sum()]
        mask = shard.features.get("seq_mask")
        num_residues = torch.zeros(()) if mask is None else mask.sum()
        return cls(list(shard.samples), loss.per_sample.isfinite(), scalars, num_residues)


def shard_scalars(results: Mapping[int, ShardResult], num_shards: int, num_parts: int) -> list[float]:
    """Returns V sums of losses, V counts and V largest losses, then V sums and V counts of each part.

    Zeros for other ranks' shards. Read only after the last backward was issued: on a GPU each ``item`` waits
    for the device.
    """
    columns = [[0.0] * num_shards for _ in range(3 + 2 * num_parts)]
    for shard, result in results.items():
        for column, value in zip(columns, result.scalars, strict=True):
            column[shard] = float(value.item())
    return [value for column in columns for value in column]


# Of a rank's row at the commit point: stop, save_failed, regroup, data_s, residues, compute_s. Then come V
# numbers three times, and V twice for each part of the loss.
NUM_PLAIN_SCALARS = 6


def combine(rows: Sequence[Sequence[float]], num_shards: int, parts: Sequence[str] = ()) -> Commit:
    """Returns what the ranks' scalars say together; each shard's entries are zero except on its owner.

    Args:
      rows: per rank the `NUM_PLAIN_SCALARS`, then V losses, V counts, V largest losses, and for each part V
        sums, V counts.
      num_shards: V.
      parts: names of the parts of the loss.
    """

    def shards(part: int) -> list[float]:
        start = NUM_PLAIN_SCALARS + part * num_shards
        return [sum(row[start + shard] for row in rows) for shard in range(num_shards)]

    losses, counts, worst = shards(0), shards(1), shards(2)
    sums = {name: (sum(shards(3 + 2 * i)), sum(shards(4 + 2 * i))) for i, name in enumerate(parts)}
    num_samples = sum(counts)
    # NaN must win: max() of a list with NaN depends on the order.
    finite = all(math.isfinite(value) for value in worst)
    return Commit(
        mean_loss=sum(losses) / num_samples if num_samples else 0.0,
        max_loss=max(worst) if finite else math.nan,
        num_samples=num_samples,
        stop=any(row[0] for row in rows),
        all_stop=all(row[0] for row in rows),
        save_failed=any(row[1] for row in rows),
        regroup=any(row[2] for row in rows),
        data_s=[row[3] for row in rows],
        compute_s=[row[5] for row in rows],
        num_residues=int(sum(row[4] for row in rows)),
        bad_shards=[shard for shard, loss in enumerate(losses) if not math.isfinite(loss)],
        parts={name: value / count for name, (value, count) in sums.items() if count},
    )
