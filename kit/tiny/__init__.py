"""The embedded model: a character-level Qwen3 of 0.9 million parameters, its tasks, its recipe.

Everything here fits in a git clone and needs no network, so the first lesson, the demo and the
tests run on any laptop. `tasks` says what the model is asked, `corpus` what it learned from,
`tokenizer` how it reads, and `recipe` makes the files of `model/` from nothing.

Importing this package is light: torch and transformers are only needed by `recipe`.
"""

from __future__ import annotations

from pathlib import Path

from kit.tiny.tasks import SPLITS, TASKS, Task, rows

MODEL_DIR = Path(__file__).parent / "model"
"""The Hugging Face directory: `AutoModelForCausalLM.from_pretrained(MODEL_DIR)`."""

__all__ = ["MODEL_DIR", "SPLITS", "TASKS", "Task", "rows"]
