"""Flat parameters and gradients: one fp32 buffer each, every `Parameter` a view into them.

Thousands of small tensors cost an optimizer more in launches than in arithmetic, so the model's parameters
are moved into one buffer in a frozen order: reverse registration, tied parameters once. Optimizer, clip,
snapshots and messages then work on a few long runs. Segments start on 64-byte boundaries, so that kernels
meet the same alignment in every run; the padding between them stays zero.

Owns: the buffers and the layout. Does not own: when gradients are summed or applied.
Invariant: after construction ``p.data`` and ``p.grad`` alias the buffers for the life of the model; code that
replaces a ``.grad`` or keeps state in a module's buffer is detected (`FlatParameters.check`), never ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from foldfeed.trainer.errors import GradientError, TrainerConfigError

# 16 fp32 elements: one cache line.
ALIGN_ELEMENTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Where one parameter lies.

    Attributes:
      name: the first name under which the model registers it.
      shape: of the parameter.
      start: first element in the flat buffer.
      numel: elements of the parameter.
      padded: elements up to the next segment.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    padded: int


class FlatParameters:
    """The flat buffers of one model.

    Attributes:
      params: fp32 (numel,), the parameters; ``requires_grad`` is off, the optimizer writes here.
      grads: fp32 (numel,), gradients of the virtual shard in work.
      segments: the frozen order.
      parameters: the model's parameters in that order, each a view.
      layout_hash: hex digest of names, shapes, dtype and offsets; equal on all ranks and in every snapshot.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        """Moves the model to ``device`` and its trainable parameters into flat buffers.

        Raises:
          GradientError: a module asks for sparse gradients.
          TrainerConfigError: a trainable parameter is not fp32, or there is none; a module is inside DDP.
        """
        _refuse(model)
        model.to(device)
        named = _trainable(model)
        self.parameters: list[nn.Parameter] = [param for _, param in named]
        self.segments: list[Segment] = _lay_out(named)
        self.numel = sum(segment.padded for segment in self.segments)
        self.params = torch.zeros(self.numel, dtype=torch.float32, device=device)
        self.grads = torch.zeros(self.numel, dtype=torch.float32, device=device)
        self.layout_hash = _layout_hash(self.segments)
        self._grad_pointers: list[int] = []
        self._constants = _persistent_buffers(model)
        for segment, param in zip(self.segments, self.parameters, strict=True):
            view = self._view(self.params, segment)
            view.copy_(param.data)
            param.data = view
            param.grad = self._view(self.grads, segment)
            self._grad_pointers.append(param.grad.data_ptr())

    @staticmethod
    def _view(buffer: torch.Tensor, segment: Segment) -> torch.Tensor:
        return buffer[segment.start : segment.start + segment.numel].view(segment.shape)

    def check(self) -> None:
        """Raises unless every ``.grad`` is still the view that was handed out, and every buffer as it was.

        Raises:
          GradientError: something replaced a ``.grad`` (``zero_grad(set_to_none=True)``, an assignment).
          TrainerConfigError: a forward pass changed a buffer, as batch normalisation does.
        """
        for position, (param, pointer) in enumerate(zip(self.parameters, self._grad_pointers, strict=True)):
            grad = param.grad
            if grad is None or grad.data_ptr() != pointer:
                raise GradientError(
                    self.segments[position].name,
                    "its .grad was replaced, so the flat buffer missed it. Zero gradients in place "
                    "(flat.zero_gradients() or zero_grad(set_to_none=False)), never assign .grad, and "
                    "differentiate twice by torch.autograd.grad, not by backward(create_graph=True).",
                )
        for name, module, key, buffer, version in self._constants:
            if module._buffers[key] is not buffer or buffer._version != version:
                raise TrainerConfigError(
                    f"buffer {name!r} changed during a step. Neither snapshots nor other ranks get what a "
                    "module keeps in buffers, so weights would depend on the ranks: use a layer without "
                    "running statistics (such as LayerNorm), or register a cache with persistent=False."
                )

    def zero_gradients(self) -> None:
        """Zeroes all gradients with one fill."""
        self.grads.zero_()


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise GradientError(
                f"{name}.weight", "sparse gradients do not fit a flat buffer; build it with sparse=False."
            )
        if isinstance(module, DistributedDataParallel):
            raise TrainerConfigError(
                f"module {name or 'the model'!r} is inside DistributedDataParallel, which would sum its "
                "gradients a second time; give the plain one."
            )


def _persistent_buffers(model: nn.Module) -> list[tuple[str, nn.Module, str, torch.Tensor, int]]:
    """Returns (name, its module, name there, tensor, version) of the buffers that a state dict would hold."""
    return [
        (f"{prefix}.{key}" if prefix else key, module, key, buffer, buffer._version)
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    # named_parameters() already gives a tied parameter once, under its first name.
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise TrainerConfigError("the model has no trainable parameter; nothing can be trained.")
    for name, param in named:
        if param.dtype != torch.float32:
            raise TrainerConfigError(
                f"parameter {name!r} is {param.dtype}; the flat buffers hold float32 master weights. "
                "Keep parameters in float32 and cast inside the forward pass."
            )
    return named[::-1]


def _lay_out(named: list[tuple[str, nn.Parameter]]) -> list[Segment]:
    segments, start = [], 0
    for name, param in named:
        padded = -(-param.numel() // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        segments.append(
            Segment(name=name, shape=tuple(param.shape), start=start, numel=param.numel(), padded=padded)
        )
        start += padded
    return segments


def _layout_hash(segments: list[Segment]) -> str:
    text = "\n".join(f"{s.name} {s.shape} float32 {s.start}" for s in segments)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
