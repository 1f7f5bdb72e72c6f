"""Which experts the trainer's mixture of experts sends each token to, and the same with its choice
replaced by somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kit.model.packing import pack

if TYPE_CHECKING:
    from kit.stack.probes import Samples
    from kit.stack.trainer import Trainer

Experts = list[list[list[int]]]
"""The experts of a sample's tokens: (tokens, layers, top k)."""


@dataclass(frozen=True, slots=True)
class Routed:
    """One pass through a mixture of experts, sample by sample."""

    experts: list[Experts]
    log_probs: list[list[float]]


def routing(
    trainer: Trainer,
    samples: Samples,
    temperature: float,
    forced: list[Experts] | None = None,
) -> Routed | None:
    """Experts and log-probs of each sample by itself; None for a model without experts.

    Args:
        trainer: whose policy computes.
        samples: the tokens.
        temperature: divides the logits.
        forced: experts to send the tokens to instead; tokens at the end that it lacks choose
            themselves.
    """
    policy: Any = trainer.policy
    routers = [
        module
        for name, module in policy.named_modules()
        if type(module).__name__.endswith("Router")
    ]
    if not routers:
        return None
    experts, log_probs = [], []
    policy.eval()
    with torch.no_grad():
        for index, (row, length) in enumerate(
            zip(samples.tokens, samples.response_lengths, strict=True)
        ):
            one = pack([row], [length], share=False).to(trainer.device)
            with _watched(routers, forced[index] if forced else None) as seen:
                log_probs.append(policy(one, temperature)[0].tolist())
            policy.reshard()
            experts.append(torch.stack(seen, dim=1).tolist())
    policy.train()
    return Routed(experts, log_probs)


@contextmanager
def _watched(routers: list[Any], forced: Experts | None) -> Iterator[list[torch.Tensor]]:
    """The experts that each router chooses, (tokens, top k), in the order of the layers."""
    seen: list[torch.Tensor] = []

    def watch(module: Any, _inputs: Any, output: Any) -> Any:
        logits, scores, chosen = output
        if forced is not None:
            table = torch.tensor(forced, device=logits.device)[:, len(seen)]
            chosen = logits.topk(table.shape[1], dim=-1).indices
            chosen[: len(table)] = table
            shares = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)
            if module.norm_topk_prob:
                shares = shares / shares.sum(-1, keepdim=True)
            scores = shares.to(scores.dtype)
        seen.append(chosen.cpu())
        return logits, scores, chosen

    hooks = [router.register_forward_hook(watch) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
