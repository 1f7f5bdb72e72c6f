"""Which members of a sweep are not worth going on with, told by their rewards so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kit.errors import RunError

Rewards = Sequence[tuple[int, float]]
"""(step, mean reward) of each training step."""

FEWEST_OTHERS = 3
"""A median of fewer members says little."""


@dataclass(frozen=True, slots=True)
class StopBelow:
    """End a member whose reward at one step is below a bound."""

    reward: float
    step: int

    @classmethod
    def parse(cls, text: str) -> StopBelow:
        """Read `REWARD@STEP`. Raises RunError for anything else."""
        reward, at, step = text.partition("@")
        try:
            if not at:
                raise ValueError(text)
            return cls(float(reward), int(step))
        except ValueError:
            raise RunError(
                f"--stop-below is {text!r}.",
                fix="write REWARD@STEP, such as 0.3@20: less than 0.3 at step 20.",
            ) from None

    def why(self, rewards: Rewards) -> str:
        """Why this member should end; empty where it should not."""
        found = next(((step, value) for step, value in rewards if step >= self.step), None)
        if found is None or found[1] >= self.reward:
            return ""
        return f"reward {found[1]:.3f} at step {found[0]}, below {self.reward:g}"


@dataclass(frozen=True, slots=True)
class StopMedian:
    """End a member whose mean reward so far is below the median of the others' at the same step.

    The rule of Google Vizier (Golovin et al., 2017, section 3.2.2), with the mean in place of the
    best value: the reward of a single step is noise.
    """

    after: int
    """Steps that every member may take first."""

    def why(self, rewards: Rewards, others: Sequence[Rewards]) -> str:
        """Why this member should end; empty where it should not.

        Args:
            rewards: of the member.
            others: of those that run or have run to their end.
        """
        if not rewards or rewards[-1][0] < self.after:
            return ""
        step = rewards[-1][0]
        reached = [_mean_until(other, step) for other in others if other and other[-1][0] >= step]
        if len(reached) < FEWEST_OTHERS:
            return ""
        own, middle = _mean_until(rewards, step), median(reached)
        if own >= middle:
            return ""
        return (
            f"mean reward {own:.3f} until step {step}, below {middle:.3f}, the median of "
            f"{len(reached)} others"
        )


def _mean_until(rewards: Rewards, step: int) -> float:
    return fmean(value for at, value in rewards if at <= step)
