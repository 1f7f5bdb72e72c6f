"""Dense layers of a Qwen3-MoE.

SGLang gives every layer experts, whatever the model's configuration says, and leaves the weights of
those that the files do not have as they come.
    relies on   models/qwen3_moe.py: Qwen3MoeDecoderLayer.__init__, Qwen3MoeMLP
"""

from __future__ import annotations

from typing import Any


def is_dense(config: Any, layer: int) -> bool:
    """Whether a layer of a Qwen3-MoE has no experts, by its configuration."""
    named, step = config.mlp_only_layers or (), config.decoder_sparse_step or 1
    return layer in named or (layer + 1) % step != 0


def register(_architecture: str, _device: str) -> None:
    """Give dense layers of a Qwen3-MoE that this process makes a plain feed-forward part."""
    from sglang.srt.models import qwen3_moe

    class DensePart(qwen3_moe.Qwen3MoeMLP):
        def forward(self, x: Any, forward_batch: Any = None) -> Any:
            return super().forward(x)

    kind: Any = qwen3_moe.Qwen3MoeDecoderLayer
    make = kind.__init__

    def make_layer(layer: Any, config: Any, layer_id: int, *args: Any, **kwargs: Any) -> None:
        make(layer, config, layer_id, *args, **kwargs)
        if is_dense(config, layer_id):
            layer.is_layer_sparse = False
            layer.mlp = DensePart(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=kwargs.get("quant_config"),
                prefix=f"{kwargs.get('prefix', '')}.mlp",
            )

    kind.__init__ = make_layer
