"""`Sample` as a person reads it, with a strip of its tokens coloured by how sure the engine was."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.samples import Sample
from kit.viz.html import Bundle, bundle, facts, join, long_text, note, page, spaced, tag, title
from kit.viz.rollouts import STATUS_SIGNS, prompt_html
from kit.viz.text import count, number, one_line, percent, shorten

MOST_CHIPS = 600
"""Tokens drawn in one strip; what is over is counted in words."""

BINS = ((0.9, "over 90%"), (0.5, "50–90%"), (0.1, "10–50%"), (0.01, "1–10%"), (0.0, "under 1%"))
"""Probability classes of a token, sure to surprising: the lower end of each, and its words."""


def show_sample(sample: Sample) -> Bundle:
    """HTML and plain text of one sample: prompt, response, reward, token strip."""
    error = note(f"✗ the reward failed: {shorten(sample.error, 400)}") if sample.error else None
    html = page(
        title(f"Sample {sample.index} of prompt {sample.group_index}"),
        facts(sample_facts(sample)),
        error,
        tag("span", "prompt", class_="kv-muted"),
        prompt_html(sample, 8_000),
        tag("span", "response", class_="kv-muted"),
        tag("div", long_text(sample.response, 60_000, preview=2_000), class_="kv-prompt"),
        token_strip(sample),
    )
    return bundle(html, _plain(sample))


def sample_facts(sample: Sample) -> list[tuple[str, str]]:
    """The headline numbers of a sample, as (name, value)."""
    reward = "not scored" if sample.reward is None else number(sample.reward)
    rows = [("reward", reward)]
    if sample.label is not None:
        rows.append(("right answer", shorten(sample.label, 60)))
    rows.append(("status", STATUS_SIGNS[sample.status]))
    rows.append(("response", count(sample.response_length, "token")))
    if log_probs := _finite(sample.rollout_log_probs or ()):
        rows.append(("mean log-prob", number(sum(log_probs) / len(log_probs), 3)))
    if sample.loss_mask is not None:
        rows.append(("trained on", count(sum(sample.loss_mask), "token")))
    if sample.weight_versions:
        versions = [str(version) for version in sample.weight_versions]
        if len(sample.spans) > 1:
            versions = [f"{version} ({count(n, 'token')})" for version, n in sample.spans]
        rows.append(("weights", f"version {', '.join(versions[:6])}"))
    return rows


def token_texts(sample: Sample) -> list[str]:
    """What each response token says, as far as the sample knows.

    From `metadata["token_texts"]`, else letter by letter where the response has as many letters
    as tokens, else the token ids.
    """
    given = sample.metadata.get("token_texts")
    if isinstance(given, Sequence) and len(given) == sample.response_length:
        return [str(text) for text in given]
    if sample.response_length and len(sample.response) == sample.response_length:
        return list(sample.response)
    return [str(token) for token in sample.response_tokens] if sample.response_length else []


def token_strip(sample: Sample) -> Markup | None:
    """One chip per response token, or None for an empty response."""
    texts = token_texts(sample)
    if not texts:
        return None
    log_probs: Sequence[float] = sample.rollout_log_probs or ()
    mask = sample.mask
    shown = min(len(texts), MOST_CHIPS)
    chips = [
        _chip(
            position,
            texts[position],
            sample.response_tokens[position] if position < len(sample.response_tokens) else None,
            log_probs[position] if position < len(log_probs) else None,
            trained=position >= len(mask) or bool(mask[position]),
        )
        for position in range(shown)
    ]
    left = len(texts) - shown
    return join(
        (
            tag("div", "tokens, by the probability the engine gave each", class_="kv-muted"),
            _legend(log_probs, untrained=0 in mask),
            tag("div", *chips, class_="kv-strip"),
            note(f"… {count(left, 'more token')} not shown here") if left else None,
        )
    )


def surprise(log_prob: float) -> int:
    """The class of a log-probability in `BINS`: 0 is sure, 4 surprising."""
    probability = math.exp(min(log_prob, 0.0))
    return next(i for i, (low, _) in enumerate(BINS) if probability >= low)


def _chip(
    position: int, text: str, token: int | None, log_prob: float | None, trained: bool
) -> Markup:
    words = [f"token {position}"]
    if token is not None:
        words.append(f"id {token}")
    kind = "kv-chip"
    if log_prob is not None and not math.isnan(log_prob):
        chance = percent(math.exp(min(log_prob, 0.0)))
        words.append(f"log-prob {number(log_prob)} (probability {chance})")
        kind += f" kv-p{surprise(log_prob)}"
    if not trained:
        words.append("not trained on")
        kind += " kv-masked"
    letters = one_line(text[:60]).replace(" ", "␣") + ("…" if len(text) > 60 else "")
    return tag("span", letters or "∅", class_=kind, title=", ".join(words))


def _legend(log_probs: Sequence[float], untrained: bool) -> Markup:
    counts = [0] * len(BINS)
    for log_prob in log_probs:
        if not math.isnan(log_prob):
            counts[surprise(log_prob)] += 1
    entries = [
        tag("span", tag("span", str(counts[i]), class_=f"kv-chip kv-p{i}"), f" {words}")
        for i, (_, words) in enumerate(BINS)
    ]
    if not any(counts):
        entries = [tag("span", "the engine gave no log-probabilities")]
    if untrained:
        entries.append(tag("span", tag("span", "a", class_="kv-chip kv-masked"), " not trained on"))
    return tag("div", spaced(entries), class_="kv-legend")


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _plain(sample: Sample) -> str:
    numbers = "   ".join(f"{name} {value}" for name, value in sample_facts(sample))
    lines = [
        f"Sample {sample.index} of prompt {sample.group_index}",
        f"  {numbers}",
        f"  prompt    {shorten(sample.prompt_text, 400)}",
        f"  response  {shorten(sample.response, 400)}",
    ]
    if sample.error:
        lines.append(f"  error     {shorten(sample.error, 400)}")
    return "\n".join(lines)
