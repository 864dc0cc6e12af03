"""What models and their users do to a reducer: gradients as plain autograd gives them, or a clear refusal.

The table of all hazards and their tests is in CONTRIBUTING.md.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_numerics import ALONE, Small, run_small
from thread_ranks import on_threads
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainer_ranks import toy_shard

from foldfeed.trainer.errors import GradientError, TrainerConfigError
from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.dyadic import owned_shards
from foldfeed.trainer.gradients.flat import FlatParameters
from foldfeed.trainer.gradients.reducer import TreeReducer
from foldfeed.trainer.groups.ranks import Ranks


def test_a_model_that_keeps_state_in_buffers_is_refused(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(10)
            self.out = nn.Linear(49, 23)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(x.transpose(1, 2)).transpose(1, 2))

    with pytest.raises(TrainerConfigError, match=r"buffer 'norm\.num_batches_tracked' changed during a step"):
        run_small(tmp_path / "a", Small(Normed()), steps=1)


class Cached(nn.Module):
    """A constant, and a cache that is filled when it is first used."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(49, 23)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.ones(1)
        self.cache += 1.0
        return self.out(x * self.scale)


def test_constants_and_caches_in_buffers_are_fine(tmp_path: Path) -> None:
    assert run_small(tmp_path / "a", Small(Cached()), steps=1)


def reduced(model: nn.Module, backward: Any) -> torch.Tensor:
    """Returns the gradient of one shard by a reducer with small buckets."""
    flat = FlatParameters(model)
    reducer = TreeReducer(flat, plan_buckets([s.padded for s in flat.segments], bucket_bytes=2000), ALONE, 1)
    try:
        reducer.begin()
        with reducer.shard(0):
            backward(model)
        reducer.finish([])
    finally:
        reducer.close()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain(model: nn.Module, backward: Any) -> torch.Tensor:
    backward(model)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reentrant(model: nn.Module) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for _ in range(2):
        x = checkpoint(model, x, use_reentrant=True)
    x.square().sum().backward()


def penalty(model: nn.Module) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()


def images(model: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()


MODELS: dict[str, Any] = {
    "a gradient penalty": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), penalty),
    "reentrant checkpoints, parameters used twice": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)),
        reentrant,
    ),
    "weights in channels_last": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 2, 3)).to(
            memory_format=torch.channels_last
        ),
        images,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_autograd(name: str) -> None:
    make, backward = MODELS[name]
    torch.manual_seed(0)
    ours = make()
    torch.manual_seed(0)
    wanted = plain(make(), backward)
    assert torch.allclose(reduced(ours, backward), wanted, rtol=1e-5, atol=1e-6)


def test_a_graph_of_the_gradients_is_refused_and_an_error_in_a_hook_comes_out() -> None:
    def twice(model: nn.Module) -> None:
        model(torch.ones(1, 6)).sum().backward(create_graph=True)

    with (
        pytest.warns(UserWarning, match="create_graph"),
        pytest.raises(GradientError, match="differentiate twice"),
    ):
        reduced(nn.Linear(6, 3), twice)

    def fails(name: str, bucket: int) -> None:
        if name == "launch":
            raise RuntimeError("in the hook")

    flat = FlatParameters(model := nn.Linear(6, 3))
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=10**6)
    reducer = TreeReducer(flat, buckets, ALONE, 1, on_event=fails)
    reducer.begin()
    with reducer.shard(0):
        model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="in the hook"):
        reducer.finish([])
    reducer.close()


def reducer_after_a_step() -> TreeReducer:
    flat = FlatParameters(model := nn.Linear(6, 3))
    buckets = plan_buckets([s.padded for s in flat.segments], bucket_bytes=10**6)
    reducer = TreeReducer(flat, buckets, ALONE, 1)
    reducer.begin()
    with reducer.shard(0):
        model(torch.ones(1, 6)).sum().backward()
    reducer.finish([])
    return reducer


def test_a_reducer_that_was_closed_holds_no_descriptors() -> None:
    """A run whose ranks change makes a new one each time, and the old ones are collected late."""
    reducer_after_a_step().close()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for _ in range(3):
            reducer = reducer_after_a_step()
            assert len(os.listdir("/proc/self/fd")) == before + 2
            reducer.close()
            reducer.close()
            assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_a_reducer_has_a_thread_from_its_first_step_until_it_is_closed() -> None:
    """A run that ends before its first step has nothing to close."""
    running = set(threading.enumerate())
    flat = FlatParameters(nn.Linear(6, 3))
    idle = TreeReducer(flat, plan_buckets([s.padded for s in flat.segments], bucket_bytes=64), ALONE, 1)
    assert set(threading.enumerate()) == running
    idle.close()
    reducer = reducer_after_a_step()
    (thread,) = set(threading.enumerate()) - running
    reducer.close(wait=False)
    thread.join(30)
    assert not thread.is_alive()


def test_ranks_that_take_other_branches_agree() -> None:
    """Odd shards leave a layer out: it has no gradient on some ranks, and comes late on others."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(13, 13) for _ in range(3))

        def forward(self, x: torch.Tensor, v: int) -> torch.Tensor:
            x = self.second(x) if v % 2 else self.first(self.second(x))
            return self.third(x) if v % 3 else self.first(x)

    def make() -> nn.Module:
        torch.manual_seed(3)
        return Branching()

    models = [make() for _ in range(4)]

    def work(ranks: Ranks) -> torch.Tensor:
        model = models[ranks.rank]
        flat = FlatParameters(model)
        reducer = TreeReducer(
            flat, plan_buckets([s.padded for s in flat.segments], bucket_bytes=700), ranks, 5
        )
        for _ in range(2):
            reducer.begin()
            for v in owned_shards(5, ranks.world, ranks.rank):
                with reducer.shard(v):
                    model(toy_shard(1, v), v).square().sum().backward()
            reducer.finish([])
        reducer.close()
        return reducer.gradient

    found = [gradient for world in (2, 3, 4) for gradient in on_threads(world, work)]
    torch.set_num_threads(1)
    models[0] = make()
    found.append(work(ALONE))
    assert all(torch.equal(gradient, found[0]) for gradient in found)
