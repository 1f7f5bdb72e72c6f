"""`RewardTrial`: what a reward would do, before it trains anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from markupsafe import Markup

from kit.reports import RewardDifference, RewardFailure, RewardTrial, Scoring
from kit.samples import Sample
from kit.utils.formatting import columns, count, cut, duration, mean, number, percent, shorten
from kit.viz.html import (
    Column,
    badge,
    bar,
    fold,
    join,
    long_text,
    note,
    number_bar,
    numeric,
    table,
    tag,
    title,
)
from kit.viz.render import register
from kit.viz.samples.rollout import heading
from kit.viz.samples.sample import sample_body, sample_title, strips
from kit.viz.svg import bins, histogram

SHOWN = 12
"""Samples written out in each table."""
MOST_FAILURES = 8
"""Messages written out, each with the traceback of its first sample."""
SHORT_RESPONSE = 64
"""Response tokens up to which a case shows its token strip too."""
_TRACEBACK_BYTES = 4_000


def _html(trial: RewardTrial) -> Markup:
    """Verdict, both rewards in numbers, distribution, failures, differences, slowest calls."""
    tried, against = trial.tried, trial.against
    names = (f"tried: {_name(tried)}", f"against: {_name(against)}")
    rewards = tried.rollout.rewards(), against.rollout.rewards()
    counted = bins(*rewards)
    return join(
        title(f"Reward {_name(tried)}, tried against {_name(against)}"),
        tag("div", badge(*_verdict(trial))),
        note(f"{heading(tried.rollout)}. Nothing was trained, and the session is as it was."),
        table(
            [Column("", "fit"), *numeric(*names), Column("", "hint")],
            ((words, *cells, hint) for words, cells, hint in _measures(trial)),
        ),
        histogram(counted, names) if counted else None,
        _failures(tried, "tried"),
        _failures(against, "against"),
        _differences(trial),
        _slowest(tried),
    )


def _plain(trial: RewardTrial) -> str:
    tried, against = trial.tried, trial.against
    lines = [
        f"Reward {_name(tried)}, tried against {_name(against)}: {_verdict(trial)[0]}",
        columns(
            [["", "tried", "against"], *([words, *cells] for words, cells, _ in _measures(trial))]
        ),
    ]
    for failure in (*tried.failures[:4], *against.failures[:2]):
        lines.append(f"  ✗ {count(len(failure.samples), 'sample')}: {shorten(failure.message, 90)}")
    rows = [
        [number(d.difference, 3), number(d.reward, 3), number(d.against, 3),
         shorten(d.sample.response, 50)]
        for d in trial.differences[:5]
    ]  # fmt: skip
    if rows:
        head = ["difference", "tried", "against", "response"]
        lines += ["  Largest differences:", columns([head, *rows], indent="    ")]
    return "\n".join(lines)


register(RewardTrial, _html, _plain)


# ---- in numbers --------------------------------------------------------------------------------


def _name(scoring: Scoring) -> str:
    return shorten(scoring.name, 40)


def _verdict(trial: RewardTrial) -> tuple[str, str]:
    """The most important finding: (words; good, warn or bad)."""
    samples, failed = len(trial.tried.rollout), len(trial.tried.rollout.failed())
    if not samples:
        return "! the rollout has no samples", "warn"
    if failed:
        return f"✗ it fails on {failed:,} of {count(samples, 'sample')}", "bad"
    groups, useful = len(trial.tried.rollout.groups()), trial.tried.groups_to_learn_from
    if not useful:
        return f"✗ none of {count(groups, 'group')} would teach anything", "bad"
    if useful * 2 < groups:
        return f"! only {useful:,} of {groups:,} groups would teach anything", "warn"
    return f"✓ it scores all {count(samples, 'sample')}", "good"


Row = tuple[str, tuple[str, str], str]
"""Of the comparison: name, (tried, against), why it matters."""


def _measures(trial: RewardTrial) -> list[Row]:
    groups = len(trial.tried.rollout.groups())

    def row(words: str, value: Callable[[Scoring], str], hint: str = "") -> Row:
        return words, (value(trial.tried), value(trial.against)), hint

    return [
        row("mean reward", lambda s: number(s.rollout.mean_reward(), 3)),
        row("from, to", _range),
        row("samples it failed on", lambda s: f"{len(s.rollout.failed()):,} of {len(s.rollout):,}"),
        row(
            "groups with zero variance",
            lambda s: f"{s.zero_variance_groups:,} of {groups:,}",
            "all rewards equal: nothing to learn",
        ),
        row(
            "groups left out",
            lambda s: f"{s.left_out_groups:,} of {groups:,}",
            "a sample has no reward, so the update leaves its group out",
        ),
        row("groups to learn from", lambda s: f"{s.groups_to_learn_from:,} of {groups:,}"),
        row("all calls took", lambda s: duration(s.seconds), "so long a training step would wait"),
    ]


def _range(scoring: Scoring) -> str:
    rewards = scoring.rollout.rewards()
    return f"{number(min(rewards), 3)} to {number(max(rewards), 3)}" if rewards else "–"


# ---- case by case ------------------------------------------------------------------------------


def _failures(scoring: Scoring, which: str) -> Markup | None:
    """Table of failures: each message once, with its source and the samples it affected."""
    if not scoring.failures:
        return None
    shown = scoring.failures[:MOST_FAILURES]
    more = len(scoring.failures) - len(shown)
    total = sum(len(failure.samples) for failure in scoring.failures)
    words = f"✗ Exceptions and wrong values of {_name(scoring)} ({which}): "
    return tag(
        "div",
        tag("b", words + count(total, "sample")),
        table(
            [Column("samples", "num"), Column("message, traceback, cases", "hint")],
            ([f"{len(failure.samples):,}", _failure(failure)] for failure in shown),
        ),
        note(f"… {count(more, 'more message')}") if more > 0 else None,
        class_="kv-group",
    )


def _failure(failure: RewardFailure) -> Markup:
    trace, missing = cut(failure.traceback, _TRACEBACK_BYTES)
    shown = tag("pre", "\n" + trace + (" …" if missing else ""), class_="kv-text")
    cases = failure.samples[: SHOWN // 3]
    left = len(failure.samples) - len(cases)
    numbers = ", ".join(str(sample.index) for sample in failure.samples[len(cases) :][:40])
    return join(
        tag("div", long_text(failure.message, 600, preview=400)),
        fold("traceback", shown) if trace else None,
        *(_case(sample) for sample in cases),
        note(f"… and samples {numbers}{' …' if left > 40 else ''}") if left else None,
    )


def _differences(trial: RewardTrial) -> Markup:
    differences = trial.differences
    both = sum(
        one.reward is not None and two.reward is not None
        for one, two in zip(trial.tried.rollout, trial.against.rollout, strict=True)
    )
    words = f"Differences: {len(differences):,} of {count(both, 'sample')} that both scored"
    pairs = trial.pairs_alike + trial.pairs_told_apart_by_one + trial.pairs_opposed
    order = (
        f"Within the groups, where only the order counts: of {count(pairs, 'pair')} "
        f"{percent(trial.pairs_alike / pairs)} are ordered alike, "
        f"{percent(trial.pairs_told_apart_by_one / pairs)} told apart by one reward only, "
        f"{percent(trial.pairs_opposed / pairs)} the other way round."
        if pairs
        else ""
    )
    return tag(
        "div",
        tag("b", words),
        note(order) if order else None,
        _difference_table(differences) if differences else None,
        class_="kv-group",
    )


def _difference_table(differences: Sequence[RewardDifference]) -> Markup:
    """Table of differences; equal responses to one prompt are one row, with their count."""
    alike = Counter(map(_what_differs, differences))
    first = {_what_differs(d): d for d in reversed(differences)}
    shown = [(first[key], amount) for key, amount in list(alike.items())[:SHOWN]]
    scale = abs(differences[0].difference)
    heads = numeric("difference", "tried", "against", "samples")
    rows = (
        [
            number_bar(d.difference, scale, signed=True),
            number(d.reward, 3),
            number(d.against, 3),
            f"{amount:,}",
            _case(d.sample),
        ]
        for d, amount in shown
    )
    left = len(differences) - sum(amount for _, amount in shown)
    return join(
        table([*heads, Column("prompt → response", "hint")], rows),
        note(f"… {count(left, 'more sample')}: .to_pandas() has all") if left else None,
    )


def _what_differs(d: RewardDifference) -> tuple[object, ...]:
    return d.sample.group_index, d.sample.response, d.reward, d.against


def _slowest(scoring: Scoring) -> Markup:
    calls = scoring.slowest()
    if not calls:
        words = f"One call scored all samples, in {duration(scoring.seconds)}."
        return tag("div", tag("b", "Slowest calls"), note(words), class_="kv-group")
    seconds = [taken for _, taken in calls]
    middle = seconds[len(seconds) // 2]
    words = f"Median {_fine(middle)}, mean {_fine(mean(seconds))}, slowest {_fine(seconds[0])}."
    rows = (
        [join(_fine(taken), bar(taken, seconds[0])), _case(sample)]
        for sample, taken in calls[: SHOWN // 2]
    )
    heads = [Column("took", "num"), Column("prompt → response", "hint")]
    return tag(
        "div",
        tag("b", f"Slowest of {count(len(calls), 'call')}"),
        note(words),
        table(heads, rows),
        class_="kv-group",
    )


def _fine(seconds: float) -> str:
    """A duration with microseconds; most calls would be 0 ms in `duration`."""
    if seconds >= 0.001:
        return duration(seconds)
    return f"{1e6 * seconds:.0f} µs" if seconds >= 1e-6 else "under 1 µs"


def _case(sample: Sample) -> Markup:
    """A line about a sample that unfolds to show it."""
    prompt, response = shorten(sample.prompt_text, 50), shorten(sample.response, 50)
    label = sample.label_text
    answer = f" (answer: {shorten(label, 30)})" if label is not None else ""
    body = sample_body(sample, prompt_bytes=600, response_bytes=3_000, preview=400)
    known = strips(sample) if sample.response_length <= SHORT_RESPONSE else {}
    drawn = [draw() for draw in list(known.values())[:1]]
    return fold(
        f"{prompt} → {response or 'nothing'}{answer}",
        tag("div", note(sample_title(sample)), body, *drawn, class_="kv-prompt"),
    )
