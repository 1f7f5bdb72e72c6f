"""What adapters a model would get, by the headers of its weight files: no torch, nothing loaded.

So names that fit nothing are refused before a process starts, and memory is planned for what is
trained. `kit.models.lora` puts the adapters in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kit.config import LoraConfig, ModelConfig
from kit.errors import ConfigError, did_you_mean
from kit.models.source import ExpertLayout, ModelSource, stored_shapes

_LAYER = re.compile(r"\blayers\.\d+\.")
_ROUTED = re.compile(r"\bexperts?\b|\bmlp\.gate\b|\brouter\b")
"""In names of a mixture's weights: experts and what chooses among them."""
TIED = {"lm_head", "embed_tokens"}
"""Modules with one weight, in models that tie their embeddings."""
FIXED = {
    "lm_head": "the output layer, whose logits the trainer computes without a layer's forward pass",
    "embed_tokens": "an embedding, which is looked up and not multiplied with",
}


Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each weight, by its module's name."""


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Number of a model's adapters, and their size."""

    modules: int
    """Layers with an adapter."""
    parameters: int
    """Trained parameters, modules that are trained whole included."""

    @classmethod
    def of(cls, config: ModelConfig, source: ModelSource) -> Self:
        """Look at a model's files.

        Args:
            config: with `lora`.
            source: where the model is.

        Raises:
            ConfigError: a name of the settings fits nothing that could be trained so.
        """
        lora = config.lora
        assert lora is not None
        stored = stored_shapes(Path(source.path))
        weights = {n.removesuffix(".weight"): s for n, s in stored.items() if n.endswith(".weight")}
        linear: Shapes = {
            name: shape
            for name, shape in weights.items()
            if len(shape) == 2 and _LAYER.search(name) and not _ROUTED.search(name)
        }
        if source.experts:
            _refuse_experts(config.name, lora, source.experts, linear)
        if "lm_head" not in weights and (tied := TIED & {*lora.modules_to_save}):
            raise ConfigError(
                f"model.lora.modules_to_save has {min(tied)!r}, which {config.name} shares between "
                "its first and its last layer.",
                why="Trained in one of both places, it would be another weight there, and the "
                "engine and every checkpoint have one for both.",
                fix="leave it out.",
            )
        adapted = _matching("target_modules", lora, linear, config.name)
        whole = _matching("modules_to_save", lora, weights, config.name)
        adapted = [name for name in adapted if name not in whole]
        trained = sum(lora.r * sum(linear[name]) for name in adapted)
        return cls(len(adapted), trained + sum(math.prod(weights[name]) for name in whole))


def fits(name: str, path: str) -> bool:
    """Whether a name of the settings means the module at this path, as PEFT takes names."""
    return f".{path}".endswith(f".{name}")


def _refuse_experts(model: str, lora: LoraConfig, experts: ExpertLayout, linear: Shapes) -> None:
    """Refuse what would leave experts out in silence, or adapt them."""
    kinds = sorted({n.rpartition(".")[2] for n in linear if "attn" in n or "attention" in n})
    fix = f"name layers of its attention in model.lora.target_modules: [{', '.join(kinds)}]."
    why = f"{model} has {experts.count} experts in each of its layers with some, in one tensor."
    if lora.target_modules == "all-linear":
        raise ConfigError(
            "model.lora.target_modules is all-linear, and experts get no adapters yet.",
            why=why,
            fix=fix,
        )
    if other := [n for n in lora.modules_to_save if n.rpartition(".")[2] not in TIED]:
        raise ConfigError(
            f"model.lora.modules_to_save has {other[0]!r}, and of a mixture of experts only "
            f"{' and '.join(sorted(TIED))} are known to be trained rightly beside adapters.",
            fix="leave it out.",
        )
    outside = [n for n in lora.target_modules if n.rpartition(".")[2] not in kinds]
    if outside:
        raise ConfigError(
            f"model.lora.target_modules has {outside[0]!r}, which names experts, or nothing.",
            why=f"{why} They get no adapters yet, and no other part outside of attention.",
            fix=fix,
        )


def _matching(setting: str, lora: LoraConfig, there: Shapes, model: str) -> list[str]:
    """Modules that the names of a setting mean. Raises ConfigError where one means none."""
    names = getattr(lora, setting)
    if names == "all-linear":
        return list(there)
    for name in names:
        if any(fits(name, path) for path in there):
            continue
        kinds = sorted({path.rpartition(".")[2] for path in there})
        known = FIXED.get(name) if setting == "target_modules" else None
        raise ConfigError(
            f"model.lora.{setting} has {name!r}, which "
            + (f"gets no adapter: it is {known}." if known else f"names nothing in {model}."),
            why=f"Its layers have {', '.join(kinds)}.",
            fix="name some of these." if known else did_you_mean(name, kinds),
        )
    return [path for path in there if any(fits(name, path) for name in names)]
