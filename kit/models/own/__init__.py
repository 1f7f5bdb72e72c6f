"""Models that Transformers lacks, as Transformers' classes.

nanochat_2026.py   nanochat as its code has it since 14 March 2026
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from kit.utils.reading import read_object

MODULES = {"nanochat_2026": "nanochat_2026"}
"""Module of each model, by `model_type` of config.json."""


def register(path: str | Path) -> None:
    """Have Transformers know the model of a directory, where it is one of these."""
    file = Path(path) / "config.json"
    kind = read_object(file, unique=False).get("model_type") if file.is_file() else None
    if kind in MODULES:
        import_module(f"{__name__}.{MODULES[str(kind)]}").register()


def source_of(kind: str) -> Path:
    """File that defines a model, by its `model_type`; it needs Transformers alone."""
    return Path(__file__).with_name(f"{MODULES[kind]}.py")
