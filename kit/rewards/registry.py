"""The built-in rewards, by name.

exact          the whole response equals the label
number         the last number equals the label's
math           the boxed or final expression equals the label, as mathematics
gsm8k          the number after #### equals the label's
format         reward.format_pattern is found
reasoning_gym  the task's own scorer; may be between 0 and 1
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kit.config import RewardConfig
from kit.errors import ConfigError, RewardError, did_you_mean
from kit.rewards import verifiers
from kit.rewards.grader_process import helper
from kit.samples import Sample

_BY_LABEL: dict[str, Callable[[str, str], float]] = {
    "exact": verifiers.exact,
    "number": verifiers.number,
    "gsm8k": verifiers.gsm8k,
    "math": lambda response, label: _math(response, label),
}
BUILT_IN = (*_BY_LABEL, "format", "reasoning_gym")
"""Every name that `grade` and the settings know."""

_ANSWER_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_BARE_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """One built-in reward or a weighted sum of several; call it with a sample."""

    weights: tuple[tuple[str, float], ...]
    format_pattern: str = ""

    @property
    def name(self) -> str:
        """`math`, or `0.9*math + 0.1*format`."""
        if len(self.weights) == 1 and self.weights[0][1] == 1.0:
            return self.weights[0][0]
        return " + ".join(f"{weight:g}*{name}" for name, weight in self.weights)

    def parts(self, sample: Sample) -> dict[str, float]:
        """Each reward by itself, before weighing. Raises RewardError as `grade` does.

        All but `exact` read the response after the prompt's opening: see `Sample.with_opening`.
        """
        opened = sample.with_opening().response
        return {
            name: grade(
                name,
                sample.response.removeprefix(sample.opening) if name == "exact" else opened,
                sample.label,
                sample.metadata,
                pattern=self.format_pattern,
            )
            for name, _ in self.weights
        }

    def __call__(self, sample: Sample) -> float:
        """The weighted sum of `parts`."""
        parts = self.parts(sample)
        return sum(weight * parts[name] for name, weight in self.weights)


def grade(
    name: str,
    response: str,
    label: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    pattern: str = "",
) -> float:
    """Grade a response with a built-in reward; usually 0 or 1.

    Args:
        name: one of `BUILT_IN`.
        response: what the model wrote. Nonsense is no error; it gets 0.
        label: the right answer. `format` needs none; `reasoning_gym` takes its own.
        metadata: the row's. `reasoning_gym` finds the generated `entry` and `dataset` in it.
        pattern: what `format` looks for; "" takes `metadata["format_pattern"]`.

    Raises RewardError for an unknown name, and for a label or row that cannot be graded against.
    """
    metadata = metadata or {}
    if name == "format":
        looked_for = verifiers.compile_pattern(
            _pattern(pattern or metadata.get("format_pattern", ""))
        )
        return helper.grade("format", response=response, pattern=looked_for.pattern)
    if name == "reasoning_gym":
        return _reasoning_gym(response, label, metadata)
    if name not in _BY_LABEL:
        raise _unknown(name)
    if label is None:
        raise RewardError(
            f"The reward {name!r} compares with a label, and this row has none.",
            fix="set data.label_key to the field that holds the right answer, or choose a reward "
            "that needs none (format, a function of your own).",
        )
    if isinstance(label, (list, dict, bool)):
        raise RewardError(
            f"The reward {name!r} compares with an answer as text, and the label is a "
            f"{type(label).__name__}: {str(label)[:60]}.",
            fix="set data.label_key to the field that holds the answer, such as "
            "`reward_model.ground_truth`, or give a reward function of your own, which gets the "
            "label as it is.",
        )
    return _BY_LABEL[name](response, str(label))


def check(config: RewardConfig) -> None:
    """Raise RewardError or ConfigError for reward settings that cannot work."""
    names = list(config.weights) or ([config.name] if config.name else [])
    for name in names:
        if name not in BUILT_IN:
            raise _unknown(name)
    check_weights(config.weights)
    if "format" in names:
        verifiers.compile_pattern(_pattern(config.format_pattern))
    elif config.format_pattern:
        raise ConfigError(
            f"reward.format_pattern is set to {config.format_pattern!r}, but the reward does not "
            "look at it.",
            fix="set reward.name: format, or give format a weight: {exact: 0.9, format: 0.1}.",
        )


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise RewardError for weights that are no numbers, or all 0."""
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise RewardError(f"The weight of the reward {name} is {weight}.", fix="give a number.")
    if weights and not any(weights.values()):
        raise RewardError(
            "The weights of the rewards are all 0, so every reward would be 0.",
            fix="give at least one a weight, such as {math: 0.9, format: 0.1}.",
        )


def build(config: RewardConfig, default: str) -> BuiltIn:
    """Build the reward that the settings name, or `default`, which fits the data.

    Raises RewardError or ConfigError as `check` does.
    """
    check(config)
    weights = config.weights or {config.name or default: 1.0}
    return BuiltIn(tuple(weights.items()), config.format_pattern)


def of_weights(weights: Mapping[str, float]) -> BuiltIn:
    """Build a weighted sum of built-ins. Raises RewardError as `check` does."""
    if not weights:
        raise RewardError("The mapping of rewards is empty.", fix="write {'exact': 1.0}.")
    return build(RewardConfig(weights=dict(weights)), default="")


def _math(response: str, label: str) -> float:
    # math-verify compares expressions; equal words ("north", \text{north}) are for us to see.
    if verifiers.answer_words(response) == verifiers.answer_words(label) != "":
        return 1.0
    return helper.grade(
        "math", response=verifiers.mathematics(response), label=verifiers.mathematics(label)
    )


def _reasoning_gym(response: str, label: Any, metadata: Mapping[str, Any]) -> float:
    dataset, entry = _entry(label, metadata)
    return helper.grade(
        "reasoning_gym",
        answer=_answer(response, str(entry["answer"])),
        dataset=dataset,
        entry=entry,
    )


def _entry(label: Any, metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find task name and generated row in the metadata.

    They are there as `load_prompts` keeps them, or as reasoning-gym itself gives them: a whole row,
    or a row's own metadata.
    """
    entry = metadata.get("entry")
    if entry is None and "answer" in metadata:
        entry = metadata
    if entry is None and "source_dataset" in metadata:
        entry = {"question": "", "answer": label, "metadata": metadata}
    if isinstance(entry, Mapping) and "answer" in entry:
        own = entry.get("metadata") or {}
        dataset = metadata.get("dataset") or own.get("source_dataset")
        if dataset:
            return str(dataset), dict(entry)
    raise RewardError(
        "The reward 'reasoning_gym' needs the generated row, and this row's metadata lacks it. "
        f"It has: {', '.join(map(str, metadata)) or 'nothing'}.",
        fix="use data.source reasoning_gym:TASK, or put the row under `entry` and the task's "
        "name under `dataset` in the metadata.",
    )


def _answer(response: str, right: str) -> str:
    """Cut the bare answer out of a response.

    Scorers of reasoning-gym expect the bare answer: an <answer> tag or a box says where it is.
    Without either, a question about a number is answered by the last number.
    """
    tags = _ANSWER_TAG.findall(response)
    if tags:
        return str(tags[-1])
    boxed = verifiers.last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    number = verifiers.last_number(response)
    if number is not None and _BARE_NUMBER.fullmatch(right.strip()):
        if number == verifiers.last_number(right):
            return right.strip()
        return str(Decimal(number.numerator) / Decimal(number.denominator))
    return response.strip()


def _pattern(pattern: Any) -> str:
    if not pattern:
        raise RewardError(
            "The reward 'format' has no pattern to look for.",
            fix="set reward.format_pattern to a regular expression, such as "
            r"'<answer>.*</answer>'.",
        )
    return str(pattern)


def _unknown(name: str) -> RewardError:
    return RewardError(
        f"There is no built-in reward {name!r}.",
        fix=f"{did_you_mean(name, BUILT_IN)} A function of your own goes to "
        "RLSession.start(config, reward=my_function), or to score and train.",
    )
