"""A plain PyTorch loop: epochs, a saved position, and going on from it with any number of ranks.

    python examples/plain_torch.py demo-output/store --epochs 2 --state state.json
    python examples/plain_torch.py demo-output/store --epochs 4 --state state.json     # goes on

Under torchrun each rank takes its virtual shards; averaging gradients over ranks (e.g. by DDP) is left out.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from masked_model import MaskedModel

from foldfeed.loader import CropLoader, FeatureStore, Recipe, Sampling


def main() -> None:
    """Trains and prints one line a step: number, samples, loss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("store")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int, help="stop there, as a killed run would")
    parser.add_argument(
        "--state", type=Path, help="position, read if it is there and written after every step"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = MaskedModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with CropLoader(
        FeatureStore.open(arguments.store),
        Recipe.named("crop_first", crop_residues=32, num_clusters=4, num_extra=8),
        seed=0,
        global_batch=4,
        # The last step of an epoch holds what is left; "join" (the default) would fill it from the next one.
        sampling=Sampling(epoch_end="short"),
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
    ) as loader:
        if arguments.state and arguments.state.exists():
            loader.load_state_dict(json.loads(arguments.state.read_text()))
        step = loader.state_dict()["step"]
        for _ in range(loader.order.epoch_of_step(step), arguments.epochs):
            for batch in loader.epoch():
                loss = model.step_loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                print(batch.step, [shard.samples for shard in batch.shards], f"{loss.item():.3f}")
                if arguments.state:
                    arguments.state.write_text(json.dumps(loader.state_dict()))
                if arguments.max_steps is not None and batch.step + 1 >= arguments.max_steps:
                    return


if __name__ == "__main__":
    main()
