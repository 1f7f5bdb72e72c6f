"""Transformers' models on the operators that the engine computes with (`kit.operators`).

`use` exchanges the classes of a model's parts for ones with the same parameters and another forward
pass. It takes models whose every part is known here, and refuses all others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from kit.models.attention import Layout, backward_op, padded
from kit.models.families.exact import refuse_others
from kit.models.packing import repeat_rows, take_rows
from kit.operators import cpu, cuda, cuda_attention, cuda_experts
from kit.operators.rope import Angles, angles_of
from kit.operators.unknown import unknown

ADDED = ("o_proj", "down_proj")
"""Parts whose output is added to what went into their layer."""


def use(model: Any, device: torch.device, attention: str = "auto") -> None:
    """Have a causal language model compute with `kit.operators`.

    Args:
        model: a Transformers model, wherever its weights are.
        device: where it will compute.
        attention: on a GPU `fa3`, `triton` or `auto`.

    Raises:
        ModelError: some part of it is not known here.
    """
    refuse_others(type(model).__name__, device.type)
    config, on_gpu = model.config, device.type == "cuda"
    experts = [part for part in model.parameters() if part.dim() == 3]
    if on_gpu and any(size % 8 for part in experts for size in part.shape[1:]):
        # The library's grouped products, which compute the gradient, take no others.
        raise unknown("sizes of its experts are no multiples of 8")
    angles = angles_of(config, device)
    if config.hidden_act != "silu":
        raise unknown(f"its activation is {config.hidden_act!r}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise unknown("some of its layers see a window only")
    if getattr(config, "dual_chunk_attention_config", None):
        raise unknown("its attention is in two chunks")
    kind = cuda_attention.attention_of(config, attention) if on_gpu else "cpu"
    if on_gpu:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        cuda.prove_products({(len(weight), weight.shape[1]) for weight in weights}, device)
    parts: list[tuple[str, Any]] = list(model.model.named_modules())
    for name, module in parts:
        module.operators = cuda if on_gpu else cpu
        module.of_mixtures = cuda_experts if on_gpu else cpu
        if isinstance(module, nn.Linear):
            _exchange(module, _Linear)
            if on_gpu and not name.endswith(ADDED):
                shape = module.out_features, module.in_features
                setattr(module, "options", {"plain": cuda.plain_rows(shape)})  # noqa: B010 - typing
        elif type(module).__name__.endswith("RMSNorm"):
            _exchange(module, _Norm)
        elif type(module).__name__.endswith("MLP"):
            _exchange(module, _FeedForward)
        elif type(module).__name__.endswith("Router"):
            _exchange(module, _Router)
        elif type(module).__name__.endswith("Experts"):
            _exchange(module, _Experts)
        elif type(module).__name__.endswith("Attention"):
            _exchange(module, _Attention)
            module.angles, module.attention = angles, kind


def _exchange(module: nn.Module, mixin: type) -> None:
    kind: Any = type(module)
    module.__class__ = _shared(mixin, kind)


@cache
def _shared(mixin: Any, kind: Any) -> Any:
    """Subclass with another forward. One class for all layers lets them share compiled code."""
    return type(f"Shared{kind.__name__}", (mixin, kind), {})


class _Linear:
    operators: Any
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Output with another weight in the place of its own."""
        operator = self.operators.linear
        product: torch.Tensor = operator(x, weight, self.bias, **self.options)
        return product


class _Norm:
    operators: Any
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        operator = self.operators.rms_norm
        normed: torch.Tensor = operator(hidden_states, self.weight, self.variance_epsilon)
        return normed


class _FeedForward:
    operators: Any
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.operators.silu_and_multiply(self.gate_proj(x), self.up_proj(x))
        out: torch.Tensor = self.down_proj(inner)
        return out


class _Router:
    operators: Any
    of_mixtures: Any
    weight: torch.Tensor
    top_k: int
    norm_topk_prob: bool

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.operators.linear(rows, self.weight)
        chosen = self.of_mixtures.route(logits, self.top_k, normalizes=self.norm_topk_prob)
        return logits, *chosen


class _Experts:
    of_mixtures: Any
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        weights = self.gate_up_proj, self.down_proj
        summed: torch.Tensor = self.of_mixtures.experts(
            hidden_states, *weights, top_k_weights.float(), top_k_index
        )
        return summed


class _Attention:
    operators: Any
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    scaling: float
    angles: Angles
    attention: str
    q_norm: Any
    k_norm: Any

    def forward(
        self, hidden_states: torch.Tensor, *, position_ids: torch.Tensor, packed: Layout, **_: Any
    ) -> tuple[torch.Tensor, None]:
        rows = hidden_states[0]
        q, k, v = (
            part(rows).view(rows.shape[0], -1, self.head_dim)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        turn = self.angles, position_ids[0]
        if hasattr(self, "q_norm") and self.attention != "cpu":
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon
            q, k = self.operators.norm_and_rotate(q, k, *norms, *turn)
        else:
            if hasattr(self, "q_norm"):
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = self.operators.rotate(q, k, *turn)
        out = attend_packed(q, k, v, self.scaling, packed, self.attention)
        return self.o_proj(out.flatten(1))[None], None


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    packed: Layout,
    kind: str = "cpu",
) -> torch.Tensor:
    """Attention of packed samples, (T, heads, D).

    Args:
        q: (T, heads, D).
        k: (T, key heads, D).
        v: as k.
        scale: multiplies the products of queries and keys.
        packed: where each sample lies.
        kind: `cpu`, or on a GPU `fa3` or `triton`.
    """
    if packed.seen_rows is not None:
        both = torch.cat([k, v], dim=1)
        both = repeat_rows(both, packed.seen_rows, packed.order, packed.order_ends)
        k, v = both.split([k.shape[1], v.shape[1]], dim=1)
    if kind != "cpu":
        ends = packed.own.ends, packed.seen.ends
        attended: torch.Tensor = attention_op(q, k, v, *ends, packed.limits, scale, kind)[0]
        return attended
    own, seen = (lengths.ends.diff().long() for lengths in (packed.own, packed.seen))
    out = cpu.attend(
        padded(q, packed.sequences, packed.own),
        padded(k, packed.sequences, packed.seen),
        padded(v, packed.sequences, packed.seen),
        seen - own,
        scale,
    )
    return take_rows(out.flatten(0, 1), packed.own.places)


@torch.library.custom_op("kit::shared_attention", mutates_args=(), device_types="cuda")
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kit.models.attention.forward_op`, with the engine's bits."""
    own, seen = limits.tolist()
    return cuda_attention.attend(kind, q, k, v, own_ends, seen_ends, (own, seen), scale)


@attention_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale, _kind = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, own_ends, seen_ends, limits, out, total = ctx.saved_tensors
    inputs = gradient, q, k, v, out, total, own_ends, seen_ends, limits, ctx.scale, 0
    return (*backward_op(*inputs), None, None, None, None, None)


attention_op.register_autograd(_gradients, setup_context=_keep)
