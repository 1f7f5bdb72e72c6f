"""Transformers' models on the operators that the engine computes with (`kit.operators`).

`use` exchanges the classes of a model's parts for ones with the same parameters and another forward
pass. It takes models whose every part is known here, and refuses all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kit.errors import ModelError
from kit.models.attention import Layout, padded
from kit.models.packing import repeat_rows, take_rows
from kit.operators import cpu as operators
from kit.operators.families import refuse_others
from kit.operators.rope import table_of


def use(model: Any) -> None:
    """Have a causal language model compute with `kit.operators`.

    Raises:
        ModelError: some part of it is not known here.
    """
    refuse_others(type(model).__name__, "cpu")
    config = model.config
    try:
        angles = Angles(*table_of(config))
    except ValueError as error:
        raise _unknown(model, str(error)) from error
    if config.hidden_act != "silu":
        raise _unknown(model, f"its activation is {config.hidden_act!r}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise _unknown(model, "some of its layers see a window only")
    backbone = model.model
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            _exchange(module, _Linear)
        elif type(module).__name__.endswith("RMSNorm"):
            _exchange(module, _Norm)
        elif type(module).__name__.endswith("MLP"):
            _exchange(module, _FeedForward)
        elif type(module).__name__.endswith("Attention"):
            _exchange(module, _Attention)
            module.angles = angles


def _unknown(model: Any, why: str) -> ModelError:
    return ModelError(
        f"training.true_on_policy cannot be had with this {type(model).__name__}: {why}.",
        fix="train another model, or leave training.true_on_policy off.",
    )


def _exchange(module: nn.Module, mixin: type) -> None:
    kind = type(module)
    module.__class__ = type(f"Shared{kind.__name__}", (mixin, kind), {})


@dataclass(frozen=True, slots=True)
class Angles:
    """The angles of every position, float32. No buffer: FSDP would round what layers are given."""

    cosines: torch.Tensor
    sines: torch.Tensor

    def at(self, position_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (T, D/2) each."""
        return self.cosines.index_select(0, position_T), self.sines.index_select(0, position_T)


class _Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return operators.linear(x, self.weight, self.bias)


class _Norm:
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return operators.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _FeedForward:
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = operators.silu_and_multiply(self.gate_proj(x), self.up_proj(x))
        out: torch.Tensor = self.down_proj(inner)
        return out


class _Attention:
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    scaling: float
    angles: Angles

    def forward(
        self, hidden_states: torch.Tensor, *, position_ids: torch.Tensor, packed: Layout, **_: Any
    ) -> tuple[torch.Tensor, None]:
        rows = hidden_states[0]
        q, k, v = (
            part(rows).view(len(rows), -1, self.head_dim)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[attr-defined]
        angles = self.angles.at(position_ids[0])
        q, k = (operators.rotate(x, *angles) for x in (q, k))
        out = attend_packed(q, k, v, self.scaling, packed)
        return self.o_proj(out.flatten(1))[None], None


def attend_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, packed: Layout
) -> torch.Tensor:
    """Attention of packed samples, (T, heads, D); arguments as those of `attend_on_cpu`."""
    if packed.seen_rows is not None:
        both = repeat_rows(torch.cat([k, v], dim=1), packed.seen_rows)
        k, v = both.split([k.shape[1], v.shape[1]], dim=1)
    own, seen = (lengths.ends.diff().long() for lengths in (packed.own, packed.seen))
    out = operators.attend(
        padded(q, packed.sequences, packed.own),
        padded(k, packed.sequences, packed.seen),
        padded(v, packed.sequences, packed.seen),
        seen - own,
        scale,
    )
    return take_rows(out.flatten(0, 1), packed.own.places)
