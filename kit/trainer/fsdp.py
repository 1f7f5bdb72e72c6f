"""What policy, reference and critic have in common: sharding, gathering, clipping.

A sharded model from outside: its weights whole and under their checkpoint names, its logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor

from kit.models.packing import Packed
from kit.models.policy import Policy
from kit.models.state_dict import named_weights


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: Any,
    dtype: torch.dtype,
    *,
    offload: bool = False,
) -> None:
    """Shard each layer and then the rest; computation in `dtype`, gradients in float32.

    Where one rank has it all, layers are not treated one by one: nothing is gained by gathering
    them when their turn comes, and it would take as long as the arithmetic of a small batch.
    """
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    for layer in layers if mesh.size() > 1 else ():
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=where)
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=where)


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


def hold_gradients(model: nn.Module, hold: bool) -> None:
    """Add up gradients where they are, and keep the weights gathered, until the last micro-batch.

    Handing gradients in after each one costs a pass over all of them and some hundred small calls.
    """
    sharded: Any = model
    sharded.set_requires_gradient_sync(not hold)
    sharded.set_reshard_after_backward(not hold)


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale the gradients down to this norm over all ranks (0: leave them); the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
    return float(whole(norm))


def recover(model: nn.Module) -> None:
    """Make a model usable again whose forward or backward pass broke off, say for want of memory.

    FSDP notes where a pass is, and would go on from there: the next gradients would be lost.
    """
    sharded: Any = model
    context = sharded._get_fsdp_state()._state_ctx
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False
    for state in context.all_states:
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        group = state._fsdp_param_group
        if group is None:
            continue
        group._training_state = TrainingState.IDLE
        group.comm_ctx.post_forward_order.clear()
        group.comm_ctx.reduce_scatter_state = None
        group.finalize_backward()
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if group.is_unsharded:
                parameter.unsharded_param.grad = None
        group.reshard()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A parameter as one tensor: gathered from all ranks, as it is where there is one."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local() if value.device_mesh.size() == 1 else value.full_tensor()


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """All parameters by name, on every rank; a tied output embedding is left out."""
    return {name: whole(value).detach() for name, value in named_weights(model)}


def full_logits(policy: Policy, packed: Packed) -> torch.Tensor:
    """Logits over the vocabulary for each response token, (R, vocabulary).

    Through the policy's own forward pass, so that FSDP gathers what it needs: the model's last
    hidden states are kept on their way to the log-probs.
    """
    kept: list[torch.Tensor] = []
    inner: Any = policy.model
    hook = inner.model.register_forward_hook(
        lambda _module, _inputs, output: kept.append(output.last_hidden_state[0])
    )
    try:
        policy(packed, 1.0)
    finally:
        hook.remove()
    sharded: Any = policy
    sharded.reshard()
    hidden_R = kept[0][packed.predictor_R]
    head = whole(inner.lm_head.weight).to(hidden_R.dtype)
    return hidden_R @ head.T
