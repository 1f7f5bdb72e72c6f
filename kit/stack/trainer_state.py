"""A trainer's weights and optimizer, as safetensors that any number of trainers can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from kit.errors import CheckpointError

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer

WEIGHTS, OPTIMIZER, COUNTERS = "weights.safetensors", "optimizer.safetensors", "trainer.json"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(trainer: Trainer, directory: str) -> None:
    """Gather everything on rank 0 and write it there. All ranks must call."""
    from safetensors.torch import save_file

    weights: dict[str, Any] = get_model_state_dict(trainer.policy, options=FULL)
    optimizer = get_optimizer_state_dict(trainer.policy, trainer.optimizer, options=FULL)
    if trainer.settings.rank:
        return
    folder = Path(directory)
    inner: Any = trainer.policy.model
    if inner.config.tie_word_embeddings:
        weights.pop("model.lm_head.weight", None)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    state: Any = optimizer["state"]
    flat = {
        f"{name}//{key}": value.contiguous()
        for name, values in state.items()
        for key, value in values.items()
    }
    save_file(flat, folder / OPTIMIZER)
    (folder / COUNTERS).write_text(json.dumps({"optimizer_steps": trainer.optimizer_steps}))


def load(trainer: Trainer, directory: str) -> None:
    """Read what `save` wrote; all ranks call and read.

    Raises:
        CheckpointError: a file is missing or broken, or belongs to another model.
    """
    from safetensors.torch import load_file

    folder = Path(directory)
    try:
        weights: dict[str, Any] = load_file(folder / WEIGHTS)
        flat = load_file(folder / OPTIMIZER)
        counters = json.loads((folder / COUNTERS).read_text())
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {directory} cannot be read.",
            why=str(error),
            fix="load another checkpoint; the session's weights are unchanged.",
        ) from error
    _check_shapes(trainer, weights, directory)
    inner: Any = trainer.policy.model
    if inner.config.tie_word_embeddings:
        weights["model.lm_head.weight"] = weights["model.model.embed_tokens.weight"]
    set_model_state_dict(trainer.policy, weights, options=FULL)
    state: Any = {}
    for path, value in flat.items():
        name, _, key = path.partition("//")
        state.setdefault(name, {})[key] = value
    groups = get_optimizer_state_dict(trainer.policy, trainer.optimizer, options=FULL)
    set_optimizer_state_dict(
        trainer.policy,
        trainer.optimizer,
        {"state": state, "param_groups": groups["param_groups"]},
        options=FULL,
    )
    trainer.optimizer_steps = int(counters["optimizer_steps"])
    trainer.last_update = None


def _check_shapes(trainer: Trainer, weights: dict[str, torch.Tensor], directory: str) -> None:
    own = {name: tuple(p.shape) for name, p in trainer.policy.named_parameters()}
    read = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in own if read.get(name) != own[name])
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"The checkpoint {directory} is of another model: {name} has shape "
            f"{read.get(name)}, this model's has {own[name]}.",
            fix="start the session with the model that the checkpoint was made from.",
        )
