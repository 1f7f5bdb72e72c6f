"""Mixture-of-experts routers: observe, or force, which experts each token takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@contextmanager
def _watched(routers: list[Any], forced: Experts | None) -> Iterator[list[torch.Tensor]]:
    """Collect the experts that each router chooses, (tokens, top k), layer by layer."""
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


Experts = list[list[list[int]]]
"""The experts of a sample's tokens: (tokens, layers, top k)."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Experts and log-probs of one forward pass, sample by sample."""

    experts: list[Experts]
    log_probs: list[list[float]]
