"""FSDP2: a model divided over the ranks, and its tensors as a rank holds them or whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


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


def whole_together(
    values: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype | None]
) -> list[torch.Tensor]:
    """As `whole` of each, in one exchange for all of a dtype; all ranks call.

    Args:
        values: as this rank holds them.
        dtypes: what each is rounded to before it travels; None leaves it as it is.
    """
    found: list[torch.Tensor] = list(values)
    together: defaultdict[tuple[Any, torch.dtype], list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}  # counting a mesh's ranks takes longer than all else here
    for index, (value, dtype) in enumerate(zip(values, dtypes, strict=True)):
        mesh = value.device_mesh if isinstance(value, DTensor) else None
        if mesh is not None and id(mesh) not in sizes:
            sizes[id(mesh)] = mesh.size()
        if isinstance(value, DTensor) and sizes[id(mesh)] == 1:
            found[index] = value.to_local()
        elif isinstance(value, DTensor) and _is_in_rows(value):
            together[mesh, dtype or value.dtype].append(index)
        else:
            found[index] = whole(value)
    for (over, dtype), indices in together.items():
        parts: list[Any] = [values[index] for index in indices]
        for index, gathered in zip(indices, _gather_rows(parts, over, dtype), strict=True):
            found[index] = gathered
    return found


def _is_in_rows(value: DTensor) -> bool:
    """Whether each of several ranks holds some rows of it, on the devices over which they talk."""
    mesh = value.device_mesh
    on_device = value.to_local().device.type == mesh.device_type
    return mesh.ndim == 1 and value.placements == (Shard(0),) and on_device


def _gather_rows(parts: list[Any], mesh: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors whole of which every rank has a part: the first ranks as many rows as fit evenly."""
    world = mesh.size()
    rows = [-(-part.shape[0] // world) for part in parts]
    sizes = [n * part.shape[1:].numel() for n, part in zip(rows, parts, strict=True)]
    own = [part.to_local().detach().reshape(-1) for part in parts]
    sent = torch.empty(sum(sizes), dtype=dtype, device=own[0].device)
    places = sent.split(sizes)
    torch._foreach_copy_(
        [place[: part.numel()] for place, part in zip(places, own, strict=True)], own
    )
    every = torch.empty(world * len(sent), dtype=dtype, device=sent.device)
    # As bytes: not every backend knows every dtype.
    group = mesh.get_group()
    dist.all_gather_into_tensor(every.view(torch.uint8), sent.view(torch.uint8), group=group)
    of_ranks = every.view(world, -1).split(sizes, dim=1)
    return [
        piece.reshape(world * n, *part.shape[1:])[: part.shape[0]]
        for piece, n, part in zip(of_ranks, rows, parts, strict=True)
    ]


def fill(value: torch.Tensor, whole_value: torch.Tensor) -> None:
    """Give a tensor other values, of which every rank has the whole and takes its part."""
    new = whole_value.detach().to(device=value.device, dtype=value.dtype)
    if isinstance(value, DTensor):
        mesh, places = value.device_mesh, value.placements
        new = distribute_tensor(new, mesh, places, src_data_rank=None)
    local(value).copy_(local(new))


def local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, detached; it shares the tensor's memory."""
    own = value.to_local() if isinstance(value, DTensor) else value
    return own.detach()


def local_bytes(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as flat bytes; it shares the tensor's memory."""
    return local(value).view(-1).view(torch.uint8)
