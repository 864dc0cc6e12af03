"""AdamW on the flat buffers, with clipping, warmup and the decision to skip a step.

The norm is taken from the reduced gradient, which has equal bits on every rank, bucket by bucket in fp64 in
a fixed order. So every rank sees the same norm, and the decision to skip a step with a NaN or an infinity is
a consensus without a message. Division happens once: the gradient is a sum over samples and is scaled by
``clip / number of counted samples``, never by the world size.

Invariant: a skipped step changes neither parameters nor moments nor Adam's step count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from foldfeed.trainer.buckets import Bucket
from foldfeed.trainer.config import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one call of `FlatAdamW.step` did.

    Attributes:
      norm: of the mean gradient, before clipping; NaN or infinite when it was.
      learning_rate: of this step.
      skipped: True when nothing was changed.
    """

    norm: float
    learning_rate: float
    skipped: bool


class FlatAdamW:
    """torch's fused AdamW on one flat tensor.

    Attributes:
      exp_avg: fp32 (numel,), first moment.
      exp_avg_sq: fp32 (numel,), second moment.
      num_updates: steps applied so far (Adam's own count, without the skipped ones).
    """

    def __init__(self, params: torch.Tensor, buckets: Sequence[Bucket], config: OptimizerConfig) -> None:
        """Allocates the moments.

        Args:
          params: fp32 (numel,), updated in place.
          buckets: the plan whose order fixes the norm's.
          config: learning rate, warmup, clipping.
        """
        self._config = config
        self._buckets = list(buckets)
        self._param = torch.nn.Parameter(params, requires_grad=False)
        self.exp_avg = torch.zeros_like(params)
        self.exp_avg_sq = torch.zeros_like(params)
        self._step = torch.zeros((), dtype=torch.float32, device=params.device)
        self._adamw = torch.optim.AdamW(
            [self._param],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # The moments are ours, so that a snapshot reads and writes flat buffers.
        self._adamw.state[self._param] = {
            "step": self._step,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }

    @property
    def num_updates(self) -> int:
        """Steps applied so far."""
        return int(self._step)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._step.fill_(value)

    def learning_rate(self, step: int) -> float:
        """Returns the rate of a step (0, 1, ...): linear warmup, then constant."""
        warmup = self._config.warmup_steps
        return self._config.lr * min(1.0, (step + 1) / warmup) if warmup else self._config.lr

    def step(self, gradient: torch.Tensor, num_samples: float, step: int) -> Update:
        """Applies one step, or skips it when the gradient is not finite.

        Args:
          gradient: fp32 (numel,), the sum over all counted samples; scaled in place.
          num_samples: how many samples were counted, over all ranks.
          step: number of this step, for the learning rate.
        """
        lr = self.learning_rate(step)
        if num_samples == 0:
            return Update(norm=0.0, learning_rate=lr, skipped=True)
        norm = self.norm(gradient) / num_samples
        if not math.isfinite(norm):
            return Update(norm=norm, learning_rate=lr, skipped=True)
        # As torch.nn.utils.clip_grad_norm_: 1e-6 keeps the quotient finite.
        clip = min(1.0, self._config.max_norm / (norm + 1e-6)) if self._config.max_norm else 1.0
        gradient.mul_(clip / num_samples)
        self._param.grad = gradient
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        return Update(norm=norm, learning_rate=lr, skipped=False)

    def norm(self, gradient: torch.Tensor) -> float:
        """Returns the 2-norm: fp64 sums of squares per bucket, added in bucket order."""
        parts = [
            torch.linalg.vector_norm(gradient[bucket.start : bucket.stop], dtype=torch.float64)
            for bucket in self._buckets
        ]
        total = 0.0
        for part in torch.stack(parts).tolist():
            total += part * part
        return math.sqrt(total)
