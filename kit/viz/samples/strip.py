"""Token strips: every response token as a chip, coloured by a quantity that is known of it.

The markup of a chip is kept small, so that a response of 4,000 tokens fits into a notebook. What a
colour says, the legend says in numbers, each chip in its `title`, and a table in cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from kit.samples import Sample, token_values
from kit.samples.token_values import Quantity
from kit.utils.display import Picture
from kit.utils.formatting import (
    columns,
    count,
    cut,
    letters,
    mean,
    number,
    one_line,
    percent,
    pointed_at,
    shorten,
)
from kit.viz.html import Child, Column, fold, join, note, numeric, page, spaced, table, tag, title
from kit.viz.samples.scales import UNKNOWN, Scale, scale_of

MOST_CHIPS = 4_000
"""Tokens drawn in one strip; `start` draws those that follow."""
DETAILED = 300
"""Up to so many tokens, each chip names all that is known of it, and the table has a row for each
token; above, both are kept to the quantity that is shown."""
STRIP_BYTES = 285_000
"""A strip and its table together; what is around them takes the rest of 300 kB."""
TEXT_BYTES = 40_000
"""All token texts of a strip together, before they are cut."""
MOST_NAMES = 24
"""Quantities that are named of one token."""
ACROSS = 10
"""Tokens in a row of the compact table."""
WORST = 5
CONTEXT = "kv-text kv-context"
"""The class of a token in its context, whose lines stay as they are for the caret."""
SIDE = 30
"""Characters on either side of a token that is shown in its context."""


def show_strip(sample: Sample, name: str | None = None, start: int = 0) -> Picture:
    """The strip of one quantity. Raises DataError where the sample does not know it."""
    name = name or next(iter(token_values.known(sample)), "rollout_log_prob")
    values = token_values.require(sample, name)
    quantity = token_values.quantity(name, values)
    heading = f"Sample {sample.index} of prompt {sample.group_index}, token by token"
    others = [shorten(other, 40) for other in token_values.known(sample) if other != name]
    drawn = strip(sample, quantity, values, start=start)
    room = STRIP_BYTES - len(drawn.encode())
    html = page(
        title(heading),
        drawn,
        token_table(sample, quantity, values, start, room),
        note(f"Also known of these tokens: {', '.join(others[:MOST_NAMES])}.") if others else None,
    )
    return Picture(html, strip_plain(sample, quantity, values, heading))


def strip(
    sample: Sample, quantity: Quantity, values: Sequence[float], start: int = 0, most: int = 0
) -> Markup:
    """Heading, legend, and chips of the tokens from `start` on; `most` 0 takes `MOST_CHIPS`."""
    scale = scale_of(quantity, values)
    start = max(start, 0)
    end = min(start + (most or MOST_CHIPS), len(values))
    worst = scale.stands_out(values)
    left = len(values) - end
    texts = token_values.texts(sample)
    call = f'sample.strip("{shorten(quantity.name, 40)}", start={end})'
    return join(
        tag("div", _heading(sample, quantity, values), class_="kv-muted"),
        legend(scale, values, untrained=0 in sample.mask),
        tag("div", _worst_line(texts, quantity, values, worst)) if worst is not None else None,
        tag("div", chips(sample, quantity, values, start, end), class_="kv-strip"),
        note(f"… {count(left, 'more token')} not shown here: {call}") if left > 0 else None,
    )


def _heading(sample: Sample, quantity: Quantity, values: Sequence[float]) -> str:
    finite = [v for v in values if math.isfinite(v) and quantity.kind != "category"]
    words = quantity.words + (f", {quantity.unit}" if quantity.unit else "")
    if finite:
        ends = ((text, _say(quantity, v)) for text, v in _ends(quantity, finite))
        words += ": " + ", ".join(f"{text} {value}" for text, value in ends)
    return shorten(words + _versions(quantity.name, sample.annotated_versions), 300)


def _versions(name: str, versions: Sequence[int]) -> str:
    """Which weights the trainer's numbers are of, for those that it gave."""
    if not versions:
        return ""
    if name == "change" and len(versions) == 2:
        return f"; weights version {versions[0]} to {versions[1]}"
    if name == "trainer_log_prob_before":
        return f"; trainer at weights version {versions[0]}"
    if name in ("trainer_log_prob", "difference", "ratio", "entropy"):
        return f"; trainer at weights version {versions[-1]}"
    return ""


def _ends(quantity: Quantity, finite: Sequence[float]) -> list[tuple[str, float]]:
    rows = [("mean", mean(finite)), ("smallest", min(finite)), ("largest", max(finite))]
    # Shares of a loss are parts of a sum; their mean says nothing.
    return [("sum", math.fsum(finite)), *rows[1:]] if quantity.name == "loss" else rows


def _worst_line(
    texts: Sequence[str], quantity: Quantity, values: Sequence[float], worst: int
) -> Markup:
    return join(
        tag("b", "^", aria_hidden="true"),
        f" {quantity.worst}: token {worst}, ",
        tag("span", letters(texts[worst], 40), class_="kv-text"),
        f", at {_say(quantity, values[worst])}{_chance(quantity, values[worst])}",
    )


def legend(scale: Scale, values: Sequence[float], *, untrained: bool = False) -> Markup:
    """What each colour spans, and how many tokens have it."""
    entries = [
        tag("span", tag("i", str(amount), class_=style or None), f" {words}")
        for style, words, amount in zip(
            scale.styles, scale.words, scale.counts(values), strict=True
        )
    ]
    if missing := sum(math.isnan(v) for v in values):
        entries.append(tag("span", tag("i", str(missing), class_=UNKNOWN), " not a number"))
    if untrained:
        entries.append(tag("span", tag("i", "a", class_="m"), " not trained on"))
    return tag("div", spaced(entries), class_="kv-legend")


def chips(
    sample: Sample, quantity: Quantity, values: Sequence[float], start: int, end: int
) -> Markup:
    """The tokens of a stretch as chips, the one that stands out with a caret."""
    scale = scale_of(quantity, values)
    worst = scale.stands_out(values)
    mask = sample.mask
    shown = _short(token_values.texts(sample)[start:end])
    full = _all_known(sample) if len(values) <= DETAILED else {}
    parts = []
    for place, text in enumerate(shown, start):
        value = values[place]
        style = scale.style(value)
        if not _trains(mask, place):
            style = f"{style} m".strip()
        if place == worst:
            style = f"{style} w".strip()
        said = _every(sample, full, place) if full else f"{place}: {_say(quantity, value, 2)}"
        kind = f' class="{style}"' if style else ""
        caret = "<b>^</b>" if place == worst else ""
        newline = "<br>" if "\u21b5" in text else ""
        parts.append(f'<i{kind} title="{said}">{escape(text)}{caret}</i>{newline}')
    return Markup("".join(parts))


def chips_alone(sample: Sample, name: str, most: int) -> Markup:
    """The first tokens as chips without heading and legend, for a cell of a table."""
    values = token_values.require(sample, name)
    end = min(most, len(values))
    drawn = chips(sample, token_values.quantity(name, values), values, 0, end)
    left = len(values) - end
    more = note(f"… {count(left, 'more token')}") if left else None
    return tag("div", drawn, more, class_="kv-strip")


def _short(texts: Sequence[str]) -> list[str]:
    """All texts as shown; each is cut where together they would be too many bytes."""
    shown = [letters(text, 60) for text in texts]
    if sum(len(escape(text).encode()) for text in shown) <= TEXT_BYTES:
        return shown
    limit = max(TEXT_BYTES // len(texts), 4)
    cuts = (cut(text, limit) for text in shown)
    return [f"{text}{'…' if missing else ''}" for text, missing in cuts]


def _all_known(sample: Sample) -> dict[str, tuple[Quantity, list[float]]]:
    names = token_values.known(sample)[:MOST_NAMES]
    values = {name: token_values.require(sample, name) for name in names}
    return {name: (token_values.quantity(name, row), row) for name, row in values.items()}


def _every(sample: Sample, full: dict[str, tuple[Quantity, list[float]]], place: int) -> Markup:
    tokens = sample.response_tokens
    words = [f"token {place}", *([f"id {tokens[place]}"] if place < len(tokens) else [])]
    words += [
        f"{_title(quantity)} {_say(quantity, row[place])}{_chance(quantity, row[place])}"
        for quantity, row in full.values()
    ]
    if not _trains(sample.mask, place):
        words.append("not trained on")
    return escape(one_line(", ".join(words)))


def _trains(mask: Sequence[int], place: int) -> bool:
    return place >= len(mask) or bool(mask[place])


def _title(quantity: Quantity) -> str:
    return shorten(quantity.name, 40).replace("log_prob", "log-prob").replace("_", " ")


def _say(quantity: Quantity, value: float, digits: int = 3) -> str:
    """A number in three digits, with its sign where both signs mean something."""
    if not math.isfinite(value):
        return number(value)
    signed = quantity.kind == "signed" and value
    return f"{value:+.{digits}g}" if signed else f"{value:.{digits}g}"


def _chance(quantity: Quantity, value: float) -> str:
    if quantity.kind != "log_prob" or math.isnan(value):
        return ""
    return f" ({percent(math.exp(min(value, 0.0)))})"


# ---- the same in cells ---------------------------------------------------------------------------


def token_table(
    sample: Sample,
    quantity: Quantity,
    values: Sequence[float],
    start: int = 0,
    room: int = STRIP_BYTES,
) -> Markup:
    """All tokens as a table: a row each where they are few, else ten to a row.

    Where it would take more bytes than there is `room`, without texts; and where those are too many
    still, a line that says how to have them.
    """
    if len(values) <= DETAILED:
        return fold("all tokens as a table", _table_of_all(sample))
    start, end = max(start, 0), min(max(start, 0) + MOST_CHIPS, len(values))
    texts = _short(token_values.texts(sample)[start:end])
    for shown in (texts, [""] * len(texts)):
        drawn = _table_of_one(shown, quantity, values, start, end)
        if len(drawn.encode()) <= room:
            return fold(f"all tokens as a table: {_title(quantity)}", drawn)
    return note("As a table: sample.to_pandas()")


def _table_of_all(sample: Sample) -> Markup:
    known = _all_known(sample)
    heads = [Column("token", "num"), Column("text", "fit")]
    heads += numeric("id", *(_title(quantity) for quantity, _ in known.values()))
    tokens, mask = sample.response_tokens, sample.mask
    if 0 in mask:
        heads.append(Column("", "fit"))
    rows: list[list[Child]] = []
    for place, text in enumerate(token_values.texts(sample)):
        row: list[Child] = [str(place), tag("span", letters(text, 40), class_="kv-text")]
        row.append(str(tokens[place]) if place < len(tokens) else "–")
        row += [_say(quantity, values[place]) for quantity, values in known.values()]
        if 0 in mask:
            row.append("" if _trains(mask, place) else "not trained on")
        rows.append(row)
    return table(heads, rows)


def _table_of_one(
    texts: Sequence[str], quantity: Quantity, values: Sequence[float], start: int, end: int
) -> Markup:
    heads = "".join(f'<th scope="col">+{i}</th>' for i in range(ACROSS))
    rows = []
    for first in range(start, end, ACROSS):
        cells = "".join(
            f"<td>{escape(texts[place - start])} {_say(quantity, values[place])}</td>"
            for place in range(first, min(first + ACROSS, end))
        )
        rows.append(f"<tr><th>{first}</th>{cells}</tr>")
    head = f'<thead><tr><th scope="col">token</th>{heads}</tr></thead>'
    drawn = Markup(f'<table class="kv-grid">{head}<tbody>{"".join(rows)}</tbody></table>')
    return tag("div", drawn, class_="kv-wide")


# ---- for a terminal ------------------------------------------------------------------------------


def strip_plain(sample: Sample, quantity: Quantity, values: Sequence[float], heading: str) -> str:
    """The strip in plain text: what the classes span, and the tokens that stand out most."""
    scale = scale_of(quantity, values)
    texts = token_values.texts(sample)
    classes = zip(scale.words, scale.counts(values), strict=True)
    lines = [heading, f"  {_heading(sample, quantity, values)}"]
    lines += ["  " + "   ".join(f"{words}: {amount}" for words, amount in classes if amount)]
    worst = scale.stands_out(values)
    if worst is not None:
        text, carets = in_context(sample, worst)
        lines += [f"      {text}", f"      {carets} {quantity.worst}"]
    places = sorted(
        (i for i, v in enumerate(values) if not math.isnan(v)),
        key=lambda i: -scale.size(values[i]),
    )
    rows = [
        [
            f"token {place}",
            letters(texts[place], 30),
            _say(quantity, values[place]) + _chance(quantity, values[place]),
        ]
        for place in places[:WORST]
    ]
    return "\n".join([*lines, columns(rows, indent="    ")])


def in_context(sample: Sample, place: int) -> tuple[str, str]:
    """The token between its neighbours, the prompt's end included, and carets under it."""
    texts = [sample.prompt_text[-SIDE:], *token_values.texts(sample)]
    place += 1
    beside = texts[max(place - SIDE, 0) : place], texts[place + 1 : place + 1 + SIDE]
    before, after = ("".join(text[:SIDE] for text in side) for side in beside)
    return pointed_at(before, texts[place], after, SIDE)
