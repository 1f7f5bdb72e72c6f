"""Verifiers that look at the text alone. Each returns 1.0 or 0.0.

Numbers are compared as fractions, exactly: 0.5, 1/2, ½ and .50 are one number, 0.1 + 0.2 is 0.3.
Texts are compared as they are read: an é is one, whether composed or not.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from kit.errors import RewardError

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"


# A minus after a digit, letter or bracket is a subtraction: "5-3" ends in 3. Four digits of
# exponent or more would make a fraction that fills the memory. "2 1/2" is a mixed number where the
# fraction is below 1.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+])?[$€£]?(?:(?P<whole>\d+) (?=\d+/\d+(?![\d/])))?(?P<top>{_DIGITS})"
    rf"(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)|\s?/\s?(?P<bottom>{_DIGITS}))?(?P<percent>\s?%)?"
)
_LATEX_FRACTION = re.compile(
    r"(?P<whole>(?<![\d.,/])\d+\s*)?\\[dt]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}"
)
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)")
_LATEX_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\[,!;: ]|\{,\}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LONGEST_NUMBER = 400
_PLAIN = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{SMALL HYPHEN-MINUS}": "-",
        "\N{FULLWIDTH HYPHEN-MINUS}": "-",
        "\N{FULLWIDTH FULL STOP}": ".",
        "\N{FULLWIDTH COMMA}": ",",
        "\N{FULLWIDTH SOLIDUS}": "/",
        "\N{DIVISION SLASH}": "/",
        "\N{FULLWIDTH PERCENT SIGN}": "%",
        "\N{FULLWIDTH DOLLAR SIGN}": "$",
    }
)
"""Signs that are typed or typeset for those on a keyboard."""
_DASH = re.compile(r"(?<![\w)\]])[‐-–](?=\s?[$€£]?[\d.])")
"""A dash in the place of a minus; between two numbers it is none."""
_GROUPED = re.compile(
    "(?<![\\d.,])\\d{1,3}(?:[\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\N{NO-BREAK SPACE}"
    "\N{SIX-PER-EM SPACE}\N{HAIR SPACE}]\\d{3})+(?!\\d)"
)
"""Thousands apart by a space that does not break the number: 1 234 567."""
_VULGAR = re.compile(r"(\d+\s?)?([¼½¾⅐-⅞])")
_FRACTION_SLASH = "\N{FRACTION SLASH}"


@dataclass(frozen=True, slots=True)
class _Read:
    """A number as it was read, and whether a percent sign follows it."""

    value: Fraction
    percent: bool = False

    def equals(self, other: _Read) -> bool:
        """Whether both are one number; 72% is 0.72, and where one side says percent, also 72."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        share, plain = (self, other) if self.percent else (other, self)
        return share.value / 100 == plain.value


def exact(response: str, label: str) -> float:
    """1 if response and label are equal, apart from white space around them."""
    return float(_composed(response) == _composed(label))


def number(response: str, label: str) -> float:
    """1 if the last number in the response equals the label's.

    Raises RewardError for a label without a number.
    """
    return _equal(_last(response), _label_number(label))


def gsm8k(response: str, label: str) -> float:
    r"""1 if the final answer equals the label's, as numbers.

    The answer follows `####` in the response; without that it is in the last `\boxed{}`, else it
    is the last number. The label may be a whole solution that ends in `#### 42`. The mark is
    that of GSM8K (Cobbe et al., 2021). Raises RewardError for a label without a number.
    """
    marked = response.rpartition("####")
    boxed = last_boxed(response)
    unmarked = response if boxed is None else boxed
    answer = _first_number(marked[2]) if marked[1] else _last(unmarked)
    return _equal(answer, _label_number(label.rpartition("####")[2]))


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

    Reads signs, thousands with commas or thin spaces, decimals, exponents, fractions (3/4, ¾,
    1 3/4, \frac{3}{4}) and currency signs. The value is that before a percent sign.
    """
    found = _last(text)
    return found.value if found else None


def _last(text: str) -> _Read | None:
    matches = list(_NUMBER.finditer(plain(text)))
    return _value(matches[-1]) if matches else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`, inner braces included, or None."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None  # cut off in the middle


def answer_words(text: str) -> str:
    r"""Content of the last box, or the whole text, without \text{} around words."""
    boxed = last_boxed(text)
    return _composed(_LATEX_WORDS.sub(r"\1", text if boxed is None else boxed))


def _composed(text: str) -> str:
    """Text without white space around it, its accents composed with their letters."""
    return unicodedata.normalize("NFC", text).strip()


def _equal(answer: _Read | None, label: _Read) -> float:
    return float(answer is not None and answer.equals(label))


def _label_number(label: str) -> _Read:
    value = _last(label)
    if value is None:
        raise RewardError(
            f"The label {label[:60]!r} holds no number to compare with.",
            fix="choose a reward that fits the labels (exact, math), or set data.label_key.",
        )
    return value


def _first_number(text: str) -> _Read | None:
    match = _NUMBER.search(plain(text))
    return _value(match) if match else None


def plain(text: str) -> str:
    r"""Text with its numbers as they are typed: `−5`, `1 234`, `2½`, `1\,234`, `\frac{1}{2}`."""
    text = _VULGAR.sub(_as_mixed, _typed(text)).replace(_FRACTION_SLASH, "/")
    text = _LATEX_SPACE.sub("", text).replace("\\$", "$").replace("\\%", "%")
    return _LATEX_FRACTION.sub(_mixed, _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text))


def mathematics(text: str) -> str:
    r"""Text as math-verify reads it: `−5` as `-5`, `2½` as `(2+1/2)`, `\fbox` as `\boxed`."""
    text = _VULGAR.sub(_as_sum, _typed(text)).replace(_FRACTION_SLASH, "/")
    return text.replace("\\fbox{", "\\boxed{")


def _typed(text: str) -> str:
    """Text with the signs of a keyboard, and no spaces within its numbers."""
    text = _DASH.sub("-", text.translate(_PLAIN))
    return _GROUPED.sub(lambda match: re.sub(r"\s", "", match[0]), text)


def _as_mixed(match: re.Match[str]) -> str:
    """`2½` as `2 1/2`."""
    whole = f"{match[1].strip()} " if match[1] else ""
    return whole + unicodedata.normalize("NFKC", match[2])


def _as_sum(match: re.Match[str]) -> str:
    """`2½` as `(2+1/2)`."""
    whole = f"{match[1].strip()}+" if match[1] else ""
    return f"({whole}{unicodedata.normalize('NFKC', match[2])})"


def _mixed(match: re.Match[str]) -> str:
    r"""`2\frac{1}{2}` as `2 1/2`."""
    whole = f"{match['whole'].strip()} " if match["whole"] else ""
    return f"{whole}{match[2]}/{match[3]}"


def _value(match: re.Match[str]) -> _Read | None:
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
    if match["whole"] and value < 1:
        value += int(match["whole"])
    return _Read(-value if match["sign"] == "-" else value, bool(match["percent"]))


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "")))
