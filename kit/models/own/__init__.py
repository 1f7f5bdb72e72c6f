"""Models that Transformers lacks, as Transformers' classes.

mimo.py            MiMo
nanochat_2026.py   nanochat as its code has it since 14 March 2026
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from kit.utils.reading import read_object

MODULES = {"mimo": "mimo", "nanochat_2026": "nanochat_2026"}
"""Module of each model, by `model_type` of config.json."""


def register(path: str | Path) -> None:
    """Have Transformers know the model of a directory, where it is one of these."""
    if kind := _kind(path):
        import_module(f"{__name__}.{MODULES[kind]}").register()


def config_for_tokenizer(path: str | Path) -> Any:
    """What `AutoTokenizer` is given as `config`, where nothing of the model is loaded.

    None leaves it to read config.json, where it would warn of a model that it does not know.
    """
    if not _kind(path):
        return None
    from transformers import PreTrainedConfig

    return PreTrainedConfig()


def _kind(path: str | Path) -> str:
    """The `model_type` of a directory, where it is one of `MODULES`; else ""."""
    file = Path(path) / "config.json"
    kind = str(read_object(file, unique=False).get("model_type")) if file.is_file() else ""
    return kind if kind in MODULES else ""


def source_of(kind: str) -> Path:
    """File that defines a model, by its `model_type`; it needs Transformers alone."""
    return Path(__file__).with_name(f"{MODULES[kind]}.py")
