"""What is changed in SGLang for some families of models, read from SGLang 0.5.16.

The record of a family (`kit.models.families`) names the modules here that it needs. Each has
`register(architecture, device)`, which runs in the scheduler's process before the model is made.

attention_name.py     a name that SGLang takes for the CPU's attention
dense_layers.py       layers without experts in a Qwen3-MoE
exaone.py             epsilon of EXAONE 4's norms
flat_heads.py         rows of HunYuan's queries and keys
gemma.py              the form of Gemma's activation
making.py             what a mend of a whole model goes through
linear_attention.py   linear attention on a CPU
latent_attention.py   DeepSeek's attention on a CPU
routers.py            routers that lack their layer, or keep their first weights
shared_gate.py        the gate of a shared expert on a CPU
sinks.py              attention sinks on a CPU in the model's dtype
whole_norms.py        MiniMax-M2's norms on a CPU
whole_projections.py  models of Transformers that SGLang would divide in an unknown way
windows.py            sliding windows that SGLang leaves out, or makes too long by a token
xielu.py              Apertus' activation in the model's dtype
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from kit.models import own
from kit.models.families import find
from kit.utils.reading import read_object


def register(model_path: str, device: str) -> None:
    """Change this process' SGLang for a model that it is going to make.

    Args:
        model_path: the model's directory.
        device: `cpu` or `cuda`.
    """
    own.register(model_path)
    for architecture in _configuration(model_path).get("architectures") or ():
        for name in find(architecture).mends:
            import_module(f"{__name__}.{name}").register(architecture, device)


def server_arguments(model_path: str, device: str) -> dict[str, Any]:
    """Fields of `sglang.ServerArgs` that a model's family needs; see `Family`."""
    settings = _configuration(model_path)
    arguments: dict[str, Any] = {}
    for architecture in settings.get("architectures") or ():
        family = find(architecture)
        arguments |= family.server_arguments(device)
        if family.overrides and (changes := family.overrides(settings)):
            arguments["json_model_override_args"] = json.dumps(changes)
    return arguments


def _configuration(model_path: str) -> dict[str, Any]:
    file = Path(model_path) / "config.json"
    return read_object(file, unique=False) if file.is_file() else {}
