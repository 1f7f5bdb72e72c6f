"""MiMo, for Transformers: a Qwen2 whose files have layers more that predict further tokens.

Those (`model.mtp_layers`) are no part of this class, as they take no part in what the model writes:
https://arxiv.org/abs/2505.07608. `kit.models.heads.mtp` computes them.

This file needs Transformers alone.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

TYPE = "mimo"


@strict
class MiMoConfig(Qwen2Config):
    """Qwen2's configuration, and how many layers predict further tokens."""

    model_type = TYPE

    num_nextn_predict_layers: int = 0


class MiMoForCausalLM(Qwen2ForCausalLM):
    """MiMo without the layers that predict further tokens."""

    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = (r"model\.mtp_layers\.",)


def register() -> None:
    """Have Transformers know this model by its `model_type`."""
    AutoConfig.register(TYPE, MiMoConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)
