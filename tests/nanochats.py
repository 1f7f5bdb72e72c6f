"""Checkpoints of nanochat with random weights, in nanochat's own files, and its formula.

make        writes one: `docs/make_nanochat.py` does it for its models, and here for random ones
log_probs   what nanochat computes, written out, in float64
"""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import tiktoken
import torch

SIZES = {
    "sequence_len": 256,
    "vocab_size": 300,
    "n_layer": 3,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 64,
}
STEP = 7
SCRIPT = Path(__file__).parents[1] / "docs" / "make_nanochat.py"


@cache
def script() -> dict[str, Any]:
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


@cache
def encoding() -> tiktoken.Encoding:
    """A tokenizer with merges of words, of runs of one letter, and of bytes of no text alone."""
    words = ["the sum of these numbers", "a" * 40, "abab" * 9, "\u4f60\u597d\u4f60\u597d", "\t\t"]
    made: tiktoken.Encoding = script()["train_tokenizer"](words * 20, SIZES["vocab_size"])
    return made


def make(folder: Path, **further: torch.Tensor) -> Path:
    """Write a checkpoint below a folder, with further weights; the checkpoint's own folder."""
    torch.manual_seed(0)
    model = script()["fresh_model"](SIZES)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    script()["write_tokenizer"](folder / "tokenizer", encoding())
    own = folder / "chatsft_checkpoints" / "d3"
    script()["write_checkpoint"](own, model, SIZES, STEP)
    if further:
        file = own / f"model_{STEP:06d}.pt"
        torch.save(torch.load(file, weights_only=True) | further, file)
    return own


def log_probs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probs after each token, (T, vocabulary), from a checkpoint's files."""
    named = torch.load(folder / f"model_{STEP:06d}.pt", weights_only=True)
    weights = {name: value.double() for name, value in named.items()}
    heads, groups = SIZES["n_head"], SIZES["n_head"] // SIZES["n_kv_head"]
    size = SIZES["n_embd"] // heads
    angles = torch.arange(len(tokens))[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.double().cos(), angles.double().sin()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat((one * cos + other * sin, other * cos - one * sin), -1)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, size)).transpose(0, 1)

    x = norm(weights["transformer.wte.weight"][tokens])
    past = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for number in range(SIZES["n_layer"]):
        own = {k: weights[f"transformer.h.{number}.{k}.weight"] for k in script()["LAYER"]}
        q, k, v = (split(norm(x) @ own[f"attn.c_{part}"].T) for part in "qkv")
        q, k = norm(rotated(q)), norm(rotated(k))
        k, v = (part.repeat_interleave(groups, 0) for part in (k, v))
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~past, -torch.inf)
        seen = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + seen @ own["attn.c_proj"].T
        x = x + (norm(x) @ own["mlp.c_fc"].T).relu().square() @ own["mlp.c_proj"].T
    logits = (norm(x) @ weights["lm_head.weight"].T)[:, : SIZES["vocab_size"]]
    return (15 * torch.tanh(logits / 15)).log_softmax(-1)
