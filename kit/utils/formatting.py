"""Formats text and numbers for display: characters made visible, text cut, plain units.

Text that a model wrote may hold anything: terminal escapes, right-to-left overrides, null bytes,
halves of surrogate pairs. `visible` turns each into something that a person can see and that any
screen, file or browser can take. It adds no markup; `kit.viz.html` escapes afterwards.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

_NOT_PLAIN = re.compile(r"[^\n\t -~]")
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
_WIDE_SPACE = "\u3000"  # the ordinary space of Chinese and Japanese text: visible as it is


def visible(text: str) -> str:
    """The text with every invisible character written out: `␛[31m`, `␀`, `⟨U+202E⟩`.

    Newlines, tabs and plain spaces stay. What comes back encodes as UTF-8 whatever went in, and
    can be shown again without changing.
    """
    return _NOT_PLAIN.sub(lambda match: _reveal(match[0]), text)


@lru_cache(maxsize=4096)
def _reveal(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in _INVISIBLE and character != _WIDE_SPACE:
        return f"\u27e8U+{code:04X}\u27e9"
    return character


def one_line(text: str) -> str:
    """Visible text on one line, newlines and tabs shown as signs."""
    return visible(text).replace("\n", "\u21b5").replace("\t", "\u21e5")


def cut(text: str, limit: int) -> tuple[str, int]:
    """The longest start of visible `text` that takes at most `limit` bytes when shown.

    Bytes are counted as HTML would write them (`<` takes four), so that a size promised to a
    notebook holds for hostile text too. Returns the start and how many characters of `text` are
    missing.
    """
    head = text[:limit]
    used = 0
    for position, character in enumerate(head):
        used += _shown_bytes(character)
        if used > limit:
            return visible(head[:position]), len(text) - position
    return visible(head), len(text) - len(head)


@lru_cache(maxsize=4096)
def _shown_bytes(character: str) -> int:
    entity = {"&": 5, "<": 4, ">": 4, '"': 5, "'": 5}.get(character)
    return entity or len(visible(character).encode())


def shorten(text: str, width: int) -> str:
    """One visible line of at most `width` characters, ended by `…` where something is missing."""
    line = one_line(text[: width + 1])
    return line if len(line) <= width and len(text) <= width else line[: width - 1] + "…"


def letters(token: str, most: int) -> str:
    """A token with its white space visible; `∅` for none at all."""
    return shorten(token, most).replace(" ", "␣") or "∅"


def pointed_at(before: str, token: str, after: str, side: int) -> tuple[str, str]:
    """A token between `side` characters of what is around it, and a line of carets under it."""
    before, token, after = one_line(before)[-side:], letters(token, side), one_line(after)[:side]
    return before + token + after, " " * len(before) + "^" * len(token)


def both_ends(text: str, width: int) -> str:
    """One visible line like `shorten`, but the middle is left out: an answer stands at the end."""
    if len(text) <= width:
        return one_line(text)
    tail = width // 3
    return f"{one_line(text[: width - tail])} … {one_line(text[-tail:])}"


def number(value: object, digits: int = 4) -> str:
    """A number as a person reads it: `0.5312`, `12,345`, `1.2e-05`, `NaN`; `–` where none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return shorten(str(value), 40)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-3:
        return f"{value:.2g}" if size < 1e-3 else f"{value:.3g}"
    if value == int(value):
        return f"{int(value):,}"
    short = f"{value:.{digits}g}"
    return f"{value:,.0f}" if size >= 1000 or "e" in short else short


def percent(share: float) -> str:
    """A share of one as `12.5%`."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """A time span: `35 ms`, `1.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if math.isnan(seconds):
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def data_size(size: float) -> str:
    """Bytes: `512 B`, `3.2 MB`, `1.2 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def in_gib(size: float) -> str:
    """Bytes as `1.5 GiB`, or as `12 MiB` where they are few."""
    return f"{size / 2**30:.1f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:,.0f} MiB"


def count(amount: int, one: str, many: str = "") -> str:
    """A number of things: `1 sample`, `8 samples`, `1,024 samples`."""
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"


def count_of(amount: float, one: str) -> str:
    """Format a mean with its unit: `15.1 tokens`, `1 token`."""
    shown = number(round(amount, 1))
    return f"{shown} {one if shown == '1' else one + 's'}"


def named(pairs: Iterable[tuple[str, str]]) -> str:
    """Pairs of name and value on one line, for the terminal."""
    return "  " + "   ".join(f"{name} {value}" for name, value in pairs)


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of text in aligned columns, for the terminal."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)


def mean(values: Sequence[float]) -> float:
    """Mean of some numbers; NaN without any."""
    return sum(values) / len(values) if values else math.nan
