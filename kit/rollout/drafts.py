"""The model, or the head, that drafts for another one: found, and refused where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kit.config import ModelConfig, SessionConfig
from kit.errors import ModelError
from kit.models import families
from kit.models.heads import eagle3_files, files, mtp_files
from kit.models.source import ModelSource, find
from kit.utils.reading import read_json

HEADS = {files.ARCHITECTURE: "EAGLE", eagle3_files.ARCHITECTURE: "EAGLE-3"}
"""Heads by SGLang's names."""


def find_draft(config: SessionConfig, model: ModelSource) -> ModelSource | None:
    """The draft that `engine.speculative` names; None where there is none.

    Args:
        config: of the session.
        model: that it drafts for.

    Raises:
        ConfigError: the model's family was not tried with heads, or with such a layer.
        ModelError: it is missing or broken, no head for this model where one is asked for, its
            tokens are not the model's, or one of the two is of a family that takes no drafts.
    """
    speculative = config.engine.speculative
    if speculative:
        families.find(model.architecture).check_drafts()
    if speculative is None or not speculative.has_weights:
        return None
    if speculative.draft_model is None:
        return _own_layer(config, model)
    name = speculative.draft_model
    trusts = config.model.trust_remote_code
    draft = find(ModelConfig(name=name, trust_remote_code=trusts))
    families.find(draft.architecture).check_drafts()
    _check_kind(config, draft, model)
    fix = (
        "name a draft that was made for this model in engine.speculative.draft_model, or set "
        "engine.speculative.algorithm: ngram, which needs none."
    )
    if draft.vocabulary != model.vocabulary:
        raise ModelError(
            f"The draft {name} has a vocabulary of {draft.vocabulary:,} tokens, and "
            f"{config.model.name} one of {model.vocabulary:,}.",
            why="What one drafts as a number would be another token to the other.",
            fix=fix,
        )
    if other := _other_token(Path(draft.path), Path(model.path)):
        raise ModelError(
            f"The draft {name} and {config.model.name} have different tokenizers: {other}.",
            why="What one drafts as a number would be another token to the other.",
            fix=fix,
        )
    if draft.context_length < model.context_length:
        raise ModelError(
            f"The draft {name} reads {draft.context_length:,} tokens, and {config.model.name} "
            f"{model.context_length:,}.",
            fix=f"set model.context_length: {draft.context_length}, or {fix}",
        )
    return draft


def _own_layer(config: SessionConfig, model: ModelSource) -> ModelSource:
    """The model as its own draft; raises ConfigError or ModelError where it is none."""
    families.find(model.architecture).check_mtp()
    if problem := mtp_files.problem_of(model.path):
        raise ModelError(
            f"{config.model.name} has no layer that predicts a further token and can draft: "
            f"{problem}.",
            fix="take files of the model that have it, or set engine.speculative.algorithm: ngram.",
        )
    return replace(
        model,
        architecture=mtp_files.ENGINE[model.architecture],
        bytes=mtp_files.size_of(model.path),
    )


def _check_kind(config: SessionConfig, draft: ModelSource, model: ModelSource) -> None:
    """Raise ModelError or ConfigError for a head that is none for this model, or none at all."""
    drafts = config.engine.speculative
    assert drafts is not None
    if drafts.algorithm == "standalone":
        if draft.architecture in HEADS:
            raise ModelError(
                f"{drafts.draft_model} is an {HEADS[draft.architecture]} head, and "
                "engine.speculative.algorithm is standalone.",
                fix="set engine.speculative.algorithm: "
                f"{HEADS[draft.architecture].lower().replace('-', '')}.",
            )
        check_standalone(draft.architecture, str(drafts.draft_model))
        return
    families.find(model.architecture).check_heads(drafts.algorithm)
    is_third = drafts.algorithm == "eagle3"
    problem_of = eagle3_files.problem_of if is_third else files.problem_of
    if problem := problem_of(draft.path, model.path):
        raise ModelError(
            f"{drafts.draft_model} is no {'EAGLE-3' if is_third else 'EAGLE'} head that can draft "
            f"for {config.model.name}: {problem}.",
            fix=f"make one with `kit draft MODEL OUT --algorithm {drafts.algorithm}`; a draft that "
            "is a model goes with engine.speculative.algorithm: standalone.",
        )


def check_standalone(architecture: str, name: str) -> None:
    """Refuse what SGLang would not take whole for a draft.

    Args:
        architecture: of the draft.
        name: for the message.

    Raises:
        ModelError: SGLang would make another model of it.
    """
    if architecture in mtp_files.TAKEN:
        raise ModelError(
            f"{name} is a {architecture}, which cannot be a draft of its own.",
            why="SGLang would make the layer of it that predicts a further token, and not the "
            "model.",
            fix="name a draft of another family with the same tokens, or set "
            "engine.speculative.algorithm: ngram.",
        )


def _other_token(draft: Path, model: Path) -> str:
    """A token that both write differently, in words; empty where none is known."""
    ours, theirs = (_vocabulary(folder) for folder in (model, draft))
    if not ours or not theirs:
        return ""
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            a, b = theirs.get(token, "nothing"), ours.get(token, "nothing")
            return f"{token!r} is {a} there and {b} here"
    return ""


def _vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their numbers; empty where the directory has no tokenizer.json of that kind."""
    try:
        tree = read_json(folder / "tokenizer.json", unique=False)
        known = tree["model"]["vocab"]
        if not isinstance(known, dict):
            return {}
        return {**known, **{str(t["content"]): int(t["id"]) for t in tree.get("added_tokens", ())}}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
