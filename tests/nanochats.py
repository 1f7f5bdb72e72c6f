"""Checkpoints of nanochat with random weights, in nanochat's own files, and its formula.

make        writes one: `docs/make_nanochat.py` does it for its models, and here for random ones
make_2026   writes one of 2026
log_probs   what nanochat computes, written out, in float64
"""

from __future__ import annotations

import json
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
ROWS = 320
"""Of what has a row for each token: nanochat rounds up to a multiple of 64."""
WINDOW = 128
"""Tokens before a token that a short window sees: a quarter of the context, in tiles of 128."""
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


def make_2026(folder: Path, pattern: str = "SSL") -> Path:
    """Write a checkpoint as nanochat does since March 2026; its own folder."""
    torch.manual_seed(0)
    size, keys = SIZES["n_embd"], SIZES["n_embd"] // SIZES["n_head"] * SIZES["n_kv_head"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (ROWS, size)}
    for number in range(SIZES["n_layer"]):
        own = {
            "attn.c_q": (size, size),
            "attn.c_k": (keys, size),
            "attn.c_v": (keys, size),
            "attn.c_proj": (size, size),
            "mlp.c_fc": (4 * size, size),
            "mlp.c_proj": (size, 4 * size),
        }
        if number in (0, 2):
            own["attn.ve_gate"] = (SIZES["n_kv_head"], 12)
            shapes[f"value_embeds.{number}.weight"] = (ROWS, keys)
        shapes |= {f"transformer.h.{number}.{k}.weight": shape for k, shape in own.items()}
    shapes |= {"lm_head.weight": (ROWS, size), "smear_gate.weight": (1, 24)}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("resid_lambdas", "x0_lambdas"):
        weights[name] = 1 + 0.3 * torch.randn(SIZES["n_layer"])
    weights |= {"smear_lambda": torch.tensor([0.8]), "backout_lambda": torch.tensor([0.3])}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    script()["write_tokenizer"](folder / "tokenizer", encoding())
    checkpoint = folder / "chatsft_checkpoints" / "d3"
    checkpoint.mkdir(parents=True)
    torch.save(weights, checkpoint / f"model_{STEP:06d}.pt")
    meta = {"step": STEP, "model_config": SIZES | {"window_pattern": pattern}}
    (checkpoint / f"meta_{STEP:06d}.json").write_text(json.dumps(meta))
    return checkpoint


def log_probs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probs after each token, (T, vocabulary), from a checkpoint's files."""
    named = torch.load(folder / f"model_{STEP:06d}.pt", weights_only=True)
    meta = json.loads((folder / f"meta_{STEP:06d}.json").read_text())["model_config"]
    w = {name: value.double() for name, value in named.items()}
    new, layers, heads = "smear_gate.weight" in w, SIZES["n_layer"], SIZES["n_head"]
    size, groups = SIZES["n_embd"] // heads, heads // SIZES["n_kv_head"]
    base, length = (1e5, 1.2) if new else (1e4, 1.0)
    places = torch.arange(len(tokens))
    angles = places[:, None] * base ** (-torch.arange(0, size, 2) / size)
    cos, sin = angles.double().cos(), angles.double().sin()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotated(x: torch.Tensor) -> torch.Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat((one * cos + other * sin, other * cos - one * sin), -1)

    x = norm(w["transformer.wte.weight"][tokens])
    if new:
        gate = w["smear_lambda"] * torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat((x[:1], x[1:] + gate * x[:-1]))
    start = middle = x
    for number in range(layers):
        part = {n.split(f"h.{number}.")[1]: v for n, v in w.items() if f".h.{number}." in n}
        if new:
            x = w["resid_lambdas"][number] * x + w["x0_lambdas"][number] * start
        read = norm(x)
        q, k, v = ((read @ part[f"attn.c_{n}.weight"].T).unflatten(-1, (-1, size)) for n in "qkv")
        if f"value_embeds.{number}.weight" in w:
            own = w[f"value_embeds.{number}.weight"][tokens].unflatten(-1, (-1, size))
            v = v + 3 * torch.sigmoid(read[:, :12] @ part["attn.ve_gate.weight"].T)[..., None] * own
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        q, k = length * norm(rotated(q)), length * norm(rotated(k))
        k, v = (each.repeat_interleave(groups, 0) for each in (k, v))
        back = places[:, None] - places
        pattern = meta.get("window_pattern", "L")
        short = number < layers - 1 and pattern[number % len(pattern)] == "S"
        hidden = (back < 0) | (back > WINDOW) if short else back < 0
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(hidden, -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ part["attn.c_proj.weight"].T
        x = x + (norm(x) @ part["mlp.c_fc.weight"].T).relu().square() @ part["mlp.c_proj.weight"].T
        middle = x if number == layers // 2 else middle
    if new:
        x = x - w["backout_lambda"] * middle
    logits = (norm(x) @ w["lm_head.weight"].T)[:, : SIZES["vocab_size"]]
    return (15 * torch.tanh(logits / 15)).log_softmax(-1)
