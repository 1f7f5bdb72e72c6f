"""The record of experts of models whose routers SGLang does not tell their layer.

relies on   models/mixtral.py and others: `topk` beside `experts`, which knows its layer
            layers/moe/topk.py: TopK.layer_id
"""

from __future__ import annotations

from typing import Any

from kit.engine.families.making import when_made


def register(architecture: str, _device: str) -> None:
    """Have routers of models that this process makes record under their layer's number."""
    when_made(architecture, _tell_layers)


def _tell_layers(model: Any, _config: Any) -> None:
    for part in model.modules():
        topk = getattr(part, "topk", None)
        if topk is not None and getattr(topk, "layer_id", 0) is None:
            topk.layer_id = part.experts.layer_id
