"""Changes of a model of SGLang's just after it was made, before it gets its weights.

relies on   models/registry.py: ModelRegistry.resolve_model_cls
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def when_made(architecture: str, change: Callable[[Any, Any], None]) -> None:
    """Have this process call `change(model, config)` with each model of an architecture."""
    from sglang.srt.models.registry import ModelRegistry

    kind, _ = ModelRegistry.resolve_model_cls([architecture])
    make = kind.__init__

    def make_model(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        make(model, config, *args, **kwargs)
        change(model, config)

    kind.__init__ = make_model
