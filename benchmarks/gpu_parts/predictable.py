"""A model whose text can be predicted, trained on the spot: what drafts pay for.

A document answers a number: it counts down from it, line by line, with some words on each, and
ends after line 0. So a prompt says how long its response is. Three words in four follow from the
one before, the rest are drawn from all; within a word the letters soon tell it.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.card import TOKENIZER_FILES
from kit.models.source import TINY_DIRECTORY

WORDS = 64
FOLLOWS = 0.75
"""Chance that a word is the one that belongs to the word before."""
ON_A_LINE = 6
MOST = 100
"""Numbers are below it."""
WARM_UP = 20
"""Steps in which the learning rate rises."""
Say = Callable[[str], None]


class Text:
    """Documents, which are the same with the same seed."""

    def __init__(self, seed: int = 0) -> None:
        """Make up the words, and which follows which."""
        draw = random.Random(seed)
        found: set[str] = set()
        while len(found) < WORDS:
            found.add("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 7))))
        self.words = sorted(found)
        draw.shuffle(self.words)
        self.next = dict(zip(self.words, draw.sample(self.words, WORDS), strict=True))

    def lines(self, number: int, draw: random.Random) -> Iterator[str]:
        """The answer to a number."""
        word = draw.choice(self.words)
        for left in range(number, -1, -1):
            line = []
            for _ in range(ON_A_LINE):
                follows = draw.random() < FOLLOWS
                word = self.next[word] if follows else draw.choice(self.words)
                line.append(word)
            yield f"{left:02d} {' '.join(line)}\n"


def number_for(tokens: int) -> int:
    """The number whose answer has about so many tokens."""
    a_line = 4 + ON_A_LINE * 6.5
    return max(0, min(round(tokens / a_line) - 1, MOST - 1))


def documents(seed: int, length: int) -> Iterator[list[int]]:
    """Sequences of so many token ids: documents as the chat template has them, one after another.

    Half of them begin within a document, so that all numbers are seen as often.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(TINY_DIRECTORY)
    text, draw = Text(), random.Random(seed)
    while True:
        row: list[int] = []
        while len(row) < length:
            number = draw.randrange(MOST)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{number:02d}"}],
                tokenize=False,
                add_generation_prompt=True,
            )
            first = draw.randint(0, number) if draw.random() < 0.5 else 0
            answer = "".join(list(text.lines(number, draw))[first:])
            ids = tokenizer(("" if first else prompt) + answer, add_special_tokens=False).input_ids
            row += [*ids, tokenizer.eos_token_id]
        yield row[:length]


def train(
    shape: dict[str, Any],
    folder: Path,
    device: str,
    *,
    steps: int,
    rows: int,
    length: int,
    say: Say,
) -> float:
    """Train a model of this shape on such text and write its directory.

    Args:
        shape: of Qwen3.
        folder: for the model.
        device: `cpu` or `cuda`.
        steps: of the optimizer.
        rows: sequences of a step.
        length: tokens of each.
        say: told of what happens.

    Returns:
        The loss over the last steps, in nats a token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("qwen3", **shape, **ends), attn_implementation="sdpa"
        )
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), fused=fused)
    stream, losses, begin = documents(1, length), [], time.perf_counter()
    for step in range(steps):
        rate = 5e-4 * min((step + 1) / WARM_UP, (steps - step) / steps * 2, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.tensor([next(stream) for _ in range(rows)], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=fused):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 20 == 19 or step == steps - 1:
            say(f"step {step + 1}: {losses[-1]:.3f} nats, {time.perf_counter() - begin:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16 if fused else torch.float32).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_DIRECTORY / name, folder)
    return float(torch.stack(losses[-10:]).mean())
