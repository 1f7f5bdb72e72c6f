"""Link of `model.lora`: one section here, seven flags there."""

from __future__ import annotations

from math import sqrt
from typing import Any

from kit.config import LoraConfig, SessionConfig
from kit.errors import ConfigError
from kit.miles.links import FSDP, LORA, READ_AS_FLAG, Given, Link, Words, is_flag

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What all-linear means in a dense model."""
_MEGATRON = {
    "linear_qkv": ALL[:3],
    "linear_q": ALL[:1],
    "linear_k": ALL[1:2],
    "linear_v": ALL[2:3],
    "linear_proj": ALL[3:4],
    "linear_fc1": ALL[4:6],
    "linear_fc1_gate": ALL[4:5],
    "linear_fc1_up": ALL[5:6],
    "linear_fc2": ALL[6:],
}
"""Layers by Megatron's names, which Miles takes too."""
_FUSED = frozenset(ALL) - {"o_proj", "down_proj"}
"""Layers that Megatron computes together with others."""


def _alpha(lora: LoraConfig) -> int:
    """The `lora_alpha` with which alpha / r is this scaling; rounded where there is none."""
    return round(lora.lora_alpha * sqrt(lora.r)) if lora.use_rslora else lora.lora_alpha


def _write(config: SessionConfig, backend: str) -> Words:
    lora = config.model.lora
    if lora is None or backend == FSDP:
        return []
    targets = lora.target_modules
    words = ["--lora-rank", str(lora.r), "--lora-alpha", str(_alpha(lora))]
    words += ["--lora-type", "canonical_lora"]
    words += ["--target-modules", targets if isinstance(targets, str) else ",".join(targets)]
    if lora.adapter_path is not None and not is_flag(lora.adapter_path):
        words += ["--lora-adapter-path", lora.adapter_path]
    return words


def _note(config: SessionConfig, backend: str) -> str:
    lora = config.model.lora
    if lora is None:
        return ""
    if backend == FSDP:
        return "Miles' FSDP trainer has no adapters, Megatron has; the script trains all weights"
    notes = []
    if lora.use_rslora:
        exact = _alpha(lora) ** 2 == lora.lora_alpha**2 * lora.r
        how = "the same factor" if exact else "nearly the same factor"
        notes.append(
            f"Miles divides by r, so --lora-alpha {_alpha(lora)} gives {how} as use_rslora"
        )
    if lora.load_in_4bit:
        notes.append("the frozen weights are in bfloat16, not in 4 bits")
    if lora.init_lora_weights is not True:
        notes.append("A begins as Megatron's does")
    if lora.modules_to_save:
        notes.append("nothing is trained whole beside the adapters (modules_to_save)")
    if is_flag(lora.adapter_path):
        notes.append(f"{lora.adapter_path} {READ_AS_FLAG}")
    return "; ".join(notes)


def _read(given: Given) -> dict[str, Any] | None:
    rank = given.whole("--lora-rank", 0)
    if rank < 0:
        raise ConfigError(f"--lora-rank is {rank}.", fix="give it 0, for none, or more.")
    if not rank:
        return None
    if given.number("--lora-dropout", 0.0):
        given.remarks.append("--lora-dropout: the kit's adapters drop nothing; 0 is taken")
    targets = _targets(given)
    fused = targets == "all-linear" or bool(_FUSED & set(targets))
    if given.text("--lora-type", "lora") == "lora" and fused:
        given.remarks.append(
            "--lora-type lora has one A for q, k and v together, and one for gate and up; here "
            "each layer has its own, as with canonical_lora"
        )
    return {
        "r": rank,
        "lora_alpha": given.whole("--lora-alpha", 16),
        "target_modules": targets,
        "adapter_path": given.text("--lora-adapter-path", None),
    }


def _targets(given: Given) -> str | tuple[str, ...]:
    """Adapted layers by the names of a checkpoint, without those that are excluded."""
    text = given.text("--target-modules", "all-linear")
    excluded = _named(given.text("--exclude-modules", ""))
    if text == "all-linear" and not excluded:
        return text
    if excluded:
        given.remarks.append(
            "--exclude-modules: the kit names the layers that have adapters, all but these"
        )
    named = ALL if text == "all-linear" else _named(text)
    left = tuple(name for name in named if name not in excluded)
    if not left:
        raise ConfigError(
            "--target-modules without --exclude-modules leaves no layer.", fix="name some."
        )
    return left


def _named(text: str) -> tuple[str, ...]:
    words = (word.strip() for word in text.split(","))
    names = [name for word in words if word for name in _MEGATRON.get(word, (word,))]
    return tuple(dict.fromkeys(names))


ADAPTERS = [
    Link(
        "model.lora",
        (
            "--lora-rank",
            "--lora-alpha",
            "--target-modules",
            "--lora-adapter-path",
            "--lora-type",
            "--lora-dropout",
            "--exclude-modules",
        ),
        LORA,
        _write,
        _read,
        _note,
        "0, none",
        "needs Miles' Megatron trainer; each layer has an A of its own here, which Miles calls "
        "`canonical_lora`",
    ),
]
