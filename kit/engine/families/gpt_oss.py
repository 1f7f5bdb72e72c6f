"""gpt-oss on a CPU: the kit's attention under a name that SGLang takes, and sinks in float32.

relies on   models/gpt_oss.py: GptOssAttention.sinks, bfloat16 whatever the model is
            server_args.py: the backends that it takes for this architecture
                utils/common.py: support_triton, which asks by a backend's name
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    import torch
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache import allocation
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.models import gpt_oss

    ATTENTION_BACKENDS["triton"] = ATTENTION_BACKENDS["torch_native"]
    allocation.support_triton = forward_batch_info.support_triton = lambda _: False
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
