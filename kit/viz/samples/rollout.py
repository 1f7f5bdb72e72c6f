"""`Rollout` as a table of groups: one prompt, the responses to it, and what each was worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from kit.samples import Rollout, Sample, Status
from kit.utils.display import Bundle, bundle
from kit.utils.formatting import columns, count, count_of, mean, number, percent, shorten
from kit.viz.html import (
    Child,
    Column,
    facts,
    fold,
    join,
    label,
    long_text,
    note,
    page,
    quiet,
    spaced,
    table,
    tag,
    title,
)
from kit.viz.render import render
from kit.viz.samples.alike import Values, alike, answer_cell, bar_of_all, number_of_all, times

if TYPE_CHECKING:
    from kit.viz.samples.browser import SampleBrowser


Item = TypeVar("Item")
OPEN_GROUPS = 8
"""Groups that are written out; the rest waits behind a line to click on."""
MOST_PARTS = 6
"""Parts of a reward with a column of their own."""
MOST_SAMPLES = 512
"""Samples that are written at all. A notebook keeps every output it shows."""
MOST_BYTES = 850_000
"""Bytes of HTML that the groups of one display may take together."""
TEXT_BYTES = 300_000
"""All response text of one display together; the samples share it equally."""
PROMPT_BYTES = 60_000
"""Bytes that all prompts together may take."""
_MORE = (
    "rollout[0] shows one sample with its tokens; rollout.best(), .worst() and .failed() pick "
    "some; rollout.to_pandas() is all of it as a table."
)
STATUS_SIGNS = {
    Status.PENDING: "○ pending",
    Status.COMPLETED: "✓ completed",
    Status.TRUNCATED: "… truncated",
    Status.ABORTED: "■ aborted",
    Status.FAILED: "✗ failed",
}


@render.register(Rollout)
def show_rollout(rollout: Rollout) -> Bundle:
    """HTML and plain text of a rollout. Its size is bounded whatever the samples hold."""
    if not rollout.samples:
        words = "Rollout, empty: no samples."
        return bundle(page(title(words)), words)
    html = page(rollout_summary(rollout), rollout_groups(rollout), note(_MORE))
    return bundle(html, _plain(rollout))


def browse(rollout: Rollout, *arguments: Any, **options: Any) -> SampleBrowser:
    """A browser of the rollout's samples; the arguments are those of `SampleBrowser`."""
    from kit.viz.samples.browser import SampleBrowser

    return SampleBrowser(rollout, *arguments, **options)


def _facts(rollout: Rollout) -> list[tuple[str, str]]:
    """The headline numbers of a rollout, as (name, value)."""
    lengths = [s.response_length for s in rollout]
    scored = len(rollout.rewards())
    rows = [
        ("mean reward", number(rollout.mean_reward(), 3) if scored else "not scored"),
        *((shorten(name, 24), number(part, 3)) for name, part in _parts(rollout).items()),
        ("mean length", count_of(mean(lengths), "token")),
        ("longest", count(max(lengths, default=0), "token")),
        ("truncated", percent(mean([s.status is Status.TRUNCATED for s in rollout]))),
    ]
    if rollout.seconds > 0:
        rows.append(("generated", f"{rollout.new_tokens / rollout.seconds:,.0f} tokens/s"))
    if failed := len(rollout.failed()):
        rows.append(("failed", count(failed, "sample")))
    if scored:
        equal = sum(all_equal(group) for group in rollout.groups())
        rows.append(("all equal", f"{equal} of {count(len(rollout.groups()), 'group')}"))
    return rows


def _parts(rollout: Rollout) -> dict[str, float]:
    """The parts of the rewards that have a column of their own, and their means."""
    return dict([*rollout.mean_parts().items()][:MOST_PARTS])


def heading(rollout: Rollout) -> str:
    """`Rollout of step 3: 16 prompts x 8 samples`."""
    sizes = {len(group) for group in rollout.groups()}
    prompts = count(len(rollout.groups()), "prompt")
    if len(sizes) == 1:
        return f"Rollout of step {rollout.step}: {prompts} x {count(sizes.pop(), 'sample')}"
    return f"Rollout of step {rollout.step}: {prompts}, {count(len(rollout), 'sample')}"


def rollout_summary(rollout: Rollout) -> Markup:
    """Title and headline numbers."""
    return join(title(heading(rollout)), facts(_facts(rollout)), *map(note, rollout.notes))


def rollout_groups(rollout: Rollout, open_groups: int = OPEN_GROUPS) -> Markup:
    """All groups, the first few written out and the others folded; bounded in size."""
    if not rollout.samples:
        return Markup("")
    groups = rollout.groups()
    limit = max(min(4000, TEXT_BYTES // min(len(rollout), MOST_SAMPLES)), 120)
    prompt_limit = prompt_bytes(len(groups))
    scales = _Scales.of(rollout)
    parts, left = draw_groups(groups, lambda group: _group(group, limit, prompt_limit, scales))
    rest = parts[open_groups:]
    folded = fold(f"{count(len(rest), 'more group')} of this rollout", *rest) if rest else None
    missing = (
        f"{count(left, 'more sample')} not shown here: rollout[{len(rollout) - left}:] shows them, "
        "rollout.to_pandas() has all."
    )
    return join(*parts[:open_groups], folded, note(missing) if left else None)


def prompt_bytes(groups: int) -> int:
    """Bytes that one prompt may take where so many groups are shown."""
    return max(min(1_000, PROMPT_BYTES // max(groups, 1)), 100)


def draw_groups(
    groups: Sequence[Sequence[Item]], draw: Callable[[Sequence[Item]], Markup]
) -> tuple[list[Markup], int]:
    """Draw group after group while samples and bytes last; how many samples are left over."""
    parts: list[Markup] = []
    drawn = used = 0
    for group in groups:
        members = group[: MOST_SAMPLES - drawn]
        part = draw(members) if members else Markup("")
        used += len(part.encode())
        if not members or (parts and used > MOST_BYTES):
            break
        parts.append(part)
        drawn += len(members)
    return parts, sum(map(len, groups)) - drawn


def reward_scale(rewards: Sequence[float]) -> tuple[float, bool]:
    """What a full bar stands for, and whether bars grow to both sides."""
    finite = [abs(r) for r in rewards if math.isfinite(r)]
    return max([1.0, *finite]), any(r < 0 for r in rewards)


def all_equal(group: Sequence[Sample]) -> bool:
    """Whether all samples, two or more, have the same reward: none is better than its group."""
    rewards = {sample.reward for sample in group}
    return len(group) > 1 and len(rewards) == 1 and None not in rewards


def group_marks(group: Sequence[Sample]) -> list[str]:
    """What is to know about a group before its update, in words."""
    failed = sum(sample.status is Status.FAILED for sample in group)
    if failed:
        return [f"✗ {count(failed, 'failed sample')}: the group is left out of the update"]
    return ["= all equal: nothing to learn"] if all_equal(group) else []


def _shared_label(group: Sequence[Sample]) -> str | None:
    """The right answer of the group, where all its samples have the same one."""
    labels = {sample.label_text for sample in group}
    return labels.pop() if len(labels) == 1 else None


def prompt_html(sample: Sample, limit: int) -> Markup:
    """The prompt; chat messages each under its role."""
    if isinstance(sample.prompt, str):
        return tag("div", long_text(sample.prompt, limit), class_="kv-prompt")
    messages = sample.prompt[:20]
    share = max(limit // max(len(messages), 1), 40)
    parts = [
        tag(
            "div",
            tag("span", shorten(str(m.get("role", "?")), 20), class_="kv-role"),
            long_text(str(m.get("content", "")), share),
            class_="kv-prompt",
        )
        for m in messages
    ]
    if len(sample.prompt) > len(messages):
        parts.append(note(count(len(sample.prompt) - len(messages), "more message")))
    return join(*parts)


def answer_html(sample: Sample) -> Child:
    """The right answer; None where none is known."""
    label = sample.label_text
    return None if label is None else quiet(f"answer: {shorten(label, 40)}")


def group_head(group: Sequence[Sample], limit: int) -> Markup:
    """What stands over a group's rows: number, answer, mean reward, marks, the prompt once."""
    rewards = [s.reward for s in group if s.reward is not None]
    answer = _shared_label(group)
    head = [
        tag("b", f"Prompt {group[0].group_index}"),
        quiet(f"mean reward {number(mean(rewards), 3)}") if rewards else None,
        quiet(f"answer: {shorten(answer, 60)}") if answer is not None else None,
        *(label(mark) for mark in group_marks(group)),
    ]
    return join(tag("div", spaced(head), class_="kv-head"), prompt_html(group[0], limit))


@dataclass(frozen=True, slots=True)
class _Scales:
    """What full bars stand for in one rollout."""

    reward: tuple[float, bool]
    advantage: float | None
    """None where no sample knows its advantage."""
    parts: tuple[str, ...]
    """Names of the rewards' parts."""

    @classmethod
    def of(cls, rollout: Rollout) -> _Scales:
        known = [s.advantage for s in rollout if s.advantage is not None]
        largest = max([1e-9, *(abs(a) for a in known if math.isfinite(a))])
        return cls(
            reward_scale(rollout.rewards()), largest if known else None, tuple(_parts(rollout))
        )


def _group(group: Sequence[Sample], limit: int, prompt_limit: int, scales: _Scales) -> Markup:
    labelled = _shared_label(group) is None and any(s.label is not None for s in group)
    heads = [Column("reward", "num")]
    heads += [Column(shorten(name, 24), "num") for name in scales.parts]
    if scales.advantage is not None:
        heads.append(Column("advantage", "num"))
    heads += [Column("response"), Column("tokens", "num"), Column("status", "fit")]
    if labelled:
        heads.append(Column("answer", "fit"))
    rows = [_row([group[i] for i in places], limit, scales, labelled) for places in alike(group)]
    return tag("div", group_head(group, prompt_limit), table(heads, rows), class_="kv-group")


def _row(same: Sequence[Sample], limit: int, scales: _Scales, labelled: bool) -> list[Child]:
    """A row of samples that wrote the same; most often one."""
    numbers: dict[str, Values] = {"reward": [s.reward for s in same]}
    numbers |= {
        shorten(name, 24): [s.reward_parts.get(name) for s in same] for name in scales.parts
    }
    cells: list[Child] = [bar_of_all(numbers["reward"], *scales.reward)]
    cells += [number_of_all([s.reward_parts.get(name) for s in same]) for name in scales.parts]
    if scales.advantage is not None:
        numbers["advantage"] = [s.advantage for s in same]
        cells.append(bar_of_all(numbers["advantage"], scales.advantage, signed=True))
    cells += [
        answer_cell(same, limit, numbers),
        number_of_all([s.response_length for s in same]),
        STATUS_SIGNS[same[0].status],
    ]
    if labelled:
        cells.append(shorten(same[0].label_text or "–", 30))
    return cells


def _plain_row(same: Sequence[Sample], advantages: bool) -> list[str]:
    row = [number_of_all([s.reward for s in same])]
    if advantages:
        value = number_of_all([s.advantage for s in same], signed=True)
        row.append(value if value == "–" else f"advantage {value}")
    return [
        *row,
        f"{times(len(same))}{shorten(same[0].response, 60)}",
        STATUS_SIGNS[same[0].status],
    ]


def _plain(rollout: Rollout) -> str:
    numbers = "   ".join(f"{name} {value}" for name, value in _facts(rollout))
    lines = [heading(rollout), f"  {numbers}", *(f"  {words}" for words in rollout.notes)]
    advantages = any("advantage" in s.token_values for s in rollout)
    for group in rollout.groups()[:3]:
        answer = _shared_label(group)
        lines.append(f"  prompt {group[0].group_index}: {shorten(group[0].prompt_text, 70)}")
        if answer is not None:
            lines[-1] += f"   (answer: {shorten(answer, 20)})"
        lines += [f"    {mark}" for mark in group_marks(group)]
        answers = [[group[i] for i in places] for places in alike(group)]
        rows = [_plain_row(same, advantages) for same in answers[:4]]
        lines.append(columns(rows, indent="    "))
        if left := sum(map(len, answers[4:])):
            lines.append(f"    … {count(left, 'more sample')}")
    if len(rollout.groups()) > 3:
        lines.append(f"  … {count(len(rollout.groups()) - 3, 'more group')}")
    return "\n".join(lines)
