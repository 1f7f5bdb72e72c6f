"""The load of a mixture's experts: a row for each layer, a field for each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.errors import DataError
from kit.samples import Rollout
from kit.utils.display import Picture
from kit.utils.formatting import columns, count, mean, percent
from kit.viz.html import note, page, tag, title

STEPS = (0.5, 0.8, 1.25, 2.0)
"""Load over the even one, where the next colour begins."""
WORDS = ("under 0.5", "0.5 to 0.8", "0.8 to 1.25", "1.25 to 2", "2 and more")
STYLES = ("d2", "d1", "", "u1", "u2")
MOST_FIELDS = 4096
"""So many fields are drawn; of larger models the first layers."""


def show_experts(rollout: Rollout) -> Picture:
    """The load of each expert by layer. Raises DataError where no sample has a record."""
    from kit.samples.experts import load

    found = [r for s in rollout if (r := s.rollout_routed_experts) is not None]
    if not found:
        raise DataError(
            "The engine recorded no experts of these samples.",
            why="The model is dense, or the engine was not asked.",
            fix="start a mixture of experts with engine.extra {enable_return_routed_experts: true},"
            " or with training.use_rollout_routing_replay: true.",
        )
    for record in found[1:]:
        found[0].check_alike(record)
    taken = load(found)
    layers, experts = found[0].layers, found[0].count
    shown = max(min(len(layers), MOST_FIELDS // experts), 1)
    rows = [_shares([int(n) for n in taken[place]]) for place in range(shown)]
    tokens = sum(int(r.known.sum()) for r in found)
    words = _words(rollout, tokens, found[0].shape[2], experts, len(layers))
    html = page(
        title("Load of the experts"),
        tag("div", words, class_="kv-muted"),
        _legend(),
        _grid(layers[:shown], rows),
        note(f"… {count(len(layers) - shown, 'more layer')}") if shown < len(layers) else None,
    )
    return Picture(html, _plain(words, layers[:shown], rows))


def _shares(taken: Sequence[int]) -> list[float]:
    """The load of each expert over that of all if they were even."""
    even = sum(taken) / len(taken)
    return [n / even if even else math.nan for n in taken]


def _words(rollout: Rollout, tokens: int, top_k: int, experts: int, layers: int) -> str:
    words = (
        f"{count(tokens, 'token')}, each sent to {top_k} of {experts} experts in "
        f"{count(layers, 'layer')}; 1 is an even share"
    )
    every = [s.token_values["experts_changed"] for s in rollout if "experts_changed" in
             s.token_values]  # fmt: skip
    changed = [float(value > 0) for row in every for value in row]
    if changed:
        words += f". The trainer would send {percent(mean(changed))} of response tokens elsewhere"
    return words + "."


def _class(share: float) -> int:
    return 2 if math.isnan(share) else sum(share >= step for step in STEPS)


def _legend() -> Markup:
    entries = [
        tag("span", tag("i", "  ", class_=style or None), f" {words}", " ")
        for style, words in zip(STYLES, WORDS, strict=True)
    ]
    return tag("div", *entries, class_="kv-legend")


def _grid(layers: Sequence[int], rows: Sequence[Sequence[float]]) -> Markup:
    experts = len(rows[0])
    wide = max(len(str(experts - 1)), 4)
    names = [str(expert).rjust(wide) for expert in range(experts)]
    head = [tag("i", name, class_="kv-none") for name in names]
    lines = [tag("div", tag("span", "expert", class_="kv-layer"), *head, class_="kv-muted")]
    for layer, row in zip(layers, rows, strict=True):
        fields = [
            tag(
                "i",
                f"{share:.1f}".rjust(wide),
                class_=STYLES[_class(share)] or None,
                title=f"layer {layer}, expert {expert}: {share:.2f} of an even share",
            )
            for expert, share in enumerate(row)
        ]
        lines.append(tag("div", tag("span", f"layer {layer}", class_="kv-layer"), *fields))
    return tag("div", tag("div", *lines, class_="kv-strip"), class_="kv-wide")


def _plain(words: str, layers: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
    table = [[f"layer {layer}", *(f"{share:.1f}" for share in row)]
             for layer, row in zip(layers, rows, strict=True)]  # fmt: skip
    head = ["expert", *map(str, range(len(rows[0])))]
    return "\n".join(["Load of the experts", f"  {words}", columns([head, *table], indent="    ")])
