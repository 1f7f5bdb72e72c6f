"""What a reward is made of, and how its functions are called.

A function of one sample has one parameter; one of all samples calls it `samples`. Functions written
for other libraries are called by the names of their parameters:

    TRL       f(prompts, completions, **columns)                       all samples, lists
    verl      f(data_source, solution_str, ground_truth, extra_info)   one sample
    slime     f(args, sample), f(args, samples)                        and Miles
    by name   f(response, label), f(response, metadata), ...           one sample

Any other name is a column of the data: a key of the sample's metadata.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kit.errors import RewardError, did_you_mean
from kit.rewards.outcomes import code_owner, describe, function_name
from kit.rewards.registry import BUILT_IN, BuiltIn, check_weights, of_weights
from kit.samples import Sample

One: TypeAlias = str | Callable[..., Any]
Reward: TypeAlias = (
    One
    | Mapping[str, float | One | tuple[One, float] | tuple[float, One]]
    | Sequence[One | tuple[One, float] | tuple[float, One]]
)
"""A built-in's name or a function; or several, by name or as a list, with weights."""

_BATCH_NAMES = ("samples", "rollout", "batch")
_BATCH_TYPES = ("list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Rollout")
_TEXTS = ("response", "completion", "solution_str", "response_str")
_COLUMNS_FIRST = ("answer", "solution", "target")
"""Names of the right answer, which may as well be another column than `data.label_key`."""
_LABELS = ("label", "ground_truth", *_COLUMNS_FIRST)


@dataclass(frozen=True, slots=True)
class Part:
    """One function of a reward, with its weight in the sum."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


def reward_parts(reward: Reward) -> tuple[Part, ...]:
    """The functions that a reward is the weighted sum of; one where it is a function or a name.

    Raises RewardError for what cannot be a reward.
    """
    if isinstance(reward, BuiltIn):
        return _of_built_in(reward)
    if isinstance(reward, str):
        return _of_built_in(of_weights({reward: 1.0}))
    if callable(reward):
        return (Part(function_name(reward), reward),)
    if isinstance(reward, Mapping):
        pairs = [(str(name), *_weighed(value, str(name))) for name, value in reward.items()]
    elif isinstance(reward, Sequence):
        pairs = [("", *_weighed(value, "")) for value in reward]
    else:
        raise _no_reward(reward)
    if not pairs:
        raise RewardError(
            f"The {type(reward).__name__} of rewards is empty.", fix="write {'exact': 1.0}."
        )
    parts = [Part(name or reward_name(one), _function(one), weight) for name, one, weight in pairs]
    check_weights({part.name: part.weight for part in parts})
    repeated = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if repeated:
        raise RewardError(
            f"Two rewards of the list are called {repeated[0]!r}.",
            fix="give them names of their own: {'first': one, 'second': another}.",
        )
    return tuple(parts)


def check_reward(reward: Reward) -> None:
    """Raise RewardError for a reward that could not be called."""
    for part in reward_parts(reward):
        Form.of(part.function)


def reward_name(reward: Reward) -> str:
    """Name of a reward: `exact`, `0.9*math + 0.1*short`, a function's or class's name."""
    parts = reward_parts(reward)
    if len(parts) == 1 and parts[0].weight == 1.0:
        return parts[0].name
    return " + ".join(f"{part.weight:g}*{part.name}" for part in parts)


def _of_built_in(reward: BuiltIn) -> tuple[Part, ...]:
    return tuple(
        Part(name, BuiltIn(((name, 1.0),), reward.format_pattern), weight)
        for name, weight in reward.weights
    )


def _weighed(value: Any, name: str) -> tuple[One, float]:
    """The reward and its weight in `0.5`, `f`, `(f, 0.5)` and `(0.5, f)`."""
    if _is_weight(value) and name:
        if name not in BUILT_IN:
            raise RewardError(
                f"There is no built-in reward {name!r} to give the weight {value}.",
                fix=f"{did_you_mean(name, BUILT_IN)} A function of your own goes beside its "
                f"weight: {{{name!r}: (my_function, {value})}}.",
            )
        return name, float(value)
    if isinstance(value, tuple) and len(value) == 2 and any(map(_is_weight, value)):
        one, weight = value if _is_weight(value[1]) else value[::-1]
        return one, float(weight)
    return value, 1.0


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _function(reward: Any) -> Callable[..., Any]:
    if isinstance(reward, str):
        return of_weights({reward: 1.0})
    if not callable(reward):
        raise _no_reward(reward)
    function: Callable[..., Any] = reward
    return function


def _no_reward(value: Any) -> RewardError:
    return RewardError(
        f"A reward cannot be {describe(value)}.",
        fix="give a built-in's name ('exact'), a function of a sample, or several with weights: "
        "{'math': 0.9, 'short': (my_function, 0.1)}.",
    )


@dataclass(frozen=True, slots=True)
class Form:
    """How a function is called."""

    whole: bool
    """With all samples at once."""
    awaits: bool
    """Calling it gives something to await."""
    names: tuple[str, ...] | None = None
    """Its parameters, where they are filled by name; None passes one argument."""
    columns: bool = False
    """Whether it takes all columns of the data besides (`**columns`)."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Form:
        """Form of a function, by its signature. Raises RewardError if it has none that is known."""
        awaits = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            code_owner(function)
        )
        if inspect.isclass(function):
            raise RewardError(
                f"The reward {function.__name__} is a class, and calling it makes an object.",
                fix=f"give an object of it, {function.__name__}(...), with a method __call__.",
            )
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions written in C have none
            return cls(False, awaits)
        parameters = signature.parameters.values()
        columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = {p.name for p in named if p.default is p.empty}
        whole = bool(names & _ALL.keys())
        known = _ALL if whole else _ONE
        by_name = tuple(p.name for p in named if p.name in names or p.name in known)
        try:
            signature.bind(None)
        except TypeError:
            if not names & known.keys() or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
                raise _unknown_form(signature) from None
            return cls(whole, awaits, by_name, columns and whole)
        first = next(iter(parameters))
        kind = _type_name(first.annotation)
        if first.name in ("prompts", "completions", *_TEXTS) and kind != "Sample":
            return cls(whole, awaits, by_name, columns and whole)
        batch = first.name in _BATCH_NAMES or kind in _BATCH_TYPES
        return cls(batch, awaits)

    def bind(self, function: Callable[..., Any]) -> Callable[[Any], Any]:
        """The function as one of a sample, or of a list of samples."""
        names = self.names
        if names is None:
            return function
        if not self.whole:
            return lambda sample: function(**{name: _one(sample, name) for name in names})
        return lambda samples: function(
            **{name: _all(samples, name) for name in (*names, *self._more(samples))}
        )

    def _more(self, samples: list[Sample]) -> Iterator[str]:
        if self.columns:
            found = dict.fromkeys(key for sample in samples for key in sample.metadata)
            for name in (*found, "label"):
                if name not in (self.names or ()) and name.isidentifier() and name not in _ALL:
                    yield name


class _NoArguments:
    """In the place of slime's and Miles' `args`, which the kit does not have."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the kit has no args.{name}: write the value into the function, or bind it with "
            "functools.partial"
        )


_ARGUMENTS = _NoArguments()
_ONE: dict[str, Callable[[Sample], Any]] = {
    "args": lambda sample: _ARGUMENTS,
    "sample": lambda sample: sample,
    "prompt": lambda sample: sample.prompt,
    "question": lambda sample: sample.prompt_text,
    "metadata": lambda sample: sample.metadata,
    "extra_info": lambda sample: sample.metadata.get("extra_info", sample.metadata),
    "data_source": lambda sample: sample.metadata.get("data_source", ""),
    **dict.fromkeys(_TEXTS, lambda sample: sample.response),
    **dict.fromkeys(_LABELS, lambda sample: sample.label),
}
_ALL: dict[str, Callable[[list[Sample]], Any]] = {
    **dict.fromkeys(_BATCH_NAMES, lambda samples: samples),
    "prompts": lambda samples: [sample.prompt for sample in samples],
    "completions": lambda samples: [_completion(sample) for sample in samples],
    "completion_ids": lambda samples: [sample.response_tokens for sample in samples],
    "prompt_ids": lambda samples: [sample.prompt_tokens for sample in samples],
}


def _one(sample: Sample, name: str) -> Any:
    """Value of a parameter: what the name stands for, or a column of the data."""
    if name in sample.metadata and (name not in _ONE or name in _COLUMNS_FIRST):
        return sample.metadata[name]
    if name in _ONE:
        return _ONE[name](sample)
    raise RewardError(
        f"The reward function has a parameter {name!r}, and the row's metadata no such key.",
        fix=f"{did_you_mean(name, [*_ONE, *map(str, sample.metadata)])} Columns of the data are "
        "in the field that data.metadata_key names.",
    )


def _all(samples: list[Sample], name: str) -> Any:
    if name in _ALL:
        return _ALL[name](samples)
    if name == "args":
        return _ARGUMENTS
    if name not in _ONE and any(name in sample.metadata for sample in samples):
        return [sample.metadata.get(name) for sample in samples]
    return [_one(sample, name) for sample in samples]


def _completion(sample: Sample) -> Any:
    """As TRL has it: text, or an assistant's message where the prompt is a list of messages."""
    if isinstance(sample.prompt, str):
        return sample.response
    return [{"role": "assistant", "content": sample.response}]


def _unknown_form(signature: inspect.Signature) -> RewardError:
    return RewardError(
        f"The reward function takes {signature}, and nothing says what it wants.",
        fix="write `def reward(sample): ...` for one sample at a time, or `def reward(samples): "
        "...` for all at once; sample.response, sample.label and sample.metadata hold the rest. "
        f"Or name its parameters: {', '.join([*_ONE, *_ALL])}, or as columns of the data.",
    )


def _type_name(annotation: Any) -> str:
    """`Sequence` for Sequence[Sample], typing.Sequence and the text "Sequence[Sample]"."""
    if not isinstance(annotation, str):
        annotation = getattr(annotation, "__name__", str(annotation))
    return str(annotation).partition("[")[0].rpartition(".")[2]
