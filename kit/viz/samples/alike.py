"""Equal answers, shown once: the samples of a prompt by their response, `7 × 34`.

What may differ among samples that wrote the same, such as rewards and log-probs, stands behind the
count, a line for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from kit.samples import Sample
from kit.utils.formatting import cut, mean, number, shorten
from kit.viz.html import Child, bar, fold, join, long_text, note, quiet, tag

SHORT = 240
"""Characters of a response that stands in the line with its count."""
Values = Sequence[float | None]
"""A number for each sample; None where it has none."""


def same_answer(sample: Sample) -> tuple[object, ...]:
    """What two samples of one prompt have in common where their answers are shown as one."""
    return sample.response, sample.status, sample.error, sample.label_text


def alike(group: Sequence[Sample]) -> list[list[int]]:
    """Positions of the samples of one prompt, those with the same answer together.

    In the order of the first sample with each answer.
    """
    places: dict[tuple[object, ...], list[int]] = {}
    for place, sample in enumerate(group):
        places.setdefault(same_answer(sample), []).append(place)
    return list(places.values())


def times(amount: int) -> str:
    """`7 × `, or nothing before what is there but once."""
    return f"{amount:,} × " if amount > 1 else ""


def known(values: Values) -> list[float]:
    """The numbers that are there."""
    return [value for value in values if value is not None]


def number_of_all(values: Values, signed: bool = False) -> str:
    """The one number that all have, or from the lowest to the highest: `0.2 to 0.9`."""
    numbers = known(values)
    if not numbers:
        return "–"
    ends = [min(numbers), max(numbers)] if all(map(math.isfinite, numbers)) else numbers[:1]
    said = [f"{end:+.3g}" if signed else number(end, 3) for end in ends]
    return " to ".join(dict.fromkeys(said))


def bar_of_all(values: Values, scale: float, signed: bool = False) -> Markup:
    """The number that all have and its bar, or the span and the bar of the mean."""
    numbers = known(values)
    if not numbers:
        return quiet("–")
    shown = tag("span", number_of_all(values), class_="kv-value")
    return join(shown, bar(mean(numbers), scale, signed))


def response_cell(sample: Sample, limit: int) -> Markup:
    """The response, and under it the error of a sample whose reward failed."""
    return join(long_text(sample.response, limit), error_note(sample))


def error_note(sample: Sample) -> Markup | None:
    """Why its reward failed; None where it did not."""
    if not sample.error:
        return None
    words, missing = cut(sample.error, 200)
    return note(f"✗ {words}{' …' if missing else ''}")


def answer_cell(
    samples: Sequence[Sample], limit: int, numbers: Mapping[str, Values] | None = None
) -> Markup:
    """The response that all these samples have in common, with its count.

    Args:
        samples: one or several with the same answer.
        limit: bytes of the response.
        numbers: what a line behind the count says of each sample, beside its log-prob.
    """
    first = samples[0]
    if len(samples) == 1:
        return response_cell(first, limit)
    counted = tag("b", times(len(samples)))
    each = each_sample(samples, numbers or {})
    shown, missing = cut(first.response, limit)
    if shown and not missing and len(shown) <= SHORT and "\n" not in shown:
        summary = join(counted, tag("span", shown, class_="kv-text"))
        return join(fold(summary, each), error_note(first))
    return join(fold(counted, each), response_cell(first, limit))


def answers_cell(group: Sequence[Sample], limit: int, most: int = 3) -> Markup:
    """The answers to one prompt, the commonest first: `6 × 34`, `2 × 24`."""
    commonest = sorted(alike(group), key=lambda places: -len(places))
    parts: list[Child] = []
    for places in commonest[:most]:
        counted = tag("b", times(len(places))) if len(places) > 1 else None
        parts.append(tag("div", counted, response_cell(group[places[0]], limit)))
    left = sum(map(len, commonest[most:]))
    return join(*parts, quiet(f"and {left:,} more") if left else None)


def commonest(group: Sequence[Sample], width: int) -> str:
    """The commonest answer to one prompt in so many characters, with its count."""
    places = max(alike(group), key=len)
    return f"{times(len(places))}{shorten(group[places[0]].response, width)}"


def each_sample(samples: Sequence[Sample], numbers: Mapping[str, Values]) -> Markup:
    """A line for each sample. Written by hand: a rollout has hundreds of them."""
    columns: dict[str, Sequence[str]] = {"sample": [str(sample.index) for sample in samples]}
    columns |= {
        name: ["–" if v is None else number(v, 3) for v in values]
        for name, values in numbers.items()
    }
    log_probs = [[*filter(math.isfinite, sample.rollout_log_probs or ())] for sample in samples]
    if any(log_probs):
        columns["mean log-prob"] = [number(mean(row), 3) if row else "–" for row in log_probs]
    lengths = [sample.response_length for sample in samples]
    if len({*lengths}) > 1:
        columns["tokens"] = [f"{length:,}" for length in lengths]
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    drawn = Markup(f'<table class="kv-grid"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>')
    return tag("div", drawn + Markup("</table>"), class_="kv-inner")
