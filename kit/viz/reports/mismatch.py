"""`MismatchReport`: how far trainer and engine agree, where they do not, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.reports import CurvePoint, MismatchReport, TokenDifference
from kit.utils.formatting import count, number, percent, pointed_at, shorten
from kit.viz.html import Child, Column, badge, fold, join, note, numeric, quiet, table, tag, title
from kit.viz.render import register
from kit.viz.samples.strip import CONTEXT
from kit.viz.svg import bars, side_by_side

VERDICTS = {"pass": ("✓ pass", "good"), "warn": ("! warn", "warn"), "fail": ("✗ fail", "bad")}
EXPECT = {
    "largest": "some tens of the mean; far more is a few tokens gone wrong",
    "KL, nats a token (k1)": "near 0, of either sign",
    "KL, nats a token (k3)": "near 0, never below",
    "ratio trainer / engine, from": "near 1",
    "ratio trainer / engine, to": "near 1",
    "effective sample size": "near 100%",
}
"""What a measure is where both sides agree."""
SIDE = 24
"""Characters of context on either side of a token."""
MOST_EVIDENCE = 30


EXACT = ("✓ exact", "good")


def verdict_words(report: MismatchReport) -> tuple[str, str]:
    """The verdict as a word with its sign, and its tone; `exact` where no bit differs."""
    return EXACT if report.exact else VERDICTS[report.verdict]


def verdict_badge(report: MismatchReport) -> Markup:
    """The verdict as a framed word with its sign."""
    return badge(*verdict_words(report))


def mismatch_html(report: MismatchReport) -> Markup:
    """Verdict, cause and evidence, numbers against their thresholds, curves, the worst tokens."""
    heads = [Column("", "fit"), Column("measure", "name"), Column("value", "num")]
    heads += [
        Column("pass up to", "num"),
        Column("fail above", "num"),
        Column("what it should be", "hint"),
    ]
    rows: list[list[Child]] = [
        [
            _mark(report),
            "mean |trainer - engine| log-prob",
            number(report.mean_abs_diff),
            number(report.warn_above),
            number(report.fail_above),
            quiet(
                "about 1e-6 in float32, 0.01 in bfloat16"
                if report.warn_above
                else "0 to the bit, as training.true_on_policy promises"
            ),
        ]
    ]
    for name, value in _numbers(report):
        rows.append(["", name, value, "", "", quiet(EXPECT.get(name, ""))])
    named = report.cause_kind.replace("_", " ")
    kind = tag("b", f"{named}. ") if named != "none" else None
    return join(
        title("Trainer against engine ", verdict_badge(report)),
        tag("div", kind, shorten(report.cause, 2_000)) if report.cause else None,
        _evidence(report.evidence),
        table(heads, rows),
        note(f"{count(report.tokens, 'token')} compared; {versions(report)}"),
        _curves(report),
        _worst(report.worst) if report.worst else None,
    )


def _mark(report: MismatchReport) -> str:
    """How the mean stands to its own thresholds; the verdict looks at more."""
    if report.mean_abs_diff <= report.warn_above:
        return "✓"
    return "!" if report.mean_abs_diff <= report.fail_above else "✗"


def _numbers(report: MismatchReport) -> list[tuple[str, str]]:
    low, high = report.ratio_range
    return [
        *(
            (f"{_share(share)} of the tokens are within", number(value))
            for share, value in report.quantiles.items()
        ),
        ("largest", number(report.max_abs_diff)),
        ("KL, nats a token (k1)", number(report.kl_k1)),
        ("KL, nats a token (k3)", number(report.kl_k3)),
        ("ratio trainer / engine, from", number(low, 6)),
        ("ratio trainer / engine, to", number(high, 6)),
        ("effective sample size", percent(report.effective_sample_size)),
    ]


def _share(share: float) -> str:
    return f"{100 * share:g}%"


def _evidence(lines: Sequence[str]) -> Markup | None:
    if not lines:
        return None
    items = [tag("li", shorten(line, 300)) for line in lines[:MOST_EVIDENCE]]
    return fold("what was looked at, and what was found", tag("ul", *items), is_open=True)


def versions(report: MismatchReport) -> str:
    """Which weights wrote the rollout and which judged it."""
    wrote = ", ".join(map(str, report.rollout_versions[:8])) or "unknown"
    return (
        f"rollout written by weights version {wrote}, trainer at version {report.trainer_version}"
    )


# ---- curves --------------------------------------------------------------------------------------


def _curves(report: MismatchReport) -> Markup | None:
    drawn = []
    for name, words, points in (
        ("place in the response", "place {low}", report.by_position),
        ("probability the engine gave", "{low} to {high}", report.by_probability),
    ):
        shown = [
            (words.format(low=number(p.low), high=number(p.high)), p.mean_abs_diff) for p in points
        ]
        if shown:
            drawn.append(bars(shown, f"mean |difference| over the {name}"))
    return side_by_side(drawn)


# ---- the worst tokens ----------------------------------------------------------------------------


def _in_context(worst: TokenDifference) -> tuple[str, str]:
    return pointed_at(worst.before, worst.token, worst.after, SIDE)


def _worst(worst: tuple[TokenDifference, ...]) -> Markup:
    numbers = numeric("sample", "position", "engine", "trainer", "difference")
    rows = [
        [
            tag("pre", "\n" + "\n".join(_in_context(w)), class_=CONTEXT),
            str(w.sample_index),
            str(w.position),
            number(w.rollout_log_prob),
            number(w.train_log_prob),
            f"{w.difference:+.3g}",
        ]
        for w in worst[:20]
    ]
    return join(
        tag("div", "the tokens that differ most", class_="kv-caption"),
        table([Column("token in its context"), *numbers], rows),
    )


# ---- for a terminal ------------------------------------------------------------------------------


def _plain(report: MismatchReport) -> str:
    shares = "   ".join(f"{_share(s)} within {number(v)}" for s, v in report.quantiles.items())
    low, high = report.ratio_range
    limits = f"warns above {number(report.warn_above)}, fails above {number(report.fail_above)}"
    if not report.fail_above:
        limits = "true_on_policy: 0 to the bit"
    lines = [
        f"Trainer against engine: {verdict_words(report)[0]}",
        f"  mean |difference| {number(report.mean_abs_diff)}   "
        f"({limits})   "
        f"largest {number(report.max_abs_diff)}",
        f"  {shares}" if shares else "",
        f"  KL k1 {number(report.kl_k1)}   k3 {number(report.kl_k3)}   "
        f"ratio {number(low, 6)} to {number(high, 6)}   "
        f"effective sample size {percent(report.effective_sample_size)}",
        f"  {count(report.tokens, 'token')}; {versions(report)}",
    ]
    if report.cause:
        lines.append(f"  {shorten(report.cause, 500)}")
    lines += [f"    - {shorten(line, 200)}" for line in report.evidence[:MOST_EVIDENCE]]
    lines += _curve_plain("by position", report.by_position)
    lines += _curve_plain("by probability", report.by_probability)
    for w in report.worst[:5]:
        text, carets = _in_context(w)
        lines.append(f"  sample {w.sample_index}, position {w.position}: {w.difference:+.3g}")
        lines += [f"      {text}", f"      {carets}"]
    return "\n".join(line for line in lines if line)


register(MismatchReport, mismatch_html, _plain)


BLOCKS = "▁▂▃▄▅▆▇█"


def _curve_plain(name: str, points: Sequence[CurvePoint]) -> list[str]:
    """A row of blocks, one a point, between the first and the last point's ends."""
    if not points:
        return []
    finite = [p.mean_abs_diff for p in points if math.isfinite(p.mean_abs_diff)]
    top = max(finite, default=0.0)
    blocks = "".join(
        "?"
        if not math.isfinite(p.mean_abs_diff)
        else BLOCKS[min(int(8 * p.mean_abs_diff / top), 7) if top else 0]
        for p in points
    )
    first, last = number(points[0].low), number(points[-1].high)
    return [f"  {name}, {first} to {last}: {blocks} (up to {number(top)})"]
