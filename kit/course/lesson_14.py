"""Exercises of 14_low_precision."""

from __future__ import annotations

import numpy as np

from kit.course.verdict import call, hint

GROUP_SIZE = 64
CODES = (0, 2, -4, 7)
ROW = (0.5, -1.25, 3.0, 7.0, 0.3, -0.7, 0.05, -0.35)
GROUP = 4


def bits_of_a_number(answer: object) -> str:
    """4 + 16 / 64 = 4.25: a code of its own, and a share of the scale."""
    return hint(
        answer,
        4 + 16 / GROUP_SIZE,
        {
            "That is the code alone. Each group has a scale, too.": 4.0,
            "That is a code and a whole scale. 64 numbers share one.": 20.0,
            "That has a scale of 32 bits. In INT4 it has 16.": 4 + 32 / GROUP_SIZE,
            "That has a scale of 8 bits. In INT4 it has 16.": 4 + 8 / GROUP_SIZE,
            "That counts bytes. How many bits are they?": (4 + 16 / GROUP_SIZE) / 8,
            "That is the sum for a whole group. Divide by its numbers.": (4.0 * GROUP_SIZE + 16),
        },
    )


def codes_of_a_group(answer: object) -> str:
    """[0, 2, -4, 7]: the scale is 1, and halves go to the even neighbour."""
    if not isinstance(answer, (list, tuple)) or len(answer) != len(CODES):
        return "Give a list of four codes, whole numbers from -7 to 7."
    if any(given is ... for given in answer):
        return "Some of the four are still open."
    cases = (
        ("0.4", {1: "the nearest whole number is 0"}),
        ("2.5", {3: "a half goes to the even neighbour, and 3 is odd"}),
        ("-3.5", {-3: "a half goes to the even neighbour, and -3 is odd", 4: "mind its sign"}),
        ("7.0", {1: "the largest number gets the largest code, 7"}),
    )
    for given, right, (number, mistakes) in zip(answer, CODES, cases, strict=True):
        if isinstance(given, bool) or not hasattr(given, "__float__"):
            return f"A whole number is asked for, not {given!r}."
        if float(given) != right:
            why = mistakes.get(int(float(given)), "the scale is the largest size over 7, here 1")
            return f"{number}: think again; {why}."
    return ""


def row_in_int4(answer: object) -> str:
    """Group by group: scale = largest size / 7, round(numbers / scale) * scale."""
    row = np.array(ROW)
    given = np.asarray(call(answer, row.copy(), GROUP), dtype=float)
    if given.shape != row.shape:
        return f"What comes out has the row's shape, {row.shape}; yours has {given.shape}."
    right = read_back(row, GROUP)
    if np.allclose(given, right):
        return ""
    groups = row.reshape(-1, GROUP)
    scales = np.abs(groups).max(1, keepdims=True) / 7
    mistakes = {
        "That is the row as it was. Divide by the scale, round, and multiply again.": row,
        "Those are the codes. Multiply them by their scale again.": (
            np.round(groups / scales).ravel()
        ),
        "That has one scale for the whole row. Each group has its own.": read_back(row, len(row)),
        "That divides by 8. The codes go from -7 to 7.": (
            np.round(groups / scales * 8 / 7) * scales * 7 / 8
        ).ravel(),
        "The scale comes from the largest size: -0.7 is larger than 0.3.": (
            np.round(groups / groups.max(1, keepdims=True) * 7) * groups.max(1, keepdims=True) / 7
        ).ravel(),
        "That cuts off. Round to the nearest.": (np.trunc(groups / scales) * scales).ravel(),
    }
    for words, mistaken in mistakes.items():
        if np.allclose(given, mistaken):
            return words
    place = int(np.argmax(~np.isclose(given, right)))
    return (
        f"Of {list(ROW)} in groups of {GROUP}, {ROW[place]:g} becomes {right[place]:.4g}, and "
        f"yours {given[place]:.4g}."
    )


def read_back(row: np.ndarray, group: int) -> np.ndarray:
    """What the INT4 codes of a row stand for."""
    groups = row.reshape(-1, group)
    scales = np.abs(groups).max(1, keepdims=True) / 7
    read: np.ndarray = (np.round(groups / scales) * scales).ravel()
    return read


EXERCISES = (bits_of_a_number, codes_of_a_group, row_in_int4)
