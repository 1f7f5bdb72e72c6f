"""`EvalReport`: mean reward on held-out prompts, or accuracy with its interval, and examples."""

from __future__ import annotations

import math
from collections import Counter

from markupsafe import Markup

from kit.reports import EvalReport
from kit.samples import Rollout, Sample
from kit.utils.formatting import columns, count, duration, mean, named, number, percent, shorten
from kit.viz.html import Child, Column, bar, facts, fold, join, long_text, note, table, tag, title
from kit.viz.render import register
from kit.viz.samples.alike import answers_cell, commonest
from kit.viz.samples.rollout import prompt_html
from kit.viz.svg import bars, side_by_side

_ALIKE = (
    "The interval takes responses as independent. Those to one prompt are alike, so the true "
    "interval is wider."
)
MOST_BARS = 64
SHOWN_EACH = 4
"""Prompts shown of those that are right, and of those that are wrong."""


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion `share` seen in `n` tries; 95% by default.

    Unlike the normal interval it stays inside [0, 1] and is honest at 0 and 1 (Wilson, 1927).
    """
    if n <= 0 or math.isnan(share):
        return math.nan, math.nan
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def interval(report: EvalReport) -> tuple[float, float] | None:
    """The 95% interval of an accuracy, or None where rewards are not all 0 or 1."""
    share = report.accuracy
    return None if share is None else wilson(share, len(report.rollout.rewards()))


def eval_number(report: EvalReport) -> str:
    """Accuracy in percent, or the mean of graded rewards as a number."""
    share = report.accuracy
    return f"mean reward {number(report.mean_reward)}" if share is None else percent(share)


def eval_headline(report: EvalReport) -> str:
    """`62.5% (95% interval 48.4% to 74.8%)`, or the plain mean of graded rewards."""
    between = interval(report)
    if between is None:
        return eval_number(report)
    low, high = map(percent, between)
    return f"{eval_number(report)} (95% interval {low} to {high})"


def sets_headline(report: EvalReport) -> str:
    """The headline of an evaluation, or the number of each of several held-out sets."""
    if not report.others:
        return eval_headline(report)
    return ", ".join(f"{shorten(n, 40)} {eval_number(one)}" for n, one in report.sets.items())


def _eval_facts(report: EvalReport) -> list[tuple[str, str]]:
    how = "greedy" if report.temperature == 0 else f"temperature {number(report.temperature)}"
    rows = [
        ("prompts", f"{report.prompts:,}"),
        ("responses each", f"{report.n_samples_per_prompt:,}"),
        ("decoding", how),
        ("took", duration(report.seconds)),
    ]
    if report.left_out:
        rows.append(("reward failed", count(report.left_out, "response")))
    return rows


def _title(report: EvalReport) -> str:
    """`Evaluation at step 3 on addition`."""
    return f"Evaluation at step {report.step} on {shorten(report.dataset, 60)}"


def eval_html(report: EvalReport) -> Markup:
    """Accuracy with its interval, pass@k, and a few prompts that went right and wrong."""
    if report.others:
        sets = report.sets.values()
        rows: list[list[Child]] = [
            [shorten(one.dataset, 60), eval_headline(one), f"{one.prompts:,}"] for one in sets
        ]
        heads = [Column("held-out set"), Column("result"), Column("prompts", "num")]
        each = [fold(shorten(one.dataset, 60), eval_html(one)) for one in sets]
        return join(title(f"Evaluation at step {report.step}"), table(heads, rows), *each)
    right_or_wrong = report.accuracy is not None
    share = bar(report.mean_reward, 1.0) if right_or_wrong else None
    return join(
        title(_title(report)),
        tag("div", tag("b", eval_headline(report)), share),
        facts(_eval_facts(report)),
        note(_ALIKE) if right_or_wrong and report.n_samples_per_prompt > 1 else None,
        side_by_side(_histogram(report)),
        _pass_at_k(report),
        _examples(report),
    )


def _pass_at_k(report: EvalReport) -> Child:
    if not report.pass_at_k:
        return None
    ks = sorted(report.pass_at_k)
    rows = [[f"pass@{k}", percent(report.pass_at_k[k]), bar(report.pass_at_k[k], 1.0)] for k in ks]
    return table([Column("", "fit"), Column("share", "num"), Column("")], rows[:20])


def _histogram(report: EvalReport) -> list[Markup]:
    """How many prompts have so many right responses: those in the middle can be learned from."""
    several = report.n_samples_per_prompt
    if several < 2 or several > MOST_BARS or interval(report) is None:
        return []
    right = Counter(
        sum(s.reward == 1 for s in group)
        for group in report.rollout.groups()
        if len(group) == several and all(s.reward is not None for s in group)
    )
    points = [(str(n), float(right[n])) for n in range(several + 1)]
    return [bars(points, f"prompts by how many of their {several} responses are right")]


Group = list[Sample]
"""The scored responses to one prompt."""


def right_and_wrong(rollout: Rollout) -> tuple[list[Group], list[Group]]:
    """The prompts whose responses all have reward 1, and the others that were scored."""
    scored = ([s for s in group if s.reward is not None] for group in rollout.groups())
    groups = [group for group in scored if group]
    right = [group for group in groups if all(sample.reward == 1 for sample in group)]
    return right, [group for group in groups if any(sample.reward != 1 for sample in group)]


def worst_and_best(rollout: Rollout, most: int) -> tuple[list[Group], list[Group]]:
    """The scored prompts of least reward, and those of most, for rewards that are not 0 or 1."""
    scored = ([s for s in group if s.reward is not None] for group in rollout.groups())
    groups = sorted((group for group in scored if group), key=_mean_reward)
    half = min(most, len(groups) // 2)
    return groups[: max(half, 1)], groups[len(groups) - half :][::-1]


def _examples(report: EvalReport) -> Markup | None:
    if interval(report) is None:
        both = zip(("least", "most"), worst_and_best(report.rollout, SHOWN_EACH), strict=True)
        folds = [
            fold(f"the {count(len(groups), 'prompt')} of {words} reward", _example_table(groups),
                 is_open=True)
            for words, groups in both if groups
        ]  # fmt: skip
        return join(*folds) if folds else None
    right, wrong = right_and_wrong(report.rollout)
    parts = []
    several = report.n_samples_per_prompt > 1
    names = ("✗ not always right", "✓ right every time") if several else ("✗ not right", "✓ right")
    for words, groups in zip(names, (wrong, right), strict=True):
        if groups:
            shown = f", the first {SHOWN_EACH} shown" if len(groups) > SHOWN_EACH else ""
            summary = f"{words}: {count(len(groups), 'prompt')}{shown}"
            parts.append(fold(summary, _example_table(groups[:SHOWN_EACH]), is_open=True))
    return join(*parts) if parts else None


def _example_table(groups: list[Group]) -> Markup:
    several = any(len(group) > 1 for group in groups)
    heads = [Column("prompt"), Column("responses" if several else "response")]
    heads += [Column("right answer"), Column("mean reward" if several else "reward", "num")]
    rows: list[list[Child]] = [
        [
            prompt_html(group[0], 2_000),
            answers_cell(group, 4_000),
            long_text(group[0].label_text or "–", 500),
            number(_mean_reward(group), 3),
        ]
        for group in groups
    ]
    return table(heads, rows)


def _mean_reward(group: Group) -> float:
    return mean([sample.reward for sample in group if sample.reward is not None])


def _plain(report: EvalReport) -> str:
    if report.others:
        return "\n".join(_plain(one) for one in report.sets.values())
    lines = [
        f"{_title(report)}: {eval_headline(report)}",
        named(_eval_facts(report)),
    ]
    if report.pass_at_k:
        shares = (f"pass@{k} {percent(report.pass_at_k[k])}" for k in sorted(report.pass_at_k))
        lines.append("  " + "   ".join(shares))
    if interval(report) is None:
        signs, examples = ("▼", "▲"), worst_and_best(report.rollout, 3)
    else:
        right, wrong = right_and_wrong(report.rollout)
        signs, examples = ("✗", "✓"), (wrong, right)
    rows = [
        [
            sign,
            shorten(group[0].prompt_text, 40),
            commonest(group, 30),
            f"answer {shorten(group[0].label_text or '–', 20)}",
        ]
        for sign, groups in zip(signs, examples, strict=True)
        for group in groups[:3]
    ]
    return "\n".join([*lines, columns(rows)] if rows else lines)


register(EvalReport, eval_html, _plain)
