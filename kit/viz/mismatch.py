"""`MismatchReport`: do trainer and engine agree, where do they not, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from kit.reports import CurvePoint, MismatchReport, TokenDifference
from kit.viz.html import Child, Column, badge, drawing, fold, join, note, table, tag, title
from kit.viz.text import count, number, one_line, percent, shorten

VERDICTS = {"pass": ("✓ pass", "good"), "warn": ("! warn", "warn"), "fail": ("✗ fail", "bad")}
SIDE = 24
"""Characters of context on either side of a token."""
MOST_EVIDENCE = 30
WIDTH, HEIGHT = 360, 96
"""Of a curve, in CSS pixels."""


def verdict_badge(report: MismatchReport) -> Markup:
    """The verdict as a framed word with its sign."""
    return badge(*VERDICTS[report.verdict])


def mismatch_html(report: MismatchReport) -> Markup:
    """Verdict, cause and evidence, numbers against their thresholds, curves, the worst tokens."""
    heads = [Column("measure"), Column("value", "num"), Column("pass up to", "num")]
    heads.append(Column("fail above", "num"))
    rows = [
        [
            "mean |trainer - engine| log-prob",
            number(report.mean_abs_diff),
            number(report.warn_above),
            number(report.fail_above),
        ],
        *([name, value, "", ""] for name, value in _numbers(report)),
    ]
    kind = tag("b", f"{report.cause_kind.replace('_', ' ')}. ")
    return join(
        (
            title("Trainer against engine ", verdict_badge(report)),
            tag(
                "div",
                kind if report.cause_kind != "none" else None,
                shorten(report.cause, 2_000),
            )
            if report.cause
            else None,
            _evidence(report.evidence),
            table(heads, rows),
            note(f"{count(report.tokens, 'token')} compared; {versions(report)}"),
            _curves(report),
            _worst(report.worst) if report.worst else None,
        )
    )


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
    said: list[tuple[str, Sequence[CurvePoint], Callable[[CurvePoint], str]]] = [
        ("place in the response", report.by_position, _place),
        ("probability the engine gave", report.by_probability, _probability),
    ]
    drawn = [
        tag("div", tag("div", heading, class_="kv-muted"), _bars(points, heading, say))
        for heading, points, say in (
            (f"mean |difference| over the {name}", points, say) for name, points, say in said
        )
        if points
    ]
    return tag("div", *drawn, class_="kv-two") if drawn else None


def _place(point: CurvePoint) -> str:
    return f"place {number(point.low)}"


def _probability(point: CurvePoint) -> str:
    return f"{number(point.low)} to {number(point.high)}"


def _bars(points: Sequence[CurvePoint], heading: str, say: Callable[[CurvePoint], str]) -> Markup:
    """One bar a point, as SVG; the largest is written over them."""
    values = [p.mean_abs_diff if math.isfinite(p.mean_abs_diff) else math.nan for p in points]
    top = max((v for v in values if not math.isnan(v)), default=0.0)
    step = WIDTH / len(points)
    floor, room = HEIGHT - 16, HEIGHT - 32
    bars: list[Child] = []
    for place, value in enumerate(values):
        missing = math.isnan(value)
        size = room if missing else max(room * value / top, 0.5) if top else 0.5
        colour = "track" if missing else "curve"
        bars.append(
            tag(
                "rect",
                x=f"{place * step + 0.1 * step:.1f}",
                y=f"{floor - size:.1f}",
                width=f"{0.8 * step:.1f}",
                height=f"{size:.1f}",
                style=f"fill:var(--kv-{colour})",
            )
        )
    spoken = "; ".join(
        f"{say(p)}: {number(v)}" for p, v in list(zip(points, values, strict=True))[:8]
    )
    svg = tag(
        "svg",
        _label(number(top), 0, 11, "start"),
        *bars,
        _label(say(points[0]), 0, HEIGHT - 3, "start"),
        _label(say(points[-1]), WIDTH, HEIGHT - 3, "end") if len(points) > 1 else None,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=str(WIDTH),
        height=str(HEIGHT),
    )
    return drawing(svg, f"{heading}: {spoken}")


def _label(words: str, x: int, y: int, anchor: str) -> Markup:
    style = f"fill:var(--kv-muted);font-size:10.5px;text-anchor:{anchor}"
    return tag("text", words, x=str(x), y=str(y), style=style)


# ---- the worst tokens ----------------------------------------------------------------------------


def in_context(worst: TokenDifference) -> tuple[str, str]:
    """The token between its neighbours, and a line of carets that points at it."""
    before, after = one_line(worst.before)[-SIDE:], one_line(worst.after)[:SIDE]
    token = shorten(worst.token, SIDE).replace(" ", "␣") or "∅"
    return before + token + after, " " * len(before) + "^" * len(token)


def _worst(worst: tuple[TokenDifference, ...]) -> Markup:
    heads = [
        Column("token in its context"),
        Column("sample", "num"),
        Column("position", "num"),
        Column("engine", "num"),
        Column("trainer", "num"),
        Column("difference", "num"),
    ]
    rows = [
        [
            tag("pre", "\n" + "\n".join(in_context(w)), class_="kv-text"),
            str(w.sample_index),
            str(w.position),
            number(w.rollout_log_prob),
            number(w.train_log_prob),
            f"{w.difference:+.3g}",
        ]
        for w in worst[:20]
    ]
    return join(
        (tag("div", "the tokens that differ most", class_="kv-caption"), table(heads, rows))
    )


# ---- for a terminal ------------------------------------------------------------------------------


def mismatch_plain(report: MismatchReport) -> str:
    """The same for a terminal."""
    shares = "   ".join(f"{_share(s)} within {number(v)}" for s, v in report.quantiles.items())
    low, high = report.ratio_range
    lines = [
        f"Trainer against engine: {VERDICTS[report.verdict][0]}",
        f"  mean |difference| {number(report.mean_abs_diff)}   "
        f"(warns above {number(report.warn_above)}, fails above {number(report.fail_above)})   "
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
        text, carets = in_context(w)
        lines.append(f"  sample {w.sample_index}, position {w.position}: {w.difference:+.3g}")
        lines += [f"      {text}", f"      {carets}"]
    return "\n".join(line for line in lines if line)


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
