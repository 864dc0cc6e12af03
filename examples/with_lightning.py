"""Under Lightning: a LightningDataModule whose checkpoints continue in the middle of an epoch, exactly.

    pip install lightning
    python examples/with_lightning.py demo-output/store --max-steps 5 --output run
    python examples/with_lightning.py demo-output/store --max-steps 9 --output run --resume

Lightning may hold back steps that it has received, so a checkpoint keeps the step after the last one that was
trained on, not the loader's own position.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from masked_model import MaskedModel

from foldfeed.loader import CropLoader, FeatureStore, Recipe, StepBatch


class EpochSteps:
    """What is left of the loader's epoch.

    It has no ``state_dict``, so that Lightning does not keep a second position beside the module's.
    """

    def __init__(self, loader: CropLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[StepBatch]:
        return self._loader.epoch()

    def __len__(self) -> int:
        """Steps of the whole epoch: Lightning counts those from before a resume as well."""
        order = self._loader.order
        return len(order.epoch_steps(order.epoch_of_step(self._loader.state_dict()["step"])))


class CropDataModule(lightning.LightningDataModule):
    """Feeds crops of a store; any number of ranks, and another number after a resume."""

    def __init__(self, store: str, seed: int = 0) -> None:
        super().__init__()
        self.store = store
        self.seed = seed
        self.next_step = 0
        self.loader: CropLoader | None = None

    def setup(self, stage: str) -> None:
        """Opens the loader of this rank, with its features on this rank's device."""
        assert self.trainer is not None, "Lightning sets it"
        self.loader = CropLoader(
            FeatureStore.open(self.store),
            Recipe.named("crop_first", crop_residues=32, num_clusters=4, num_extra=8),
            seed=self.seed,
            global_batch=4,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            device=self.trainer.strategy.root_device,
        )

    def train_dataloader(self) -> EpochSteps:
        """Returns an iterable that gives the next epoch each time Lightning starts one."""
        assert self.loader is not None, "Lightning calls setup first"
        return EpochSteps(self.loader)

    def transfer_batch_to_device(self, batch: StepBatch, *_: Any) -> StepBatch:
        """Returns the batch: it is there already."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns what Lightning keeps in a checkpoint."""
        assert self.loader is not None, "Lightning calls setup first"
        return self.loader.state_dict(step=self.next_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the position of a checkpoint."""
        assert self.loader is not None, "Lightning calls setup first"
        self.loader.load_state_dict(state_dict)
        self.next_step = state_dict["step"]

    def teardown(self, stage: str) -> None:
        """Ends the loader's threads."""
        if self.loader is not None:
            self.loader.close()


class LightningMaskedModel(lightning.LightningModule):
    """The model of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MaskedModel()

    def training_step(self, batch: StepBatch, batch_idx: int) -> torch.Tensor:
        """Returns the loss of a step and notes that it was trained on."""
        loss = self.model.step_loss(batch)
        print(batch.step, [shard.samples for shard in batch.shards], f"{loss.item():.3f}")
        self.trainer.datamodule.next_step = batch.step + 1
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    """Trains and prints one line a step: number, samples, loss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("store")
    parser.add_argument("--max-steps", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Lightning would have more worker processes, where the loader has threads; and it does not see that the
    # data module resumes.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=arguments.max_steps,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=arguments.output,
        callbacks=[
            ModelCheckpoint(
                arguments.output, filename="last", every_n_train_steps=1, enable_version_counter=False
            )
        ],
    )
    checkpoint = str(arguments.output / "last.ckpt") if arguments.resume else None
    trainer.fit(LightningMaskedModel(), datamodule=CropDataModule(arguments.store), ckpt_path=checkpoint)


if __name__ == "__main__":
    main()
