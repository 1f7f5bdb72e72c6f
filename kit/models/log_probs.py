"""Log-probs and entropies of tokens from the last hidden states, and how far two models are apart.

Logits of a long batch over a large vocabulary would be the largest tensor by far. They are computed
in pieces, in the model's dtype, and only one number is kept of each row, the logarithm of its sum.
The backward pass recomputes the pieces and turns each into its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from kit.algo.corrections import entropy_of
from kit.operators import cpu, cuda
from kit.operators.unknown import unknown

KEPT_LOGITS = 1 << 26
"""So few are kept for the backward pass: 256 MiB in float32. More are made in pieces."""
LOGITS_AT_ONCE = 1 << 28
"""Logits in one piece: 512 MiB in bfloat16."""


def token_log_probs(
    hidden_R: torch.Tensor,
    head: torch.Tensor,
    target_R: torch.Tensor,
    temperature: float,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, both (R), float32, in nats.

    Args:
        hidden_R: output of the last layer, (R, hidden size).
        head: the output embedding, (vocabulary, hidden size).
        target_R: the tokens.
        temperature: divides the logits, after the cap.
        cap: soft cap of the logits; see `soft_capped`.
    """
    if len(target_R) * len(head) <= KEPT_LOGITS:
        logits = soft_capped((hidden_R @ head.T).float(), cap) / temperature
        logp = torch.log_softmax(logits, dim=-1)
        return logp.gather(-1, target_R[:, None])[:, 0], entropy_of(logp)
    logp_R, entropy_R = _InPieces.apply(hidden_R, head, target_R, temperature, False, cap)  # type: ignore[no-untyped-call]
    return logp_R, entropy_R


def soft_capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits z as c tanh(z / c), which keeps them between -c and c; unchanged without a cap c.

    Gemma 2, https://arxiv.org/abs/2408.00118.
    """
    return logits if cap is None else cap * torch.tanh(logits / cap)


def shared_token_log_probs(
    hidden_R: torch.Tensor,
    head: torch.Tensor,
    target_R: torch.Tensor,
    temperature: float,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_log_probs`, by the engine's operators, and so to the engine's bits.

    Raises:
        ModelError: the logits are capped, for which there is no shared operator.
    """
    if cap is not None:
        raise unknown(f"it caps its logits at {cap:g}")
    if hidden_R.is_cuda:
        logp_R, entropy_R = _InPieces.apply(hidden_R, head, target_R, temperature, True, None)  # type: ignore[no-untyped-call]
        return logp_R, entropy_R
    size = max(1, KEPT_LOGITS // len(head))
    rows = [
        _shared_piece(hidden, head, target, temperature)
        for hidden, target in zip(hidden_R.split(size), target_R.split(size), strict=True)
    ]
    logp, entropy = zip(*rows, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _shared_piece(
    hidden_R: torch.Tensor, head: torch.Tensor, target_R: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logp = cpu.log_softmax(cpu.linear(hidden_R, head), temperature)
    return logp.gather(-1, target_R[:, None])[:, 0], entropy_of(logp)


def rows_at_once(vocabulary: int) -> int:
    """Rows of logits in one piece; a multiple of a matrix product's tile where possible."""
    rows = LOGITS_AT_ONCE // vocabulary
    return max(rows // 256 * 256, min(rows, 256), 1)


@dataclass(frozen=True, slots=True)
class Distributions:
    """A model's distributions over the next token, a row each, of which no logits are made yet."""

    hidden_R: torch.Tensor
    """Output of the last layer, (R, hidden size)."""
    head: torch.Tensor
    """The output embedding, (vocabulary, hidden size)."""
    temperature: float
    """Divides the logits, after the cap."""
    cap: float | None = None
    """Soft cap of the logits; see `soft_capped`."""


def forward_kl(target: Distributions, own: Distributions) -> torch.Tensor:
    """KL(target || own) of each row over the whole vocabulary, (R), float32, in nats.

    Gradients reach `own` alone: the target teaches. That is forward KL as a draft is distilled with
    in DistillSpec, https://arxiv.org/abs/2310.08461. Not all logits of the two are in memory.
    """
    taught = target.hidden_R.detach(), target.head.detach()
    if len(own.hidden_R) * len(own.head) <= KEPT_LOGITS // 2:
        sources = (*taught, target), (own.hidden_R, own.head, own)
        logp, logq = (
            torch.log_softmax(soft_capped((h @ w.T).float(), of.cap) / of.temperature, dim=-1)
            for h, w, of in sources
        )
        return (logp.exp() * (logp - logq)).sum(-1)
    how = 1 / target.temperature, target.cap, 1 / own.temperature, own.cap
    kl_R: torch.Tensor = _KlInPieces.apply(own.hidden_R, own.head, *taught, how)  # type: ignore[no-untyped-call]
    return kl_R


class _KlInPieces(torch.autograd.Function):
    """Autograd function: KL by row; keeps hidden states and two numbers per row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_R: torch.Tensor,
        head: torch.Tensor,
        target_hidden_R: torch.Tensor,
        target_head: torch.Tensor,
        how: tuple[float, float | None, float, float | None],
    ) -> torch.Tensor:
        statistics = _compiled(kl_statistics) if hidden_R.is_cuda else kl_statistics
        kl_R, target_total_R, total_R = (
            torch.empty(len(hidden_R), dtype=torch.float32, device=hidden_R.device)
            for _ in range(3)
        )
        for piece in _pieces(len(hidden_R), 2 * len(head)):
            target_logits = target_hidden_R[piece] @ target_head.T
            found = statistics(target_logits, hidden_R[piece] @ head.T, *how)
            kl_R[piece], target_total_R[piece], total_R[piece] = found
        ctx.save_for_backward(hidden_R, head, target_hidden_R, target_head, target_total_R, total_R)
        ctx.how = how
        return kl_R

    @staticmethod
    def backward(ctx: Any, gradient_R: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_R, head, target_hidden_R, target_head, target_total_R, total_R = ctx.saved_tensors
        gradient_of = _compiled(kl_gradient) if hidden_R.is_cuda else kl_gradient
        hidden_gradient_R = torch.empty_like(hidden_R)
        head_gradient = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for piece in _pieces(len(hidden_R), 2 * len(head)):
            gradient = gradient_of(
                target_hidden_R[piece] @ target_head.T,
                hidden_R[piece] @ head.T,
                target_total_R[piece],
                total_R[piece],
                gradient_R[piece],
                *ctx.how,
            )
            torch.mm(gradient, head, out=hidden_gradient_R[piece])
            _add_product(head_gradient, gradient.T, hidden_R[piece])
        return hidden_gradient_R, head_gradient.to(head.dtype), None, None, None


def kl_statistics(
    target_logits: torch.Tensor,
    logits: torch.Tensor,
    target_scale: float,
    target_cap: float | None,
    scale: float,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL, log of the target's sum of exponentials, of the other's), all (R)."""
    target, own = (
        soft_capped(of.float(), c) * s
        for of, c, s in ((target_logits, target_cap, target_scale), (logits, cap, scale))
    )
    target_total_R, total_R = target.logsumexp(-1), own.logsumexp(-1)
    logp = target - target_total_R[:, None]
    kl_R = (logp.exp() * (logp - own + total_R[:, None])).sum(-1)
    return kl_R, target_total_R, total_R


def kl_gradient(
    target_logits: torch.Tensor,
    logits: torch.Tensor,
    target_total_R: torch.Tensor,
    total_R: torch.Tensor,
    gradient_R: torch.Tensor,
    target_scale: float,
    target_cap: float | None,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """Gradient of the KL with respect to the logits, in their dtype: probability minus target's.

    A cap c, whose output is y, contributes the factor 1 - (y / c)^2.
    """
    capped = soft_capped(logits.float(), cap)
    target = soft_capped(target_logits.float(), target_cap) * target_scale
    gap = (capped * scale - total_R[:, None]).exp() - (target - target_total_R[:, None]).exp()
    gradient = gap * (gradient_R * scale)[:, None]
    if cap is not None:
        gradient = gradient * (1 - (capped / cap).square())
    return gradient.to(logits.dtype)


class _InPieces(torch.autograd.Function):
    """Autograd function: (log-probs, entropies); keeps hidden states and three numbers per row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_R: torch.Tensor,
        head: torch.Tensor,
        target_R: torch.Tensor,
        temperature: float,
        shared: bool,
        cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        statistics = _compiled(row_statistics) if hidden_R.is_cuda else row_statistics
        product = cuda.product if shared else nn.functional.linear
        divisor = torch.tensor([temperature], device=hidden_R.device) if shared else None
        logp_R, total_R, entropy_R = (
            torch.empty(len(target_R), dtype=torch.float32, device=hidden_R.device)
            for _ in range(3)
        )
        for piece in _pieces(len(target_R), len(head)):
            logits = product(hidden_R[piece], head)
            if divisor is None:
                found = statistics(logits, target_R[piece], 1 / temperature, cap)
            else:
                found = _shared_statistics(logits, target_R[piece], divisor)
            logp_R[piece], total_R[piece], entropy_R[piece] = found
        ctx.save_for_backward(hidden_R, head, target_R, total_R, entropy_R)
        ctx.scale, ctx.cap = 1 / temperature, cap
        ctx.set_materialize_grads(False)  # mostly there is none of the entropy
        return logp_R, entropy_R

    @staticmethod
    def backward(
        ctx: Any, logp_gradient_R: torch.Tensor | None, entropy_gradient_R: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_R, head, target_R, total_R, entropy_R = ctx.saved_tensors
        if logp_gradient_R is None:
            logp_gradient_R = torch.zeros_like(total_R)
        gradient_of = _compiled(logit_gradient) if hidden_R.is_cuda else logit_gradient
        hidden_gradient_R = torch.empty_like(hidden_R)
        head_gradient = None
        if ctx.needs_input_grad[1]:  # it may be frozen
            head_gradient = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for piece in _pieces(len(target_R), len(head)):
            gradient = gradient_of(
                hidden_R[piece] @ head.T,
                target_R[piece],
                total_R[piece],
                entropy_R[piece],
                logp_gradient_R[piece],
                None if entropy_gradient_R is None else entropy_gradient_R[piece],
                ctx.scale,
                ctx.cap,
            )
            torch.mm(gradient, head, out=hidden_gradient_R[piece])
            if head_gradient is not None:
                _add_product(head_gradient, gradient.T, hidden_R[piece])
        if head_gradient is not None:
            head_gradient = head_gradient.to(head.dtype)
        return hidden_gradient_R, head_gradient, None, None, None, None


def _pieces(rows: int, vocabulary: int) -> Iterator[slice]:
    size = rows_at_once(vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b in float32, whatever their dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def row_statistics(
    logits: torch.Tensor, target_R: torch.Tensor, scale: float, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-prob of the target, log of the sum of exponentials, entropy), all (R)."""
    scaled = soft_capped(logits.float(), cap) * scale
    total_R = torch.logsumexp(scaled, dim=-1)
    chosen_R = soft_capped(logits.gather(-1, target_R[:, None])[:, 0].float(), cap) * scale
    return chosen_R - total_R, total_R, entropy_of(scaled - total_R[:, None])


def _shared_statistics(
    logits: torch.Tensor, target_R: torch.Tensor, divisor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `row_statistics`, by the engine's operators."""
    total_R, entropy_R = cuda.log_sums(logits, divisor)
    return cuda.log_probs_of(logits, target_R, divisor, total_R), total_R, entropy_R


def logit_gradient(
    logits: torch.Tensor,
    target_R: torch.Tensor,
    total_R: torch.Tensor,
    entropy_R: torch.Tensor,
    logp_gradient_R: torch.Tensor,
    entropy_gradient_R: torch.Tensor | None,
    scale: float,
    cap: float | None = None,
) -> torch.Tensor:
    """Gradient with respect to the logits, in their dtype.

    With p the probabilities, the log-prob contributes 1 at the target minus p, and the entropy
    -p (log p + entropy). A cap c, whose output is y, contributes the factor 1 - (y / c)^2.
    """
    capped = soft_capped(logits.float(), cap)
    logp = capped * scale - total_R[:, None]
    factor = -logp_gradient_R[:, None]
    if entropy_gradient_R is not None:
        factor = factor - entropy_gradient_R[:, None] * (logp + entropy_R[:, None])
    gradient = factor * logp.exp() * scale
    # The target's own 1 is added in one place a row, rather than asked for in every place.
    chosen = gradient.gather(1, target_R[:, None]) + (logp_gradient_R * scale)[:, None]
    if cap is not None:
        slope = 1 - (capped / cap).square()
        gradient, chosen = gradient * slope, chosen * slope.gather(1, target_R[:, None])
    return gradient.to(logits.dtype).scatter(1, target_R[:, None], chosen.to(logits.dtype))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile into one kernel instead of a dozen passes over the logits."""
    return torch.compile(function, dynamic=True)
