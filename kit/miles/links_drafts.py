"""Link of `engine.speculative`: one section here, SGLang's flags there."""

from __future__ import annotations

from typing import Any

from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.miles.links import SGLANG, Given, Link, Words

_ALGORITHM = "--sglang-speculative-algorithm"
_STEPS, _TOPK = "--sglang-speculative-num-steps", "--sglang-speculative-eagle-topk"
_TOKENS = "--sglang-speculative-num-draft-tokens"
_DRAFT = "--sglang-speculative-draft-model-path"


def _write(config: SessionConfig, backend: str) -> Words:
    own = config.engine.speculative
    if own is None:
        return []
    words = [_ALGORITHM, own.algorithm.upper(), _TOKENS, str(own.draft_tokens)]
    if own.draft_model is not None:
        words += [_STEPS, str(own.steps), _TOPK, str(own.topk), _DRAFT, own.draft_model]
    return words


def _note(config: SessionConfig, backend: str) -> str:
    own = config.engine.speculative
    if own is None or own.algorithm != "standalone":
        return ""  # a head has no weights of the names that are sent
    # Its engines load what they are sent into the draft, too.
    return (
        "Miles' sync gives SGLang's draft the policy's weights, which ends the engine where their "
        "shapes differ; the kit's reaches the policy alone"
    )


def _read(given: Given) -> dict[str, Any] | None:
    name = given.text(_ALGORITHM, None)
    if name is None:
        return None
    algorithm = str(name).lower()
    draft = given.text(_DRAFT, None)
    if algorithm not in ("ngram", "standalone", "eagle"):
        raise ConfigError(
            f"{_ALGORITHM} {name} has no counterpart here.",
            why="The kit drafts with ngram, standalone and eagle.",
            fix="leave it out, or take one of these.",
        )
    if algorithm == "eagle" and draft is None:
        raise ConfigError(
            f"{_ALGORITHM} is {name}, without {_DRAFT}.",
            why="SGLang then drafts with the layers of the model itself that predict several "
            "tokens, which the kit does not.",
            fix=f"name a head with {_DRAFT}, or leave {_ALGORITHM} out.",
        )
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


DRAFTS = [
    Link(
        "engine.speculative",
        (_ALGORITHM, _STEPS, _TOPK, _TOKENS, _DRAFT),
        SGLANG,
        _write,
        _read,
        _note,
        "no drafts",
        "`ngram`, `standalone` and `eagle`; Miles' own are EAGLE and MTP",
    ),
]
