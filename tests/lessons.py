"""The notebooks as tests run them: with parameters that take a minute each at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(set(NOTEBOOKS.glob("*.ipynb")) - set(NOTEBOOKS.glob("10_*")))
"""All that run without a GPU."""

FAST: dict[str, dict[str, Any]] = {
    "01_one_step": {"prompts": 8},
    "02_train_to_solve": {"steps": 30, "seed": 1, "eval_every": 0},
    "05_estimators": {"steps": 2, "contenders": ["rloo"]},
}
"""Other values than a notebook's own, by its name."""
