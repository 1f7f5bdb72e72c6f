"""The plan of a session: before it starts, and before there is even a GPU to start it on."""

from __future__ import annotations

from pathlib import Path

from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.memory.card import GIB, Card
from kit.memory.plan import MemoryPlan, make_plan
from kit.memory.shape import ModelShape
from kit.model.source import ModelSource, find


def memory_plan(
    config: SessionConfig | str | Path = "tiny", *, device_gib: float | None = None
) -> MemoryPlan:
    """What a session with these settings would hold; starts nothing and needs no GPU.

        kit.memory_plan("config.yaml", device_gib=24)

    Args:
        config: as for `RLSession.start`.
        device_gib: plan for a GPU of so many GiB; None takes the device that is here.

    Raises:
        ConfigError: it cannot fit, or there is a setting that is wrong.
        ModelError, DataError: the model or the prompts are not there.
    """
    from kit.data import load_prompts
    from kit.prompting import response_limit
    from kit.stack.machine import pick_device

    config = SessionConfig.of(config)
    if device_gib is not None and not device_gib > 0:
        raise ConfigError(
            f"device_gib is {device_gib!r}.", fix="give the GiB of the card, such as 24."
        )
    model = find(config.model)
    train = load_prompts(config.data, split="train", model_name=config.model.name, seed=config.seed)
    response = response_limit(config, train, model)
    if device_gib is None:
        return plan_for(config, model, pick_device(config.device), response)
    card = Card(f"a card of {device_gib:g} GiB", int(device_gib * GIB), is_gpu=True)
    return plan_for(config, model, "cuda", response, card)


def plan_for(
    config: SessionConfig,
    model: ModelSource,
    device: str,
    max_response_len: int,
    card: Card | None = None,
) -> MemoryPlan:
    """The plan for the device that is here, or for another card.

    Args:
        config: the settings; those that are left open are chosen.
        model: where the model is.
        device: `cpu` or `cuda`.
        max_response_len: tokens.
        card: None takes the one that is here.

    Raises:
        ConfigError: it cannot fit; names the settings that would make it.
        ModelError: the directory does not tell the model's sizes.
    """
    if card is None and device == "cuda" and config.cluster.address and not Card.gpu():
        if config.memory.device_gib is None:
            raise ConfigError(
                "The session's GPUs are on other nodes of the cluster, and their size is unknown.",
                fix="set memory.device_gib to what the session may take of each, such as 70.",
            )
        size = int(config.memory.device_gib * GIB)
        card = Card("a GPU of the cluster", size, is_gpu=True)
    if card is None:
        card = (Card.gpu() if device == "cuda" else None) or Card.host()
    widths = {"float32": 4, "bfloat16": 2, "auto": 2 if card.is_gpu else 4}
    return make_plan(
        config,
        ModelShape.read(model.path),
        card,
        max_response_len=max_response_len,
        context_length=model.context_length,
        width=widths[config.model.dtype],
    )
