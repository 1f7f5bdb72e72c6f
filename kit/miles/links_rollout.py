"""Links of batches, sampling, evaluation and saving."""

from __future__ import annotations

from kit.config import SessionConfig
from kit.miles.given import Given
from kit.miles.links import (
    CKPT,
    EVAL,
    READ_AS_FLAG,
    ROLLOUT,
    Link,
    Variable,
    Words,
    is_flag,
    switch,
    value,
)

KEEPS_DIFFERENT_GROUPS = (
    "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
)
ANY_LENGTH = 1024
"""What the kit takes where the length of a response is left open."""


def _write_batch(config: SessionConfig, backend: str) -> Words:
    batch = config.training.global_batch_size
    return (
        ["--num-steps-per-rollout", "1"] if batch is None else ["--global-batch-size", str(batch)]
    )


def _read_batch(given: Given) -> int | None:
    steps = given.whole("--num-steps-per-rollout", None)
    if steps is None or given.has("--global-batch-size"):
        return given.whole("--global-batch-size", None)
    size = given.whole("--rollout-batch-size", 0) * given.whole("--n-samples-per-prompt", 1)
    return None if steps == 1 else size // max(steps, 1)


def _write_stop(config: SessionConfig, backend: str) -> Words:
    words = [word for word in config.rollout.stop if not _reads_as_flag(word)]
    return ["--rollout-stop", *words] if words else []


def _reads_as_flag(word: str) -> bool:
    return is_flag(word) or not word


def _stop_note(config: SessionConfig, backend: str) -> str:
    odd = [word for word in config.rollout.stop if _reads_as_flag(word)]
    return f"{odd[0]!r} {READ_AS_FLAG}" if odd else ""


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
        lambda given: tuple(given.all("--rollout-stop")),
        _stop_note,
        "none",
    ),
    Link(
        "rollout.dynamic_sampling",
        ("--dynamic-sampling-filter-path",),
        ROLLOUT,
        lambda c, backend: (
            ["--dynamic-sampling-filter-path", KEEPS_DIFFERENT_GROUPS]
            if c.rollout.dynamic_sampling
            else []
        ),
        lambda given: _read_filter(given),
        default="none",
        remark=f"`{KEEPS_DIFFERENT_GROUPS}`",
    ),
    value("rollout.over_sampling_batch_size", "--over-sampling-batch-size", ROLLOUT, None),
    switch("rollout.partial_rollout", "--partial-rollout", ROLLOUT),
    switch(
        "rollout.mask_offpolicy_in_partial_rollout",
        "--mask-offpolicy-in-partial-rollout",
        ROLLOUT,
    ),
]


def _read_filter(given: Given) -> bool:
    path = given.text("--dynamic-sampling-filter-path", "")
    if path and path != KEEPS_DIFFERENT_GROUPS:
        given.remarks.append(
            f"--dynamic-sampling-filter-path {path} has no counterpart; "
            "rollout.dynamic_sampling leaves out groups whose rewards are all equal"
        )
    return path == KEEPS_DIFFERENT_GROUPS


EVALUATION = [
    Link(
        "evaluation.interval",
        ("--eval-interval", "--skip-eval-before-train"),
        EVAL,
        lambda c, backend: (
            ["--eval-interval", str(c.evaluation.interval), "--skip-eval-before-train"]
            if c.evaluation.interval
            else []
        ),
        lambda given: given.whole("--eval-interval", 0),
        default="none",
        remark="`train` evaluates after steps, not before the first one",
    ),
    value("evaluation.n_samples_per_prompt", "--n-samples-per-eval-prompt", EVAL, 1),
    Link(
        "evaluation.temperature",
        ("--eval-temperature",),
        EVAL,
        lambda c, backend: (
            ["--eval-temperature", str(c.evaluation.temperature)]
            if c.evaluation.temperature != c.rollout.temperature
            else []
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
        lambda c, backend: (
            ["--save", Variable("$SAVE"), "--save-interval", str(c.checkpoint.interval)]
            if c.checkpoint.interval
            else []
        ),
        lambda given: given.whole("--save-interval", 0),
        default="none",
        remark="the kit's own folders say where",
    ),
]
