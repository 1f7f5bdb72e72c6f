"""The exercises of the lessons in `notebooks/`: what each answer is checked against.

    from kit.course import check
    check("01.1", 1.62)                      # shows whether it is right, and if not, why
    check("01.2", 5, rollout=rollout)        # some look at what the notebook has computed

A check never raises because of an answer: an answer is open, wrong or right, and a wrong one is
told what it looks like. An answer that is still `...` is open. The functions in `lesson_01.py` to
`lesson_07.py` return what is wrong, in a sentence, or nothing where all is well.
"""

from kit.course.verdict import Verdict, check, exercises

__all__ = ["Verdict", "check", "exercises"]
