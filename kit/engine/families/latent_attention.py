"""DeepSeek's latent attention on a CPU, always in its absorbed form.

In that form queries meet the latent vectors of the cache themselves, one key head of them for all.
SGLang chooses another form for prefills, of kernels that a CPU lacks, and a rotation for AMX.
    relies on   models/deepseek_v2.py: get_rope_wrapper
                models/deepseek_common/attention_backend_handler.py: AttentionBackendRegistry
"""

from __future__ import annotations

from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.models import deepseek_v2
    from sglang.srt.models.deepseek_common import attention_backend_handler
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_methods

    def rotation(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        return factory.get_rope(*args, **kwargs)

    deepseek_v2.get_rope_wrapper = rotation
    attention_backend_handler.AttentionBackendRegistry.register(
        "torch_native", lambda *_: forward_methods.AttnForwardMethod.MLA
    )
