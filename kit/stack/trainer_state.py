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
REFERENCE = "reference.safetensors"
CRITIC_WEIGHTS, CRITIC_OPTIMIZER = "critic.safetensors", "critic_optimizer.safetensors"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(trainer: Trainer, directory: str) -> None:
    """Gather everything on rank 0 and write it there. All ranks must call."""
    folder = Path(directory)
    _save_model(trainer, trainer.policy, folder / WEIGHTS)
    _save_optimizer(trainer, trainer.policy, trainer.optimizer, folder / OPTIMIZER)
    if _reference_moves(trainer):
        _save_model(trainer, trainer.reference, folder / REFERENCE)
    if trainer.critic:
        critic = trainer.critic
        _save_model(trainer, critic.model, folder / CRITIC_WEIGHTS)
        _save_optimizer(trainer, critic.model, critic.optimizer, folder / CRITIC_OPTIMIZER)
    if not trainer.settings.rank:
        counters = {"optimizer_steps": trainer.optimizer_steps, "updates": trainer.updates}
        (folder / COUNTERS).write_text(json.dumps(counters))


def load(trainer: Trainer, directory: str) -> None:
    """Read what `save` wrote; all ranks call and read.

    Raises:
        CheckpointError: a file is missing or broken, or belongs to another model.
    """
    from safetensors.torch import load_file

    folder = Path(directory)
    names = [WEIGHTS, OPTIMIZER]
    names += [REFERENCE] if _reference_moves(trainer) else []
    names += [CRITIC_WEIGHTS, CRITIC_OPTIMIZER] if trainer.critic else []
    try:
        read: dict[str, Any] = {name: load_file(folder / name) for name in names}
        counters = json.loads((folder / COUNTERS).read_text())
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {directory} cannot be read.",
            why=str(error),
            fix="load another checkpoint; the session's weights are unchanged.",
        ) from error
    models: list[tuple[str, Any]] = [(WEIGHTS, trainer.policy)]
    models += [(REFERENCE, trainer.reference)] if REFERENCE in read else []
    models += [(CRITIC_WEIGHTS, trainer.critic.model)] if trainer.critic else []
    for name, model in models:
        _check_shapes(model, read[name], directory)
    for name, model in models:
        _load_model(model, read[name])
    _load_optimizer(trainer.policy, trainer.optimizer, read[OPTIMIZER])
    if trainer.critic:
        _load_optimizer(trainer.critic.model, trainer.critic.optimizer, read[CRITIC_OPTIMIZER])
    trainer.optimizer_steps = int(counters["optimizer_steps"])
    trainer.updates = int(counters.get("updates", 0))
    trainer.last_update = None


def _reference_moves(trainer: Trainer) -> bool:
    """Else it is the model that the session starts from, and need not be kept."""
    return bool(trainer.reference and trainer.settings.training.ref_update_interval)


def _tied(model: Any) -> bool:
    """Is the output embedding the input embedding? Then it is kept once."""
    return hasattr(model, "model") and bool(model.model.config.tie_word_embeddings)


def _save_model(trainer: Trainer, model: Any, file: Path) -> None:
    from safetensors.torch import save_file

    weights: dict[str, Any] = get_model_state_dict(model, options=FULL)
    if trainer.settings.rank:
        return
    if _tied(model):
        weights.pop("model.lm_head.weight", None)
    save_file({name: value.contiguous() for name, value in weights.items()}, file)


def _load_model(model: Any, weights: dict[str, Any]) -> None:
    if _tied(model):
        weights["model.lm_head.weight"] = weights["model.model.embed_tokens.weight"]
    set_model_state_dict(model, weights, options=FULL)


def _save_optimizer(trainer: Trainer, model: Any, optimizer: Any, file: Path) -> None:
    from safetensors.torch import save_file

    gathered: Any = get_optimizer_state_dict(model, optimizer, options=FULL)  # on rank 0 only
    if trainer.settings.rank:
        return
    flat = {
        f"{name}//{key}": value.contiguous()
        for name, values in gathered["state"].items()
        for key, value in values.items()
    }
    save_file(flat, file)


def _load_optimizer(model: Any, optimizer: Any, flat: dict[str, Any]) -> None:
    state: Any = {}
    for path, value in flat.items():
        name, _, key = path.partition("//")
        state.setdefault(name, {})[key] = value
    groups = get_optimizer_state_dict(model, optimizer, options=FULL)["param_groups"]
    set_optimizer_state_dict(
        model, optimizer, {"state": state, "param_groups": groups}, options=FULL
    )


def _check_shapes(model: Any, weights: dict[str, torch.Tensor], directory: str) -> None:
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    read = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in own if read.get(name) != own[name])
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"The checkpoint {directory} is of another model: {name} has shape "
            f"{read.get(name)}, this model's has {own[name]}.",
            fix="start the session with the model that the checkpoint was made from.",
        )
