"""Weights made worse on their way to the engine, on purpose: as a quantised engine has them.

What it is for: to see how far training bears it that engine and trainer disagree, and what
corrections such as TIS mend. Other signs make another model, with which a start sees that the
engine computes with what a sync brought. The trainer's own weights stay as they are.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Rounding and noise on each weight matrix, while vectors stay exact; or other signs."""

    bits: int | None = None
    """Round each row to so many bits; None does not."""
    noise: float = 0.0
    """Add normal noise, drawn anew for each version of the weights: its standard deviation, as a
    share of the root mean square of the row."""
    seed: int = 0
    signs: bool = False
    """Give weights other signs, as `turned` does."""

    def of(self, name: str, weight: torch.Tensor, version: int) -> torch.Tensor:
        """Disturbed weight; the same for the same name, weight and version."""
        if self.signs:
            return turned(weight)
        if weight.dim() < 2:
            return weight
        if self.bits:
            weight = rounded(weight, self.bits)
        if self.noise:
            random = torch.Generator(weight.device)
            random.manual_seed(zlib.crc32(f"{self.seed} {version} {name}".encode()))
            size = weight.square().mean(dim=-1, keepdim=True).sqrt()
            drawn = torch.randn(
                weight.shape, generator=random, device=weight.device, dtype=weight.dtype
            )
            weight = weight + self.noise * size * drawn
        return weight

    def __str__(self) -> str:
        parts = [f"rounded to {self.bits} bits"] if self.bits else []
        parts += [f"with noise of {self.noise:g} of their size"] if self.noise else []
        return " and ".join(parts)


EXACT, TURNED = Disturbance(), Disturbance(signs=True)


def turned(weight: torch.Tensor) -> torch.Tensor:
    """Another weight, without rounding: every second number of a row negated, or a whole vector."""
    if weight.dim() < 2:
        return -weight
    signs = torch.ones(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1
    return weight * signs


@dataclass(frozen=True, slots=True)
class WeightTransform:
    """Transform of one sync, for weights of a given number of updates."""

    disturbance: Disturbance
    version: int

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the trainer as the engine is given it."""
        return self.disturbance.of(name, weight, self.version)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row on a grid of 2^bits - 1 steps that is symmetric about 0 and reaches its maximum."""
    step = weight.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (weight / step).round() * step, weight)
