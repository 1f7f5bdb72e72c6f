"""The angles of rotary position embeddings, as one table that engine and trainer make alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kit.operators.unknown import unknown


@dataclass(frozen=True, slots=True)
class Angles:
    """The angles of every position, float32. No buffer: FSDP would round what layers are given."""

    cosines: torch.Tensor
    """(positions, D/2)."""
    sines: torch.Tensor
    """(positions, D/2)."""

    def at(self, position_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (T, D/2) each."""
        return self.cosines.index_select(0, position_T), self.sines.index_select(0, position_T)


def angle_table(
    inverse_frequencies: torch.Tensor, scale: float, positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, (positions, D/2) each, float32.

    Always made whole: a part of it could be computed by other code.

    Args:
        inverse_frequencies: angle of each pair a position, (D/2).
        scale: multiplies both, as some kinds of scaling ask.
        positions: how many; those of the model, whatever a session uses of them.
    """
    place = torch.arange(positions, dtype=torch.float32, device=inverse_frequencies.device)
    angles = place[:, None] * inverse_frequencies.float()[None]
    return angles.cos() * scale, angles.sin() * scale


def angles_of(config: Any, device: torch.device | str = "cpu") -> Angles:
    """The angles of a model, from its Transformers configuration, made on the CPU.

    Raises:
        ModelError: its angles depend on the length of a sequence.
    """
    try:
        table = table_of(config)
    except ValueError as error:
        raise unknown(str(error)) from error
    return Angles(*(part.to(device) for part in table))


STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of scaling whose frequencies do not depend on the length of a sequence."""


def table_of(config: Any, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """`angle_table` for a model, from its Transformers configuration.

    Raises:
        ValueError: its angles depend on the length of a sequence.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(config.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in STATIC:
        raise ValueError(f"its positions are of type {kind!r}")
    if kind == "default":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        inverse, scale = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return angle_table(inverse.to(device), float(scale), int(config.max_position_embeddings))
