"""Exercises of 04_samples_and_rewards."""

from __future__ import annotations

from collections.abc import Callable

from kit.course.verdict import call, hint, near
from kit.rewards import grade
from kit.samples import Rollout, Sample, Status

LONGEST = 16
"""Characters, of which each is a token of the tiny model."""
STEP = 1.0
"""What the lesson's flawed reward pays for a step."""
HONEST = 4.0
"""What it pays for the right response 3>1>6>8=8."""


def a_response_that_games(answer: object) -> str:
    """Any wrong text with five steps or more, such as `1>1>1>1>1>1>1>1`."""
    if not isinstance(answer, str):
        return "Give a response as a string."
    if len(answer) > LONGEST:
        return f"It has {len(answer)} characters; the engine cuts at {LONGEST}."
    if grade("number", answer, "8") == 1.0:
        return f"The last number of {answer!r} is 8, so it is right. A wrong one is asked for."
    steps = answer.count(">")
    if STEP * steps <= HONEST:
        return f"It has {steps} steps, which are worth {STEP * steps:g}: not more than {HONEST:g}."
    return ""


def reward_for_the_finished(answer: object) -> str:
    """`grade("number", ...)` where the status is COMPLETED, otherwise 0."""
    cases = [
        ("3>1>6>8=8", Status.COMPLETED, 1.0, "a right, finished response"),
        ("=4", Status.COMPLETED, 0.0, "a wrong one"),
        ("3>1>6>8", Status.TRUNCATED, 0.0, "one that was cut, though it ends in 8"),
        ("", Status.COMPLETED, 0.0, "an empty one"),
        ("8>8=1", Status.COMPLETED, 0.0, "one that has the 8 in the wrong place"),
    ]
    for response, status, right, words in cases:
        sample = Sample(prompt="(3+8+5+2)%10=", response=response, label="8", status=status)
        given = call(answer, sample)
        if not near(given, right):
            return f"{response!r} ({words}) should get {right:g}, and yours gives {given!r}."
    return ""


def wrong_but_preferred(answer: object, rollout: Rollout, reward: Callable[[Sample], float]) -> str:
    """Wrong samples whose reward is above that of a right answer to the same question."""
    count = beaten = wrong = 0
    for group in rollout.groups():
        right = [s for s in group if grade("number", s.response, s.label)]
        others = [s for s in group if not grade("number", s.response, s.label)]
        lowest = min((reward(s) for s in right), default=float("inf"))
        count += sum(reward(s) > lowest for s in others)
        highest = max((reward(s) for s in others), default=float("-inf"))
        beaten += sum(reward(s) < highest for s in right)
        wrong += len(others)
    return hint(
        answer,
        count,
        {
            "Those are the right ones that lose to a wrong one. Count the wrong ones.": beaten,
            "Those are all wrong samples. Some have no right sibling to be compared with.": wrong,
        },
        tolerance=0.0,
    )


EXERCISES = (a_response_that_games, reward_for_the_finished, wrong_but_preferred)
