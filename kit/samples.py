"""What a generation is: `Sample`, one response; `Rollout`, all responses of one step.

Field names are those of Miles, so that a saved rollout reads the same in both.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from kit.errors import DataError

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

    def __post_init__(self) -> None:
        lengths = self.version_lengths
        if lengths and (
            len(lengths) != len(self.weight_versions)
            or min(lengths) < 1
            or sum(lengths) != self.response_length
        ):
            raise DataError(
                f"version_lengths {lengths} does not part {self.response_length} response tokens "
                f"among the weight_versions {self.weight_versions}.",
                fix="give one length of 1 or more for each version, together response_length; or "
                "leave version_lengths empty where one version wrote all.",
            )

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
        )

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
    """How long generating took."""
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

    def failed(self) -> list[Sample]:
        """The samples whose reward could not be computed; each one's `error` says why."""
        return [s for s in self.samples if s.status is Status.FAILED]

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
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": s.group_index,
                    "index": s.index,
                    "prompt": s.prompt_text,
                    "response": s.response,
                    "label": s.label,
                    "reward": s.reward,
                    "length": s.response_length,
                    "status": s.status.value,
                    "error": s.error,
                }
                for s in self.samples
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Write one JSON line a sample."""
        target = Path(path)
        with target.open("w", encoding="utf-8") as file:
            for sample in self.samples:
                file.write(json.dumps(sample.to_dict()) + "\n")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Rollout:
        """Read what `save` wrote. Raises DataError with the number of a line that is broken."""
        samples = []
        with Path(path).open("rb") as file:  # so that a line of other bytes is found out by number
            for number, line in enumerate(file, start=1):
                try:
                    samples.append(Sample.from_dict(json.loads(line)))
                except (ValueError, TypeError, DataError) as error:
                    raise DataError(f"{path}, line {number}: not a sample: {error}") from error
        return cls(samples)

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
        if len(self.samples) != len(self.advantages):
            raise DataError(
                f"A batch needs one advantage per sample: got {len(self.samples)} samples and "
                f"{len(self.advantages)} advantages."
            )
        for name in ("token_advantages", "values", "returns"):
            rows = getattr(self, name)
            lengths = [s.response_length for s in self.samples]
            if rows is not None and [len(row) for row in rows] != lengths:
                raise DataError(
                    f"{name} needs one number for each response token of each sample: got "
                    f"{[len(row) for row in rows][:8]}, the responses have {lengths[:8]} tokens."
                )

    def __len__(self) -> int:
        return len(self.samples)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_batch

        return show_batch(self)
