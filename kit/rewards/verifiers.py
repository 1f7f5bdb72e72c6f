"""Verifiers that look at the text alone. Each returns 1.0 or 0.0.

Numbers are compared as fractions, exactly: 0.5, 1/2 and .50 are one number, 0.1 + 0.2 is 0.3.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from kit.errors import RewardError

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"


# A minus after a digit, letter or bracket is a subtraction: "5-3" ends in 3. Four digits of
# exponent or more would make a fraction that fills the memory.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+])?[$€£]?(?P<top>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,3}})"
    rf"(?!\d)|\s?/\s?(?P<bottom>{_DIGITS}))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}")
_LATEX_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,!;: ]|\{,\}")
_LONGEST_NUMBER = 400


def exact(response: str, label: str) -> float:
    """1 if response and label are equal, apart from white space around them."""
    return float(response.strip() == label.strip())


def number(response: str, label: str) -> float:
    """1 if the last number in the response equals the label's.

    Raises RewardError for a label without a number.
    """
    return float(last_number(response) == _label_number(label))


def gsm8k(response: str, label: str) -> float:
    r"""1 if the final answer equals the label's, as numbers.

    The answer follows `####` in the response; without that it is in the last `\boxed{}`, else it
    is the last number. The label may be a whole solution that ends in `#### 42`. The mark is
    that of GSM8K (Cobbe et al., 2021). Raises RewardError for a label without a number.
    """
    marked = response.rpartition("####")
    boxed = last_boxed(response)
    if marked[1]:
        answer = _first_number(marked[2])
    else:
        answer = last_number(response if boxed is None else boxed)
    return float(answer == _label_number(label.rpartition("####")[2]))


def has_format(response: str, pattern: str) -> float:
    """1 if the regular expression is found in the response; `.` matches newlines too.

    Raises RewardError for a pattern that is no regular expression.
    """
    return float(compile_pattern(pattern).search(response) is not None)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile the pattern of `format`. Raises RewardError if it is no regular expression."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(
            f"reward.format_pattern {pattern!r} is no regular expression: {error}.",
            fix="correct it; Python's `re.compile` must accept it. In YAML, single quotes keep "
            "backslashes as they are.",
        ) from None


def last_number(text: str) -> Fraction | None:
    r"""The last number in a text; None if there is none.

    Reads signs, thousands commas, decimals, exponents, fractions (3/4, \frac{3}{4}) and currency
    signs; a percent sign is ignored.
    """
    matches = list(_NUMBER.finditer(_plain(text)))
    return _value(matches[-1]) if matches else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, inner braces included; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None  # cut off in the middle


def answer_words(text: str) -> str:
    r"""Content of the last box, or the whole text, without \text{} around words."""
    boxed = last_boxed(text)
    return _LATEX_WORDS.sub(r"\1", text if boxed is None else boxed).strip()


def _label_number(label: str) -> Fraction:
    value = last_number(label)
    if value is None:
        raise RewardError(
            f"The label {label[:60]!r} holds no number to compare with.",
            fix="choose a reward that fits the labels (exact, math), or set data.label_key.",
        )
    return value


def _first_number(text: str) -> Fraction | None:
    match = _NUMBER.search(_plain(text))
    return _value(match) if match else None


def _plain(text: str) -> str:
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$")
    return _LATEX_FRACTION.sub(r"\1/\2", _LATEX_SPACE.sub("", text))


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST_NUMBER:
        return None
    value = _fraction(match["top"])
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["bottom"]:
        bottom = _fraction(match["bottom"])
        if not bottom:
            return None
        value /= bottom
    return -value if match["sign"] == "-" else value


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "")))
