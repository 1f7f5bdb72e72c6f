"""Runs as pictures: `RunComparison` in a notebook and as a page, `RunRecord` on the run's page.

A comparison shows curves with bands over seeds, what differs, and samples side by side. Its page is
one HTML file that needs neither scripts nor a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kit.reports.runs import Group, RunComparison, RunRecord, Side, held_out, known_headline
from kit.utils.formatting import columns, count, duration, mean, number, shorten
from kit.viz.html import (
    Child,
    Column,
    badge,
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
from kit.viz.render import register
from kit.viz.samples.alike import response_cell, times
from kit.viz.samples.rollout import answer_html, prompt_html, reward_scale
from kit.viz.svg import Pen, band_panels
from kit.viz.theme import DARK, LIGHT

MOST_SIDES = 6
"""Groups whose samples stand beside each other; more do not fit on a page."""
_VALUE = 60
"""Signs of a value in the table of differences."""
_NOTE = 300
_HELD_OUT = (
    "Held out is an accuracy in percent where all rewards were 0 or 1, else the mean reward."
)
_SIGNS = {
    "completed": "✓ completed",
    "failed": "✗ failed",
    "interrupted": "‖ interrupted",
    "stopped": "■ stopped early",
    "running": "▶ running",
    "killed": "✗ killed",
    "unfinished": "? unfinished",
    "unreadable": "? unreadable",
}


def _html(compared: RunComparison) -> Markup:
    """Legend, curves, differences, samples."""
    return join(
        title(_title(compared)),
        _legend(compared.groups),
        *(note(f"! {shorten(words, _NOTE)}") for words in compared.notes),
        _curves(compared),
        _differences(compared),
        _samples(compared),
        _folders(compared),
    )


def _plain(compared: RunComparison) -> str:
    """The legend, and what differs."""
    groups = compared.groups
    heads = ["", "", "seeds", "steps", "reward", "held out", "ended"]
    rows = [[str(i), shorten(g.label, 60), *_numbers(g)] for i, g in enumerate(groups, start=1)]
    lines = [_title(compared), columns([heads, *rows])]
    lines += [f"  ! {shorten(words, _NOTE)}" for words in compared.notes]
    if compared.differences:
        names = [["differs", *(str(i) for i in range(1, len(groups) + 1))]]
        names += [
            [shorten(d.name, 40), *(shorten(v, 24) for v in d.values)] for d in compared.differences
        ]
        lines += ["", columns(names)]
    if compared.alike:
        lines.append(f"  The same in all: {_alike(compared, 24)}")
    return "\n".join(lines)


register(RunComparison, _html, _plain)


def _title(compared: RunComparison) -> str:
    runs, groups = len(compared.runs), len(compared.groups)
    names = sorted({run.notebook for run in compared.runs})
    of = f" of {shorten(names[0], 60)}" if len(names) == 1 and runs > 1 else ""
    if groups == runs:
        return f"{count(runs, 'run')}{of} side by side"
    return f"{count(runs, 'run')}{of} in {count(groups, 'curve')}, each over its seeds"


def _alike(compared: RunComparison, width: int) -> str:
    """Names and values of the parameters that are the same in all; values of at most `width`."""
    return ", ".join(f"{shorten(k, 40)} {shorten(v, width)}" for k, v in compared.alike.items())


def _heading(words: str) -> Markup:
    return tag("div", words, class_="kv-title kv-section")


def _legend(groups: Sequence[Group]) -> Markup:
    several = any(len(group.runs) > 1 for group in groups)
    heads = [Column("", "fit"), Column("", "fit"), Column("", "mid")]
    heads += numeric("seeds" if several else "seed", "steps", "reward", "held out")
    heads.append(Column("ended"))
    rows: list[list[Child]] = [
        [tag("b", str(i + 1)), Pen(i).sample(), shorten(group.label, 100), *_numbers(group)]
        for i, group in enumerate(groups)
    ]
    over = "Numbers are means over the runs of a curve. " if several else ""
    over += f"Reward is that of the first and the last step. {_HELD_OUT}"
    return join(table(heads, rows), note(over))


def _numbers(group: Group) -> list[str]:
    seeds = ", ".join(map(str, group.seeds)) or "–"
    if len(group.seeds) < len(group.runs) > 1:  # a seed was run again
        seeds += f" ({count(len(group.runs), 'run')})"
    steps = sorted({run.steps for run in group.runs})
    states = [run.status for run in group.runs]
    ended = [
        _ending(state) + (f" {states.count(state)}" if len({*states}) > 1 else "")
        for state in dict.fromkeys(states)
    ]
    return [
        seeds,
        "–".join(str(s) for s in (steps[:1] + steps[-1:] if len(steps) > 1 else steps)),
        _change(group, "reward", "first", "last", lambda value: number(value, 3)),
        _held_out(group),
        ", ".join(ended),
    ]


def _ending(status: str) -> str:
    return _SIGNS.get(status) or shorten(status, 20) or "–"


def _change(group: Group, what: str, begin: str, end: str, say: Callable[[float], str]) -> str:
    first, last = (group.values(f"{what}_{name}") for name in (begin, end))
    if not first and not last:
        return "–"
    return " → ".join(say(mean(values)) if values else "–" for values in (first, last))


def _held_out(group: Group) -> str:
    def of(name: str) -> float | None:
        return mean(values) if (values := group.values(name)) else None

    accuracies = of("accuracy_before"), of("accuracy_after")
    return held_out(accuracies, (of("mean_reward_before"), of("mean_reward_after")))[1] or "–"


def _curves(compared: RunComparison) -> Markup | None:
    if not compared.metrics:
        return note("None of these runs trained a step.")
    drawn = band_panels(compared.metrics, [group.bands for group in compared.groups])
    several = any(band.runs > 1 for g in compared.groups for band in g.bands.values())
    words = "Lines are means over seeds; the shade reaches from the lowest run to the highest. "
    return join(
        _heading("Curves"),
        note((words if several else "") + "A curve's number stands at its end."),
        drawn,
    )


def _differences(compared: RunComparison) -> Markup:
    groups = compared.groups
    same = note(f"The same in all: {_alike(compared, _VALUE)}.") if compared.alike else None
    if len(groups) == 1:
        words = "The runs differ in nothing but their seed." if len(compared.runs) > 1 else None
        return join(_heading("Differences"), note(words) if words else None, same)
    heads = [Column("", "fit"), Column("", "fit")]
    heads += [Column(f"{i + 1}") for i in range(len(groups))]
    rows: list[list[Child]] = [
        [quiet(d.kind), shorten(d.name, 60), *(shorten(value, _VALUE) for value in d.values)]
        for d in compared.differences
    ]
    shown = table(heads, rows) if rows else note("Nothing that they recorded differs.")
    return join(_heading("Differences"), shown, same)


def _samples(compared: RunComparison) -> Markup | None:
    groups = compared.groups[:MOST_SIDES]
    rows = [row[:MOST_SIDES] for row in compared.samples if any(row[:MOST_SIDES])]
    if not rows:
        return None
    sides = [side for row in rows for side in row if side]
    scale = reward_scale([side.reward for side in sides if side.reward is not None])
    limit = min(max(150_000 // max(len(rows) * len(groups), 1), 200), 2_000)

    def cell(side: Side | None) -> Child:
        if side is None:
            return quiet("kept none")
        bar = tag("div", number_bar(side.reward, *scale), class_="kv-line")
        counted = tag("b", times(side.alike)) if side.alike > 1 else None
        return join(counted, response_cell(side.sample, limit), bar)

    def asked(row: Sequence[Side | None]) -> Child:
        first = next(side for side in row if side).sample
        return join(prompt_html(first, limit), answer_html(first))

    heads = [Column("prompt", "mid")]
    heads += [Column(f"{i + 1} {shorten(g.label, 40)}", "side") for i, g in enumerate(groups)]
    steps = sorted({side.step for side in sides})
    when = f"at step {steps[0]}" if len(steps) == 1 else f"at steps {steps[0]} to {steps[-1]}"
    more = len(compared.groups) - len(groups)
    return join(
        _heading("Samples"),
        note(
            f"The same prompts {when}; of each curve its first run that kept samples, and of "
            "that the commonest response, with its count. The reward is the mean over all "
            "responses to the prompt."
        ),
        table(heads, [[asked(row), *map(cell, row)] for row in rows]),
        note(f"… and {count(more, 'more curve')}") if more > 0 else None,
    )


def _folders(compared: RunComparison) -> Markup:
    heads = [Column("", "fit"), Column("run"), Column("ended", "fit"), Column("time", "num")]
    rows: list[list[Child]] = [
        [
            str(i),
            tag(
                "span",
                shorten(f"{run.sweep}/{run.name}" if run.sweep else run.name, 160),
                class_="kv-text",
            ),
            _ending(run.status) + (f": {shorten(run.error, 120)}" if run.error else ""),
            duration(run.seconds) if run.seconds is not None else "–",
        ]
        for i, group in enumerate(compared.groups, start=1)
        for run in group.runs
    ]
    return fold(f"the folders of these runs ({len(compared.runs)})", table(heads, rows))


_NOTHING_ELSE = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser is told besides: load nothing, run nothing."""


def comparison_page(compared: RunComparison) -> str:
    """A comparison as an HTML document: light or dark as the reader's system, light in print."""
    runs = count(len(compared.runs), "run")
    names = ", ".join(sorted({run.notebook for run in compared.runs}))
    around = (
        f"body{{margin:0;background:{LIGHT['bg']}}}main{{max-width:1140px;margin:0 auto;"
        f"padding:12px}}@media screen and (prefers-color-scheme:dark){{"
        f"body{{background:{DARK['bg']}}}}}"
        "main .kit-viz.kit-viz{max-width:none}"
        "@media print{main .kit-viz.kit-viz .kv-wide{overflow:visible}}"
    )
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_ELSE}">'),
        tag("title", f"{runs} side by side: {names}"),
        Markup(f"<style>{around}</style>"),
    )
    body = tag("body", tag("main", Markup(page(_html(compared)))))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


_KINDS = {"completed": "good", "failed": "bad", "interrupted": "warn", "running": "warn"}
_PACKAGES = ("kit", "sglang", "torch", "transformers", "ray", "python")


def run_summary(record: RunRecord) -> str:
    """HTML: status, headline figures and parameters; machine and versions folded."""
    name = Path(record.notebook).stem
    return page(
        title(f"{shorten(name, 80)} ", badge(_SIGNS[record.status], _KINDS[record.status])),
        facts(_figures(record)),
        note(_given(record.given)),
        fold("Where it ran, and with what", _circumstances(record)),
    )


def run_title(record: RunRecord) -> str:
    """The title of a run's page, for a browser's tab."""
    return f"{Path(record.notebook).stem}, {_when(record.started)}"


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    head, figures = known_headline(record.headline), list[tuple[str, str]]()
    if head.get("steps"):
        figures.append(("steps", f"{head['steps']:,}"))
    if head.get("reward_first") is not None:
        ends = [number(head[name], 3) for name in ("reward_first", "reward_last")]
        figures.append(("reward, first and last step", " → ".join(ends)))
    name, moved = held_out(
        (head.get("accuracy_before"), head.get("accuracy_after")),
        (head.get("mean_reward_before"), head.get("mean_reward_after")),
    )
    if moved:
        figures.append((f"{name} on {shorten(str(head.get('dataset')), 40)}, held out", moved))
    figures.append(("took", duration(record.seconds)))
    if record.seed is not None:
        figures.append(("seed", str(record.seed)))
    return figures


def _given(parameters: Mapping[str, Any]) -> str:
    if not parameters:
        return "All parameters are the notebook's own."
    words = ", ".join(f"{name} = {shorten(str(value), 80)}" for name, value in parameters.items())
    return f"Given: {words}."


def _circumstances(record: RunRecord) -> Child:
    machine = record.machine
    rows: list[list[Child]] = [["started", _when(record.started)]]
    if machine.get("cores"):
        words = [count(int(machine["cores"]), "core"), f"{machine.get('memory_gib')} GiB"]
        gpus = [str(gpu) for gpu in machine.get("gpus") or ()] or ["no GPU"]
        rows.append(["machine", shorten(", ".join([*words, *gpus]), 200)])
    known = {**{name: None for name in _PACKAGES}, **record.versions}
    versions = [f"{name} {version}" for name, version in known.items() if version]
    rows.append(["versions", ", ".join(versions)])
    if record.git_commit:
        rows.append(["git commit", tag("span", record.git_commit, class_="kv-text")])
    if attempts := record.lineage.attempts:
        ends = ", ".join(attempt.status for attempt in attempts)
        rows.append(["attempts before", f"{len(attempts)} ({ends})"])
    return table([Column("", "fit"), Column("")], rows)


def _when(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%d %B %Y, %H:%M %Z}".strip()
    except ValueError:
        return started
