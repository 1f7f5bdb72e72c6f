"""The memory plan of a session: its settings, its model, the device that it will take."""

from __future__ import annotations

from kit.config import SessionConfig
from kit.memory.card import Card
from kit.memory.plan import MemoryPlan, make_plan
from kit.memory.shape import ModelShape
from kit.model.source import ModelSource


def plan_for(
    config: SessionConfig,
    model: ModelSource,
    device: str,
    max_response_len: int,
    card: Card | None = None,
) -> MemoryPlan:
    """The plan for this device, or for another card. Raises ConfigError for what cannot fit."""
    if card is None:
        card = (Card.gpu() if device == "cuda" else None) or Card.host()
    narrow = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and card.is_gpu)
    return make_plan(
        config,
        ModelShape.read(model.path),
        card,
        max_response_len=max_response_len,
        context_length=model.context_length,
        width=2 if narrow else 4,
    )
