"""Gemma's activation: the tanh form of GELU, which SGLang's class of it does not take.

relies on   models/gemma.py: GemmaMLP.act_fn
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, _device: str) -> None:
    """Have feed-forward parts that this process makes take the form of the files."""
    from sglang.srt.layers.activation import GeluAndMul
    from sglang.srt.models import gemma

    kind: Any = gemma.GemmaMLP
    make = kind.__init__

    def make_part(part: Any, *args: Any, **kwargs: Any) -> None:
        make(part, *args, **kwargs)
        part.act_fn = GeluAndMul("tanh")

    kind.__init__ = make_part
