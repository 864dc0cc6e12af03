"""foldfeed.trainer: a lean data-parallel trainer whose weights do not depend on the number of ranks.

    torchrun --nproc-per-node 4 -m foldfeed.trainer --store URL --output runs/a
    python -m foldfeed.trainer.elastic --ranks 4 -- --store URL --output runs/a      ranks may die and join

Read in this order: training.loop (the step; training.source: of batches), training.commit (what ranks agree
on), gradients.reducer and gradients.dyadic (how gradients are summed), the rest of gradients (how they
travel), groups (between whom), state (how a run survives), members (how its ranks survive each other),
goodput and training.watch (how it is watched), models (what is trained), training.held_out (how well).
elastic, prove, goodput, export and curve are commands of their own.
Names of modules that need torch are imported on first use, so that the command line can print its help
without waiting for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foldfeed.feature_store.lazy_names import lazy_names
from foldfeed.trainer.config import (
    DataConfig,
    HeldOutConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SnapshotConfig,
)
from foldfeed.trainer.errors import (
    CommunicationError,
    DivergedError,
    LeaseHeldError,
    SnapshotError,
    TrainerConfigError,
    TrainerError,
)

if TYPE_CHECKING:
    from foldfeed.trainer.models.losses import Loss, PerSample, distogram_loss, masked_msa_loss
    from foldfeed.trainer.models.model import CompactEvoformer
    from foldfeed.trainer.models.task import EvoformerTask, Task
    from foldfeed.trainer.training.launch import run
    from foldfeed.trainer.training.loop import Outcome

_HOMES = {
    "CompactEvoformer": "models.model",
    "EvoformerTask": "models.task",
    "Loss": "models.losses",
    "Outcome": "training.loop",
    "PerSample": "models.losses",
    "Task": "models.task",
    "distogram_loss": "models.losses",
    "masked_msa_loss": "models.losses",
    "run": "training.launch",
}

__all__ = [
    "CommunicationError",
    "CompactEvoformer",
    "DataConfig",
    "DivergedError",
    "EvoformerTask",
    "HeldOutConfig",
    "LeaseHeldError",
    "Loss",
    "ModelConfig",
    "OptimizerConfig",
    "Outcome",
    "PerSample",
    "RunConfig",
    "SnapshotConfig",
    "SnapshotError",
    "Task",
    "TrainerConfigError",
    "TrainerError",
    "distogram_loss",
    "masked_msa_loss",
    "run",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
