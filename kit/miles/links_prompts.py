"""Links of model, prompts and rewards."""

from __future__ import annotations

from pathlib import PurePosixPath

from kit.config import TINY, SessionConfig
from kit.miles.given import Given
from kit.miles.links import CKPT, EVAL, ROLLOUT, Link, Variable, Words, switch, value

REWARDS = "kit.miles.rewards."
"""The kit's rewards in the form that `--custom-rm-path` takes."""
TINY_DIRECTORY = "kit/tiny/model"


def is_file(source: str) -> bool:
    """Can Miles read this source: a JSONL or Parquet file, a slice of it perhaps?"""
    name = source.partition("@[")[0]
    return PurePosixPath(name).suffix in (".jsonl", ".parquet")


def _source_note(config: SessionConfig, backend: str) -> str:
    source = config.data.source
    if is_file(source):
        return ""
    named = f"{source} is" if source else "left open means"
    return f"{named} no file that Miles reads; `--data FOLDER` writes its rows to one"


def _eval_note(config: SessionConfig, backend: str) -> str:
    source = config.data.eval_source
    if is_file(source) or (not source and not config.evaluation.interval):
        return ""
    named = f"{source} is" if source else "the task's own held-out rows are"
    return f"{named} no file that Miles reads; `--data FOLDER` writes the rows to one"


def _write_eval(config: SessionConfig, backend: str) -> Words:
    if not config.data.eval_source and not config.evaluation.interval:
        return []
    source = config.data.eval_source.partition("@[")[0]
    name = PurePosixPath(source).stem.lstrip("-") if is_file(source) else ""
    return ["--eval-prompt-data", name or "held_out", Variable("$EVAL_DATA")]


def _read_eval(given: Given) -> str:
    values = given.all("--eval-prompt-data")
    if len(values) > 2:
        given.remarks.append(
            f"--eval-prompt-data names {len(values) // 2} datasets; the kit has one, the first"
        )
    return values[min(1, len(values) - 1)] if values else ""


def _reward(config: SessionConfig) -> str:
    """The reward's name; where it is open, the one that fits the source."""
    source = config.data.source
    from_gym = source.startswith("reasoning_gym:") or (not source and config.model.name != TINY)
    return config.reward.name or ("reasoning_gym" if from_gym else "exact")


def _write_reward(config: SessionConfig, backend: str) -> Words:
    if config.reward.weights:
        return []
    name = _reward(config)
    return ["--rm-type", "math"] if name == "math" else ["--custom-rm-path", REWARDS + name]


def _read_reward(given: Given) -> str:
    path = given.text("--custom-rm-path", "")
    if path.startswith(REWARDS):
        return path.removeprefix(REWARDS)
    kind = given.text("--rm-type", "")
    if path or kind not in ("", "math"):
        what = f"--custom-rm-path {path}" if path else f"--rm-type {kind}"
        given.remarks.append(
            f"{what} has no counterpart; reward.name is left open. Built in are exact, number, "
            "math, gsm8k, format and reasoning_gym; a function of your own goes to "
            "RLSession.start(reward=...)"
        )
        return ""
    return kind


def _reward_note(config: SessionConfig, backend: str) -> str:
    if config.reward.weights:
        return "reward.weights: Miles has no sum of rewards; write a function of your own"
    if not config.reward.name:
        return f"left open the kit takes what fits the rows; {_reward(config)} is meant here"
    return ""


PROMPTS = [
    Link(
        "model.name",
        ("--hf-checkpoint",),
        CKPT,
        lambda config, backend: ["--hf-checkpoint", Variable("$MODEL")],
        lambda given: _read_model(given),
        default="required",
        remark="`tiny` is written as the directory it is in",
    ),
    value("model.context_length", "--rollout-max-context-len", ROLLOUT, None),
    Link(
        "data.source",
        ("--prompt-data",),
        ROLLOUT,
        lambda config, backend: ["--prompt-data", Variable("$PROMPT_DATA")],
        lambda given: given.text("--prompt-data", ""),
        _source_note,
        "none",
        "JSONL and Parquet files; slices such as `@[0:1000]` are the same",
    ),
    value("data.input_key", "--input-key", ROLLOUT, "input", explicit=True),
    value("data.label_key", "--label-key", ROLLOUT, None, explicit=True, absent="label"),
    value("data.metadata_key", "--metadata-key", ROLLOUT, "metadata"),
    switch("data.apply_chat_template", "--apply-chat-template", ROLLOUT),
    switch("data.shuffle", "--rollout-shuffle", ROLLOUT),
    Link(
        "seed",
        ("--seed", "--rollout-seed"),
        ROLLOUT,
        lambda c, backend: ["--seed", str(c.seed), "--rollout-seed", str(c.seed)],
        lambda given: given.whole("--seed", 1234),
        default="1234, 42",
        remark="the kit has one seed for both",
    ),
    Link(
        "reward.name",
        ("--rm-type", "--custom-rm-path"),
        ROLLOUT,
        _write_reward,
        _read_reward,
        _reward_note,
        "required",
        f"`math` is Miles' own; the others are `{REWARDS}NAME`, for which the kit has to be "
        "installed where Miles runs",
    ),
    Link(
        "data.eval_source",
        ("--eval-prompt-data",),
        EVAL,
        _write_eval,
        _read_eval,
        _eval_note,
        "none",
        "Miles wants a name before the path",
    ),
]


def _read_model(given: Given) -> str:
    name = given.text("--hf-checkpoint", "")
    return TINY if name.endswith(TINY_DIRECTORY) else name
