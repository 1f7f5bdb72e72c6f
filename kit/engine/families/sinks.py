"""Attention sinks on a CPU in the model's dtype; SGLang has them in bfloat16.

relies on   models/gpt_oss.py: GptOssAttention.sinks
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    import torch
    from sglang.srt.models import gpt_oss

    kind: Any = gpt_oss.GptOssAttention
    make = kind.__init__

    def make_attention(attention: Any, *args: Any, **kwargs: Any) -> None:
        make(attention, *args, **kwargs)
        coarse = attention.sinks
        sinks = torch.nn.Parameter(torch.empty_like(coarse, dtype=torch.get_default_dtype()), False)
        for name, value in vars(coarse).items():  # how it is loaded
            setattr(sinks, name, value)
        attention.sinks = sinks

    kind.__init__ = make_attention
