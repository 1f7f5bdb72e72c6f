"""Digests of what each part of a model puts out, to find the first in which two models differ.

Engine and trainer name the parts of a model alike (`model.layers.0.self_attn`), and under
`true_on_policy` each of them gives the same bits on both sides. `Recorder` keeps the outputs of one
sequence, `first_difference` compares two of them rung by rung.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

PARTS = (
    "embed_tokens",
    "input_layernorm",
    "q_norm",
    "k_norm",
    "o_proj",
    "self_attn",
    "post_attention_layernorm",
    "down_proj",
    "gate",
    "experts",
    "mlp",
    "norm",
)
"""Last names of the parts that are compared; not all models have all of them."""


class Recorder:
    """Records the outputs of a model's parts until `digests` is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[str, list[torch.Tensor]] = {}
        self._hooks = [
            module.register_forward_hook(partial(self._keep, name))
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in PARTS
        ]

    def _keep(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            self._outputs.setdefault(name, []).append(first.detach().flatten().clone())

    def digests(self) -> dict[str, str]:
        """A digest of each part's output, in the order of the first outputs; ends the recording."""
        for hook in self._hooks:
            hook.remove()
        return {name: digest(torch.cat(rows)) for name, rows in self._outputs.items()}


def digest(values: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, where -0 is 0."""
    plain = (values + 0.0).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


def first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, int]:
    """Name of the first part that differs, "" if none does; and how many agree before it."""
    names = [name for name in one if name in other]
    for agree, name in enumerate(names):
        if one[name] != other[name]:
            return name, agree
    return "", len(names)
