"""Weights of a snapshot as a safetensors file: ``python -m foldfeed.trainer.export RUN_OR_SNAPSHOT FILE``.

The file holds the model's parameters (or their moving average) under their names, fp32, and where they come
from as metadata. The snapshot is validated first; the layout is that of the model in its manifest, checked by
the layout's hash.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.trainer.config import EVOFORMER, ModelConfig
from foldfeed.trainer.errors import NoValidSnapshotError, SnapshotMismatchError, TrainerConfigError
from foldfeed.trainer.exit_code import exit_code
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.models.task import EvoformerTask, Task, own_task
from foldfeed.trainer.state.snapshot import (
    EMA,
    MANIFEST,
    SNAPSHOTS,
    Generation,
    SnapshotFolder,
    read_generation,
)


def task_of(generation: Generation, task: str) -> Task:
    """Returns the task that a snapshot was trained with.

    Args:
      generation: a validated snapshot.
      task: as ``--task`` of the training; a snapshot never names code that is loaded.
    Raises:
      TrainerConfigError: the snapshot is of another task.
    """
    known = generation.manifest["identity"]
    if task != EVOFORMER:
        return own_task(task)
    if "model" not in known:
        raise TrainerConfigError(
            f"{generation.path} was trained with the task {known['task']['class']!r}, not with the compact "
            "Evoformer; give the --task of its training."
        )
    return EvoformerTask(ModelConfig(**known["model"]))


def named_weights(
    generation: Generation, task: str = EVOFORMER, *, ema: bool = False
) -> dict[str, torch.Tensor]:
    """Returns the parameters of a validated snapshot, fp32 on the CPU, by their names in the model.

    Args:
      generation: a validated snapshot.
      task: what it was trained with.
      ema: their moving average instead.
    Raises:
      TrainerConfigError: the run keeps no average.
      SnapshotMismatchError: this release's model has another layout than the one that was trained.
    """
    manifest = generation.manifest
    if ema and EMA not in generation.buffers:
        raise TrainerConfigError(
            f"{generation.path} has no moving average of the weights: the run was not given --ema-decay; "
            "export its weights, without --ema."
        )
    flat = FlatParameters(task_of(generation, task).build())
    if flat.layout_hash != manifest["layout_hash"]:
        raise SnapshotMismatchError(
            str(generation.path),
            [f"layout {manifest['layout_hash']} in the snapshot, {flat.layout_hash} now"],
            "Export it with the release that trained it.",
        )
    params = generation.buffers[EMA if ema else "params"]
    return {
        segment.name: params[segment.start : segment.start + segment.numel].view(segment.shape).clone()
        for segment in flat.segments
    }


def export_safetensors(path: Path, target: Path, task: str = EVOFORMER, *, ema: bool = False) -> Generation:
    """Writes the weights of a snapshot, or of the newest snapshot on a run's disk, to a safetensors file.

    Args:
      path: a snapshot's folder, or a run's (``--output``).
      target: the file; appears whole or not at all.
      task: what the snapshot was trained with.
      ema: the moving average of the weights instead of the weights.
    Returns: the generation.
    Raises:
      TrainerConfigError: of another task, or without an average.
      InvalidSnapshotError: it does not validate.
      NoValidSnapshotError: the run has no snapshot.
      SnapshotMismatchError: the model's layout is another one.
      MissingExtraError: safetensors is not installed.
    """
    try:
        # Lazy: an optional extra.
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise MissingExtraError("safetensors", "export") from error
    if not (path / MANIFEST).exists():
        folder = SnapshotFolder(path / SNAPSHOTS, keep=1)
        if not folder.steps():
            raise NoValidSnapshotError(str(folder.path), ["there is none"])
        path = folder.generation_path(folder.steps()[-1])
    generation = read_generation(path)
    weights = named_weights(generation, task, ema=ema)
    digest = hashlib.sha256(generation.buffers["params"].numpy().data.cast("B")).hexdigest()
    metadata = {
        "format": "pt",
        "step": str(generation.step),
        "weights_digest": digest,
        "weights": EMA if ema else "params",
        **{name: str(generation.manifest[name]) for name in ("run_id", "config_digest", "layout_hash")},
    }
    temporary = target.with_name(f".{target.name}.writing")
    try:
        save_file(weights, temporary, metadata=metadata)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return generation


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--task", default=EVOFORMER, show_default=True, help="As in the training.")
@click.option("--ema", is_flag=True, help="The moving average of the weights (of a run with --ema-decay).")
def command(source: Path, target: Path, task: str, ema: bool) -> None:
    """Write the weights of SOURCE (a snapshot, or a run's --output) to the safetensors file TARGET."""
    generation = export_safetensors(source, target, task, ema=ema)
    what = "average of the weights" if ema else "weights"
    click.echo(f"{target}: {what} of step {generation.step} from {generation.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code(command, "foldfeed.trainer.export", arguments)


if __name__ == "__main__":
    sys.exit(main())
