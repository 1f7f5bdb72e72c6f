"""Links of model, prompts, rewards, batches, sampling, evaluation and saving."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from kit.config import SHIPPED, TINY, TINY_MOE, SessionConfig
from kit.data.sources import eval_sources
from kit.errors import ConfigError
from kit.miles.links import (
    CKPT,
    EVAL,
    READ_AS_FLAG,
    ROLLOUT,
    Given,
    Link,
    Variable,
    Words,
    is_flag,
    switch,
    value,
    words_if,
)
from kit.utils.reading import parse_json

KEEPS_DIFFERENT_GROUPS = (
    "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
)
ANY_LENGTH = 1024
"""What the kit takes where the length of a response is left open."""


def _write_batch(config: SessionConfig, backend: str) -> Words:
    if config.training.global_batch_size is None:
        return ["--num-steps-per-rollout", "1"]
    return ["--global-batch-size", str(config.training.global_batch_size)]


def _read_batch(given: Given) -> int | None:
    steps = given.whole("--num-steps-per-rollout", None)
    if steps is None or given.has("--global-batch-size"):
        return given.whole("--global-batch-size", None)
    size = given.whole("--rollout-batch-size", 0) * given.whole("--n-samples-per-prompt", 1)
    return None if steps == 1 else size // max(steps, 1)


def _write_stop(config: SessionConfig, backend: str) -> Words:
    words = [word for word in config.rollout.stop if not _reads_as_flag(word)]
    return words_if(words, "--rollout-stop", *words)


def _reads_as_flag(word: str) -> bool:
    return is_flag(word) or not word


def _stop_note(config: SessionConfig, backend: str) -> str:
    odd = [word for word in config.rollout.stop if _reads_as_flag(word)]
    return f"{odd[0]!r} {READ_AS_FLAG}" if odd else ""


def _read_stop(given: Given) -> tuple[str, ...]:
    stops = tuple(given.all("--rollout-stop"))
    if stops:
        given.remarks.append(
            "--rollout-stop: Miles keeps the string in the text of a response; set "
            "rollout.include_stop_str_in_output: true for rewards that look for it"
        )
    return stops


def _read_stop_tokens(given: Given) -> tuple[int, ...]:
    words = given.all("--rollout-stop-token-ids")
    if odd := [word for word in words if not word.isdecimal()]:
        raise ConfigError(
            f"--rollout-stop-token-ids has {odd[0]!r}.", fix="give it token ids, whole numbers."
        )
    return tuple(map(int, words))


def _read_filter(given: Given) -> bool:
    path = given.text("--dynamic-sampling-filter-path", "")
    if path and path != KEEPS_DIFFERENT_GROUPS:
        given.remarks.append(
            f"--dynamic-sampling-filter-path {path} has no counterpart; "
            "rollout.dynamic_sampling leaves out groups whose rewards are all equal"
        )
    return path == KEEPS_DIFFERENT_GROUPS


ROLLOUTS = [
    value("training.num_rollout", "--num-rollout", ROLLOUT, None, explicit=True, absent=60),
    value(
        "training.rollout_batch_size",
        "--rollout-batch-size",
        ROLLOUT,
        None,
        explicit=True,
        absent=16,
    ),
    value("training.n_samples_per_prompt", "--n-samples-per-prompt", ROLLOUT, 1, explicit=True),
    Link(
        "training.global_batch_size",
        ("--global-batch-size", "--num-steps-per-rollout"),
        ROLLOUT,
        _write_batch,
        _read_batch,
        default="none",
        remark="`null`, the whole rollout, is `--num-steps-per-rollout 1`",
    ),
    value("rollout.temperature", "--rollout-temperature", ROLLOUT, 1.0, explicit=True),
    value(
        "rollout.top_p",
        "--rollout-top-p",
        ROLLOUT,
        1.0,
        remark="below 1 Miles wants a positive top-k too",
    ),
    value("rollout.top_k", "--rollout-top-k", ROLLOUT, -1),
    Link(
        "rollout.max_response_len",
        ("--rollout-max-response-len",),
        ROLLOUT,
        lambda c, backend: [
            "--rollout-max-response-len",
            str(c.rollout.max_response_len or ANY_LENGTH),
        ],
        lambda given: given.whole("--rollout-max-response-len", None),
        lambda c, backend: (
            "" if c.rollout.max_response_len else f"left open it is {ANY_LENGTH} for files"
        ),
        "none",
    ),
    Link(
        "rollout.stop",
        ("--rollout-stop",),
        ROLLOUT,
        _write_stop,
        _read_stop,
        _stop_note,
        "none",
        "Miles keeps the string in the text, as `rollout.include_stop_str_in_output: true` does",
    ),
    Link(
        "rollout.stop_token_ids",
        ("--rollout-stop-token-ids",),
        ROLLOUT,
        lambda c, backend: words_if(
            c.rollout.stop_token_ids, "--rollout-stop-token-ids", *c.rollout.stop_token_ids
        ),
        _read_stop_tokens,
        default="none",
    ),
    switch("rollout.skip_special_tokens", "--rollout-skip-special-tokens", ROLLOUT),
    Link(
        "rollout.dynamic_sampling",
        ("--dynamic-sampling-filter-path",),
        ROLLOUT,
        lambda c, backend: words_if(
            c.rollout.dynamic_sampling, "--dynamic-sampling-filter-path", KEEPS_DIFFERENT_GROUPS
        ),
        _read_filter,
        default="none",
        remark=f"`{KEEPS_DIFFERENT_GROUPS}`",
    ),
    value("rollout.over_sampling_batch_size", "--over-sampling-batch-size", ROLLOUT, None),
    switch("rollout.partial_rollout", "--partial-rollout", ROLLOUT),
    switch(
        "rollout.mask_offpolicy_in_partial_rollout", "--mask-offpolicy-in-partial-rollout", ROLLOUT
    ),
]


EVALUATION = [
    Link(
        "evaluation.interval",
        ("--eval-interval",),
        EVAL,
        lambda c, backend: words_if(
            c.evaluation.interval, "--eval-interval", c.evaluation.interval
        ),
        lambda given: given.whole("--eval-interval", 0),
        default="none",
    ),
    switch("evaluation.skip_eval_before_train", "--skip-eval-before-train", EVAL),
    value("evaluation.n_samples_per_prompt", "--n-samples-per-eval-prompt", EVAL, 1),
    Link(
        "evaluation.temperature",
        ("--eval-temperature",),
        EVAL,
        lambda c, backend: words_if(
            c.evaluation.temperature != c.rollout.temperature,
            "--eval-temperature",
            c.evaluation.temperature,
        ),
        lambda given: given.number(
            "--eval-temperature", given.number("--rollout-temperature", 1.0)
        ),
        default="the rollout's",
    ),
    Link(
        "checkpoint.interval",
        ("--save-interval", "--save"),
        CKPT,
        lambda c, backend: words_if(
            c.checkpoint.interval,
            "--save",
            Variable("$SAVE"),
            "--save-interval",
            c.checkpoint.interval,
        ),
        lambda given: given.whole("--save-interval", 0),
        default="none",
        remark="the kit's own folders say where",
    ),
]

REWARDS = "kit.miles.rewards."
"""The kit's rewards in the form that `--custom-rm-path` takes."""
DIRECTORIES = {TINY: "kit/tiny/model", TINY_MOE: "kit/tiny/moe"}


def is_file(source: str) -> bool:
    """Whether Miles can read this source: a JSONL or Parquet file, or a slice of one."""
    name = source.partition("@[")[0]
    return PurePosixPath(name).suffix in (".jsonl", ".parquet")


def _source_note(config: SessionConfig, backend: str) -> str:
    source = config.data.source
    if is_file(source):
        return ""
    named = f"{source} is" if source else "left open means"
    return f"{named} no file that Miles reads; `--data FOLDER` writes its rows to one"


def _eval_note(config: SessionConfig, backend: str) -> str:
    sources = [str(each.eval_source) for each in eval_sources(config.data).values()]
    source = next((each for each in sources if not is_file(each)), "")
    if all(map(is_file, sources)) or (not source and not config.evaluation.interval):
        return ""
    named = f"{source} is" if source else "the task's own held-out rows are"
    return f"{named} no file that Miles reads; `--data FOLDER` writes the rows to one"


def _write_eval(config: SessionConfig, backend: str) -> Words:
    if not config.data.eval_source and not config.evaluation.interval:
        return []
    words: Words = ["--eval-prompt-data"]
    for number, (given, settings) in enumerate(eval_sources(config.data).items()):
        source = str(settings.eval_source).partition("@[")[0]
        name = given or (PurePosixPath(source).stem.lstrip("-") if is_file(source) else "")
        words += [name or "held_out", Variable(f"$EVAL_DATA{number or ''}")]
    return words


def _read_eval(given: Given) -> str | dict[str, str]:
    values = given.all("--eval-prompt-data")
    if len(values) > 2:
        return dict(zip(values[::2], values[1::2], strict=False))
    return values[min(1, len(values) - 1)] if values else ""


def _reward(config: SessionConfig) -> str:
    """Name of the reward, or of the one that fits the source if the settings leave it open."""
    source = config.data.source
    of_gym = not source and config.model.name not in SHIPPED
    from_gym = source.startswith("reasoning_gym:") or of_gym
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


def _read_template_kwargs(given: Given) -> dict[str, Any]:
    text = given.text("--apply-chat-template-kwargs", "{}")
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"--apply-chat-template-kwargs is {text!r}.", fix="give it an object in JSON."
        )
    return found


def _read_model(given: Given) -> str:
    name = given.text("--hf-checkpoint", "")
    return next((ours for ours, end in DIRECTORIES.items() if name.endswith(end)), name)


PROMPTS = [
    Link(
        "model.name",
        ("--hf-checkpoint",),
        CKPT,
        lambda config, backend: ["--hf-checkpoint", Variable("$MODEL")],
        _read_model,
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
    Link(
        "data.chat_template_kwargs",
        ("--apply-chat-template-kwargs",),
        ROLLOUT,
        lambda c, backend: words_if(
            c.data.chat_template_kwargs,
            "--apply-chat-template-kwargs",
            json.dumps(c.data.chat_template_kwargs),
        ),
        _read_template_kwargs,
        default="{}",
        remark="as JSON",
    ),
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
