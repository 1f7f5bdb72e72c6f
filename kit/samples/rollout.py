"""`Rollout`, all samples of one step; `Batch`, what an update trains on."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import DataError
from kit.samples.sample import Sample, Status
from kit.utils.display import Picture, Shown, pictures
from kit.utils.formatting import mean

NEW_TOKENS = "rollout/new_tokens"


@dataclass(frozen=True, slots=True)
class Rollout(Shown, Sequence[Sample]):
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
        """Copy with other samples."""
        return Rollout(samples, self.step, self.seconds, self.metrics, self.notes)

    @property
    def new_tokens(self) -> int:
        """Number of response tokens generated for it, also those of groups that were dropped."""
        return int(self.metrics.get(NEW_TOKENS, sum(s.response_length for s in self.samples)))

    def rewards(self) -> list[float]:
        """The rewards of all samples that have one."""
        return [s.reward for s in self.samples if s.reward is not None]

    def mean_reward(self) -> float:
        """Mean over the samples that have a reward; NaN before `score`."""
        return mean(self.rewards())

    def part_names(self) -> list[str]:
        """Names of the rewards' parts, in the order in which samples have them."""
        return list(dict.fromkeys(name for s in self.samples for name in s.reward_parts))

    def mean_parts(self) -> dict[str, float]:
        """Mean of each part of the rewards, over the samples that have it."""
        return {
            name: mean([s.reward_parts[name] for s in self.samples if name in s.reward_parts])
            for name in self.part_names()
        }

    def best(self) -> Sample:
        """The sample with the highest reward. Raises DataError before `score`."""
        return max(self._scored(), key=lambda s: s.reward or 0.0)

    def worst(self) -> Sample:
        """The sample with the lowest reward. Raises DataError before `score`."""
        return min(self._scored(), key=lambda s: s.reward or 0.0)

    def written_by(self, versions: set[int]) -> bool:
        """Whether only these weight versions wrote it."""
        return {v for s in self.samples for v in s.weight_versions} <= versions

    def of_version(self, version: int) -> Rollout:
        """Rollout of the samples that these weights alone generated."""
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
        return pictures().browse(self, labels)

    def experts(self) -> Picture:
        """How often each expert of a mixture was taken, layer by layer.

        After `session.annotate`, also for how many tokens the trainer would choose others.

        Raises:
            DataError: the engine recorded no experts.
        """
        drawn: Picture = pictures().show_experts(self)
        return drawn

    def to_pandas(self) -> Any:
        """One row a sample, with the columns a person sorts by."""
        from kit.samples.serialization import sample_table

        return sample_table(self)

    def save(self, path: str | Path) -> Path:
        """Write one JSON line a sample."""
        from kit.samples.serialization import write_rollout

        return write_rollout(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Rollout:
        """Read what `save` wrote. Raises DataError with the number of a line that is broken."""
        from kit.samples.serialization import read_rollout

        return read_rollout(path)


@dataclass(frozen=True, slots=True)
class Batch(Shown):
    """Input of an update: the samples that train, and the advantage of each.

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
        lengths = [s.response_length for s in self.samples]
        for name in ("token_advantages", "values", "returns"):
            rows = getattr(self, name)
            if rows is not None and [len(row) for row in rows] != lengths:
                raise DataError(
                    f"{name} needs one number for each response token of each sample: got "
                    f"{[len(row) for row in rows][:8]}, the responses have {lengths[:8]} tokens."
                )

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

    def source(self, last: Rollout | None) -> Rollout:
        """Rollout that it was made from: the last one, if all of that is in here or left out.

        Else its own samples as a rollout, of which no times are known.
        """
        if last is not None and last.step == self.step:
            mine = {(s.group_index, s.index) for s in self.samples}
            groups = {s.group_index for s in self.samples}
            there = [s for s in last if s.group_index in groups and s.response_length]
            whole = len(groups) + len(self.left_out) == len(last.groups())
            if whole and mine == {(s.group_index, s.index) for s in there}:
                return last
        return Rollout(self.samples, self.step)
