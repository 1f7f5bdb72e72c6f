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
    from torch.nn.functional import rms_norm

    def forward(norms: Any, q: Any, k: Any) -> tuple[Any, Any]:
        q_norm, k_norm = norms._q_norm, norms._k_norm
        return tuple(
            rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.variance_epsilon).to(
                x.dtype
            )
            for x, norm in ((q, q_norm), (k, k_norm))
        )

    minimax_m2.MiniMaxM2QKRMSNorm.forward = forward
