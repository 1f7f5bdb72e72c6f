"""SGLang imports the one model that it is asked for, and not all two hundred that it has.

Those imports take a core two seconds and more, in each scheduler of each start.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"
"""SGLang's own variable: modules of models that it is not to import."""
EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def import_only(model_path: str) -> None:
    """Tell this process' SGLang, and what it starts, which models it can leave out.

    Where the model's architecture is in none of SGLang's modules, or the environment already says
    something of this, SGLang is told nothing.

    Args:
        model_path: a model directory, with config.json.
    """
    if os.environ.get(DISABLED) or os.environ.get(EXTERNAL):
        return
    wanted = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    names = [str(name) for name in wanted.get("architectures") or ()]
    others, found = [], False
    for file in _modules():
        text = file.read_text(encoding="utf-8")
        if any(name in text for name in names):
            found = found or "EntryClass" in text
        else:
            others.append(file.stem)
    if found:
        os.environ[DISABLED] = ",".join(others)


def _modules() -> list[Path]:
    package = find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "srt" / "models"
    return sorted(file for file in folder.glob("*.py") if file.stem != "__init__")
