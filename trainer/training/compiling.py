"""Whether a run computes with compiled blocks (torch.compile): it was told to, or has seen that they repeat.

A run that says nothing does what it did before when it goes on, and on a CPU computes without. A new one on a
CUDA device tries: two fresh models, each compiled for itself and from nothing (a kernel's tuning may end
otherwise the next time), take the same small step twice. Compiled blocks are used when all four give equal
bits on every rank. What was decided is in the run's identity, so it is decided once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from foldfeed.trainer.config import RunConfig
from foldfeed.trainer.errors import TrainerConfigError
from foldfeed.trainer.groups.ranks import Ranks
from foldfeed.trainer.models.task import Features, Task
from foldfeed.trainer.rng import seed_initial_weights, seed_shard
from foldfeed.trainer.state.resume import compiler


def settle(
    config: RunConfig,
    task: Task,
    ranks: Ranks,
    before: Callable[[RunConfig], Mapping[str, Any] | None],
    say: Callable[[str], None],
) -> RunConfig:
    """Returns the settings with ``compile`` decided. A collective.

    Args:
      config: settings; what they say themselves is done.
      task: what is trained.
      ranks: the run; their device counts.
      before: gives the identity of the run that goes on, None for a new one. Called on the first rank.
      say: called with the outcome of a trial.
    """
    if config.compile is not None:
        return config
    identity = ranks.first_does(lambda: before(config), "the choice of compiled blocks")
    if identity is not None or ranks.device.type != "cuda":
        return dataclasses.replace(config, compile=bool(identity and identity.get("compile")))
    reasons = ranks.gather_json(why_not(config, task, ranks.device), "the trial of compiled blocks")
    reason = next((f"{text} (rank {rank})" for rank, text in enumerate(reasons) if text), "")
    why = f"not compiled: {reason}" if reason else "compiled: two compilations gave equal bits, twice each"
    say(f"blocks are {why}")
    return dataclasses.replace(config, compile=not reason)


def compile_blocks(modules: Iterable[torch.nn.Module]) -> None:
    """Compiles modules in place, with kernels that repeat where the process asks for them."""
    if torch.are_deterministic_algorithms_enabled():
        # The compiler has a switch of its own, which `prepare_numerics` leaves alone: to set it is to import
        # the compiler, a second and a half of CPU that other runs need not wait for.
        torch.use_deterministic_algorithms(True)
    for module in modules:
        module.compile(dynamic=False)


def why_not(config: RunConfig, task: Task, device: torch.device) -> str:
    """Returns what speaks against compiled blocks on a device; empty when they repeat to the bit."""
    features = task.example(config.data)
    if features is None:
        return f"{type(task).__name__} gives no example to try them with"
    # Here, because it takes a second that other runs need not wait for.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import utils

    # Its name before torch 2.8.
    from_nothing = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache
    try:
        compiler(device)
        steps = _steps(config, task, features, device)
        with from_nothing():
            steps += _steps(config, task, features, device)
    except (TrainerConfigError, TorchDynamoException, OSError, subprocess.SubprocessError) as error:
        # The last two: Triton also needs a C compiler and Python's headers, once its kernels run.
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return "" if len(set(steps)) == 1 else f"the same step gave {len(set(steps))} results"


def _steps(config: RunConfig, task: Task, features: Features, device: torch.device) -> list[str]:
    """Returns the digests of the same step, taken twice by a fresh model."""
    torch.compiler.reset()
    seed_initial_weights(config.seed)
    model = task.build().to(device)
    compile_blocks(task.compiled(model))
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        seed_shard(config.seed, 0, 0)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            loss = task.loss(model, {name: value.to(device) for name, value in features.items()})
        loss.total.backward()
        digest = hashlib.sha256(loss.per_sample.cpu().numpy().tobytes())
        for param in model.parameters():
            if param.grad is not None:
                digest.update(param.grad.cpu().numpy().tobytes())
        found.append(digest.hexdigest())
    torch.compiler.reset()
    return found
