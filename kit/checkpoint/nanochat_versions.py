"""What a checkpoint of nanochat holds, version by version, and what Transformers calls it.

nanochat writes sizes beside its weights, and no more: base of the rotation, soft cap and factors
are constants of its code, and changed. A version is told by which weights there are.

    to 11 January 2026       before commit aa530cd: Transformers' NanoChat
    from 14 March 2026 on    from commit a825e63 on: `kit.models.own.nanochat_2026`
    between them             refused: the same weights were computed with in several ways
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kit.errors import ModelError

if TYPE_CHECKING:
    import torch

EPS = 2.0**-23
"""Of nanochat's norms in float32: that dtype's epsilon, as torch takes where it is told none."""
SOFT_CAP = 15.0
ROTATION_BASE, ROTATION_BASE_2026 = 10_000.0, 100_000.0
LAYER = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of a layer: nanochat's name, and Transformers'."""
WHOLE = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
SCALARS = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")
"""Numbers by layer or for the whole model, of 2026."""
SMEAR_CHANNELS, VALUE_CHANNELS = 24, 12
NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
"""Values with which scalars of 2026 do nothing."""
BETWEEN = {
    r"value_embeds\.": "adds embeddings to the values (since 16 January 2026)",
    r"(resid|x0)_lambdas$": "scales its residual stream by layer (since 11 January 2026)",
}
"""What versions between the two have, by the names of their weights."""
WINDOW_TILE, WINDOW_SHARE = 128, 4
"""A short window is a quarter of the context, rounded up to a multiple of this."""
_LAYER_NAME = re.compile(r"transformer\.h\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True, slots=True)
class Version:
    """A checkpoint's sizes, by nanochat's names, and whether it is of 2026."""

    sizes: Mapping[str, int]
    window_pattern: str
    """A letter a layer, repeated: `S` for a short window."""
    of_2026: bool

    @property
    def names(self) -> dict[str, str]:
        """Transformers' name of every weight, by nanochat's."""
        layers = range(self.sizes["n_layer"])
        names = WHOLE | {
            f"transformer.h.{number}.{old}.weight": f"model.layers.{number}.{new}.weight"
            for number in layers
            for old, new in LAYER.items()
        }
        if not self.of_2026:
            return names
        names |= {name: f"model.{name}" for name in (*SCALARS, "smear_gate.weight")}
        for number in filter(self.has_values, layers):
            gate = f"transformer.h.{number}.attn.ve_gate.weight"
            names[gate] = f"model.layers.{number}.self_attn.ve_gate.weight"
            names[f"value_embeds.{number}.weight"] = f"model.value_embeds.{number}.weight"
        return names

    def has_values(self, layer: int) -> bool:
        """Whether a layer has embeddings of values: every other one, the last included."""
        return self.of_2026 and layer % 2 == (self.sizes["n_layer"] - 1) % 2

    def is_by_token(self, name: str) -> bool:
        """Whether a weight has a row for each token, which nanochat pads to a round number."""
        return name in WHOLE or name.startswith("value_embeds.")

    @property
    def short(self) -> list[bool]:
        """Whether each layer has a short window; the last one has none."""
        layers, pattern = self.sizes["n_layer"], self.window_pattern.upper()
        kinds = [pattern[number % len(pattern)] == "S" for number in range(layers)]
        return [*kinds[:-1], False]

    def check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Refuse a version that is not known, and weights that do not fit its sizes.

        Raises:
            ModelError: it is one between the two, or weights are missing, too many, or of another
                shape.
        """
        self._refuse_others(weights)
        if missing := sorted(self.names.keys() - weights.keys()):
            raise ModelError(
                f"The checkpoint lacks {', '.join(missing[:4])}, which its sizes ask for.",
                fix="copy model and meta of one and the same step.",
            )
        for name in self.names:
            there = tuple(weights[name].shape)
            expected = self._shape(name, there, weights)
            if there != expected:
                raise ModelError(
                    f"{name} has the shape {there}, but the sizes in meta_*.json ask for "
                    f"{expected}.",
                    fix="copy model and meta of one and the same step.",
                )

    def _refuse_others(self, weights: Mapping[str, torch.Tensor]) -> None:
        more = [
            name
            for name, value in weights.items()
            if name not in self.names and not (name in NEUTRAL and (value == NEUTRAL[name]).all())
        ]
        reasons = [
            why for pattern, why in BETWEEN.items() if any(re.match(pattern, name) for name in more)
        ]
        if not self.of_2026 and any(self.short):
            pattern = self.window_pattern.upper()
            reasons.append(f"has windows (window_pattern {pattern}, since 11 January 2026)")
        if reasons and not self.of_2026:
            raise ModelError(
                f"This nanochat {'; '.join(reasons)}, and nothing of 14 March 2026.",
                why="Between these days nanochat changed its soft cap, the base of its rotation "
                "and its windows more than once, and no file says which of them a checkpoint was "
                "trained with.",
                fix="take one of before commit aa530cd or since commit a825e63, or train it on "
                "with nanochat's present code.",
            )
        if more:
            raise ModelError(
                f"The checkpoint has {', '.join(sorted(more)[:4])}, which nanochat does not.",
                why="Known are nanochat's versions of before commit aa530cd, and from a825e63 to "
                "92d63d4.",
                fix="train with nanochat's own code.",
            )

    def _shape(
        self, name: str, there: tuple[int, ...], weights: Mapping[str, torch.Tensor]
    ) -> tuple[int, ...]:
        """Shape that a weight has to have; rows by token may be more."""
        wide, heads = self.sizes["n_embd"], self.sizes["n_kv_head"]
        keys = wide // self.sizes["n_head"] * heads
        inner = len(weights["transformer.h.0.mlp.c_fc.weight"])
        if self.is_by_token(name):
            rows = max(there[0] if there else 0, self.sizes["vocab_size"])
            return rows, wide if name in WHOLE else keys
        if layer := _LAYER_NAME.fullmatch(name):
            return {
                "attn.c_q": (wide, wide),
                "attn.c_k": (keys, wide),
                "attn.c_v": (keys, wide),
                "attn.c_proj": (wide, wide),
                "attn.ve_gate": (heads, VALUE_CHANNELS),
                "mlp.c_fc": (inner, wide),
                "mlp.c_proj": (wide, inner),
            }[layer[2]]
        if name == "smear_gate.weight":
            return 1, SMEAR_CHANNELS
        return (self.sizes["n_layer"] if name in NEUTRAL else 1,)

    def settings(self, inner: int) -> dict[str, Any]:
        """The configuration of the model in Transformers' words, without its tokens.

        Args:
            inner: width of the feed-forward part.
        """
        base = ROTATION_BASE_2026 if self.of_2026 else ROTATION_BASE
        settings = {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "vocab_size": self.sizes["vocab_size"],
            "hidden_size": self.sizes["n_embd"],
            "intermediate_size": inner,
            "num_hidden_layers": self.sizes["n_layer"],
            "num_attention_heads": self.sizes["n_head"],
            "num_key_value_heads": self.sizes["n_kv_head"],
            "max_position_embeddings": self.sizes["sequence_len"],
            "hidden_act": "relu2",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": base},
            "final_logit_softcapping": SOFT_CAP,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "pad_token_id": None,  # the token that a model pads with learns nothing
        }
        return settings | self._settings_of_2026() if self.of_2026 else settings

    def _settings_of_2026(self) -> dict[str, Any]:
        context = self.sizes["sequence_len"]
        before = -(-context // WINDOW_SHARE // WINDOW_TILE) * WINDOW_TILE
        module = "nanochat_2026"
        return {
            "architectures": ["NanoChat2026ForCausalLM"],
            "model_type": module,
            "auto_map": {
                "AutoConfig": f"{module}.NanoChat2026Config",
                "AutoModelForCausalLM": f"{module}.NanoChat2026ForCausalLM",
            },
            "sliding_window": before + 1 if any(self.short) else None,
            "layer_types": [
                "sliding_attention" if is_short else "full_attention" for is_short in self.short
            ],
            "smear_channels": SMEAR_CHANNELS,
            "value_channels": VALUE_CHANNELS,
            "value_range": 3.0,
            "query_key_factor": 1.2,
        }
