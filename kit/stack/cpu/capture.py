"""SGLang's record of which experts took each token, in plain memory: pinned memory needs a GPU."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.state_capturer import base


def _init(self: Any, num_tokens: int, num_layers: int, topk_size: int, name: str) -> None:
    self.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
    self.num_tokens, self.num_layers, self.topk_size = num_tokens, num_layers, topk_size
    self.name = name


def register() -> None:
    """Let this process' SGLang report experts on a CPU."""
    base.BaseHostCache.__init__ = _init
