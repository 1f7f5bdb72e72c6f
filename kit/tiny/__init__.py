"""The embedded models: character-level, 0.9 million parameters; their tasks and their recipe.

Everything here fits in a git clone and needs no network, so the first lesson, the demo and the
tests run on any laptop. `tasks` generates and grades the questions; `recipe` makes the files of
`model/`, a Qwen3, and of `moe/`, a Qwen3-MoE with two of eight experts in all layers but the first,
from nothing, corpus and tokenizer included.

What GRPO makes of it, so that you can tell a run that works from one that does not: 16 prompts x 8
samples an iteration at temperature 1, one AdamW step each (learning rate 1e-4, betas 0.9 and 0.98,
no weight decay), clip 0.2 / 0.28, gradient norm clipped at 1, no KL term. Held-out greedy accuracy,
and in brackets the mean reward of the ten iterations before:

    iteration             0        10           20           40          60           120
    addition, 5 seeds   0.42   0.84-0.95    0.96-0.98    0.97-0.99    1.00         1.00
                       (0.50) (0.69-0.73)  (0.82-0.85)  (0.91-0.93)  (0.96-0.97)  (0.98-0.99)
    chain, 2 seeds      0.36   0.97-0.99    0.97-0.98    0.99         0.99
                       (0.37) (0.63)       (0.86-0.88)  (0.89-0.91)  (0.93)

The mixture of experts begins at 0.42 in addition too, and the same settings make 0.99 of it in 80
iterations (3 seeds); an iteration takes one and a half times as long.

Learning rates from 5e-5 to 3e-4 reach 0.9 too. In `chain` watch the response length: it grows from
under 6 tokens to 12, because only written steps lead to right answers.

Importing this package is light: torch and transformers are only needed by `recipe`.
"""

from __future__ import annotations

from pathlib import Path

from kit.tiny.tasks import SPLITS, TASKS, Task, rows

MODEL_DIR = Path(__file__).parent / "model"
"""The Hugging Face directory: `AutoModelForCausalLM.from_pretrained(MODEL_DIR)`."""

MOE_DIR = Path(__file__).parent / "moe"
"""That of the mixture of experts."""

__all__ = ["MODEL_DIR", "MOE_DIR", "SPLITS", "TASKS", "Task", "rows"]
