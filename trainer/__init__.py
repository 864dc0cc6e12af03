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
    DependencyError,
    DivergedError,
    ExcludedError,
    GradientError,
    InvalidSnapshotError,
    LeaseHeldError,
    LeaseLostError,
    MeetingPointError,
    NoValidSnapshotError,
    PeerError,
    ReplicaMismatchError,
    SnapshotError,
    SnapshotMismatchError,
    TrainerConfigError,
    TrainerError,
    WireError,
)

if TYPE_CHECKING:
    from foldfeed.trainer.gradients.flat import FlatParameters
    from foldfeed.trainer.gradients.reducer import TreeReducer
    from foldfeed.trainer.models.losses import Loss, PerSample, distogram_loss, masked_msa_loss
    from foldfeed.trainer.models.model import CompactEvoformer
    from foldfeed.trainer.models.task import EvoformerTask, Task
    from foldfeed.trainer.training.launch import run
    from foldfeed.trainer.training.loop import Outcome, Trainer

_HOMES = {
    "CompactEvoformer": "models.model",
    "EvoformerTask": "models.task",
    "FlatParameters": "gradients.flat",
    "Loss": "models.losses",
    "Outcome": "training.loop",
    "PerSample": "models.losses",
    "Trainer": "training.loop",
    "TreeReducer": "gradients.reducer",
    "Task": "models.task",
    "distogram_loss": "models.losses",
    "masked_msa_loss": "models.losses",
    "run": "training.launch",
}

__all__ = [
    "CommunicationError",
    "CompactEvoformer",
    "DataConfig",
    "DependencyError",
    "DivergedError",
    "EvoformerTask",
    "ExcludedError",
    "FlatParameters",
    "GradientError",
    "HeldOutConfig",
    "InvalidSnapshotError",
    "LeaseHeldError",
    "LeaseLostError",
    "Loss",
    "MeetingPointError",
    "ModelConfig",
    "NoValidSnapshotError",
    "OptimizerConfig",
    "Outcome",
    "PeerError",
    "PerSample",
    "ReplicaMismatchError",
    "RunConfig",
    "SnapshotConfig",
    "SnapshotError",
    "SnapshotMismatchError",
    "Task",
    "Trainer",
    "TrainerConfigError",
    "TrainerError",
    "TreeReducer",
    "WireError",
    "distogram_loss",
    "masked_msa_loss",
    "run",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
