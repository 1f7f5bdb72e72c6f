"""FSDP2: a model divided over the ranks, and its tensors as a rank holds them or whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: Any,
    dtype: torch.dtype | None,
    *,
    offload: bool = False,
    as_it_is: Collection[nn.Parameter] = (),
) -> None:
    """Shard each layer and then the rest; computation in `dtype`, gradients in float32.

    With None each weight is computed with in the dtype that it is kept in. Parameters in `as_it_is`
    are left alone: they are whole on this rank, and no copy of them is made to compute with.

    Where one rank has it all, layers are not treated one by one: nothing is gained by gathering
    them when their turn comes, and it would take as long as the arithmetic of a small batch.
    """
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    ignored = set(as_it_is)
    for layer in layers if mesh.size() > 1 else ():
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=where, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=mixed, offload_policy=where, ignored_params=ignored)


def reshard(model: nn.Module) -> None:
    """Free gathered weights: the parameters that FSDP keeps are then the module's own.

    Only a backward pass makes FSDP do this for the root's own parameters.
    """
    sharded: Any = model
    sharded.reshard()


def hold_gradients(model: nn.Module, hold: bool) -> None:
    """Add up gradients where they are, and keep the weights gathered, until the last micro-batch.

    Handing gradients in after each one costs a pass over all of them and some hundred small calls.
    """
    sharded: Any = model
    sharded.set_requires_gradient_sync(not hold)
    sharded.set_reshard_after_backward(not hold)


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
    """A tensor gathered from all ranks, as it is where there is one; all ranks call."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local() if value.device_mesh.size() == 1 else value.full_tensor()


def local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, detached; it shares the tensor's memory."""
    own = value.to_local() if isinstance(value, DTensor) else value
    return own.detach()


def local_bytes(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as flat bytes; it shares the tensor's memory."""
    return local(value).view(-1).view(torch.uint8)
