"""What a generation is: `Sample`, one response; `Rollout`, all responses of one step.

Field names are those of Miles, so that a saved rollout reads the same in both.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit import token_values as by_token
from kit.errors import DataError
from kit.sample_checks import check_batch, check_sample

if TYPE_CHECKING:
    from kit.viz.html import Picture

Messages = list[dict[str, str]]
NEW_TOKENS = "rollout/new_tokens"


class Status(StrEnum):
    """How far a sample came."""

    PENDING = "pending"
    """Not generated yet."""
    COMPLETED = "completed"
    """The model ended its response itself (end-of-sequence token or stop string)."""
    TRUNCATED = "truncated"
    """Cut at the length limit."""
    ABORTED = "aborted"
    """Stopped from outside; the tokens so far are kept."""
    FAILED = "failed"
    """The reward function failed on it; `error` says how. Its group is left out of the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response to one prompt, with everything that training needs to know about it."""

    group_index: int = 0
    """Samples of the same prompt share it."""
    index: int = 0
    """Position in the rollout."""
    prompt: str | Messages = ""
    """The prompt as the data gave it: a string, or chat messages."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and response token ids, in one list."""
    response: str = ""
    response_length: int = 0
    """Response tokens; the last so many of `tokens`."""
    label: str | None = None
    """The right answer, where the data has one."""
    reward: float | None = None
    loss_mask: list[int] | None = None
    """One 0 or 1 per response token; None means that all are trained on."""
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    rollout_log_probs: list[float] | None = None
    """The engine's log-probability of each response token, at the sampling temperature."""
    rollout_routed_experts: Any = None
    weight_versions: list[int] = field(default_factory=list)
    """Which trainer weights wrote it, one entry per span of response tokens."""
    version_lengths: list[int] = field(default_factory=list)
    """Response tokens of each span; empty where one version wrote them all."""
    error: str | None = None
    """Why the reward function failed, in its own words."""
    token_values: dict[str, list[float]] = field(default_factory=dict)
    """What is known of each response token (`kit.token_values`), as `session.annotate` fills in."""
    annotated_versions: list[int] = field(default_factory=list)
    """Weight versions of `trainer_log_prob_before`, where known, and of `trainer_log_prob`."""

    def __post_init__(self) -> None:
        check_sample(self)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(weight version, response tokens it wrote), in order; empty where that is unknown."""
        if self.version_lengths:
            return list(zip(self.weight_versions, self.version_lengths, strict=True))
        if len(self.weight_versions) == 1 and self.response_length:
            return [(self.weight_versions[0], self.response_length)]
        return []

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt's token ids."""
        return self.tokens[: len(self.tokens) - self.response_length]

    @property
    def response_tokens(self) -> list[int]:
        """The response's token ids."""
        return self.tokens[len(self.tokens) - self.response_length :]

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it: chat messages joined by newlines."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message.get("content", "")) for message in self.prompt)

    @property
    def mask(self) -> list[int]:
        """The loss mask, written out: one 0 or 1 per response token."""
        return [1] * self.response_length if self.loss_mask is None else self.loss_mask

    @property
    def advantage(self) -> float | None:
        """The mean over the tokens that train; None where it is not among `token_values`."""
        values = self.token_values.get("advantage")
        return None if values is None else by_token.trained_mean(values, self.mask)

    def strip(self, quantity: str | None = None, start: int = 0) -> Picture:
        """Every response token, coloured by a quantity that is known of it.

        Args:
            quantity: one of `kit.token_values.QUANTITIES`, such as `entropy` or `change`, or a
                name of your own in `token_values`; None takes the most telling one.
            start: the first token drawn, for responses longer than one strip.

        Raises:
            DataError: it is not known of this sample; the message says what to call.
        """
        from kit.viz.strips import show_strip

        return show_strip(self, quantity, start)

    def to_pandas(self) -> Any:
        """One row a response token, with a column for each quantity that is known."""
        from kit.rollout_files import token_table

        return token_table(self)

    def continued(
        self, tokens: Sequence[int], log_probs: Sequence[float], weight_version: int
    ) -> Sample:
        """The same sample with further response tokens, which these weights wrote.

        Raises:
            DataError: it has tokens of which nobody knows who wrote them.
        """
        spans = self.spans
        if self.response_length and not (spans and self.rollout_log_probs):
            raise DataError(
                "A sample without log-probs or weight versions cannot be continued.",
                why=f"Its {self.response_length} response tokens were not written by the engine.",
                fix="generate it anew.",
            )
        if tokens and spans and spans[-1][0] == weight_version:
            spans[-1] = (weight_version, spans[-1][1] + len(tokens))
        elif tokens:
            spans.append((weight_version, len(tokens)))
        return replace(
            self,
            tokens=[*self.tokens, *tokens],
            response_length=self.response_length + len(tokens),
            loss_mask=None if self.loss_mask is None else [*self.loss_mask, *[1] * len(tokens)],
            rollout_log_probs=[*(self.rollout_log_probs or ()), *log_probs],
            weight_versions=[version for version, _ in spans] or [weight_version],
            version_lengths=[length for _, length in spans] if len(spans) > 1 else [],
            token_values={},
            annotated_versions=[],
        )

    def masked_to(self, weight_version: int) -> Sample:
        """The same sample, with only what these weights wrote left to train on."""
        if all(version == weight_version for version, _ in self.spans):
            return self
        own = [version == weight_version for version, length in self.spans for _ in range(length)]
        kept = [mask * mine for mask, mine in zip(self.mask, own, strict=True)]
        return replace(self, loss_mask=kept)

    def unwritten(self) -> Sample:
        """The same sample before anything was written: its prompt alone."""
        return replace(
            self,
            tokens=self.prompt_tokens,
            response="",
            response_length=0,
            reward=None,
            loss_mask=None,
            status=Status.PENDING,
            rollout_log_probs=None,
            weight_versions=[],
            version_lengths=[],
            error=None,
            token_values={},
            annotated_versions=[],
        )

    def with_values(self, **values: Sequence[float]) -> Sample:
        """The same sample with these `token_values` beside those it has."""
        new = {name: list(row) for name, row in values.items()}
        return replace(self, token_values=self.token_values | new)

    def with_reward(self, reward: float) -> Sample:
        """The same sample with its reward."""
        return replace(self, reward=reward, error=None)

    def with_failure(self, error: str) -> Sample:
        """The same sample, marked: its reward could not be computed."""
        return replace(self, reward=None, status=Status.FAILED, error=error)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as `save` writes them."""
        return asdict(self) | {"status": self.status.value}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        """The inverse of `to_dict`. Raises DataError for a field that a sample does not have."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(row) - known)
        if unknown:
            raise DataError(
                f"A sample has no field {unknown[0]!r}.",
                fix=f"Keep only: {', '.join(sorted(known))}.",
            )
        return cls(**dict(row) | {"status": Status(row.get("status", "pending"))})

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_sample

        return show_sample(self)


@dataclass(frozen=True, slots=True)
class Rollout(Sequence[Sample]):
    """The samples of one `generate`, in groups of the same prompt. Shows itself as a table."""

    samples: tuple[Sample, ...]
    step: int = 0
    """The training step whose weights wrote it."""
    seconds: float = 0.0
    """Until the last response was written; what is scored meanwhile costs nothing of it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the rollout policies did (aborted, dropped, continued), under Miles' names."""
    notes: tuple[str, ...] = ()
    """What is to know before training on it, such as why it is smaller than configured."""

    def __init__(
        self,
        samples: Iterable[Sample],
        step: int = 0,
        seconds: float = 0.0,
        metrics: Mapping[str, float] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        object.__setattr__(self, "samples", tuple(samples))
        object.__setattr__(self, "step", step)
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "metrics", dict(metrics or {}))
        object.__setattr__(self, "notes", tuple(notes))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        """One sample, or with a slice a smaller rollout."""
        if isinstance(index, slice):
            return Rollout(self.samples[index], self.step, self.seconds)
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def groups(self) -> list[list[Sample]]:
        """The samples by prompt, in the order of their first sample."""
        by_prompt: dict[int, list[Sample]] = {}
        for sample in self.samples:
            by_prompt.setdefault(sample.group_index, []).append(sample)
        return list(by_prompt.values())

    def with_samples(self, samples: Iterable[Sample]) -> Rollout:
        """The same rollout with other samples."""
        return Rollout(samples, self.step, self.seconds, self.metrics, self.notes)

    @property
    def new_tokens(self) -> int:
        """Response tokens that were written for it, those of groups that are not in it included."""
        return int(self.metrics.get(NEW_TOKENS, sum(s.response_length for s in self.samples)))

    def rewards(self) -> list[float]:
        """The rewards of all samples that have one."""
        return [s.reward for s in self.samples if s.reward is not None]

    def mean_reward(self) -> float:
        """Mean over the samples that have a reward; NaN before `score`."""
        rewards = self.rewards()
        return sum(rewards) / len(rewards) if rewards else math.nan

    def best(self) -> Sample:
        """The sample with the highest reward. Raises DataError before `score`."""
        return max(self._scored(), key=lambda s: s.reward or 0.0)

    def worst(self) -> Sample:
        """The sample with the lowest reward. Raises DataError before `score`."""
        return min(self._scored(), key=lambda s: s.reward or 0.0)

    def written_by(self, versions: set[int]) -> bool:
        """Did only these weight versions write it?"""
        return {v for s in self.samples for v in s.weight_versions} <= versions

    def of_version(self, version: int) -> Rollout:
        """Only the samples that these weights alone wrote."""
        return self.with_samples(s for s in self.samples if set(s.weight_versions) <= {version})

    def failed(self) -> Rollout:
        """The samples whose reward could not be computed; each one's `error` says why."""
        return Rollout((s for s in self if s.status is Status.FAILED), self.step)

    def _scored(self) -> list[Sample]:
        scored = [s for s in self.samples if s.reward is not None]
        if not scored:
            raise DataError(
                f"None of the {len(self.samples)} samples has a reward.",
                fix="call `rollout = session.score(rollout)` first.",
            )
        return scored

    def browse(self, labels: Sequence[str] = ("good", "bad", "odd")) -> Any:
        """Look through the samples in a notebook: filter, sort, step, mark with these labels."""
        from kit.viz.browser import SampleBrowser

        return SampleBrowser(self, labels)

    def to_pandas(self) -> Any:
        """One row a sample, with the columns a person sorts by."""
        from kit.rollout_files import sample_table

        return sample_table(self)

    def save(self, path: str | Path) -> Path:
        """Write one JSON line a sample."""
        from kit.rollout_files import write

        return write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Rollout:
        """Read what `save` wrote. Raises DataError with the number of a line that is broken."""
        from kit.rollout_files import read

        return read(path)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_rollout

        return show_rollout(self)


@dataclass(frozen=True, slots=True)
class Batch:
    """What an update will see: the samples that train, and the advantage of each.

    Failed samples and their groups are already left out; `left_out` says which and why.
    """

    samples: tuple[Sample, ...]
    advantages: tuple[float, ...]
    """One a sample (shape N); every trained token of a sample carries it. Where the tokens have
    their own, their mean."""
    step: int = 0
    left_out: tuple[str, ...] = ()
    token_advantages: tuple[tuple[float, ...], ...] | None = None
    """One a response token, for estimators that tell the tokens of a sample apart."""
    values: tuple[tuple[float, ...], ...] | None = None
    """PPO: what the critic expected before each response token."""
    returns: tuple[tuple[float, ...], ...] | None = None
    """PPO: what the critic should have expected."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """An update remembers it: the same batch cannot be applied twice in a row by mistake."""

    def __post_init__(self) -> None:
        check_batch(self)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def rollout(self) -> Rollout:
        """The samples as a rollout, each token with its advantage."""
        rows = self.token_advantages
        every = enumerate(zip(self.samples, self.advantages, strict=True))
        return Rollout(
            (
                s.with_values(advantage=rows[i] if rows else [value] * s.response_length)
                for i, (s, value) in every
            ),
            self.step,
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_batch

        return show_batch(self)
