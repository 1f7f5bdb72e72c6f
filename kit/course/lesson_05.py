"""Exercises of 05_estimators."""

from __future__ import annotations

from kit.course.verdict import call, hint, near

_CASES = (
    "ratio 1.5, advantage +1",
    "ratio 1.5, advantage -1",
    "ratio 0.5, advantage +1",
    "ratio 0.5, advantage -1",
)
_GRADIENT = (False, True, True, False)


def leave_one_out(answer: object) -> str:
    """1 - (0 + 0 + 1) / 3 = 0.667."""
    return hint(
        answer,
        2 / 3,
        {
            "That compares with the mean of all four, as Dr. GRPO does. RLOO leaves the "
            "answer itself out of the mean.": 0.5,
            "That is the advantage of a wrong answer.": -2 / 3,
            "That is the mean of the other three. Subtract it from the reward.": 1 / 3,
            "That is GRPO's: minus the mean, divided by the deviation.": 0.8660,
        },
    )


def who_still_learns(answer: object) -> str:
    """[False, True, True, False]: flat only where it has gone far enough in the right direction."""
    if not isinstance(answer, (list, tuple)) or len(answer) != len(_CASES):
        return "Give a list of four: True where there is a gradient, False where the loss is flat."
    if any(given is ... for given in answer):
        return "Some of the four are still open."
    for given, right, words in zip(answer, _GRADIENT, _CASES, strict=True):
        if bool(given) is not right:
            why = (
                "it has gone the wrong way, and must be able to come back"
                if right
                else "it has gone far enough where it should go, and the clip stops it"
            )
            return f"{words}: think again; {why}."
    return ""


def group_advantages(answer: object) -> str:
    """Reward minus mean, divided by the deviation with n - 1; all 0 where that is 0."""
    cases = [
        ([1.0, 0.0, 0.0, 0.0], [1.5, -0.5, -0.5, -0.5]),
        ([1.0, 1.0, 0.0, 0.0], [0.866, 0.866, -0.866, -0.866]),
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
    ]
    for rewards, right in cases:
        given = [float(value) for value in call(answer, list(rewards))]
        if len(given) != len(right):
            return f"{rewards} has {len(right)} rewards, and yours gives {len(given)} advantages."
        if not all(map(near, given, right)):
            shown = [round(value, 3) for value in given]
            return f"{rewards} should give {right}, and yours gives {shown}.{_why(given, rewards)}"
    return ""


def _why(given: list[float], rewards: list[float]) -> str:
    mean = sum(rewards) / len(rewards)
    if all(map(near, given, [r - mean for r in rewards])):
        return " Divide by the standard deviation."
    spread = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    if spread and all(map(near, given, [(r - mean) / spread for r in rewards])):
        return " The deviation divides by n - 1, not by n."
    return ""


EXERCISES = (leave_one_out, who_still_learns, group_advantages)
