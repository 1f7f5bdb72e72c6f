"""Which tokens gained and which lost probability between two sets of weights."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from kit import token_values
from kit.samples import Rollout, Sample
from kit.viz.html import Child, Column, bar, facts, fold, join, note, table, tag
from kit.viz.strips import in_context, letters
from kit.viz.text import columns, count, percent

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
    """All of them in short, and the few that moved most."""

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
    """What moved, of samples that both hold (the same tokens, annotated with different weights)
    and of those that were annotated twice on either side.
    """
    found = Moves()
    sums: dict[str, tuple[int, float]] = {}
    for sample, old, new in _pairs(before, after):
        changes = [y - x if math.isfinite(y - x) else 0.0 for x, y in zip(old, new, strict=True)]
        found.tokens += len(changes)
        found.gained += sum(change > 0 for change in changes)
        found.lost += sum(change < 0 for change in changes)
        found.total += sum(changes)
        for text, change in zip(token_values.texts(sample), changes, strict=True):
            times, total = sums.get(text, (0, 0.0))
            sums[text] = (times + 1, total + change)
        own = [Move(sample, i, old[i], new[i]) for i in _extremes(changes)]
        found.up = _first_of_each([*found.up, *own], lambda move: -move.change)
        found.down = _first_of_each([*found.down, *own], lambda move: move.change)
    found.up = [move for move in found.up if move.change > 0]
    found.down = [move for move in found.down if move.change < 0]
    largest = heapq.nlargest(MOST, sums.items(), key=lambda item: abs(item[1][1]))
    found.kinds = [(text, times, total / times) for text, (times, total) in largest]
    return found


def _first_of_each(found: list[Move], key: Callable[[Move], float]) -> list[Move]:
    """The first few by this key. Samples that begin alike have tokens in common: listed once."""
    seen: dict[tuple[int, ...], Move] = {}
    for move in sorted(found, key=key):
        seen.setdefault(move.context, move)
        if len(seen) == MOST:
            break
    return list(seen.values())


def _extremes(changes: Sequence[float]) -> set[int]:
    """Positions of the largest gains and losses; others can be among no sample's most moved."""
    places = range(len(changes))
    up = heapq.nlargest(MOST, places, key=changes.__getitem__)
    return {*up, *heapq.nsmallest(MOST, places, key=changes.__getitem__)}


def _pairs(
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


def moved_html(found: Moves) -> Markup:
    """The tokens that moved most, in their context, and the same by token; else how to see them."""
    if not found:
        return note(HOW)
    numbers = [
        ("tokens compared", f"{found.tokens:,}"),
        ("▲ gained", f"{found.gained:,}"),
        ("▼ lost", f"{found.lost:,}"),
        ("mean change, nats a token", f"{found.total / found.tokens:+.3g}"),
    ]
    top = (
        max(abs(move.change) for move in (*found.up, *found.down)) if found.up or found.down else 1
    )
    return tag(
        "div",
        tag("div", "Probability of the same tokens, before and after", class_="kv-title"),
        facts(numbers),
        _listed("▲ gained most", found.up, top),
        _listed("▼ lost most", found.down, top),
        _by_kind(found.kinds),
        class_="kv-group",
    )


def _listed(heading: str, listed: Sequence[Move], top: float) -> Markup | None:
    if not listed:
        return None
    heads = [
        Column(heading),
        Column("sample", "num"),
        Column("position", "num"),
        Column("before", "num"),
        Column("after", "num"),
        Column("change, nats", "num"),
    ]
    rows: list[list[Child]] = [
        [
            tag("pre", "\n" + "\n".join(_context(move)), class_="kv-text"),
            str(move.sample.index),
            str(move.position),
            _chance(move.old),
            _chance(move.new),
            join((f"{move.change:+.3g}", bar(move.change, top, signed=True))),
        ]
        for move in listed
    ]
    return table(heads, rows)


def _context(move: Move) -> tuple[str, str]:
    return in_context(move.sample, move.position)


def _chance(log_prob: float) -> str:
    return percent(math.exp(min(log_prob, 0.0)))


def _by_kind(kinds: Iterable[tuple[str, int, float]]) -> Markup:
    heads = [Column("token"), Column("written", "num"), Column("mean change, nats", "num")]
    rows: list[list[Child]] = [
        [tag("span", letters(text, 40), class_="kv-text"), count(times, "time"), f"{change:+.3g}"]
        for text, times, change in kinds
    ]
    return fold("by token: those that moved most in all", table(heads, rows))


def moved_plain(found: Moves) -> str:
    """The same for a terminal."""
    if not found:
        return f"  {HOW}"
    lines = [
        f"  {count(found.tokens, 'token')} before and after: ▲ gained {found.gained:,}   "
        f"▼ lost {found.lost:,}   mean change {found.total / found.tokens:+.3g} nats"
    ]
    for sign, listed in (("▲", found.up[:4]), ("▼", found.down[:4])):
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
