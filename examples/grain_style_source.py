"""Random access as Grain does it: a source with ``__len__`` and ``__getitem__``, and a sampler beside it.

    python examples/grain_style_source.py demo-output/store

`SampleSource` is such a source, without depending on Grain: where it is installed,
``grain.MapDataset.source(source)`` and ``grain.DataLoader(data_source=source, ...)`` take it as it is, and
``torch.utils.data.DataLoader(source, batch_size=4)`` does too. Its samples are in the run's random order
already, so the sampler goes through them one after the other; what it has to keep is one number.
"""

import argparse
from collections.abc import Iterator
from typing import Protocol

import torch

from foldfeed.loader import FeatureStore, Recipe, SampleSource

Features = dict[str, torch.Tensor]


class RandomAccessDataSource(Protocol):
    """Grain's protocol of that name."""

    def __len__(self) -> int:
        """Returns how many samples there are."""
        ...

    def __getitem__(self, record_key: int) -> Features:
        """Returns a sample, the same one whenever it is asked for."""
        ...


def batches(source: RandomAccessDataSource, size: int, shard: int, num_shards: int) -> Iterator[Features]:
    """Yields batches of every ``num_shards``-th sample, the last one short."""
    mine = range(shard, len(source), num_shards)
    for first in range(0, len(mine), size):
        samples = [source[index] for index in mine[first : first + size]]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def main() -> None:
    """Prints what two readers get, who share an epoch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("store")
    arguments = parser.parse_args()
    source = SampleSource(
        FeatureStore.open(arguments.store),
        Recipe.named("crop_first", crop_residues=32, num_clusters=4, num_extra=8),
        seed=0,
    )
    for shard in range(2):
        for batch in batches(source, 4, shard, 2):
            print(
                f"reader {shard}:", len(batch["aatype"]), "samples,", int(batch["seq_mask"].sum()), "residues"
            )


if __name__ == "__main__":
    main()
