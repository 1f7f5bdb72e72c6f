"""`Sample` as a person reads it, with a token strip for each quantity that is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from markupsafe import Markup

from kit.samples import Sample, token_values
from kit.utils.display import Bundle, bundle
from kit.utils.formatting import count, mean, named, number, shorten
from kit.viz.html import Child, facts, fold, join, long_text, note, page, quiet, tag, title
from kit.viz.render import render
from kit.viz.samples.rollout import STATUS_SIGNS, prompt_html
from kit.viz.samples.strip import STRIP_BYTES, strip, strip_plain, token_table

OTHERS_BYTES = 150_000
"""Bytes of strips after which no further quantity is drawn; the first one is in any case."""


@render.register(Sample)
def show_sample(sample: Sample) -> Bundle:
    """HTML and plain text of one sample: prompt, response, reward, token strips."""
    html = page(title(sample_title(sample)), sample_body(sample), _strips(sample))
    return bundle(html, _plain(sample))


def _strips(sample: Sample) -> Markup | None:
    """The most telling quantity, the others behind a line to click on while there is room."""
    names, written = token_values.known(sample), sample.response_length > 0
    if not names:
        none = "no numbers of these tokens are known: the engine gave no log-probabilities"
        return note(f"{none}; session.annotate(sample) asks the trainer") if written else None
    drawn = {name: token_values.require(sample, name) for name in names}
    quantities = {name: token_values.quantity(name, values) for name, values in drawn.items()}
    parts = [strip(sample, quantities[names[0]], drawn[names[0]])]
    room = STRIP_BYTES - len(parts[0].encode())
    parts.append(token_table(sample, quantities[names[0]], drawn[names[0]], room=room))
    used, left = sum(len(part.encode()) for part in parts), []
    for name in names[1:]:
        if used > OTHERS_BYTES:
            left.append(f'sample.strip("{shorten(name, 40)}")')
            continue
        words = f"by {shorten(quantities[name].words, 80)}"
        part = fold(words, strip(sample, quantities[name], drawn[name]))
        used += len(part.encode())
        parts.insert(-1, part)
    return join(*parts, note(f"Also known: {', '.join(left[:12])}") if left else None)


def sample_body(
    sample: Sample, prompt_bytes: int = 8_000, response_bytes: int = 30_000, preview: int = 2_000
) -> Markup:
    """Everything about a sample but its tokens; `preview` characters of its response unfolded."""
    return join(
        facts(sample_facts(sample)),
        note(f"✗ the reward failed: {shorten(sample.error, 400)}") if sample.error else None,
        quiet("prompt"),
        prompt_html(sample, prompt_bytes),
        quiet("response"),
        tag("div", long_text(sample.response, response_bytes, preview), class_="kv-prompt"),
    )


def sample_title(sample: Sample) -> str:
    """`Sample 12 of prompt 3`."""
    return f"Sample {sample.index} of prompt {sample.group_index}"


def sample_facts(sample: Sample) -> list[tuple[str, str]]:
    """The headline numbers of a sample, as (name, value)."""
    reward = "not scored" if sample.reward is None else number(sample.reward)
    rows = [("reward", reward)]
    rows += [
        (shorten(name, 24), number(part)) for name, part in [*sample.reward_parts.items()][:12]
    ]
    if sample.label_text is not None:
        rows.append(("right answer", shorten(sample.label_text, 60)))
    rows.append(("status", STATUS_SIGNS[sample.status]))
    rows.append(("response", count(sample.response_length, "token")))
    if log_probs := [*filter(math.isfinite, sample.rollout_log_probs or ())]:
        rows.append(("mean log-prob", number(mean(log_probs), 3)))
    if sample.advantage is not None:
        rows.append(("advantage", f"{sample.advantage:+.3g}"))
    if sample.loss_mask is not None:
        rows.append(("trained on", count(sum(sample.loss_mask), "token")))
    if sample.weight_versions:
        versions = [str(version) for version in sample.weight_versions]
        if len(sample.spans) > 1:
            versions = [f"{version} ({count(n, 'token')})" for version, n in sample.spans]
        rows.append(("weights", f"version {', '.join(versions[:6])}"))
    return rows


def _plain(sample: Sample) -> str:
    lines = [
        sample_title(sample),
        named(sample_facts(sample)),
        f"  prompt    {shorten(sample.prompt_text, 400)}",
        f"  response  {shorten(sample.response, 400)}",
    ]
    if sample.error:
        lines.append(f"  error     {shorten(sample.error, 400)}")
    if names := token_values.known(sample):
        values = token_values.require(sample, names[0])
        quantity = token_values.quantity(names[0], values)
        lines.append(strip_plain(sample, quantity, values, "  token by token"))
    return "\n".join(lines)


def strips(sample: Sample) -> dict[str, Callable[[], Child]]:
    """The quantities known of this sample's tokens, most telling first, and what draws each."""
    return {name: partial(_draw, sample, name) for name in token_values.known(sample)}


def _draw(sample: Sample, name: str) -> Child:
    values = token_values.require(sample, name)
    return strip(sample, token_values.quantity(name, values), values)
