"""A sharded model from outside: its weights whole and under their checkpoint names, its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from kit.model.packing import Packed
from kit.model.policy import Policy


def whole(value: torch.Tensor) -> torch.Tensor:
    """A parameter as one tensor: gathered from all ranks, as it is where there is one."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local() if value.device_mesh.size() == 1 else value.full_tensor()


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """All parameters by name, on every rank; a tied output embedding is left out."""
    tied = model.config.tie_word_embeddings
    return {
        name: whole(value).detach()
        for name, value in model.named_parameters()
        if not (tied and name == "lm_head.weight")
    }


def as_saved(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter under the names of a checkpoint, which are those that SGLang loads.

    Transformers holds the experts of a layer in one tensor; checkpoints have them one by one, and
    SGLang passes over names that it does not know.
    """
    place, _, part = name.rpartition(".experts.")
    if part == "down_proj" and value.ndim == 3:
        for expert, down in enumerate(value):
            yield f"{place}.experts.{expert}.down_proj.weight", down
    elif part == "gate_up_proj" and value.ndim == 3:
        for expert, both in enumerate(value):
            gate, up = both.chunk(2)
            yield f"{place}.experts.{expert}.gate_proj.weight", gate
            yield f"{place}.experts.{expert}.up_proj.weight", up
    else:
        yield name, value


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
