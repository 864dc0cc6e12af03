"""What ranks must refuse, or name; runs on the ranks of `trainer_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainer_ranks import SyntheticSource, tiny_config, toy_model, toy_shard

from foldfeed.trainer.errors import GradientError, ReplicaMismatchError, TrainerConfigError
from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.models.task import Task, load_task
from foldfeed.trainer.state.snapshot import SnapshotFolder
from foldfeed.trainer.state.tiers import Saver
from foldfeed.trainer.training.loop import Trainer
from foldfeed.trainer.training.metrics import Metrics
from foldfeed.trainer.training.source import Source


def replaced_gradient(ranks: Any) -> str:
    """Every rank replaces a .grad; the error must come out of finish() without a collective."""
    model = toy_model()
    flat = FlatParameters(model)
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=10**9)
    reducer = TreeReducer(flat, buckets, ranks, ranks.world)
    reducer.begin()
    model.last.weight.grad = None
    try:
        with reducer.shard(ranks.rank):
            model(toy_shard(0, 0)).sum().backward()
        reducer.finish([])
    except GradientError as error:
        return error.parameter
    finally:
        reducer.close()
    return "nothing was raised"


def replica_mismatch(ranks: Any, folder: Path) -> Any:
    """One bit of a weight flips on the second rank: the snapshot must not happen, and name that rank."""
    config = tiny_config(folder)
    source = SyntheticSource(config.data, config.seed, ranks, {})
    metrics = Metrics(config, active=False)
    trainer = Trainer(config, ranks, Source(source, ""), metrics, load_task(config))
    trainer.train_step(next(iter(source)), 0.0)
    snapshots = SnapshotFolder(folder / "desync", keep=1)
    saver = Saver(snapshots, None, ranks, config.snapshots)
    if ranks.rank == 1:
        bits = trainer.flat.params.numpy().view("int32")
        bits[5] ^= 1
    try:
        trainer._begin_snapshot(saver, {}, 0.0, memory=False, disk=True)
        trainer._end_snapshot()
        saver.finish()
    except ReplicaMismatchError as error:
        return [list(error.odd_ranks), snapshots.steps()]
    finally:
        trainer.reducer.close()
    return [[], snapshots.steps()]


def other_layout(ranks: Any, folder: Path) -> str:
    """The last rank builds its layers in another order."""

    class Odd(Task):
        def build(self) -> nn.Module:
            sizes = [(2, 3), (3, 2)] if ranks.rank < ranks.world - 1 else [(3, 2), (2, 3)]
            return nn.Sequential(*[nn.Linear(*size) for size in sizes])

        def loss(self, model: nn.Module, features: Any) -> Any:
            raise NotImplementedError

    config = tiny_config(folder)
    metrics = Metrics(config, active=False)
    try:
        source = Source(SyntheticSource(config.data, config.seed, ranks, {}), "")
        Trainer(config, ranks, source, metrics, Odd())
    except ReplicaMismatchError as error:
        return str(error)
    return "nothing was raised"


def model_in_ddp() -> str:
    """A model whose middle somebody put into DistributedDataParallel."""
    try:
        FlatParameters(nn.Sequential(nn.Linear(2, 2), DistributedDataParallel(nn.Linear(2, 2))))
    except TrainerConfigError as error:
        return str(error)
    return "nothing was raised"
