"""AdamW, and AdamW with moments in 8 bits (torchao), behind the few things that a learner needs.

In 8 bits a moment is kept as codes, a byte a number, and a scale for each 256 of them; moments of
fewer than 4,096 numbers, or whose number is no multiple of 256, stay in float32. Weights stay in
float32 in any case. Dettmers et al., https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kit.config import Optimizer

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""What is kept of each parameter beside the number of steps, and whether it has a sign."""
PARTS = ("codes", "scale")
"""Tensors that a moment in 8 bits is kept in."""


def make(
    kind: Optimizer, parameters: Sequence[nn.Parameter], rate: float, adam: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer with nothing kept yet.

    Args:
        kind: `adamw` or `adamw8bit`.
        parameters: what it steps.
        rate: learning rate of the first step.
        adam: betas, eps and weight_decay.
    """
    if kind == "adamw8bit":
        from torchao.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(parameters, lr=rate, **adam)
        return eight_bit
    # Its arithmetic in one kernel.
    return torch.optim.AdamW(parameters, lr=rate, fused=True, **adam)


def step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Apply the gradient at this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    with _uncompiled(optimizer):
        optimizer.step()


def _uncompiled(optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
    """Keep torchao from compiling its arithmetic, which takes minutes on a CPU: one for each shape.

    Nothing is lost by it there.
    """
    plain = isinstance(optimizer, torch.optim.AdamW)
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return nullcontext() if plain else stance


def kept(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in which an optimizer's state of one parameter is kept, by name."""
    for key, value in state.items():
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        if all(hasattr(local, part) for part in PARTS):
            for part in PARTS:
                yield f"{key}.{part}", getattr(local, part)
        elif isinstance(value, torch.Tensor):
            yield key, value


def empty_state(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of a parameter before its first step, to be filled."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        device = parameter.device
    else:
        moments = {k: optimizer._new_buffer(parameter, sign) for k, sign in MOMENTS.items()}
        device = torch.device("cpu")
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}
