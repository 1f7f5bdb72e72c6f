"""The CPU's attention under a name that SGLang takes for the architecture.

For some it refuses all but a few backends, of which none is for a CPU without AMX. The record then
asks for one of these (`TAKEN` in `kit.models.families.record`), and here it is the kit's own.
    relies on   server_args.py: the backends that it takes, by architecture
                utils/common.py: support_triton, which asks by a backend's name
"""

from __future__ import annotations


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache import allocation
    from sglang.srt.model_executor import forward_batch_info

    ATTENTION_BACKENDS["triton"] = ATTENTION_BACKENDS["torch_native"]
    allocation.support_triton = forward_batch_info.support_triton = lambda _: False
