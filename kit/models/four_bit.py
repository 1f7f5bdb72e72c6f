"""Frozen linear layers whose weights are kept in 4 bits (NF4), beside adapters: QLoRA.

The model is then the one with the weights that 4 bits can say: what the trainer computes with is
what `weight` reads, and the same goes to engines and into exports. Each rank has all of them, since
4 bits are less than what gathering bfloat16 would take. Embeddings, norms, the output layer and
modules that are trained whole stay as they are.

Dettmers et al., https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from kit.errors import ModelError
from kit.operators import nf4


class FourBit:
    """A linear layer that has its weight in 4 bits."""

    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor
    mean: torch.Tensor
    """As in `nf4.Quantized`."""
    out_features: int
    in_features: int
    bias: torch.Tensor | None
    kept_dtype: torch.dtype
    """What the weight is read in."""

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tensors of its weight."""
        return self.codes, self.scales, self.factors, self.mean

    @property
    def weight(self) -> torch.Tensor:
        """The weight, made anew."""
        value: torch.Tensor = nf4.weight(*self.parts, self.in_features, self.kept_dtype)
        return value


class _Product(FourBit):
    """One that computes as `nn.Linear`, and keeps no weight for its backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = nf4.linear(x, *self.parts)
        return product if self.bias is None else product + self.bias


@cache
def _four_bit(kind: Any) -> Any:
    """Subclass with the weight in 4 bits. One class for all layers shares compiled code."""
    mixin = _Product if kind.forward is nn.Linear.forward else FourBit
    return type(kind.__name__, (mixin, kind), {})


def frozen_linear(layers: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of a model's decoder that no training changes, by their names in a layer."""
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                yield name, module


def quantize(layers: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Put the frozen linear layers of a model's decoder into 4 bits.

    Args:
        layers: the decoder's, with adapters.
        device: where the weights will be; each is moved there before it is quantised.
        dtype: what a weight is rounded to when it is read.

    Raises:
        ModelError: a weight's size is no multiple of a block's.
    """
    for name, module in frozen_linear(layers):
        _check_size(name, module.weight)
        found = nf4.quantize(module.weight.to(device))
        linear: Any = module
        del linear.weight
        linear.__class__ = _four_bit(linear.__class__)
        linear.kept_dtype = dtype
        for part, value in zip(("codes", "scales", "factors", "mean"), found.parts, strict=True):
            linear.register_buffer(part, value, persistent=False)


def _check_size(name: str, weight: torch.Tensor) -> None:
    if weight.numel() % nf4.BLOCK:
        raise ModelError(
            f"{name} has a weight of {tuple(weight.shape)} numbers, which is no multiple of "
            f"{nf4.BLOCK}, and model.lora.load_in_4bit quantises them in blocks of so many.",
            fix="leave load_in_4bit out.",
        )


def round_weights(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Give the linear layers of a model without adapters the numbers that 4 bits can say.

    Args:
        layers: the decoder's; their weights stay where and in which dtype they are.
        device: what they are computed on.
    """
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                found = nf4.quantize(module.weight.to(device))
                value = nf4.weight(*found.parts, module.in_features, torch.float32)
                module.weight.data.copy_(value)


def quantized(model: nn.Module) -> Iterator[tuple[str, FourBit]]:
    """The layers of a model that have their weights in 4 bits, by name."""
    for name, module in model.named_modules():
        if isinstance(module, FourBit):
            yield name, module


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Their weights by name, on the meta device: `read` makes one, which takes its memory."""
    for name, layer in quantized(model):
        shape = layer.out_features, layer.in_features
        yield f"{name}.weight", torch.empty(shape, dtype=layer.kept_dtype, device="meta")


def tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that all of them are kept in."""
    for _, layer in quantized(model):
        yield from layer.parts
