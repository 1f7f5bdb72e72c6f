"""Links of `engine.speculative`, SGLang's flags there, and of `training.draft`."""

from __future__ import annotations

from typing import Any

from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.miles.links import MEGATRON, OPTIMIZER, SGLANG, Given, Link, Words

_ALGORITHM = "--sglang-speculative-algorithm"
_STEPS, _TOPK = "--sglang-speculative-num-steps", "--sglang-speculative-eagle-topk"
_TOKENS = "--sglang-speculative-num-draft-tokens"
_DRAFT = "--sglang-speculative-draft-model-path"
_TRAIN, _LAYERS = "--enable-mtp-training", "--mtp-num-layers"
_FACTOR = "--mtp-loss-scaling-factor"


def _write(config: SessionConfig, backend: str) -> Words:
    own = config.engine.speculative
    if own is None:
        return []
    algorithm = "EAGLE" if own.algorithm == "mtp" else own.algorithm.upper()
    words = [_ALGORITHM, algorithm, _TOKENS, str(own.draft_tokens)]
    if own.has_weights:
        words += [_STEPS, str(own.steps), _TOPK, str(own.topk)]
    if own.draft_model is not None:
        words += [_DRAFT, own.draft_model]
    return words


def _note(config: SessionConfig, backend: str) -> str:
    own = config.engine.speculative
    if own is None or own.algorithm not in ("standalone", "eagle3"):
        return ""  # other heads have no weights of the names that are sent
    # Its engines load what they are sent into the draft, too.
    return (
        "Miles' sync gives SGLang's draft the policy's weights, which ends the engine where their "
        "shapes differ; the kit's reaches the policy alone"
    )


def _read(given: Given) -> dict[str, Any] | None:
    name = given.text(_ALGORITHM, None)
    if name is None:
        return None
    algorithm = "eagle" if name == "NEXTN" else str(name).lower()  # which SGLang takes for it
    draft = given.text(_DRAFT, None)
    if algorithm not in ("ngram", "standalone", "eagle", "eagle3"):
        raise ConfigError(
            f"{_ALGORITHM} {name} has no counterpart here.",
            why="The kit drafts with ngram, standalone, eagle and eagle3, and with layers of the "
            "model itself.",
            fix="leave it out, or take one of these.",
        )
    if algorithm == "eagle" and draft in (None, given.text("--hf-checkpoint", "")):
        algorithm, draft = "mtp", None
    own: dict[str, Any] = {
        "algorithm": algorithm,
        "num_draft_tokens": given.whole(_TOKENS, None),
    }
    if algorithm != "ngram":
        own |= {
            "num_steps": given.whole(_STEPS, None),
            "eagle_topk": given.whole(_TOPK, None),
            "draft_model": draft,
        }
    return own


def _trains_mtp(config: SessionConfig) -> bool:
    own = config.engine.speculative
    return bool(config.training.draft and own and own.algorithm == "mtp")


def _write_training(config: SessionConfig, backend: str) -> Words:
    draft = config.training.draft
    if draft is None or not _trains_mtp(config) or backend != MEGATRON:
        return []
    return [_TRAIN, _LAYERS, "1", _FACTOR, str(draft.mtp_factor)]


def _training_note(config: SessionConfig, backend: str) -> str:
    draft, policy = config.training.draft, config.training
    if draft is None:
        return ""
    if not _trains_mtp(config):
        return "Miles trains the layers of models that predict further tokens, no draft"
    if backend != MEGATRON:
        return "Miles trains such layers with its Megatron trainer only"
    others = {
        f"loss {draft.loss}": draft.loss != "cross_entropy",
        f"learning_rate {draft.learning_rate:g}": draft.learning_rate != policy.learning_rate,
        f"clip_grad {draft.clip_grad:g}": draft.clip_grad != policy.clip_grad,
        f"interval {draft.interval}": draft.interval != 1,
    }
    if left := [words for words, differs in others.items() if differs]:
        return (
            f"{', '.join(left)}: Miles trains the layer by cross-entropy with the policy's "
            "optimizer, and sends it with each sync"
        )
    return ""


def _read_training(given: Given) -> dict[str, Any] | None:
    if not given.has(_TRAIN):
        return None
    if given.whole(_LAYERS, 0) != 1:
        raise ConfigError(
            f"{_TRAIN} is given, and {_LAYERS} is {given.whole(_LAYERS, 0)}.",
            why="The kit drafts with one layer, and trains that.",
            fix=f"set {_LAYERS} 1, or leave {_TRAIN} out.",
        )
    drafts = _read(given)
    if drafts is None or drafts["algorithm"] != "mtp":
        given.remarks.append(
            f"{_TRAIN} trains a layer with which nothing drafts here: add {_ALGORITHM} EAGLE"
        )
        return None
    return {
        "learning_rate": given.number("--lr", 1e-6),
        "mtp_loss_scaling_factor": given.number(_FACTOR, 0.2),
    }


DRAFTS = [
    Link(
        "engine.speculative",
        (_ALGORITHM, _STEPS, _TOPK, _TOKENS, _DRAFT),
        SGLANG,
        _write,
        _read,
        _note,
        "no drafts",
        "`ngram`, `standalone`, `eagle`, `eagle3`, and `mtp`, which is EAGLE without a directory",
    ),
    Link(
        "training.draft",
        (_TRAIN, _LAYERS, _FACTOR),
        OPTIMIZER,
        _write_training,
        _read_training,
        _training_note,
        "no such training",
        "Miles trains layers of the model's own (`mtp`), with the policy's optimizer; the kit any "
        "draft, with one of its own",
    ),
]
