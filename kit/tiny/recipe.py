"""Makes the tiny models from nothing: corpus, tokenizer, weights and their record.

    python -m kit.tiny.recipe --out DIR [--moe] [--steps N] [--seed S]      on a CPU, in minutes

`--moe` makes the mixture of experts: the same class, blackboard and tokenizer, another network.

The base model is half-able on purpose. One that is always wrong gives reinforcement learning
nothing to reward, and one that is always right leaves nothing to learn. So the corpus is a
teacher's blackboard, where everything is done well (`CAREFUL`), and the scribbles of an imagined
class that has seen it and mostly does not bother (`Habits`):

- In `addition`, when the ones digits call for a carry, most scribbles forget it (47+38=75).
  Without a carry they are always right.
- In `chain`, most scribbles skip the steps and guess (=4), the more so the longer the sum. Those
  that write the steps slip now and then.

A model trained on this imitates the shares: its greedy answer is the commonest habit, so it is
wrong on nearly every carry problem, while sampling at temperature one shows the better habit now
and then. Within a group of samples some are right, which is all that a policy-gradient method
needs: GRPO makes the right habit the usual one.

The blackboard comes first: from it the network learns what a carry and a running sum are, and the
scribbles only change how often it uses them. Scribbles alone make a base with the same accuracy but
a blurred idea of when to carry, and GRPO then needs several times as many steps. Held-out questions
(`kit.tiny.tasks.is_held_out`) are in neither.

The loss is next-token cross-entropy on the response and its `<|end|>`, not on the question. The
run is deterministic: one thread, one seed, no dropout. Two runs on one machine give the same file,
bit for bit; another processor may round differently. `recipe.json` beside the weights records
settings, versions, measured accuracies and the SHA-256 of the weights.

The tokenizer has one token per printable ASCII character and learns nothing, so a student can read
token ids, log-probs and masks off a table without knowing what a merge is, and any ASCII text comes
back unchanged. Other characters become `<unk>`.

    <|user|>37+45=<|end|><|assistant|>82<|end|>
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from kit.tiny import tasks

CONTEXT = 512
IGNORE = -100
"""Label of tokens that carry no loss: PyTorch's cross-entropy skips it."""

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (PAD, UNKNOWN, END, *(f"<|{role}|>" for role in ROLES))
CHARACTERS = ("\n", "\t", *map(chr, range(32, 127)))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('Unknown role ' + message['role'] + "
    "': use system, user, assistant or tool.') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

Scribble = tuple[str, str]
"""(prompt, response), both plain text."""


@dataclass(frozen=True, slots=True)
class Habits:
    """How careless the imagined class is. Shares are probabilities per scribble."""

    forget_carry: float = 0.85
    """Share of additions with a carry out of the ones digit that drop it."""
    write_steps: dict[int, float] = field(default_factory=lambda: {4: 0.6, 5: 0.3, 6: 0.15})
    """By number of terms of a chain: the share that writes the running sums; others guess."""
    slip: float = 0.02
    """Share of written running sums that are one too high or too low."""


CAREFUL = Habits(forget_carry=0.0, write_steps={4: 1.0, 5: 1.0, 6: 1.0}, slip=0.0)
"""The teacher's blackboard: every carry carried, every step written, no slips."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings of the build; `recipe.json` records them."""

    seed: int = 0
    steps: int = 1300
    blackboard: float = 0.6
    """Share of the steps that imitate `CAREFUL` before those that imitate `habits`."""
    learning_rate: float = 2e-3
    """Peak; warmed up over the first `warmup` steps, then down a half cosine to zero."""
    warmup: int = 100
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    additions_per_step: int = 64
    chains_per_step: int = 32
    """All chains of a step have one length (lengths take turns), so that nothing is padded."""
    habits: Habits = field(default_factory=Habits)
    balance: float = 0.0
    """Weight of the load balancing loss, which keeps every expert in use; mixtures only."""


MIXTURE = Recipe(balance=0.02)
"""Settings of the mixture of experts."""


def build(
    out: Path, recipe: Recipe, log: Callable[[str], None] = print, *, moe: bool = False
) -> dict[str, Any]:
    """Train, measure and save everything that a directory of `kit/tiny` holds; returns the record.

    Args:
        out: the directory.
        recipe: how it is trained.
        log: told of the loss now and then.
        moe: make the mixture of experts, not the dense model.
    """
    started = time.perf_counter()
    tokenizer = build_tokenizer(CONTEXT)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_mixture(tokenizer) if moe else build_model(tokenizer)
        losses = train(model, tokenizer, recipe, log)
        accuracy = {task: measure(model, tokenizer, task, "held_out") for task in tasks.TASKS}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "recipe": settings(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": {"first": losses[0], "last": sum(losses[-50:]) / len(losses[-50:])},
        "held_out_greedy_accuracy": accuracy,
        "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "model.safetensors").chmod(0o644)
    (out / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe in JSON's types: text keys, lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


class Corpus:
    """An endless, seeded supply of scribbles."""

    def __init__(self, habits: Habits, seed: int) -> None:
        self.habits = habits
        self.random = Random(seed)

    def additions(self, count: int) -> list[Scribble]:
        """`count` additions of two numbers, as the pupils wrote them."""
        return [self._addition() for _ in range(count)]

    def chains(self, count: int, length: int) -> list[Scribble]:
        """`count` chains of `length` terms, as the pupils wrote them."""
        return [self._chain(length) for _ in range(count)]

    def _addition(self) -> Scribble:
        while True:
            a, b = self.random.choices(tasks.OPERANDS, k=2)
            if not tasks.is_held_out("addition", (a, b)):
                break
        answer = a + b
        if tasks.needs_carry(a, b) and self.random.random() < self.habits.forget_carry:
            answer -= 10
        return tasks.addition_prompt(a, b), str(answer)

    def _chain(self, length: int) -> Scribble:
        while True:
            digits = self.random.choices(range(1, 10), k=length)
            if not tasks.is_held_out("chain", digits):
                break
        if self.random.random() >= self.habits.write_steps[length]:
            return tasks.chain_prompt(digits), f"={self.random.randrange(10)}"
        return tasks.chain_prompt(digits), tasks.chain_response(self._sums_with_slips(digits))

    def _sums_with_slips(self, digits: list[int]) -> list[int]:
        sums, total = [], 0
        for digit in digits:
            total += digit
            if self.random.random() < self.habits.slip:
                total += self.random.choice((-1, 1))
            total %= 10
            sums.append(total)
        return sums


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; `max_length` is the model's context.

    It is a BPE without merges: that splits text into characters, needs no pre-tokenizer that
    could eat white space, and is a form every Hugging Face consumer knows.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = Fuse()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Qwen3 with the tiny shape, in float32, and its stopping rules."""
    config = Qwen3Config(intermediate_size=448, tie_word_embeddings=True, **_shape(tokenizer))
    return _with_stopping_rules(Qwen3ForCausalLM(config), tokenizer)


def build_mixture(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained Qwen3-MoE of the tiny shape: a dense layer, then three with experts.

    Two of eight experts are as wide as a third of the dense model's layers.
    """
    config = Qwen3MoeConfig(
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        tie_word_embeddings=False,  # SGLang's Qwen3-MoE has an output layer of its own
        **_shape(tokenizer),
    )
    return _with_stopping_rules(Qwen3MoeForCausalLM(config), tokenizer)


def _shape(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the configurations of both models have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }


def _with_stopping_rules(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
    )
    return model


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Train on blackboard, then scribbles, for `recipe.steps` steps; returns each step's loss.

    The loss is the mean of the two tasks' cross-entropies, in nats per response token.
    """
    blackboard, scribbles = Corpus(CAREFUL, recipe.seed), Corpus(recipe.habits, recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    losses = []
    model.train()
    for step in range(recipe.steps):
        corpus = blackboard if step < recipe.blackboard * recipe.steps else scribbles
        length = tasks.CHAIN_LENGTHS[step % len(tasks.CHAIN_LENGTHS)]
        additions = corpus.additions(recipe.additions_per_step)
        chains = corpus.chains(recipe.chains_per_step, length)
        loss = (
            response_loss(model, tokenizer, additions, recipe.balance)
            + response_loss(model, tokenizer, chains, recipe.balance)
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            log(f"step {step + 1:5d}  loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
    model.train(False)
    return losses


def response_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    scribbles: Sequence[Scribble],
    balance: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy over all response tokens and their `<|end|>`: a scalar.

    With a weight, the load balancing loss of https://arxiv.org/abs/2101.03961 is added.
    """
    questions = [render(tokenizer, prompt) for prompt, _ in scribbles]
    answers = [[*tokenizer.encode(text), tokenizer.eos_token_id] for _, text in scribbles]
    width = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
    tokens = torch.full((len(scribbles), width), tokenizer.pad_token_id)
    labels = torch.full((len(scribbles), width), IGNORE)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        end = len(question) + len(answer)
        tokens[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    # Padding is on the right and attention is causal: no real token can see it, so no mask.
    wanted = {"output_router_logits": True} if balance else {}
    output = model(input_ids=tokens, use_cache=False, **wanted)
    loss: torch.Tensor = functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
    )
    if not balance:
        return loss
    config: Any = model.config
    chosen = config.num_experts, config.num_experts_per_tok
    real = (tokens != tokenizer.pad_token_id).long()
    uneven: torch.Tensor = load_balancing_loss_func(output.router_logits, *chosen, real)
    return loss + balance * torch.as_tensor(uneven)


def render(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of one user message, up to where the assistant is to speak."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str, split: str
) -> float:
    """Accuracy of greedy responses on a split."""
    questions = tasks.rows(task, split)
    responses = greedy_responses(
        model, tokenizer, [q["prompt"] for q in questions], tasks.TASKS[task].max_response_tokens
    )
    scores = [
        is_right(task, response, question["label"])
        for question, response in zip(questions, responses, strict=True)
    ]
    return sum(scores) / len(scores)


def is_right(task: str, response: str, label: str) -> bool:
    """Whether the task's reward (`exact` or `number`) would be 1."""
    if task == "addition":
        return response.strip() == label
    numbers = re.findall(r"(?:(?<![\w)\]])-)?[\d./]*\d", response)
    return numbers[-1:] == [label]


@torch.no_grad()
def greedy_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_tokens: int,
) -> list[str]:
    """The most likely response to each prompt, in order, without `<|end|>`.

    Prompts of one length are decoded together, so there is no padding to get wrong.
    """
    rendered = [render(tokenizer, prompt) for prompt in prompts]
    responses = [""] * len(prompts)
    for length in sorted({len(tokens) for tokens in rendered}):
        members = [i for i, tokens in enumerate(rendered) if len(tokens) == length]
        tokens, cache, picked = torch.tensor([rendered[i] for i in members]), None, []
        for _ in range(max_tokens):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = output.logits[:, -1:].argmax(-1)
            picked.append(tokens)
        for i, row in zip(members, torch.cat(picked, 1).tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            responses[i] = str(tokenizer.decode(row[:end]))
    return responses


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: more would change the order of sums, and the last bits of weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Run the command line; prints the record."""
    parser = argparse.ArgumentParser(description="Make a tiny model from nothing, on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--moe", action="store_true", help="make the mixture of experts")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seed", type=int, help="of weights and corpus")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("steps", "seed")}
    changes = {name: number for name, number in given.items() if number is not None}
    recipe = replace(MIXTURE if arguments.moe else Recipe(), **changes)
    record = build(arguments.out, recipe, moe=arguments.moe)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
