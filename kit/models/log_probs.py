"""Log-probs and entropies of tokens from the last hidden states, without all logits in memory.

Logits of a long batch over a large vocabulary would be the largest tensor by far. They are computed
in pieces, in the model's dtype, and only one number is kept of each row, the logarithm of its sum.
The backward pass recomputes the pieces and turns each into its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
