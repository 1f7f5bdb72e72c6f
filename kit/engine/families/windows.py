"""Sliding windows that SGLang leaves out, or makes too long by a token.

Its classes of Mistral, Mixtral, Qwen, Phi-3 and StarCoder2 attend to everything, and Cohere 2 sees
a token more than its window. A window of w is the token itself and the w - 1 before it; SGLang's
number is w - 1.
    relies on   layers/radix_attention.py: RadixAttention.sliding_window_size, layer_id
                model_executor/model_runner_components/load_model_utils.py:
                resolve_sliding_window_size asks a model for its largest window
"""

from __future__ import annotations

from typing import Any

from kit.engine.families.making import when_made

IN_EVERY_LAYER = (
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Starcoder2ForCausalLM",
)
"""Architectures of which Transformers gives every layer the window, if there is one."""


def windows(config: Any, architecture: str) -> list[int]:
    """Window of each layer by a model's configuration; 0 where a layer sees everything."""
    layers, window = int(config.num_hidden_layers), getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    if architecture in IN_EVERY_LAYER:
        return [window] * layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def register(architecture: str, _device: str) -> None:
    """Have models of this architecture that this process makes attend through their windows."""

    def change(model: Any, config: Any) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        of_layer = windows(config, architecture)
        for module in model.modules():
            if isinstance(module, RadixAttention):
                module.sliding_window_size = of_layer[module.layer_id] - 1
        model.get_attention_sliding_window_size = lambda: max(of_layer) - 1 or None

    when_made(architecture, change)
