"""MiniMax-M2's norms of all of q and k on a CPU, which SGLang has in Triton only.

relies on   models/minimax_m2.py: MiniMaxM2QKRMSNorm.forward, _q_norm, _k_norm
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    from sglang.srt.models import minimax_m2

    def forward(norms: Any, q: Any, k: Any) -> tuple[Any, Any]:
        return norms._q_norm(q.contiguous()), norms._k_norm(k.contiguous())

    minimax_m2.MiniMaxM2QKRMSNorm.forward = forward
