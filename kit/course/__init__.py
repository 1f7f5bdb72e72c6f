"""Checks for the exercises of the lessons in `notebooks/`.

    from kit.course import check
    check("01.1", 1.62)                      # shows whether it is right, and if not, why
    check("01.2", 5, rollout=rollout)        # some checks use what the notebook has computed

A check never raises because of an answer: an answer is open, wrong or right, and the verdict on a
wrong one names the likely mistake. An answer that is still `...` is open. The functions in
`lesson_01.py` to `lesson_14.py` return a sentence on what is wrong, or an empty string for a right
answer.
"""

from kit.course.verdict import Verdict, check, exercises

__all__ = ["Verdict", "check", "exercises"]
