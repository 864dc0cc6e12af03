"""Flat buffers and the optimizer on them, against torch's own per-tensor code."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from foldfeed.trainer.config import OptimizerConfig
from foldfeed.trainer.errors import GradientError, TrainerConfigError
from foldfeed.trainer.gradients.buckets import plan_buckets
from foldfeed.trainer.gradients.flat import ALIGN_ELEMENTS, FlatParameters
from foldfeed.trainer.gradients.optimizer import FlatAdamW


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.b = nn.Linear(7, 7)
        self.c = nn.Linear(7, 7)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def test_parameters_and_gradients_are_views_in_reverse_order(model: Tied) -> None:
    before = copy.deepcopy(model)
    x = torch.randn(4, 5)
    flat = FlatParameters(model)
    assert [segment.name for segment in flat.segments] == [
        "c.bias",
        "b.bias",
        "b.weight",
        "a.bias",
        "a.weight",
    ]
    for segment, param in zip(flat.segments, flat.parameters, strict=True):
        assert segment.start % ALIGN_ELEMENTS == 0
        assert param.data_ptr() == flat.params[segment.start].data_ptr()
        assert param.grad is not None
        assert param.grad.data_ptr() == flat.grads[segment.start].data_ptr()
    assert torch.equal(model(x), before(x))
    model(x).square().sum().backward()
    before(x).square().sum().backward()
    for param, other in zip(model.parameters(), before.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(param.grad, other.grad)
    assert model.c.weight is model.b.weight
    flat.zero_gradients()
    assert not model.b.weight.grad.any()
    flat.params.zero_()
    assert not model.a.weight.any()


def test_the_layout_hash_follows_names_and_shapes(model: Tied) -> None:
    same, other = FlatParameters(copy.deepcopy(model)), copy.deepcopy(model)
    other.a = nn.Linear(6, 7)
    assert FlatParameters(model).layout_hash == same.layout_hash
    assert FlatParameters(other).layout_hash != same.layout_hash


@pytest.mark.parametrize("replace", [None, torch.zeros(7)])
def test_a_replaced_gradient_is_detected_and_named(model: Tied, replace: torch.Tensor | None) -> None:
    flat = FlatParameters(model)
    flat.check()
    model.c.bias.grad = replace
    with pytest.raises(GradientError, match=r"gradient of 'c.bias': its .grad was replaced"):
        flat.check()


def test_models_that_do_not_fit_are_refused(model: Tied) -> None:
    with pytest.raises(GradientError, match=r"'0.weight'.*sparse=False"):
        FlatParameters(nn.Sequential(nn.Embedding(4, 4, sparse=True)))
    model.a.half()
    with pytest.raises(TrainerConfigError, match=r"'a\.weight' is torch\.float16"):
        FlatParameters(model)
    with pytest.raises(TrainerConfigError, match="no trainable parameter"):
        FlatParameters(nn.ReLU())


def test_flat_adamw_equals_torch_on_separate_tensors(model: Tied) -> None:
    reference = copy.deepcopy(model)
    config = OptimizerConfig(lr=1e-2, warmup_steps=4, max_norm=0.5, weight_decay=0.1)
    torch_adamw = torch.optim.AdamW(
        [p for p in reference.parameters() if p.requires_grad], lr=1e-2, eps=config.eps, weight_decay=0.1
    )
    flat = FlatParameters(model)
    ours = FlatAdamW(flat.params, plan_buckets([s.padded for s in flat.segments], bucket_bytes=200), config)
    for step in range(7):
        x = torch.randn(6, 5)
        flat.zero_gradients()
        model(x).square().sum().backward()
        update = ours.step(flat.grads.clone(), 6.0, step)
        torch_adamw.zero_grad()
        reference(x).square().sum().div(6).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in torch_adamw.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 4)
        torch_adamw.step()
        assert update.norm == pytest.approx(norm.item(), rel=1e-5)
        assert update.learning_rate == group["lr"]
        for param, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(param, other, atol=1e-6)
    assert ours.num_updates == 7


@pytest.mark.parametrize(("value", "samples"), [(math.nan, 4.0), (math.inf, 4.0), (1.0, 0.0)])
def test_a_step_that_is_not_finite_or_empty_changes_nothing(
    model: Tied, value: float, samples: float
) -> None:
    flat = FlatParameters(model)
    ours = FlatAdamW(flat.params, plan_buckets([flat.numel], bucket_bytes=100), OptimizerConfig())
    before = flat.params.clone()
    gradient = torch.ones_like(before)
    gradient[3] = value
    assert ours.step(gradient, samples, 0).skipped
    assert torch.equal(flat.params, before)
    assert not ours.exp_avg.any()
    assert ours.num_updates == 0


def test_the_norm_does_not_overflow_where_fp32_squares_would(model: Tied) -> None:
    flat = FlatParameters(model)
    ours = FlatAdamW(flat.params, plan_buckets([flat.numel], bucket_bytes=100), OptimizerConfig())
    assert ours.norm(torch.full_like(flat.params, 1e30)) == pytest.approx(1e30 * math.sqrt(flat.numel))
