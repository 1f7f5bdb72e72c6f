"""`Family`: the record of a family of models, and what is refused of one that does not have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.config import SessionConfig
from kit.errors import ConfigError, ModelError
from kit.utils.reading import read_json

TAKEN = {"attention_backend": "triton"}
"""On a CPU, for an architecture of which SGLang refuses other names; see the mend
`attention_name`."""
BY_BATCH = ("dynamic", "longrope", "su")
"""Kinds of rope scaling that look at the longest sequence of a batch."""
HOW = "docs/models.md says how a family is tried and recorded"


def quantized(settings: Mapping[str, Any]) -> str:
    """Why files whose weights are quantised cannot be trained; "" for others."""
    if not (how := settings.get("quantization_config")):
        return ""
    method = how.get("quant_method", "unknown")
    return (
        f"Its files hold quantised weights ({method}), which neither the trainer nor a sync reads. "
        "Take the files with plain weights, or have Transformers write them: "
        "from_pretrained(..., dtype=bfloat16) with its option to dequantise, then save_pretrained."
    )


def check_rotation(path: str, used: int) -> None:
    """Refuse a rotation that depends on what else is in the batch, where a session can meet it.

    Args:
        path: the model's directory.
        used: the most tokens of a prompt with its response.

    Raises:
        ModelError: the rotation of all samples of a batch changes once one of them is so long.
    """
    settings = read_json(Path(path) / "config.json", unique=False)
    rotation = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    # By kind of layer, or one for all.
    for each in [rotation, *(part for part in rotation.values() if isinstance(part, dict))]:
        kind = each.get("rope_type") or each.get("type")
        named = {**settings, **each} if kind in ("longrope", "su") else settings
        limit = named.get("original_max_position_embeddings") or 0
        if kind == "dynamic" or not limit:
            limit = settings["max_position_embeddings"]
        if kind in BY_BATCH and used > limit:
            raise ModelError(
                f"Prompt and response can have {used} tokens, and the model's rotation changes "
                f"after {limit} (rope scaling of type {kind}).",
                why="It then changes for every sample that is computed beside the long one, so a "
                "log-prob depends on the batch: Transformers, trainer and engine give others.",
                fix=f"set model.context_length: {limit}.",
            )


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: what differs from a Llama-like decoder, and what is known to be right.

    An empty record says nothing but the name. Flags say what was compared with Transformers, by
    a test or by the command that writes the table of docs/models.md, and not what should work.
    """

    architecture: str
    """As config.json has it."""
    name: str = ""
    """As people call it."""
    differs: str = ""
    """What it has that a Llama-like decoder has not, for the table."""
    refused: str = ""
    """Why it cannot be trained at all; empty where it can be tried."""
    refuses: Callable[[Mapping[str, Any]], str] | None = None
    """Why models with such a config.json cannot be trained; "" where they can be tried."""
    refused_on: Mapping[str, str] = field(default_factory=dict)
    """Why it cannot be trained on a kind of device (`cpu`, `cuda`)."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SGLang's `ServerArgs` that it needs everywhere."""
    engine_on: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further ones on a kind of device."""
    overrides: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """Makes of config.json what SGLang's own reading of it lacks; Transformers' names."""
    mends: tuple[str, ...] = ()
    """Modules of `kit.engine.families` that change SGLang's process before it makes the model."""
    feed_forward: str = "mlp"
    """Attribute of a layer that holds its feed-forward part, which may be computed once more."""
    carries_state: tuple[str, ...] = ()
    """Classes of layers in Transformers whose state must not run from one sample to the next."""
    exact: bool = False
    """Whether `training.true_on_policy` has every operator on both sides."""
    quantizes: bool = False
    """Whether every linear layer is known to `kit.models.low_precision`."""
    replays: bool = False
    """Whether its experts can be replayed."""
    adapts: bool = False
    """Whether adapters were trained, merged into what the engine gets."""
    drafts: bool = False
    """Whether drafts (`engine.speculative`) were seen to write as plain decoding does."""
    heads: bool = False
    """Whether EAGLE heads on its hidden states were seen to draft what the trainer computes."""
    eagle3: bool = False
    """Whether EAGLE-3 heads on what its layers put out were seen to draft so."""
    mtp: bool = False
    """Whether its own layer that predicts a further token was seen to draft so."""
    engine_adapts: bool = False
    """Whether SGLang was seen to compute with adapters of its own (`engine.lora: adapter`)."""

    undrafted: str = ""
    """Why it can neither draft nor be drafted for (`engine.speculative`); empty where it can be
    tried."""

    def server_arguments(self, device: str) -> dict[str, Any]:
        """Fields of SGLang's `ServerArgs` on a kind of device."""
        return {**self.engine, **self.engine_on.get(device, {})}

    def check(self, config: SessionConfig, path: str, device: str) -> None:
        """Refuse what was not seen to be right, before anything starts.

        Args:
            config: of the session.
            path: the model's directory.
            device: `cpu` or `cuda`.

        Raises:
            ModelError: the family cannot be trained, not on this device, or not this model of it.
            ConfigError: a setting was not tried with it.
        """
        why, where = self.refused or self.refused_on.get(device, ""), ""
        if not self.refused and why:
            where = f" on {device}"
        if not why and self.refuses:
            why = self.refuses(read_json(Path(path) / "config.json", unique=False))
            where = " with these settings in config.json"
        if why:
            raise ModelError(
                f"{self.architecture} cannot be trained{where}.",
                why=why,
                fix="train another model; docs/models.md lists those that were tried.",
            )
        training, lora = config.training, config.model.lora
        if training.replays_routing and not self.replays:
            own = "" if training.use_rollout_routing_replay else "training.use_routing_replay"
            name = own or "training.use_rollout_routing_replay"
            raise self._untried("the replay of its experts", name)
        if lora and not self.adapts:
            raise self._untried("adapters", "model.lora")
        if lora and config.engine.lora == "adapter" and not self.engine_adapts:
            raise self._untried("adapters of SGLang's own", "engine.lora: adapter", "set it merged")
        if config.engine.speculative and not self.drafts:
            raise self._untried("what drafts write", "engine.speculative")
        if self.carries_state and config.engine.extra.get("disable_radix_cache") is False:
            raise self._untried("a prefix cache", "engine.extra.disable_radix_cache: false")

    def check_drafts(self) -> None:
        """Raise ModelError for a family that neither drafts nor is drafted for."""
        if self.undrafted:
            raise ModelError(
                f"{self.architecture} neither drafts nor is drafted for.",
                why=self.undrafted,
                fix="leave engine.speculative out, or take another model.",
            )

    def check_heads(self, kind: str) -> None:
        """Raise ConfigError for a family that no head was tried with; `eagle` or `eagle3`."""
        if not (self.heads if kind == "eagle" else self.eagle3):
            raise self._untried(
                "what a head drafts on its hidden states",
                f"engine.speculative.algorithm: {kind}",
                "set ngram or standalone",
            )

    def check_mtp(self) -> None:
        """Raise ConfigError for a family whose own layers were not seen to draft."""
        if not self.mtp:
            raise self._untried(
                "what layers of its own that predict further tokens draft",
                "engine.speculative.algorithm: mtp",
                "set ngram or standalone",
            )

    def _untried(self, what: str, setting: str, way_out: str = "leave it out") -> ConfigError:
        return ConfigError(
            f"{setting} was not tried with {self.architecture}.",
            why=f"Nobody has compared {what} with Transformers for this family.",
            fix=f"{way_out}, or try it and record it: {HOW}.",
        )
