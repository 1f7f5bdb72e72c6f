"""What policy, reference and critic have in common: sharding, gathering, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from kit.stack.unsharded import whole


def shard(model: nn.Module, layers: Iterable[nn.Module], mesh: Any, dtype: torch.dtype) -> None:
    """Shard each layer and then the rest; computation in `dtype`, gradients in float32.

    Where one rank has it all, layers are not treated one by one: nothing is gained by gathering
    them when their turn comes, and it would take as long as the arithmetic of a small batch.
    """
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers if mesh.size() > 1 else ():
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)


def without_gradient(model: nn.Module, *args: Any) -> Any:
    """The model's answer in evaluation mode, and everything sharded again afterwards."""
    model.eval()
    with torch.no_grad():
        answer = model(*args)
    # Only a backward pass makes FSDP shard the root's own parameters again.
    sharded: Any = model
    sharded.reshard()
    model.train()
    return answer


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale the gradients down to this norm over all ranks (0: leave them); the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return float(whole(norm))
