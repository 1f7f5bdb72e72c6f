"""Exercises of 09_lora."""

from __future__ import annotations

import numpy as np

from kit.course.verdict import call, hint

OUT, IN, RANK = 1024, 4096, 16
GRADIENTS = (False, True, True, True)
_CASES = ("A in the first step", "B in the first step", "A in the second", "B in the second")
W = ((1.0, 0.0, 2.0, 0.0), (0.0, 1.0, -1.0, 3.0))
A = ((1.0, 2.0, 0.0, 1.0), (0.0, -1.0, 1.0, 0.0), (2.0, 0.0, 0.0, 1.0))
B = ((0.5, 0.0, 1.0), (1.0, -2.0, 0.0))
ALPHA = 6.0


def numbers_of_an_adapter(answer: object) -> str:
    """16 x (4096 + 1024) = 81,920: A has 16 rows of 4,096 numbers, B 1,024 rows of 16."""
    return hint(
        answer,
        RANK * (IN + OUT),
        {
            "That is the weight itself, which is frozen.": IN * OUT,
            "That is the weight with its adapter. The weight is frozen.": (
                IN * OUT + RANK * (IN + OUT)
            ),
            "That is A alone. B has 1,024 rows of 16 numbers.": RANK * IN,
            "That is B alone. A has 16 rows of 4,096 numbers.": RANK * OUT,
            "That is the adapter of rank 1.": IN + OUT,
            "That is the product B A, which has the weight's shape.": RANK * IN * OUT,
            "That counts AdamW's two averages too, which are kept and not trained.": (
                3 * RANK * (IN + OUT)
            ),
        },
    )


def who_gets_a_gradient(answer: object) -> str:
    """[False, True, True, True]: the gradient of A passes through B, which begins at zero."""
    if not isinstance(answer, (list, tuple)) or len(answer) != len(GRADIENTS):
        return "Give a list of four: True where the gradient is not zero, False where it is."
    if any(given is ... for given in answer):
        return "Some of the four are still open."
    whys = (
        "a change of A changes the output only through B, and B is still zero",
        "A is not zero, so a change of B changes the output",
        "the first step has moved B away from zero",
        "nothing has taken from B what it got in the first step",
    )
    for given, right, words, why in zip(answer, GRADIENTS, _CASES, whys, strict=True):
        if bool(given) is not right:
            return f"{words}: think again; {why}."
    return ""


def merged_weight(answer: object) -> str:
    """W + lora_alpha / r * B A."""
    w, a, b = (np.array(x) for x in (W, A, B))
    try:
        given = np.asarray(call(answer, w.copy(), a.copy(), b.copy(), ALPHA), dtype=float)
    except ValueError as error:
        return (
            f"The shapes do not fit: {error}. W is (out, in), A is (r, in) and B is (out, r): "
            "which product of the last two is (out, in)?"
        )
    if given.shape != w.shape:
        return f"The engine's weight has W's shape, {w.shape}; yours has {given.shape}."
    change, rank = b @ a, len(a)
    right = w + ALPHA / rank * change
    if np.allclose(given, right):
        return ""
    mistakes = {
        "That is the change alone. The engine gets it added to W.": right - w,
        "Multiply B A by lora_alpha / r.": w + change,
        "That multiplies B A by lora_alpha. Divide by r, too.": w + ALPHA * change,
        "That divides by r and leaves lora_alpha out.": w + change / rank,
        "That divides by the root of r, as use_rslora does. Here it is r.": (
            w + ALPHA / rank**0.5 * change
        ),
        "r is the number of A's rows. You have divided by that of its columns.": (
            w + ALPHA / a.shape[1] * change
        ),
        "That is W alone. B A is missing.": w,
    }
    for words, mistaken in mistakes.items():
        if np.allclose(given, mistaken):
            return words
    first, yours = right[0, 0], given[0, 0]
    return f"For one W, A and B the sum begins with {first:g}, and yours with {yours:g}."


EXERCISES = (numbers_of_an_adapter, who_gets_a_gradient, merged_weight)
