"""Heads: some that draft well or badly, and what they draft, by plain torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from kit.config import SessionConfig
from kit.models import own, packing
from kit.models.heads import eagle, eagle3, making, mtp
from kit.models.heads.head import Head, PolicyStates
from kit.models.state_dict import as_saved, named_weights
from kit.samples import Rollout, Sample
from kit.tiny import MODEL_DIR
from tests.drafting import drafting
from tests.small_models import make_model

STEPS = 100
PYTORCH = {"format": "pt"}


def random_head(folder: Path, model: Path = MODEL_DIR) -> Path:
    """A head that has learned nothing."""
    folder.mkdir(exist_ok=True)
    making.make("eagle", model, folder, seed=1)
    return folder


def random_eagle3(
    folder: Path, model: Path = MODEL_DIR, words: Sequence[int] | None = None
) -> Path:
    """An EAGLE-3 head that has learned nothing; with `words`, of so many, and with older names."""
    folder.mkdir(exist_ok=True)
    making.make("eagle3", model, folder, seed=1)
    if words is not None:
        file, settings = folder / "model.safetensors", folder / "config.json"
        found = {n.replace("layers.0.", "midlayer."): w for n, w in load_file(file).items()}
        kept = torch.tensor(words)
        found["t2d"] = torch.zeros(len(found["lm_head.weight"]), dtype=torch.bool)
        found["t2d"][kept] = True
        found["lm_head.weight"] = found["lm_head.weight"][kept].clone()
        found["d2t"] = kept - torch.arange(len(kept))
        save_file(found, file, PYTORCH)
        config = json.loads(settings.read_text()) | {"draft_vocab_size": len(words)}
        settings.write_text(json.dumps(config))
    return folder


class Drafter:
    """A model and a head for it, computed by the formulas of a paper, one sample at a time."""

    def __init__(self, model: Path, head: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        own.register(model)
        self.policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.config: Any = AutoConfig.from_pretrained(head)
        self.weights = {n: v.float() for n, v in load_file(head / "model.safetensors").items()}

    @property
    def words(self) -> torch.Tensor:
        """Tokens that the head can draft."""
        return torch.arange(len(self.policy.lm_head.weight))

    def outputs(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """The head's output for each place: a hidden state, and the embedding after it."""
        raise NotImplementedError

    def said(self, out: torch.Tensor) -> torch.Tensor:
        """Logits of the head's words."""
        return out @ self.policy.lm_head.weight.T

    def read(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the trainer gives a head of the policy's layers, embeddings) of these tokens."""
        return self.hidden(tokens)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A product with a weight, and its bias if it has one."""
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm with a weight."""
        scaled = x * (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return scaled * self.weights[f"{name}.weight"]

    def attention(self, prefix: str, u: torch.Tensor) -> torch.Tensor:
        """Causal attention of grouped queries, rotated, of one sample."""
        c, n = self.config, len(u)
        heads, pairs, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        part = int(size * c.rope_parameters.get("partial_rotary_factor", 1))
        frequency = c.rope_parameters["rope_theta"] ** (-torch.arange(0, part, 2) / part)
        angle = (torch.arange(n)[:, None] * frequency).repeat(1, 2)

        def rotated(whole: torch.Tensor) -> torch.Tensor:
            x, rest = whole[..., :part], whole[..., part:]
            turned = torch.cat([-x[..., part // 2 :], x[..., : part // 2]], dim=-1)
            return torch.cat([x * angle.cos() + turned * angle.sin(), rest], dim=-1)

        q, k, v = (self.linear(f"{prefix}.{name}_proj", u).view(n, -1, size) for name in "qkv")
        if f"{prefix}.q_norm.weight" in self.weights:
            q, k = self.normed(f"{prefix}.q_norm", q), self.normed(f"{prefix}.k_norm", k)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(heads // pairs, dim=0) for x in (rotated(k), v))
        scores = rotated(q) @ k.transpose(1, 2) / size**0.5
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        attended = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.linear(f"{prefix}.o_proj", attended.transpose(0, 1).reshape(n, -1))

    def feed_forward(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        """A gated feed-forward part."""
        gate, up = (self.linear(f"{prefix}.{name}_proj", x) for name in ("gate", "up"))
        return self.linear(f"{prefix}.down_proj", functional.silu(gate) * up)

    @torch.no_grad()
    def hidden(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the policy's last hidden states, embeddings) of these tokens."""
        rows = torch.tensor([list(tokens)])
        inner = self.policy.model
        return inner(rows).last_hidden_state[0], inner.embed_tokens(rows)[0]

    @torch.no_grad()
    def distributions(
        self, sample: Sequence[int], length: int, temperature: float
    ) -> list[torch.Tensor]:
        """Log-probs of all the head's words for each response token but the first.

        By the policy, by the head on the policy's states, and by the head on its own outputs.
        """
        hidden, embedded = self.hidden(sample)
        first = len(sample) - length + 1
        once = self.outputs(hidden[:-1], embedded[1:])
        again = self.outputs(torch.cat([hidden[:1], once[:-1]]), embedded[1:])
        policys = self.policy(torch.tensor([list(sample)])).logits[0, first - 1 : -1, self.words]
        heads = (self.said(out[first - 2 : -1]) for out in (once, again))
        return [(logits / temperature).log_softmax(-1) for logits in (policys, *heads)]

    def log_probs(self, sample: Sequence[int], length: int, temperature: float) -> torch.Tensor:
        """The head's, of each response token but the first; the mean of both ways."""
        _, once, again = self.distributions(sample, length, temperature)
        tokens = torch.tensor(sample[len(sample) - length + 1 :], dtype=torch.long)
        is_word = tokens[:, None] == self.words
        return torch.where(is_word, (once + again) / 2, 0).sum(-1)

    def divergence(self, sample: Sequence[int], length: int, temperature: float) -> torch.Tensor:
        """Of the head from the policy, likewise."""
        logp, *others = self.distributions(sample, length, temperature)
        return sum((logp.exp() * (logp - logq)).sum(-1) for logq in others) / 2

    @torch.no_grad()
    def drafted(self, sample: Sample, steps: int) -> list[int]:
        """What `Sample.rollout_drafted` is, of chains of so many tokens."""
        tokens = sample.tokens
        read = self.hidden(tokens)
        last = len(tokens) - sample.response_length  # the first token comes with the prompt
        places = [0]
        while last < len(tokens) - 1:
            right = self._right(tokens, read, last, steps)
            places += [*range(1, right + 1), 0]
            last += right + 1
        return places[: sample.response_length]

    @torch.no_grad()
    def agreeing(self, sample: Sample, steps: int) -> tuple[int, int]:
        """Of how many passes it drafts as many right tokens as the engine did; and of how many.

        Each pass begins where the engine's did. The last one of a response is left out.
        """
        tokens, places = sample.tokens, sample.rollout_drafted
        assert places is not None
        read, first = self.hidden(tokens), len(tokens) - sample.response_length
        begins = [place for place, drafted in enumerate(places) if drafted == 0]
        passes = list(pairwise(begins))
        same = [self._right(tokens, read, first + a, steps) == b - a - 1 for a, b in passes]
        return sum(same), len(passes)

    def _right(
        self,
        tokens: Sequence[int],
        read: tuple[torch.Tensor, torch.Tensor],
        last: int,
        steps: int,
    ) -> int:
        """How many drafted tokens after `last`, up to `steps`, are those of the text."""
        hidden, embedded = read
        known, words = hidden[:last], embedded[1 : last + 1]
        right = 0
        while right < steps and last + 1 + right < len(tokens):
            out = self.outputs(known, words)[-1]
            token = int(self.words[self.said(out).argmax()])
            if token != tokens[last + 1 + right]:
                break
            right += 1
            known = torch.cat([known, out[None]])
            words = torch.cat([words, self.policy.model.embed_tokens.weight[token][None]])
        return right


class Written(Drafter):
    """A model and an EAGLE head for it."""

    def __init__(self, head: Path, model: Path = MODEL_DIR) -> None:
        super().__init__(model, head)

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """See `Drafter`."""
        u = self.linear("fc", torch.cat([embedded, hidden], dim=-1))
        x = u + self.attention("layers.0.self_attn", u)
        normed = self.normed("layers.0.post_attention_layernorm", x)
        return x + self.feed_forward("layers.0.mlp", normed)


class WrittenEagle3(Drafter):
    """A model and an EAGLE-3 head for it."""

    def __init__(self, head: Path, model: Path = MODEL_DIR) -> None:
        super().__init__(model, head)
        self.offsets = load_file(head / "model.safetensors").get("d2t")
        self.weights = {n.replace("midlayer.", "layers.0."): w for n, w in self.weights.items()}

    @property
    def words(self) -> torch.Tensor:
        """See `Drafter`."""
        if self.offsets is None:
            return super().words
        return self.offsets + torch.arange(len(self.offsets))

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Drafter`."""
        rows = torch.tensor([list(tokens)])
        own, count = (
            getattr(self.config, "eagle_config", None),
            self.policy.config.num_hidden_layers,
        )
        # What SGLang takes of its own accord: what comes into layers 2, L / 2 and L - 3.
        layers = (1, count // 2 - 1, count - 4)
        layers = own["eagle_aux_hidden_state_layer_ids"] if own else layers
        states = self.policy(rows, output_hidden_states=True).hidden_states
        side_by_side = torch.cat([states[layer + 1][0] for layer in layers], dim=-1)
        return side_by_side, self.policy.model.embed_tokens(rows)[0]

    def hidden(self, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Drafter`."""
        states, embedded = self.read(tokens)
        return self.linear("fc", states), embedded

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """See `Drafter`."""
        layer = "layers.0"
        parts = (
            self.normed(f"{layer}.input_layernorm", embedded),
            self.normed(f"{layer}.hidden_norm", hidden),
        )
        x = hidden + self.attention(f"{layer}.self_attn", torch.cat(parts, dim=-1))
        normed = self.normed(f"{layer}.post_attention_layernorm", x)
        return x + self.feed_forward(f"{layer}.mlp", normed)

    def said(self, out: torch.Tensor) -> torch.Tensor:
        """See `Drafter`."""
        return self.linear("lm_head", self.normed("norm", out))


class WrittenMtp(Drafter):
    """A MiMo and its own layer that predicts a further token."""

    prefix = "model.mtp_layers.0"

    def __init__(self, model: Path) -> None:
        super().__init__(model, model)

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """See `Drafter`."""
        own = self.prefix
        embedded = torch.cat([torch.zeros_like(embedded[:1]), embedded[1:]])
        parts = (
            self.normed(f"{own}.hidden_layernorm", hidden),
            self.normed(f"{own}.token_layernorm", embedded),
        )
        x = self.layer(self.linear(f"{own}.input_proj", torch.cat(parts, dim=-1)))
        return self.normed(f"{own}.final_layernorm", x)

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        """The layer as the model's others are."""
        own = self.prefix
        x = x + self.attention(f"{own}.self_attn", self.normed(f"{own}.input_layernorm", x))
        return x + self.wide(f"{own}.mlp", self.normed(f"{own}.post_attention_layernorm", x))

    def wide(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Its feed-forward part."""
        return self.feed_forward(name, x)


class WrittenGlm(WrittenMtp):
    """A GLM-4.5 and its own layer."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.prefix = f"model.layers.{self.config.num_hidden_layers}"

    @torch.no_grad()
    def outputs(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """See `Drafter`."""
        own = self.prefix
        parts = self.normed(f"{own}.enorm", embedded), self.normed(f"{own}.hnorm", hidden)
        x = self.layer(self.linear(f"{own}.eh_proj", torch.cat(parts, dim=-1)))
        return self.normed(f"{own}.shared_head.norm", x)

    def wide(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Experts that a router chooses, and one that all share."""
        c = self.config
        scores = self.linear(f"{name}.gate", x).sigmoid()
        biased = scores + self.weights[f"{name}.gate.e_score_correction_bias"]
        chosen = biased.topk(c.num_experts_per_tok, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        weights = c.routed_scaling_factor * weights / weights.sum(-1, keepdim=True)
        each = [self.feed_forward(f"{name}.experts.{e}", x) for e in range(c.n_routed_experts)]
        own = (weights[..., None] * torch.stack(each, dim=1)).sum(1)
        return own + self.feed_forward(f"{name}.shared_experts", x)


Texts = Sequence[tuple[Sequence[int], int]]
"""Tokens, and how many of them are the response."""


def taught(folder: Path, model: Path, texts: Texts) -> Path:
    """An EAGLE head that has learned the responses in some texts."""
    known = Written(random_head(folder, model), model)
    save_file(_learned(eagle.load(folder), known, texts), folder / "model.safetensors", PYTORCH)
    return folder


def taught_eagle3(
    folder: Path, model: Path, texts: Texts, words: Sequence[int] | None = None
) -> Path:
    """An EAGLE-3 head that has learned the responses in some texts."""
    known = WrittenEagle3(random_eagle3(folder, model, words), model)
    learned = _learned(eagle3.load(folder, model), known, texts)
    tables = eagle3.word_tables(folder)
    save_file(learned | tables, folder / "model.safetensors", PYTORCH)
    return folder


MTP = {"MiMo": WrittenMtp, "Glm4Moe": WrittenGlm}
"""What computes a family with a layer of its own."""


def with_layer(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model of random weights with a layer of its own."""
    folder.mkdir(exist_ok=True)
    own: dict[str, Any] = {"num_nextn_predict_layers": 1}
    if family == "Glm4Moe":
        own |= {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5}
    return make_model(folder, family, dtype=dtype, **own)


def taught_own_layer(folder: Path, family: str = "MiMo") -> Path:
    """A model whose own layer has learned what the model likes best."""
    with_layer(folder, family)
    texts = [likeliest(folder, [5 + i, 9, 20 + i, 7], 24) for i in range(8)]
    known, head = MTP[family](folder), mtp.load(folder)
    _learned(head, known, texts)
    named = dict(named_weights(head.model))
    saved = (as_saved(head.model, name, value.detach()) for name, value in named.items())
    weights = known.weights | dict(pair for pairs in saved for pair in pairs)
    save_file(weights, folder / "model.safetensors", PYTORCH)
    return folder


def _learned(head: Head, known: Drafter, texts: Texts) -> dict[str, torch.Tensor]:
    """A head's weights after some steps."""
    packed = packing.pack([list(row) for row, _ in texts], [n for _, n in texts], share=False)
    rows = [known.read(tokens) for tokens, _ in texts]
    hidden, embedded = (torch.cat(parts) for parts in zip(*rows, strict=True))
    states = PolicyStates(hidden, embedded, known.policy.lm_head.weight.detach())
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (-head(packed, 1.0, states)[0].mean()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    return dict(head.model.state_dict())


def taught_by(rollout: Rollout, folder: Path) -> Path:
    """A head of the tiny model that knows some of what it has written."""
    texts = [(sample.tokens, sample.response_length) for sample in rollout]
    return taught(folder, MODEL_DIR, texts[::4])


@torch.no_grad()
def likeliest(model: Path, prompt: Sequence[int], tokens: int) -> tuple[list[int], int]:
    """What a model writes after a prompt, token by token the likeliest."""
    from transformers import AutoModelForCausalLM

    own.register(model)
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(policy(torch.tensor([text])).logits[0, -1].argmax()))
    return text, tokens


def is_odd(sample: Sample) -> float:
    """A reward that a model of random weights gets for some of its responses."""
    return float(sum(sample.tokens) % 2)


def with_own_layer(model: Path, *, train: bool = False, **settings: Any) -> SessionConfig:
    """A session of a MiMo that drafts with its own layer."""
    config = drafting(None, train=train, algorithm="mtp", **settings)
    return config.replace("model.name", str(model)).replace("rollout.max_response_len", 24)


def headed(folder: Path | str, *, train: bool = False, **settings: Any) -> SessionConfig:
    return drafting(folder, train=train, **{"algorithm": "eagle", **settings})


def as_predicted(rollout: Rollout, model: Drafter, steps: int) -> int:
    """Check that what was accepted is what plain torch says; how many tokens were."""
    assert [s.rollout_drafted for s in rollout] == [model.drafted(s, steps) for s in rollout]
    return sum(bool(place) for s in rollout for place in s.rollout_drafted or ())
