"""Where prompts come from, and how they become tokens.

    sources.py         load_prompts: every notation of `data.source`, down to one validated set
                       load_held_out: those of `data.eval_source`, one set or several
    prompts.py         PromptRow and PromptSet: what a prompt is, and what makes a row malformed
    conversations.py   a prompt as people write it, down to text or chat messages
    plain.py           values of NumPy, torch, pandas and Arrow as Python's own
    readers.py         files and directories: JSONL, JSON, CSV, Parquet, `datasets` on disk or hub
    reasoning_gym.py   rows that reasoning-gym generates when they are read
    chat_template.py   the model's chat template, and whether a prompt fits the context
    prompt_check.py    the first prompt as tokens, and what is odd about it
    stream.py          the order in which training sees the rows, resumable
    buffer.py          groups of samples that wait to be continued

Importing this package is light; `datasets`, `pyarrow` and `reasoning_gym` load when needed.
"""

from __future__ import annotations

from kit.data.prompts import PromptRow, PromptSet
from kit.data.sources import load_held_out, load_prompts

__all__ = ["PromptRow", "PromptSet", "load_held_out", "load_prompts"]
