"""Exercises of 01_one_step."""

from __future__ import annotations

from kit.course.verdict import hint
from kit.samples import Rollout
from kit.tracking.metrics import equal_rewards


def two_right_of_eight(answer: object) -> str:
    """Two right answers of eight: (1 - 1/4) / 0.4629 = 1.620."""
    return hint(
        answer,
        1.6202,
        {
            "0.75 is the reward minus the group's mean. Divide it by the group's standard "
            "deviation.": 0.75,
            "That is with the deviation divided by 8. GRPO's divides by n - 1, here 7.": 1.7321,
            "That is the advantage of a wrong answer. That of a right one is asked for.": -0.5401,
            "0.25 is the group's mean. The advantage begins with: reward minus this.": 0.25,
        },
    )


def groups_without_a_lesson(answer: object, rollout: Rollout) -> str:
    """The groups whose rewards are all equal, whether all 1 or all 0."""
    groups = rollout.groups()
    equal = [group for group in groups if equal_rewards(group)]
    different = len(groups) - len(equal)
    all_right = sum(bool(group[0].reward) for group in equal)
    all_wrong = len(equal) - all_right
    return hint(
        answer,
        len(equal),
        {
            "Those are the groups that do teach something. The others are asked for.": different,
            "That counts the groups that are all right. All wrong is as equal.": all_right,
            "That counts the groups that are all wrong. All right is as equal.": all_wrong,
            "That counts samples. Count groups.": sum(map(len, equal)),
        },
    )


def four_greedy_answers(answer: object) -> str:
    """One prompt, four samples, temperature 0: all the same."""
    if not isinstance(answer, Rollout):
        return "Put the rollout that session.generate(...) returns into `answer`."
    if (asked := len(answer.groups())) != 1:
        return f"It asks {asked} questions; one is wanted: generate(['12+34='], ...)."
    if len(answer) != 4:
        return f"It has {len(answer)} samples; pass n_samples_per_prompt=4."
    if len({sample.response for sample in answer}) > 1:
        return "The four differ, so they were sampled. Greedy is temperature=0."
    if answer[0].prompt_text != "12+34=":
        return f"It asks {answer[0].prompt_text!r}; ask '12+34='."
    return ""


EXERCISES = (two_right_of_eight, groups_without_a_lesson, four_greedy_answers)
