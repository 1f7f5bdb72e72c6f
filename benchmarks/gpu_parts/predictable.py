"""A model whose text can be predicted, trained on the spot, and what drafts for it.

A text is an endless row of words, made up once. Three words in four are the one that belongs to the
word before, the rest are drawn from all; within a word the letters soon tell it. So a model of two
layers guesses most letters, and a new word in four is hard to guess for any.
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
WARM_UP = 20
"""Steps in which the learning rate rises."""
Say = Callable[[str], None]


class Text:
    """Words and which belongs to which; the same with the same seed."""

    def __init__(self, seed: int = 0) -> None:
        """Make them up."""
        draw = random.Random(seed)
        found: set[str] = set()
        while len(found) < WORDS:
            found.add("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(4, 7))))
        self.words = sorted(found)
        draw.shuffle(self.words)
        self.next = dict(zip(self.words, draw.sample(self.words, WORDS), strict=True))

    def after(self, word: str, draw: random.Random) -> Iterator[str]:
        """Words that follow one, without end."""
        while True:
            word = self.next[word] if draw.random() < FOLLOWS else draw.choice(self.words)
            yield word


def documents(seed: int, length: int) -> Iterator[list[int]]:
    """Sequences of so many token ids: a word as a prompt in the chat template, and what follows."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(TINY_DIRECTORY)
    text, draw = Text(), random.Random(seed)
    while True:
        word = draw.choice(text.words)
        whole: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": word}], tokenize=False, add_generation_prompt=True
        )
        words = text.after(word, draw)
        whole += " ".join(next(words) for _ in range(length // 4))
        yield tokenizer(whole[: 2 * length], add_special_tokens=False).input_ids[:length]


def make(shape: dict[str, Any], device: str) -> Any:
    """A model of this shape of Qwen3 with random weights, which knows no end of a response."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    no_end = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape, **no_end))


def train(
    model: Any, folder: Path, *, steps: int, rows: int, length: int, rate: float, say: Say
) -> float:
    """Train a model on such text and write its directory.

    Args:
        model: in float32.
        folder: for it, in bfloat16 where it is on a GPU.
        steps: of the optimizer.
        rows: sequences of a step.
        length: tokens of each.
        rate: largest learning rate.
        say: told of what happens.

    Returns:
        The loss over the last steps, in nats a token.
    """
    import torch

    device = model.device.type
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=fused)
    stream, losses, begin = documents(1, length), [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARM_UP, (steps - step) / steps * 2, 1.0)
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


def train_head(
    model: Path,
    folder: Path,
    device: str,
    *,
    steps: int,
    rows: int,
    length: int,
    rate: float,
    say: Say,
) -> float:
    """Train an EAGLE head for a model on such text and write its directory.

    Args:
        model: directory of the model.
        folder: for the head, in float32.
        device: `cuda` or `cpu`.
        steps: as for `train`, like the others.
        rows: sequences of a step.
        length: tokens of each.
        rate: largest learning rate.
        say: told of what happens.

    Returns:
        The loss over the last steps, in nats a token.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from kit.models import packing
    from kit.models.heads import eagle, making
    from kit.models.heads.head import PolicyStates

    folder.mkdir(parents=True, exist_ok=True)
    making.make("eagle", model, folder)
    fast = device == "cuda"
    policy: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16 if fast else torch.float32
    ).to(device)
    head = eagle.load(folder).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95), fused=fast)
    stream, losses, output = documents(1, length), [], policy.lm_head.weight.detach()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARM_UP, (steps - step) / steps * 2, 1.0)
        texts = [next(stream) for _ in range(rows)]
        batch = torch.tensor(texts, device=device)
        with torch.no_grad():
            hidden = policy.model(batch, use_cache=False).last_hidden_state.flatten(0, 1)
            embedded = policy.model.embed_tokens(batch).flatten(0, 1)
        packed = packing.pack(texts, [length - 1] * rows, share=False).to(torch.device(device))
        states = PolicyStates(hidden, embedded, output)
        # In the policy's digits, of weights that are kept in float32, as a session's trainer.
        weights = {name: value.to(output.dtype) for name, value in head.named_parameters()}
        (log_probs,) = torch.func.functional_call(head, weights, (packed, 1.0, states))
        loss = -log_probs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 20 == 19 or step == steps - 1:
            say(f"head, step {step + 1}: {losses[-1]:.3f} nats")
    own = {
        name: value.float().cpu().contiguous() for name, value in head.model.state_dict().items()
    }
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    return float(torch.stack(losses[-10:]).mean())
