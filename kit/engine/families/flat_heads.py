"""HunYuan's queries and keys with one row a token, as attention on a GPU gives them back.

Its norms leave a row for each head.
    relies on   models/hunyuan.py: HunYuanAttention.attn
"""

from __future__ import annotations

from typing import Any

from kit.engine.families.making import when_made


def register(architecture: str, _device: str) -> None:
    """Have models of this architecture that this process makes give attention such rows."""

    def change(model: Any, _config: Any) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        for module in model.modules():
            if isinstance(module, RadixAttention):
                module.register_forward_pre_hook(_by_token)

    when_made(architecture, change)


def _by_token(_attention: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v, *others = inputs
    return q.reshape(len(v), -1), k.reshape(len(v), -1), v, *others
