"""`MemoryPlan`: what holds the device in each phase, what sleeps meanwhile, and why."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from kit.memory.plan import MemoryPlan, Phase
from kit.memory.sizes import KEPT
from kit.utils.formatting import columns, count, in_gib, percent, shorten
from kit.viz.html import Child, Column, drawing, facts, join, note, spaced, table, tag, title
from kit.viz.render import register
from kit.viz.svg import Axes, box, stroke, text

WIDTH, MARGINS = 760, (70, 16, 24, 10)
"""In CSS pixels: of the drawing, and around its bars for names and the limit."""
ROW, BAR = 54, 24
"""Heights of a phase, and of its bar."""
FAR = 6
"""A limit of more than so many times the largest phase is told in words, not drawn."""
TEXT_BAR = 40
"""Characters."""
SHADES = {
    "engine: process": "u1",
    "engine: weights": "u3",
    "engine: adapters": "u2",
    "engine: draft": "u3",
    "engine: KV cache": "u2",
    "engine: graphs, workspace": "u1",
    "trainer: process": "d1",
    "trainer: weights, optimizer": "d3",
    "trainer: frozen weights": "d3",
    "trainer: frozen weights in 4 bits": "d3",
    "trainer: adapters, optimizer": "d2",
    "trainer: draft, optimizer": "d2",
    "trainer: gradients, weights to compute with": "d2",
    "trainer: activations, logits": "d1",
    "trainer: buckets of weights": "d2",
}
"""Blues and oranges of the theme; a part that is not listed takes its side's palest."""
RECOMPUTED = {
    "none": "nothing",
    "selective": "the feed-forward part of each layer",
    "alternating": "every other layer, and the feed-forward part of those between",
    "full": "each layer",
}


def _html(plan: MemoryPlan) -> Markup:
    """Title, headline numbers, a bar for each phase, what was decided, and every part."""
    return join(
        title(_title(plan)),
        facts(_facts(plan)),
        _picture(plan),
        tag("ul", *(tag("li", words) for words in decisions(plan))),
        table(*_table(plan)),
        note(_measured_note(plan)),
    )


def _plain(plan: MemoryPlan) -> str:
    heads, rows = _table(plan)
    scale = _scale(plan)
    bars = [
        [phase.name, _text_bar(plan, phase, scale), _planned_and_measured(phase)]
        for phase in plan.phases
    ]
    limit = "| limit" if scale >= plan.limit else f"the limit is {in_gib(plan.limit)}"
    return "\n".join(
        (
            _title(plan),
            columns(bars),
            f"  █ engine   ▒ trainer   · free   {limit}",
            *(f"  - {words}" for words in decisions(plan)),
            columns([[head.name for head in heads], *rows]),
            f"  {_measured_note(plan)}",
        )
    )


register(MemoryPlan, _html, _plain)


def _title(plan: MemoryPlan) -> str:
    """`Memory plan for NVIDIA H100: at most 31.1 GiB of 79.1 GiB`."""
    name = shorten(plan.card.name, 80)
    words = f"Memory plan for {name}: at most {in_gib(_largest(plan))} of {in_gib(plan.limit)}"
    if plan.limit < plan.card.total:
        return f"{words} (memory.device_gib; the device has {in_gib(plan.card.total)})"
    return words


def decisions(plan: MemoryPlan) -> Iterator[str]:
    """What was decided and why, one sentence each, with the setting that decides otherwise."""
    yield from _sleep(plan)
    yield _key_value_cache(plan)
    yield (
        f"The trainer packs up to {plan.max_tokens_per_gpu:,} tokens into a micro-batch "
        "(training.max_tokens_per_gpu)."
    )
    yield (
        f"Its backward pass recomputes {RECOMPUTED[plan.recompute]} (model.gradient_checkpointing)."
    )
    if plan.compile:
        yield "Its layers are compiled, which takes the first start longer (model.compile)."
    else:
        yield "Its layers are not compiled (model.compile)."


def _sleep(plan: MemoryPlan) -> Iterator[str]:
    if not plan.card.is_gpu:
        yield "This is host memory, not a GPU's: engine and trainer share it, and nothing sleeps."
        return
    if plan.apart:
        yield (
            "Engine and trainer have a device each, so nothing sleeps: the engine's parts are on "
            "one, the trainer's on the other (cluster.colocate)."
        )
        return
    if not (plan.kv_sleeps or plan.trainer_sleeps):
        yield "Nothing sleeps: engine and trainer fit side by side (memory.sleep)."
    generate, update = (plan.phase(name) for name in ("generate", "update"))
    together = generate.of("engine") + update.of("trainer")
    asked = "memory.sleep: always asks for it"
    if plan.kv_sleeps:
        what = "KV cache and weights sleep" if plan.engine_weights_sleep else "KV cache sleeps"
        why = f"awake, engine and trainer would hold {in_gib(together)} together"
        yield (
            f"While the trainer works, the engine's {what}: "
            f"{why if together > plan.usable else asked} (memory.sleep)."
        )
    if plan.trainer_sleeps:
        size = update.kept
        crowded = generate.total + size > plan.usable
        why = "beside it the KV cache would hold less than half of a rollout"
        yield (
            f"While the engine generates, the trainer's {in_gib(size)} wait in host memory: "
            f"{why if crowded else asked} (memory.sleep)."
        )
    if plan.optimizer_cpu_offload:
        yield (
            "The trainer's weights and optimizer stay in host memory, and it steps there, which is "
            "slower (training.optimizer_cpu_offload)."
        )


def _key_value_cache(plan: MemoryPlan) -> str:
    fit, wanted = plan.samples_at_once, plan.rollout_tokens // plan.sample_tokens
    held, rest = f"all {wanted:,}", ""
    if fit < wanted:
        held, rest = f"{fit:,} of the {wanted:,}", "; the others wait for room"
    return (
        f"The KV cache has room for {count(plan.kv_tokens, 'token')}: {held} samples of a rollout "
        f"at once, if each is as long as it may be ({plan.sample_tokens:,} tokens, prompt and "
        f"response){rest} (engine.max_total_tokens)."
    )


def _facts(plan: MemoryPlan) -> list[tuple[str, str]]:
    largest = max(plan.phases, key=lambda phase: phase.total)
    asleep = [
        words
        for words, sleeps in (
            ("KV cache", plan.kv_sleeps),
            ("engine's weights", plan.engine_weights_sleep),
            ("trainer", plan.trainer_sleeps),
        )
        if sleeps
    ]
    return [
        (f"most, in {largest.name}", in_gib(largest.total)),
        ("may be taken", in_gib(plan.limit)),
        ("tokens of KV cache", f"{plan.kv_tokens:,}"),
        ("tokens a micro-batch", f"{plan.max_tokens_per_gpu:,}"),
        ("sleeps at times", ", ".join(asleep) or "nothing"),
    ]


# ---- the table ----------------------------------------------------------------------------------


def _table(plan: MemoryPlan) -> tuple[list[Column], list[list[str]]]:
    """One row a part, one column a phase; how much of the limit is left, and what was measured."""
    heads = [Column("part", "mid"), *(Column(phase.name, "num") for phase in plan.phases)]
    rows = [
        [f"{place} {name}", *(_cell(plan, phase, name) for phase in plan.phases)]
        for name, place in _numbers(plan).items()
    ]
    rows.append(["together", *(in_gib(phase.total) for phase in plan.phases)])
    rows.append(["left free", *(in_gib(plan.limit - phase.total) for phase in plan.phases)])
    if any(phase.measured for phase in plan.phases):
        measured = [in_gib(p.measured) if p.measured else "not yet" for p in plan.phases]
        rows += [
            ["measured", *measured],
            ["the plan is", *(_off(phase) or "–" for phase in plan.phases)],
        ]
    return heads, rows


def _cell(plan: MemoryPlan, phase: Phase, name: str) -> str:
    size = dict(phase.parts).get(name)
    if size is None:
        return "–"
    if size == 0:
        return "in host memory" if _always_outside(plan, name) else "asleep"
    return in_gib(size)


def _numbers(plan: MemoryPlan) -> dict[str, int]:
    """The parts that hold anything, and the number that stands for each in the picture."""
    names = dict.fromkeys(name for phase in plan.phases for name, _ in phase.parts)
    shown = [
        name
        for name in sorted(names, key=lambda name: not name.startswith("engine"))
        if _always_outside(plan, name) or any(dict(p.parts).get(name) for p in plan.phases)
    ]
    return {name: place for place, name in enumerate(shown, start=1)}


def _always_outside(plan: MemoryPlan, name: str) -> bool:
    return plan.optimizer_cpu_offload and name in KEPT


def _off(phase: Phase) -> str:
    """`7.0% above`: how far the plan is from what was measured; empty before."""
    if not phase.measured:
        return ""
    off = phase.total / phase.measured - 1
    return f"{percent(abs(off))} {'above' if off >= 0 else 'below'}"


def _planned_and_measured(phase: Phase) -> str:
    """`23.0 GiB, measured 21.5 GiB (plan 7.0% above)`."""
    planned = in_gib(phase.total)
    if not phase.measured:
        return planned
    return f"{planned}, measured {in_gib(phase.measured)} (plan {_off(phase)})"


def _measured_note(plan: MemoryPlan) -> str:
    if any(phase.measured for phase in plan.phases):
        return "measured: most that was seen on the device in each phase so far"
    if plan.card.is_gpu:
        return "worked out before the start; what is measured stands beside it after a step"
    return "worked out before the start"


# ---- the picture --------------------------------------------------------------------------------


def _largest(plan: MemoryPlan) -> int:
    return max(phase.total for phase in plan.phases)


def _scale(plan: MemoryPlan) -> int:
    """Bytes that the whole width stands for."""
    largest = max([_largest(plan), *(phase.measured or 0 for phase in plan.phases)])
    return max(largest, plan.limit if plan.limit <= FAR * largest else 0, 1)


def _picture(plan: MemoryPlan) -> Markup:
    """One stacked bar a phase, with a number in each part that says which it is.

    The engine's parts are blue with a line on top, the trainer's orange with a line under them.
    """
    numbers = _numbers(plan)
    axes = Axes(WIDTH, MARGINS[2] + ROW * len(plan.phases), MARGINS, (0, _scale(plan)))
    drawn: list[Child] = []
    for row, phase in enumerate(plan.phases):
        drawn += _row(axes, phase, axes.top + ROW * row, numbers)
    far = plan.limit > _scale(plan)
    if not far:
        x = axes.x(plan.limit)
        drawn.append(stroke(f"M{x:.1f} {axes.top - 6:g}V{axes.floor:g}", "fg", dashes="5 3"))
        drawn.append(text(x, axes.top - 12, f"limit {in_gib(plan.limit)}", "end", size=11))
    spoken = "; ".join(f"{phase.name}: {_planned_and_measured(phase)}" for phase in plan.phases)
    words = f"Memory by phase, of {in_gib(plan.limit)} at most. {spoken}"
    keys = [_key(name, place) for name, place in numbers.items()]
    if any(phase.measured for phase in plan.phases):
        keys.append(tag("span", "▲ measured"))
    if far:
        keys.append(tag("span", f"the limit of {in_gib(plan.limit)} is far to the right"))
    legend = tag("div", spaced(keys), class_="kv-legend")
    return tag("div", drawing(axes.svg(*drawn), words), legend)


def _row(axes: Axes, phase: Phase, top: float, numbers: dict[str, int]) -> Iterator[Markup]:
    yield text(0, top + BAR / 2 + 4, phase.name, ink="fg", size=12.5)
    held, before = dict(phase.parts), 0
    for name, place in numbers.items():
        if size := held.get(name, 0):
            x = axes.x(before)
            yield from _part(name, x, top, axes.x(before + size) - x, place)
            before += size
    if phase.measured:
        x = axes.x(phase.measured)
        yield stroke(f"M{x:.1f} {top - 3:g}V{top + BAR + 3:g}", "fg", 2)
        yield tag("path", d=f"M{x:.1f} {top + BAR + 1:g}l5 8h-10z", fill="var(--kv-fg)")
    yield text(axes.left, top + BAR + 15, _planned_and_measured(phase), size=11)


def _part(name: str, x: float, top: float, width: float, place: int) -> Iterator[Markup]:
    engine = name.startswith("engine")
    gap = 1.0 if width > 3 else 0.0
    shown = max(width - gap, 0.5)
    yield box(x, top, shown, BAR, _shade(name))
    edge = top + 1.5 if engine else top + BAR - 1.5
    yield stroke(f"M{x:.1f} {edge:g}h{shown:.1f}", "up" if engine else "down", 3)
    if width >= 14:
        yield text(x + (width - gap) / 2, top + BAR / 2 + 4, str(place), "middle", "fg", size=11)


def _shade(name: str) -> str:
    return SHADES.get(name, "u1" if name.startswith("engine") else "d1")


def _key(name: str, place: int) -> Markup:
    """A part's number on its colour, and its name."""
    side = "u" if name.startswith("engine") else "d"
    return tag("span", tag("i", str(place), class_=f"{side}{_shade(name)[1]}"), f" {name}")


def _text_bar(plan: MemoryPlan, phase: Phase, scale: int) -> str:
    """`█████▒▒▒▒····|`, of `TEXT_BAR` characters."""
    engine = round(TEXT_BAR * phase.of("engine") / scale)
    held = round(TEXT_BAR * phase.total / scale)
    ends = "|" if scale == plan.limit else ""
    return ("█" * engine + "▒" * (held - engine)).ljust(TEXT_BAR, "·") + ends
