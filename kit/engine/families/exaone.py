"""EXAONE 4's norms of q and k with the configuration's epsilon, and not with 1e-6.

relies on   models/exaone4.py: Exaone4Attention.q_norm, k_norm
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, _device: str) -> None:
    """Have attention that this process makes norm as the files say."""
    from sglang.srt.models import exaone4

    kind: Any = exaone4.Exaone4Attention
    make = kind.__init__

    def make_attention(attention: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        make(attention, config, *args, **kwargs)
        for norm in (attention.q_norm, attention.k_norm):
            norm.variance_epsilon = config.rms_norm_eps

    kind.__init__ = make_attention
