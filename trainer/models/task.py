"""What is trained: a task says which samples it wants, builds a model and reports a loss.

    python -m foldfeed.trainer --task evoformer ...              the compact Evoformer (the default)
    python -m foldfeed.trainer --task mymodel.py:MyTask ...      yours, from a file
    python -m foldfeed.trainer --task mypackage.tasks:MyTask ... yours, from a module

Everything else (order of samples, virtual shards, exact sums, snapshots, recovery) is the trainer's. What a
task must keep to, so that weights stay equal on any number of ranks: parameters in float32, randomness from
torch's global generator alone (it is seeded for each virtual shard), kernels that are deterministic for a
fixed shape, and a loss per sample that no other sample of the batch touches.

A task's code is loaded because its name was typed, never because a snapshot names it.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from foldfeed.loader import LoaderConfigError, Recipe
from foldfeed.loader.recipe import CLUSTERED
from foldfeed.trainer.config import EVOFORMER, DataConfig, ModelConfig, RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.models.evoformer import EvoformerBlock
from foldfeed.trainer.models.losses import Loss, distogram_loss, masked_msa_loss
from foldfeed.trainer.models.model import MSA_CHANNELS, NUM_TOKENS, TARGET_CHANNELS, CompactEvoformer

Features = Mapping[str, torch.Tensor]


class Task(abc.ABC):
    """One thing to train. Subclasses give `build` and `loss`; the rest has defaults.

    Example:
      >>> class Profile(Task):
      ...     def build(self):
      ...         return nn.Linear(49, 23)
      ...     def loss(self, model, features):
      ...         logits = model(features["msa_feat"]).permute(0, 3, 1, 2)
      ...         error = nn.functional.cross_entropy(logits, features["true_msa"], reduction="none")
      ...         return Loss.of((error * features["msa_mask"]).mean((1, 2)))
    """

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """Returns the model with its first weights; torch's generator was seeded, alike on all ranks."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, features: Features) -> Loss:
        """Returns the loss of one virtual shard.

        Args:
          model: what `build` returned, or a wrapper that is called like it. With ``--precision bf16`` what it
            gives may be bfloat16: begin a loss with ``.float()``.
          features: tensors with a leading sample axis, as the recipe gives them.
        """

    def compiled(self, model: nn.Module) -> Iterable[nn.Module]:
        """Returns the modules that ``--compile`` compiles, each by itself; the whole model by default.

        Gradients of a compiled module come at once when its backward has ended, and leave no earlier.
        """
        return [model]

    def example(self, data: DataConfig) -> Features | None:
        """Returns features like those of a virtual shard, for the trial whether compiled modules repeat.

        None, the default: they are compiled only where ``--compile`` says so.
        """
        return None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that every `Loss` of this task has, for the metrics."""
        return ()

    def settings(self) -> dict[str, Any]:
        """Returns what decides the numbers, as JSON-able values; a run goes on under equal ones only."""
        return {}

    def recipe(self, data: DataConfig) -> Recipe:
        """Returns how samples are made; the run's recipe and sizes by default.

        Raises:
          TrainerConfigError: the loader knows no such recipe, or not with these sizes.
        """
        return make_recipe(data)


def make_recipe(data: DataConfig, **further: Any) -> Recipe:
    """Returns the loader's recipe for the run's settings.

    Args:
      data: name and sizes.
      further: other values of the recipe.
    Raises:
      TrainerConfigError: the loader refuses it.
    """
    sizes = {"crop_residues": data.crop_residues, "num_clusters": data.num_clusters}
    try:
        recipe = Recipe.named(data.recipe)
        if recipe.name in CLUSTERED:
            sizes["num_extra"] = data.num_extra
        return Recipe.named(data.recipe, **sizes, **further)
    except LoaderConfigError as error:
        # The values come from our command line, so it is wrong usage of ours.
        raise TrainerConfigError(str(error)) from error


class EvoformerTask(Task):
    """The compact Evoformer: fills in masked MSA positions and, with a weight, predicts distances."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @property
    def parts(self) -> tuple[str, ...]:
        """Both losses, where there are two."""
        return ("masked_msa", "distogram") if self.config.distogram_weight else ()

    def build(self) -> nn.Module:
        """Returns the model."""
        return CompactEvoformer(self.config)

    def compiled(self, model: nn.Module) -> Iterable[nn.Module]:
        """Returns the blocks."""
        return [module for module in model.modules() if isinstance(module, EvoformerBlock)]

    def example(self, data: DataConfig) -> Features | None:
        """Returns random features of the run's sizes, with holes in every mask."""
        draw = torch.Generator().manual_seed(0)
        one = (data.global_batch // data.num_shards, data.crop_residues)
        msa, extra = (one[0], data.num_clusters, one[1]), (one[0], data.num_extra, one[1])
        numbers = {
            **{"target_feat": (*one, TARGET_CHANNELS), "msa_feat": (*msa, MSA_CHANNELS)},
            **{"extra_deletion_value": extra, "pseudo_beta": (*one, 3)},
        }
        flags = {
            **{"seq_mask": one, "msa_mask": msa, "extra_msa_mask": extra, "pseudo_beta_mask": one},
            **{"bert_mask": msa, "extra_has_deletion": extra},
        }
        found = {name: torch.rand(shape, generator=draw) for name, shape in (numbers | flags).items()}
        found |= {name: (found[name] < 0.8).float() for name in flags}
        for name, shape in (("true_msa", msa), ("extra_msa", extra)):
            found[name] = torch.randint(NUM_TOKENS, shape, generator=draw)
        return found | {"residue_index": torch.arange(one[1]).expand(one)}

    def recipe(self, data: DataConfig) -> Recipe:
        """Returns the run's recipe, with labels where distances are predicted."""
        if (kind := make_recipe(data).name) not in CLUSTERED:
            raise TrainerConfigError(
                f"recipe {data.recipe!r} cannot be used here: the compact Evoformer learns from msa_feat, "
                f"which {kind} does not give; use one of {', '.join(CLUSTERED)}, or a task of your own"
            )
        return make_recipe(data, labels=True) if self.config.distogram_weight else make_recipe(data)

    def loss(self, model: nn.Module, features: Features) -> Loss:
        """Returns the masked-MSA loss and, by its weight, the distogram's."""
        predicted = model(features)
        masked = masked_msa_loss(predicted.msa, features)
        if predicted.distogram is None:
            return Loss.of(masked.values, masked.counted)
        distances = distogram_loss(predicted.distogram, features)
        return Loss.of(
            masked.values + self.config.distogram_weight * distances.values,
            masked.counted | distances.counted,
            {"masked_msa": masked, "distogram": distances},
        )


def load_task(config: RunConfig) -> Task:
    """Returns the task that a run names; raises as `own_task`."""
    return EvoformerTask(config.model) if config.task == EVOFORMER else own_task(config.task)


def own_task(name: str) -> Task:
    """Returns a task that somebody wrote, from ``FILE.py:NAME`` or ``MODULE:NAME``.

    Raises:
      TrainerConfigError: there is no such module, file or class, or it makes no task.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise TrainerConfigError(
            f"task {name!r} is neither {EVOFORMER} nor a place; give FILE.py:NAME or MODULE:NAME."
        )
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    if not hasattr(module, attribute):
        raise TrainerConfigError(f"task {name!r}: {place} has no {attribute!r}.")
    made = getattr(module, attribute)
    task = made() if callable(made) else made
    if not isinstance(task, Task):
        raise TrainerConfigError(
            f"task {name!r} gives {type(task).__name__}, not a foldfeed.trainer.Task; derive its "
            "class from Task, or name a function without arguments that returns one."
        )
    return task


def _module_of_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # One that the module itself misses is its own fault, and told as such.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise TrainerConfigError(
            f"there is no module {error.name!r} for task {name!r}; is its folder on PYTHONPATH?"
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TrainerConfigError(f"there is no file {path} for the task.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, spec
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and the like look their module up by its name.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """Returns the settings that decide a run's numbers, those of its task among them."""
    known = config.identity()
    if isinstance(task, EvoformerTask):
        return known
    del known["model"]
    return known | {"task": {"class": type(task).__qualname__, "settings": task.settings()}}
