"""Two rollouts of the same prompts side by side: what training changed, one prompt at a time.

Where both were annotated, also which tokens gained and which lost probability.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from kit.samples import Rollout, Sample, token_values
from kit.utils.display import Picture
from kit.utils.formatting import columns, count, letters, mean, named, number, percent, shorten
from kit.viz.html import (
    Child,
    Column,
    bar,
    facts,
    fold,
    join,
    note,
    number_bar,
    numeric,
    page,
    quiet,
    table,
    tag,
    title,
)
from kit.viz.samples.alike import alike, answers_cell, commonest, times
from kit.viz.samples.rollout import answer_html, prompt_html, reward_scale
from kit.viz.samples.strip import CONTEXT, chips_alone, in_context

_FIRST = "Shown is the commonest response to each prompt; the reward is the mean over all of them."
_COLOURS = (
    "Tokens with a thick upper edge, blue, gained probability in the update; those with a thick "
    "lower edge, orange, lost."
)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The samples of one prompt in both rollouts."""

    before: list[Sample]
    after: list[Sample]

    @property
    def change(self) -> str:
        first, second = _reward(self.before), _reward(self.after)
        if math.isnan(first) or math.isnan(second):
            return "– not scored"
        return "▲ better" if second > first else "▼ worse" if second < first else "= same"


def compare_samples(before: Rollout, after: Rollout, n: int = 8) -> Picture:
    """The first `n` prompts that both rollouts hold, in their order, with rewards.

    Prompts are the same where their text is. Equal responses to a prompt are shown once, with
    their count, the commonest first; the reward is the mean over all of them. The counts above the
    table are over all prompts that both hold, not only those shown. Under it, the tokens whose
    probability moved most, of samples that were annotated with the weights before and after.
    """
    pairs, alone = _pairs(before, after)
    moved = moves(before, after)
    words = f"Before and after: {count(len(pairs), 'prompt')} in both"
    changes = [pair.change for pair in pairs]
    tallies = [
        ("mean reward before", number(mean([_reward(p.before) for p in pairs]), 3)),
        ("after", number(mean([_reward(p.after) for p in pairs]), 3)),
        *((name, str(changes.count(name))) for name in ("▲ better", "= same", "▼ worse")),
    ]
    left = note(f"{count(alone, 'prompt')} only in one of the two") if alone else None
    more = note(f"… {count(len(pairs) - n, 'more prompt')}") if len(pairs) > n else None
    shown = _table(pairs[:n]) if pairs else None
    striped = any(_changed(s) for p in pairs[:n] for s in (p.before[0], p.after[0]))
    more = join(more, note(_COLOURS)) if striped else more
    html = page(title(words), facts(tallies), left, shown, more, moved_html(moved))
    return Picture(html, "\n".join((_plain(words, tallies, pairs[:n]), moved_plain(moved))))


def _pairs(before: Rollout, after: Rollout) -> tuple[list[_Pair], int]:
    """The prompts in both, and how many are in only one."""
    first, second = _by_prompt(before), _by_prompt(after)
    pairs = [_Pair(samples, second[key]) for key, samples in first.items() if key in second]
    return pairs, len(first.keys() ^ second.keys())


def _by_prompt(rollout: Rollout) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in rollout:
        groups.setdefault(sample.prompt_text, []).append(sample)
    return groups


def _reward(samples: Sequence[Sample]) -> float:
    return mean([s.reward for s in samples if s.reward is not None])


def _table(pairs: Sequence[_Pair]) -> Child:
    samples = [s for pair in pairs for s in (*pair.before, *pair.after)]
    scale = reward_scale([s.reward for s in samples if s.reward is not None])
    heads = [Column("prompt"), Column("before"), Column("after"), Column("change", "fit")]
    limit = min(max(200_000 // max(len(pairs), 1) // 3, 200), 3_000)

    def cell(group: list[Sample]) -> Child:
        reward = _reward(group)
        bar = number_bar(None if math.isnan(reward) else reward, *scale)
        shown = tag("div", bar, class_="kv-line")
        several = tag("div", quiet(f"mean of {len(group)}")) if len(group) > 1 else None
        return join(_response(group, limit), shown, several)

    rows = [
        [
            join(prompt_html(p.before[0], limit), answer_html(p.before[0])),
            cell(p.before),
            cell(p.after),
            p.change,
        ]
        for p in pairs
    ]
    return table(heads, rows)


def _response(group: Sequence[Sample], limit: int) -> Child:
    """The responses, equal ones once; or the first, where the change of its tokens is known."""
    if _changed(group[0]):
        first = alike(group)[0]
        counted = tag("b", f"{times(len(first))}") if len(first) > 1 else None
        return join(counted, chips_alone(group[0], "change", most=max(limit // 60, 10)))
    return answers_cell(group, limit)


def _changed(sample: Sample) -> bool:
    return "change" in token_values.known(sample)


def _plain(words: str, tallies: Sequence[tuple[str, str]], pairs: Sequence[_Pair]) -> str:
    rows = [
        [
            shorten(pair.before[0].prompt_text, 30),
            commonest(pair.before, 24),
            number(_reward(pair.before), 3),
            "→",
            commonest(pair.after, 24),
            number(_reward(pair.after), 3),
            pair.change,
        ]
        for pair in pairs
    ]
    several = any(len(p.before) > 1 or len(p.after) > 1 for p in pairs)
    lines = [words, named(tallies)]
    if several:
        lines.append(f"  {_FIRST}")
    return "\n".join([*lines, columns(rows)] if rows else lines)


MOST = 8
"""Tokens listed of those that gained, and of those that lost."""
NEW, OLD = "trainer_log_prob", "trainer_log_prob_before"
HOW = (
    "To see which tokens gained and lost probability, annotate the same rollout with the weights "
    "before and after: before = session.annotate(rollout), an update, after = "
    "session.annotate(before), kit.compare(before, after)."
)


@dataclass(frozen=True, slots=True)
class Move:
    """One token, and its log-prob under both sets of weights."""

    sample: Sample
    position: int
    old: float
    new: float

    @property
    def change(self) -> float:
        """New minus old, in nats."""
        return self.new - self.old

    @property
    def context(self) -> tuple[int, ...]:
        """The token and all before it, the prompt included: what its probability depends on."""
        prompt = len(self.sample.tokens) - self.sample.response_length
        return tuple(self.sample.tokens[: prompt + self.position + 1])


@dataclass(slots=True)
class Moves:
    """How many tokens moved and how far, and the few that moved most."""

    tokens: int = 0
    gained: int = 0
    lost: int = 0
    total: float = 0.0
    up: list[Move] = field(default_factory=list)
    """The largest gains, the largest first; a beginning that samples share is in it once."""
    down: list[Move] = field(default_factory=list)
    """The largest losses, likewise."""
    kinds: list[tuple[str, int, float]] = field(default_factory=list)
    """By token: its text, how often it was written, and its mean change; most moved first."""

    def __bool__(self) -> bool:
        return self.tokens > 0


def moves(before: Rollout, after: Rollout) -> Moves:
    """Tokens that moved, of samples annotated with two sets of weights.

    Those are samples that both rollouts hold, annotated with different weights, and samples of
    either that were annotated twice.
    """
    moved = Moves()
    sums: dict[str, tuple[int, float]] = {}
    for sample, old, new in _token_pairs(before, after):
        changes = [y - x if math.isfinite(y - x) else 0.0 for x, y in zip(old, new, strict=True)]
        moved.tokens += len(changes)
        moved.gained += sum(change > 0 for change in changes)
        moved.lost += sum(change < 0 for change in changes)
        moved.total += sum(changes)
        for text, change in zip(token_values.texts(sample), changes, strict=True):
            times, total = sums.get(text, (0, 0.0))
            sums[text] = (times + 1, total + change)
        own = [Move(sample, i, old[i], new[i]) for i in _extremes(changes)]
        moved.up = _first_of_each([*moved.up, *own], lambda move: -move.change)
        moved.down = _first_of_each([*moved.down, *own], lambda move: move.change)
    moved.up = [move for move in moved.up if move.change > 0]
    moved.down = [move for move in moved.down if move.change < 0]
    largest = heapq.nlargest(MOST, sums.items(), key=lambda item: abs(item[1][1]))
    moved.kinds = [(text, times, total / times) for text, (times, total) in largest]
    return moved


def _first_of_each(moved: list[Move], key: Callable[[Move], float]) -> list[Move]:
    """The first few by this key. Samples that begin alike have tokens in common: listed once."""
    seen: dict[tuple[int, ...], Move] = {}
    for move in sorted(moved, key=key):
        seen.setdefault(move.context, move)
        if len(seen) == MOST:
            break
    return list(seen.values())


def _extremes(changes: Sequence[float]) -> set[int]:
    """Positions of the largest gains and losses; others can be among no sample's most moved."""
    places = range(len(changes))
    up = heapq.nlargest(MOST, places, key=changes.__getitem__)
    return {*up, *heapq.nsmallest(MOST, places, key=changes.__getitem__)}


def _token_pairs(
    before: Rollout, after: Rollout
) -> Iterator[tuple[Sample, Sequence[float], Sequence[float]]]:
    """Each sample whose log-probs are known under two sets of weights, once: (it, old, new)."""
    first = {_key(s): s for s in before if NEW in s.token_values}
    seen = set()
    for sample in after:
        other = first.get(_key(sample))
        if other is None or NEW not in sample.token_values:
            continue
        if other.annotated_versions[-1:] != sample.annotated_versions[-1:]:
            seen.add(_key(sample))
            yield sample, other.token_values[NEW], sample.token_values[NEW]
    for sample in (*after, *before):
        values = sample.token_values
        if OLD in values and NEW in values and _key(sample) not in seen:
            seen.add(_key(sample))
            yield sample, values[OLD], values[NEW]


def _key(sample: Sample) -> tuple[object, ...]:
    return (sample.group_index, sample.index, *sample.tokens)


def moved_html(moved: Moves) -> Markup:
    """The tokens that moved most, in their context, and the same by token; else how to see them."""
    if not moved:
        return note(HOW)
    numbers = [
        ("tokens compared", f"{moved.tokens:,}"),
        ("▲ gained", f"{moved.gained:,}"),
        ("▼ lost", f"{moved.lost:,}"),
        ("mean change, nats a token", f"{moved.total / moved.tokens:+.3g}"),
    ]
    top = max((abs(move.change) for move in (*moved.up, *moved.down)), default=1.0)
    return tag(
        "div",
        title("Probability of the same tokens, before and after"),
        facts(numbers),
        _listed("▲ gained most", moved.up, top),
        _listed("▼ lost most", moved.down, top),
        _by_kind(moved.kinds),
        class_="kv-group",
    )


def _listed(heading: str, listed: Sequence[Move], top: float) -> Markup | None:
    if not listed:
        return None
    numbers = numeric("sample", "position", "before", "after", "change, nats")
    rows: list[list[Child]] = [
        [
            tag("pre", "\n" + "\n".join(in_context(move.sample, move.position)), class_=CONTEXT),
            str(move.sample.index),
            str(move.position),
            _chance(move.old),
            _chance(move.new),
            join(f"{move.change:+.3g}", bar(move.change, top, signed=True)),
        ]
        for move in listed
    ]
    return table([Column(heading), *numbers], rows)


def _chance(log_prob: float) -> str:
    return percent(math.exp(min(log_prob, 0.0)))


def _by_kind(kinds: Iterable[tuple[str, int, float]]) -> Markup:
    heads = [Column("token"), *numeric("written", "mean change, nats")]
    rows: list[list[Child]] = [
        [tag("span", letters(text, 40), class_="kv-text"), count(times, "time"), f"{change:+.3g}"]
        for text, times, change in kinds
    ]
    return fold("by token: those that moved most in all", table(heads, rows))


def moved_plain(moved: Moves) -> str:
    """The tokens that moved most, for a terminal."""
    if not moved:
        return f"  {HOW}"
    lines = [
        f"  {count(moved.tokens, 'token')} before and after: ▲ gained {moved.gained:,}   "
        f"▼ lost {moved.lost:,}   mean change {moved.total / moved.tokens:+.3g} nats"
    ]
    for sign, listed in (("▲", moved.up[:4]), ("▼", moved.down[:4])):
        rows = [
            [
                sign,
                f"{move.change:+.3g}",
                f"{_chance(move.old)} → {_chance(move.new)}",
                letters(token_values.texts(move.sample)[move.position], 20),
                f"in sample {move.sample.index}, token {move.position}",
            ]
            for move in listed
        ]
        lines += [columns(rows, indent="    ")] if rows else []
    return "\n".join(lines)
