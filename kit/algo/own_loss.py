"""A loss function of the user's own in place of the estimator's.

    def loss(logp_T, old_logp_T, advantage_T):
        return -(logp_T - old_logp_T).exp() * advantage_T

It is called in the trainer, once a micro-batch, with tensors over its response tokens, and returns
the loss of each token, (T). Which ones it is given, its parameters' names say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from kit.errors import ConfigError, StackError, did_you_mean

LossFunction: TypeAlias = Callable[..., Any]
INPUTS = {
    "logp_T": "log-prob under the weights that are trained, in nats; it has the gradient",
    "old_logp_T": "log-prob under the weights that the update began with",
    "advantage_T": "advantage",
    "entropy_T": "entropy of the policy, in nats; it has a gradient",
    "mask_T": "1 where a token trains, else 0",
    "sample_T": "which sample of the micro-batch a token belongs to",
    "rollout_logp_T": "log-prob in the engine; None where it was not kept",
    "ref_logp_T": "log-prob under the reference model; None without one",
}
"""Names of its parameters, and what they are."""


def check_loss(function: LossFunction) -> None:
    """Raise ConfigError for a function that could not be called."""
    if not callable(function):
        raise ConfigError(
            f"loss is {function!r}, and not a function.",
            fix="pass a function such as `def loss(logp_T, old_logp_T, advantage_T): ...`.",
        )
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in INPUTS and parameter.default is parameter.empty:
            raise ConfigError(
                f"The loss function has a parameter {name!r}.",
                why="It is given tensors by the names of its parameters.",
                fix=did_you_mean(name, INPUTS),
            )


def token_loss(
    function: LossFunction, inputs: Mapping[str, torch.Tensor | None]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss of each token, metrics by token) of a function.

    Args:
        function: returns a tensor, (T), or it and a mapping of names to tensors, (T).
        inputs: everything that `INPUTS` names, (T).

    Raises:
        StackError: it raised, or returned something else.
    """
    wanted = {n: inputs[n] for n in inspect.signature(function).parameters if n in inputs}
    try:
        answer = function(**wanted)
    except Exception as error:
        raise StackError(
            f"The loss function failed: {type(error).__name__}: {error}",
            why="The update was not made.",
            fix="mend it, and start again from a checkpoint or snapshot with it.",
        ) from error
    loss_T, metrics = answer if isinstance(answer, tuple) else (answer, {})
    shape = inputs["logp_T"].shape if inputs["logp_T"] is not None else None
    for name, value in {"the loss": loss_T, **metrics}.items():
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise StackError(
                f"The loss function returned {got} as {name}; {tuple(shape or ())} is meant, a "
                "number for each response token.",
                fix="return the loss by token: the trainer averages as `training` says.",
            )
    return loss_T, {str(name): value.detach() for name, value in metrics.items()}
