"""The same prompts before and after, side by side: what training changed, one prompt at a time.

Where both sides were annotated, also which tokens gained and lost probability: `kit.viz.moved`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kit import token_values
from kit.samples import Rollout, Sample
from kit.viz.html import (
    Child,
    Column,
    Picture,
    facts,
    join,
    note,
    number_bar,
    page,
    table,
    tag,
    title,
)
from kit.viz.moved import moved_html, moved_plain, moves
from kit.viz.rollouts import prompt_html, response_cell, reward_scale
from kit.viz.strips import chips_alone
from kit.viz.text import columns, count, mean, number, shorten

_FIRST = "Shown is the first response to each prompt; its reward is the mean over all of them."
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
        if first != first or second != second:
            return "– not scored"
        return "▲ better" if second > first else "▼ worse" if second < first else "= same"


def compare_samples(before: Rollout, after: Rollout, n: int = 8) -> Picture:
    """The first `n` prompts that both rollouts hold, in their order, with rewards.

    Prompts are the same where their text is. Shown is the first response to each; where a prompt
    has several, its reward is their mean. The counts above the table are over all prompts that
    both hold, not only those shown. Under it, the tokens whose probability moved most, of samples
    that were annotated with the weights before and after.
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
    more = join((more, note(_COLOURS))) if striped else more
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
    limit = max(200_000 // max(len(pairs), 1) // 3, 200)
    limit = min(limit, 3_000)

    def cell(group: list[Sample]) -> Child:
        reward = _reward(group)
        shown = number_bar(None if reward != reward else reward, *scale)
        several = tag("span", f" mean of {len(group)}", class_="kv-muted")
        bar = tag("div", shown, several if len(group) > 1 else None)
        return join((_response(group[0], limit), bar))

    rows = [
        [
            join((prompt_html(p.before[0], limit), _answer(p.before[0]))),
            cell(p.before),
            cell(p.after),
            p.change,
        ]
        for p in pairs
    ]
    return table(heads, rows)


def _response(sample: Sample, limit: int) -> Child:
    """The response, as a strip where the change of its tokens is known."""
    if _changed(sample):
        return chips_alone(sample, "change", most=max(limit // 60, 10))
    return response_cell(sample, limit)


def _changed(sample: Sample) -> bool:
    return "change" in token_values.known(sample)


def _answer(sample: Sample) -> Child:
    if sample.label is None:
        return None
    return tag("span", f"answer: {shorten(sample.label, 40)}", class_="kv-muted")


def _plain(words: str, tallies: Sequence[tuple[str, str]], pairs: Sequence[_Pair]) -> str:
    rows = [
        [
            shorten(pair.before[0].prompt_text, 30),
            shorten(pair.before[0].response, 24),
            number(_reward(pair.before), 3),
            "→",
            shorten(pair.after[0].response, 24),
            number(_reward(pair.after), 3),
            pair.change,
        ]
        for pair in pairs
    ]
    several = any(len(p.before) > 1 or len(p.after) > 1 for p in pairs)
    lines = [words, "  " + "   ".join(f"{name} {value}" for name, value in tallies)]
    if several:
        lines.append(f"  {_FIRST}")
    return "\n".join([*lines, columns(rows)] if rows else lines)
