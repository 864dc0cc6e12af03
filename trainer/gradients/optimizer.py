"""AdamW on the flat buffers, with clipping, a schedule, an average and the decision to skip a step.

The norm is taken from the reduced gradient, which has equal bits on every rank, bucket by bucket in fp64 in
a fixed order. So every rank sees the same norm, and the decision to skip a step with a NaN or an infinity is
a consensus without a message. Division happens once: the gradient is a sum over samples and is scaled by
``clip / number of counted samples``, never by the world size.

Invariant: a skipped step changes neither parameters nor moments nor average nor Adam's step count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch.optim.adamw import adamw

from foldfeed.trainer.config import OptimizerConfig
from foldfeed.trainer.gradients.buckets import Bucket


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
      ema: fp32 (numel,), exponential moving average of the parameters, which begins as they do; or None.
      num_updates: steps applied so far (Adam's own count, without the skipped ones).
    """

    def __init__(self, params: torch.Tensor, buckets: Sequence[Bucket], config: OptimizerConfig) -> None:
        """Allocates the moments.

        Args:
          params: fp32 (numel,) with the first weights, updated in place.
          buckets: the plan whose order fixes the norm's.
          config: learning rate, clipping, average.
        """
        self._config = config
        self._buckets = list(buckets)
        self._param = torch.nn.Parameter(params, requires_grad=False)
        self.exp_avg = torch.zeros_like(params)
        self.exp_avg_sq = torch.zeros_like(params)
        self.ema = params.clone() if config.ema_decay else None
        self._step = torch.zeros((), dtype=torch.float32, device=params.device)

    @property
    def num_updates(self) -> int:
        """Steps applied so far."""
        return int(self._step)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._step.fill_(value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the average in the place of the parameters while the context lasts."""
        assert self.ema is not None, "without ema_decay there is no average"
        kept = self._param.clone()
        self._param.copy_(self.ema)
        try:
            yield
        finally:
            self._param.copy_(kept)

    def step(self, gradient: torch.Tensor, num_samples: float, step: int) -> Update:
        """Applies one step, or skips it when the gradient is not finite.

        Args:
          gradient: fp32 (numel,), the sum over all counted samples; scaled in place.
          num_samples: how many samples were counted, over all ranks.
          step: number of this step, for the learning rate.
        """
        lr = learning_rate(self._config, step)
        if num_samples == 0:
            return Update(norm=0.0, learning_rate=lr, skipped=True)
        norm = self.norm(gradient) / num_samples
        if not math.isfinite(norm):
            return Update(norm=norm, learning_rate=lr, skipped=True)
        # As torch.nn.utils.clip_grad_norm_: 1e-6 keeps the quotient finite.
        clip = min(1.0, self._config.max_norm / (norm + 1e-6)) if self._config.max_norm else 1.0
        gradient.mul_(clip / num_samples)
        self._apply(gradient, lr)
        if self.ema is not None:
            self.ema.lerp_(self._param, 1.0 - self._config.ema_decay)
        return Update(norm=norm, learning_rate=lr, skipped=False)

    def _apply(self, gradient: torch.Tensor, lr: float) -> None:
        # What torch.optim.AdamW's step does. The class itself would import torch's compiler, nine hundred
        # modules and a second and a half of CPU, in every run; and the moments are ours, so that a snapshot
        # reads and writes flat buffers.
        with torch.no_grad():
            adamw(
                [self._param],
                [gradient],
                [self.exp_avg],
                [self.exp_avg_sq],
                [],
                [self._step],
                fused=True,
                amsgrad=False,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                lr=lr,
                weight_decay=self._config.weight_decay,
                eps=self._config.eps,
                maximize=False,
            )

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


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Returns the rate of a step (0, 1, ...): linear warmup, then what the schedule says.

    With lr 1, no warmup, decay_steps 4 and decay_factor 0.5, steps 0, 2, 4, 8 have 1, 1, 0.5, 0.25 (step),
    1, 0.75, 0.5, 0.5 (linear).

    Source: AlphaFold 2 supplementary information, 1.11.3; that it decays again and again is from OpenFold.
    """
    warmup, last, factor = config.warmup_steps, config.decay_steps, config.decay_factor
    rate = config.lr * min(1.0, (step + 1) / warmup) if warmup else config.lr
    if config.schedule == "constant":
        return rate
    if config.schedule == "step":
        return float(rate * factor ** (step // last))
    done = min(1.0, max(0.0, (step - warmup) / (last - warmup)))
    # Rounded: the last bit of a cosine depends on the C library, and ranks must agree on all bits.
    left = 1.0 - done if config.schedule == "linear" else round(0.5 * (1.0 + math.cos(math.pi * done)), 12)
    return rate * (factor + (1.0 - factor) * left)
