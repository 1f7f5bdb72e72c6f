"""xIELU's two numbers on a CPU in the model's dtype; SGLang has them in bfloat16.

relies on   layers/activation.py: XIELU.__init__, its argument `dtype`
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    import torch
    from sglang.srt.layers import activation

    kind: Any = activation.XIELU
    make = kind.__init__

    def make_activation(part: Any, *args: Any, **kwargs: Any) -> None:
        make(part, *args, **{"dtype": torch.get_default_dtype()} | kwargs)

    kind.__init__ = make_activation
