"""`Batch`: what an update will see, each group's rewards beside the advantages made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from markupsafe import Markup

from kit.samples import Batch, Sample
from kit.utils.display import Bundle, bundle
from kit.utils.formatting import columns, count, named, number, shorten
from kit.viz.html import Column, facts, fold, note, numeric, page, table, tag, title
from kit.viz.render import render
from kit.viz.samples.alike import Values, alike, answer_cell, bar_of_all, number_of_all, times
from kit.viz.samples.rollout import (
    MOST_SAMPLES,
    OPEN_GROUPS,
    TEXT_BYTES,
    draw_groups,
    group_head,
    prompt_bytes,
    reward_scale,
)

Pair = tuple[Sample, float]
"""A sample and its advantage."""


@render.register(Batch)
def show_batch(batch: Batch) -> Bundle:
    """HTML and plain text of a batch: advantages as bars to either side, groups left out."""
    groups = _groups(batch)
    scale = max([1e-9, *(abs(a) for a in batch.advantages if math.isfinite(a))])
    rewards = reward_scale([s.reward for s in batch.samples if s.reward is not None])
    limit = TEXT_BYTES // min(max(len(batch), 75), MOST_SAMPLES)
    prompt_limit = prompt_bytes(len(groups))
    draw = partial(_group, rewards=rewards, scale=scale, limit=limit, prompt_limit=prompt_limit)
    parts, left = draw_groups(groups, draw)
    rest = parts[OPEN_GROUPS:]
    html = page(
        title(_heading(batch)),
        facts(_facts(batch)),
        left_out(batch.left_out),
        *parts[:OPEN_GROUPS],
        fold(count(len(rest), "more group"), *rest) if rest else None,
        note(f"{count(left, 'more sample')} not shown here") if left else None,
    )
    return bundle(html, _plain(batch, groups))


def left_out(reasons: Sequence[str], most: int = 50) -> Markup | None:
    """The groups that do not train, and why; None where there are none."""
    if not reasons:
        return None
    items = [tag("li", shorten(reason, 300)) for reason in reasons[:most]]
    if len(reasons) > most:
        items.append(tag("li", f"… {len(reasons) - most:,} more"))
    return tag("div", f"✗ {count(len(reasons), 'group')} left out:", tag("ul", *items))


def _heading(batch: Batch) -> str:
    return f"Batch of step {batch.step}: {count(len(batch), 'sample')} to train on"


def _facts(batch: Batch) -> list[tuple[str, str]]:
    """The headline numbers of a batch, as (name, value)."""
    advantages = batch.advantages
    groups = _groups(batch)
    flat = sum(_flat(group) for group in groups)
    return [
        ("groups", f"{len(groups):,}"),
        ("better than their group", f"{sum(a > 0 for a in advantages):,}"),
        ("worse", f"{sum(a < 0 for a in advantages):,}"),
        ("largest advantage", number(max(advantages, default=math.nan), 3)),
        ("smallest", number(min(advantages, default=math.nan), 3)),
        ("nothing to learn", count(flat, "group")),
    ]


def _flat(group: Sequence[Pair]) -> bool:
    return all(advantage == 0 for _, advantage in group)


def _groups(batch: Batch) -> list[list[Pair]]:
    by_prompt: dict[int, list[Pair]] = {}
    for sample, advantage in zip(batch.samples, batch.advantages, strict=True):
        by_prompt.setdefault(sample.group_index, []).append((sample, advantage))
    return list(by_prompt.values())


def _group(
    group: Sequence[Pair], rewards: tuple[float, bool], scale: float, limit: int, prompt_limit: int
) -> Markup:
    heads = [*numeric("reward", "advantage"), Column("response"), Column("tokens", "num")]
    samples = [sample for sample, _ in group]
    rows = []
    for places in alike(samples):
        same = [samples[i] for i in places]
        numbers: dict[str, Values] = {
            "reward": [sample.reward for sample in same],
            "advantage": [group[i][1] for i in places],
        }
        rows.append(
            [
                bar_of_all(numbers["reward"], *rewards),
                bar_of_all(numbers["advantage"], scale, signed=True),
                answer_cell(same, limit, numbers),
                number_of_all([sample.response_length for sample in same]),
            ]
        )
    head = group_head(samples, prompt_limit)
    return tag("div", head, table(heads, rows), class_="kv-group")


def _plain_row(same: Sequence[Pair]) -> list[str]:
    return [
        number_of_all([sample.reward for sample, _ in same]),
        number_of_all([advantage for _, advantage in same], signed=True),
        f"{times(len(same))}{shorten(same[0][0].response, 60)}",
    ]


def _plain(batch: Batch, groups: list[list[Pair]]) -> str:
    lines = [_heading(batch), named(_facts(batch))]
    lines += [f"  left out: {shorten(reason, 100)}" for reason in batch.left_out[:5]]
    for group in groups[:3]:
        lines.append(f"  prompt {group[0][0].group_index}: {shorten(group[0][0].prompt_text, 70)}")
        if _flat(group):
            lines.append("    = all equal: nothing to learn")
        answers = alike([sample for sample, _ in group])
        rows = [_plain_row([group[i] for i in places]) for places in answers[:4]]
        lines.append(columns(rows, indent="    "))
        if left := sum(map(len, answers[4:])):
            lines.append(f"    … {count(left, 'more sample')}")
    if len(groups) > 3:
        lines.append(f"  … {count(len(groups) - 3, 'more group')}")
    return "\n".join(lines)
