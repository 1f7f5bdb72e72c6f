"""Linear attention on a CPU, with the operators of `kit.engine.cpu.gated_delta`.

relies on   layers/attention/linear/gdn_backend.py and kernels/gdn_triton.py, which import these
            operators from sgl_kernel.mamba and torch.ops.sgl_kernel
            the gated norm that models/qwen3_next.py makes
            environ.py: SGLANG_MAMBA_CONV_DTYPE, the dtype of a state
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any


def register(_architecture: str, device: str) -> None:
    """Change this process on a CPU; on a GPU nothing is."""
    if device != "cpu":
        return
    import torch

    from kit.engine.cpu import gated_delta

    os.environ["SGLANG_MAMBA_CONV_DTYPE"] = "float32"
    mamba: Any = ModuleType("sgl_kernel.mamba")
    mamba.causal_conv1d_fn_cpu = gated_delta.convolve
    mamba.causal_conv1d_update_cpu = gated_delta.convolve_one
    mamba.chunk_gated_delta_rule_cpu = gated_delta.read
    sys.modules[mamba.__name__] = mamba
    operators: Any = torch.ops.sgl_kernel
    operators.fused_gdn_gating_cpu = gated_delta.gates
    operators.fused_sigmoid_gating_delta_rule_update_cpu = gated_delta.write
    _replace_norms(gated_delta.gated_norm)


def _replace_norms(norm: Any) -> None:
    from sglang.kernels.ops.attention.fla.fused_norm_gate import FusedRMSNormGated
    from sglang.kernels.ops.attention.fla.layernorm_gated import RMSNorm

    def forward(part: Any, x: Any, gate: Any = None, *_: Any, **__: Any) -> Any:
        return norm(x, gate, part.weight, part.eps)

    for kind in (FusedRMSNormGated, RMSNorm):
        replaced: Any = kind
        replaced.forward = forward
