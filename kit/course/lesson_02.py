"""Exercises of 02_train_to_solve."""

from __future__ import annotations

import math

from kit.course.verdict import hint
from kit.reports import EvalReport, TrainReport

GOOD = 0.8


def first_good_step(answer: object, training: TrainReport) -> str:
    """The first step whose mean reward is 0.8 or more, counted from 0; -1 where there is none."""
    curve = training.curve("rollout/raw_reward")
    good = [step for step, reward in enumerate(curve) if reward >= GOOD]
    first = good[0] if good else -1
    late = {"Steps count from 0, so the first of the curve is step 0.": first + 1}
    return hint(answer, first, late if good else {}, tolerance=0.0)


def newly_right(answer: object, before: EvalReport, after: EvalReport) -> str:
    """Questions that were answered wrong before training and right after it."""
    pairs = list(zip(before.rollout, after.rollout, strict=True))
    gained = sum(not old.reward and bool(new.reward) for old, new in pairs)
    lost = sum(bool(old.reward) and not new.reward for old, new in pairs)
    right_after = sum(bool(new.reward) for _, new in pairs)
    return hint(
        answer,
        gained,
        {
            "Those went the other way: right before, wrong after.": lost,
            "Those are all that are right now. Leave out what was right before.": right_after,
            "That is the difference of the two totals. Some that were right may "
            "have become wrong; count the newly right ones alone.": gained - lost,
        },
        tolerance=0.0,
    )


def standard_error(answer: object, before: EvalReport) -> str:
    """sqrt(p (1 - p) / n), with p the accuracy and n the number of questions."""
    share, n = before.mean_reward, before.prompts
    right = math.sqrt(share * (1 - share) / n)
    return hint(
        answer,
        right,
        {
            "That is in percent. Give the share: one percent is 0.01.": 100 * right,
            "That is the variance of the mean. Take its square root.": share * (1 - share) / n,
            "That is the spread of one answer. The mean of n "
            "answers is surer: divide by n under the root.": math.sqrt(share * (1 - share)),
        },
        tolerance=max(right * 0.02, 1e-6),
    )


EXERCISES = (first_good_step, newly_right, standard_error)
