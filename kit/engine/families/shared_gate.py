"""The gate of a shared expert on a CPU, which SGLang has in Triton only.

relies on   models/qwen2_moe.py: fused_gate_sigmoid_mul_add
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    import torch
    from sglang.srt.models import qwen2_moe

    def add_gated(hidden: Any, weight: Any, shared: Any, total: Any) -> None:
        """Add the shared expert's output to `total`, times the sigmoid of its gate."""
        total += torch.sigmoid(hidden @ weight)[:, None] * shared

    qwen2_moe.fused_gate_sigmoid_mul_add = add_gated
