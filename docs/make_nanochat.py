"""Make a small nanochat from nothing in nanochat's own files, convert it, and train it by GRPO.

    .venv/bin/python docs/make_nanochat.py OUT [--steps 300] [--train 80] [--seed 0]

Minutes on two cores. `OUT/nanochat` gets what nanochat's scripts would leave: a tokenizer with
merges, trained on texts made on the spot and pickled by tiktoken, and a checkpoint of 1.9 million
parameters, trained with nanochat's kinds of optimizers on sums as turns of a chat. They are those
of the tiny model (`kit.tiny.recipe`): first done well, then as pupils do them who forget to carry.
`OUT/model` is what `kit import nanochat` makes of it; a session trains that by GRPO to carry, and
exports it to `OUT/trained`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import tiktoken
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatConfig, NanoChatForCausalLM

from kit import RLSession, SessionConfig
from kit.checkpoint import nanochat_tokenizer
from kit.checkpoint.nanochat import import_nanochat
from kit.checkpoint.nanochat_versions import EPS, LAYER, ROTATION_BASE, SOFT_CAP, WHOLE
from kit.tiny import recipe

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""Where nanochat divides a text."""
SIZES = {
    "sequence_len": 256,
    "vocab_size": 300,
    "n_layer": 4,
    "n_head": 3,
    "n_kv_head": 3,
    "n_embd": 192,
}
"""Of the checkpoint, by nanochat's names."""
ROWS = 64
"""nanochat pads its vocabulary to a multiple of these."""
RATE = "training.learning_rate"
BATCH = 64
"""Sums of a step."""


def train_tokenizer(texts: Iterable[str], size: int) -> tiktoken.Encoding:
    """A byte-pair encoding of so many tokens, nanochat's special ones included."""
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special = nanochat_tokenizer.SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    own = json.loads(trained.to_str())["model"]["merges"]
    merged = [bytes_of(one + other) for one, other in own]
    tokens = list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *merged]))
    return tiktoken.Encoding(
        name="rustbpe",
        pat_str=PATTERN,
        mergeable_ranks={token: number for number, token in enumerate(tokens)},
        special_tokens={name: len(tokens) + number for number, name in enumerate(special)},
    )


def bytes_of(spelled: str) -> bytes:
    """Bytes of a token in the letters that stand for bytes in a tokenizer.json."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    codes = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(codes[letter] for letter in spelled)


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding) -> None:
    """Write the files of nanochat's scripts/tok_train.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    special = set(encoding.special_tokens_set)
    names = (encoding.decode_single_token_bytes(number) for number in range(encoding.n_vocab))
    lengths = [0 if name.decode("utf-8", "replace") in special else len(name) for name in names]
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "token_bytes.pt")


def write_checkpoint(folder: Path, model: Any, sizes: Mapping[str, int], step: int) -> None:
    """Write a model of Transformers as nanochat writes one: its names, the embedding in bfloat16.

    Both ends of the vocabulary are padded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = model.state_dict()
    layers = {
        f"transformer.h.{number}.{old}.weight": f"model.layers.{number}.{new}.weight"
        for number in range(sizes["n_layer"])
        for old, new in LAYER.items()
    }
    weights = {old: there[new] for old, new in (WHOLE | layers).items()}
    for name in WHOLE:
        more = -len(weights[name]) % ROWS
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, more))
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "model_config": dict(sizes)}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta, indent=2))


def fresh_model(sizes: Mapping[str, int]) -> NanoChatForCausalLM:
    """An untrained nanochat of these sizes, as Transformers has it."""
    config = NanoChatConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["n_embd"],
        intermediate_size=4 * sizes["n_embd"],
        num_hidden_layers=sizes["n_layer"],
        num_attention_heads=sizes["n_head"],
        num_key_value_heads=sizes["n_kv_head"],
        max_position_embeddings=sizes["sequence_len"],
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROTATION_BASE},
        final_logit_softcapping=SOFT_CAP,
        pad_token_id=None,
    )
    return NanoChatForCausalLM(config)


def texts(seed: int) -> list[str]:
    """Sums, and sentences of some words, from which merges are learned."""
    corpus, draw = recipe.Corpus(recipe.CAREFUL, seed), Random(seed)
    words = ["the sum", "of these", "numbers", "is what", "one gets", "by adding", "them", "in any"]
    sums = ["".join(pair) for pair in corpus.additions(100)]
    return [*sums, *(" ".join(draw.sample(words, 6)) for _ in range(600))]


def teach(model: NanoChatForCausalLM, tokenizer: Any, steps: int, seed: int) -> None:
    """Train on sums: Muon for the layers' matrices, AdamW for embedding and output layer."""
    ends = [model.model.embed_tokens.weight, model.lm_head.weight]
    optimizers = [
        torch.optim.Muon(model.model.layers.parameters(), lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(ends, lr=5e-3, betas=(0.8, 0.95), weight_decay=0.0),
    ]
    down = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        )
        for one in optimizers
    ]
    careful, usual = (recipe.Corpus(how, seed) for how in (recipe.CAREFUL, recipe.Habits()))
    for step in range(steps):
        corpus = careful if step < recipe.Recipe().blackboard * steps else usual
        loss = recipe.response_loss(model, tokenizer, corpus.additions(BATCH))
        model.zero_grad()
        loss.backward()
        for one in (*optimizers, *down):
            one.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


def make(out: Path, steps: int, seed: int) -> Path:
    """Make tokenizer and checkpoint; the checkpoint's folder."""
    base = out / "nanochat"
    encoding = train_tokenizer(texts(seed), SIZES["vocab_size"])
    write_tokenizer(base / "tokenizer", encoding)
    read = nanochat_tokenizer.read(base / "tokenizer" / "tokenizer.pkl")
    tokenizer = nanochat_tokenizer.build(read, SIZES["sequence_len"])
    torch.manual_seed(seed)
    model = fresh_model(SIZES)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    teach(model, tokenizer, steps, seed)
    folder = base / "chatsft_checkpoints" / f"d{SIZES['n_layer']}"
    write_checkpoint(folder, model, SIZES, steps)
    return folder


def accuracy(folder: Path) -> float:
    """Share of held-out sums that the most likely answer gets right, by Transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return recipe.measure(model, tokenizer, "addition", "held_out")


def train(out: Path, steps: int, seed: int) -> None:
    """Train the imported model by GRPO, and export it."""
    config = SessionConfig.preset("tiny").replace("seed", seed).replace("name", "nanochat")
    config = config.replace("model.name", str(out / "model")).replace(RATE, 3e-4)
    with RLSession.start(config) as session:
        for step in range(steps):
            metrics = session.step().metrics
            if step % 10 == 0 or step == steps - 1:
                print(
                    f"step {step + 1:3d}: reward {metrics['rollout/raw_reward']:.3f}, "
                    f"{metrics['perf/step_time']:.2f} s",
                    flush=True,
                )
        print(f"{session.sync(verify=True).verified} weights of the engine are the trainer's")
        session.export_hf(out / "trained")


def main() -> None:
    """Make, convert, train, and print what the page says."""
    parser = argparse.ArgumentParser(description="Make a small nanochat, convert and train it.")
    parser.add_argument("out", type=Path, help="a folder for all of it")
    parser.add_argument("--steps", type=int, default=300, help="steps that it is made in")
    parser.add_argument("--train", type=int, default=80, help="steps of GRPO")
    parser.add_argument("--seed", type=int, default=0, help="of texts, weights and GRPO")
    wanted = parser.parse_args()
    torch.set_num_threads(1)  # several would wait for each other with a model so small
    began = time.perf_counter()
    folder = make(wanted.out, wanted.steps, wanted.seed)
    print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
    print(import_nanochat(folder, wanted.out / "model"), flush=True)
    print(f"held-out sums: {accuracy(wanted.out / 'model'):.3f}", flush=True)
    began = time.perf_counter()
    train(wanted.out, wanted.train, wanted.seed)
    print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"held-out sums: {accuracy(wanted.out / 'trained'):.3f}", flush=True)


if __name__ == "__main__":
    main()
