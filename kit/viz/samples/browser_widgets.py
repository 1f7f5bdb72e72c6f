"""The widgets of `SampleBrowser`, and which samples its list holds in which order.

JupyterLab keeps arrow keys and letters for its cells while a list, a slider or a radio button in an
output has the focus (an `x` cuts the cell); it leaves them alone in boxes to type in, and leaves
Enter and Space to buttons and menus. So whatever the list does, a box and buttons do too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kit.samples import Sample, Status
from kit.samples.serialization import Mark
from kit.utils.formatting import mean, number, shorten
from kit.viz.samples.alike import times
from kit.viz.samples.rollout import STATUS_SIGNS

LINES = 9
"""Lines of the list that are seen at once."""
_ALL = "all"
_HARD_SPACE = "\u00a0"
_STYLE = """<style>
.kit-browser select[size]{font-family:var(--jp-code-font-family,ui-monospace,Menlo,Consolas,
monospace);font-size:13px;line-height:1.45}
.kit-browser .kit-browser-heading .widget-html-content{font-family:var(--jp-code-font-family,
ui-monospace,Menlo,Consolas,monospace);font-size:13px;white-space:pre;overflow:hidden;
padding-left:5px;line-height:1.3;height:auto}
.kit-browser .kit-viz{padding:3px 5px}
.kit-browser .widget-button:focus-visible,.kit-browser select:focus-visible,
.kit-browser input:focus-visible{outline:2px solid
 var(--jp-brand-color1,#0072b2);outline-offset:1px}
</style>"""
_STYLE_OF_NAMES = {"description_width": "initial"}
"""A widget's name takes the room that it needs."""
_COLUMNS = ((6, "sample"), (6, "group"), (9, "reward"), (7, "tokens"))
"""Width and name of the numbers of a line."""
_STATUS, _MARK = 13, 10


class Controls:
    """All widgets by name; `SampleBrowser` connects them."""

    def __init__(self, marks: Sequence[str], orders: Sequence[str], labels: Sequence[str]) -> None:
        import ipywidgets as widgets

        self.reward_from, self.reward_to = _box("Reward from", "11em"), _box("Reward to", "10em")
        self.length_from, self.length_to = _box("Tokens from", "11em"), _box("Tokens to", "10em")
        # A menu takes None for nothing chosen, so that `all` has to be a value of its own.
        statuses = [(sign, status.value) for status, sign in STATUS_SIGNS.items()]
        self.status_is = _choice("Status", [(_ALL, _ALL), *statuses])
        self.mark_is = _choice("Marked", [_ALL, *marks])
        self.text = _box("Text", "20em")
        self.text.continuous_update = True
        self.text.placeholder = "in prompt, response, answer, error"
        self._bounds = (self.reward_from, self.reward_to, self.length_from, self.length_to)
        self.filters = (*self._bounds, self.status_is, self.mark_is, self.text)
        self.order = _choice("Sort", orders)
        self.equal = _choice("Equal answers", (ONCE, EACH))
        self.reset = _button("Show all", "Take away every filter, and sort as generated")
        self.status = widgets.HTML()
        self.heading = widgets.HTML(list_heading())
        self.heading.add_class("kit-browser-heading")
        self.list = widgets.Select(rows=LINES, layout=widgets.Layout(width="auto"))
        self.list.tooltip = "Samples. JupyterLab moves between cells by arrow keys: step in Line"
        first = "To the first sample of the"
        self.previous_group = _button("◀◀ Previous group", f"{first} group before")
        self.previous = _button("◀ Previous sample", "One line up")
        self.next = _button("Next sample ▶", "One line down")
        self.next_group = _button("Next group ▶▶", f"{first} next group")
        self._moves = (self.previous_group, self.previous, self.next, self.next_group)
        self.line = widgets.BoundedIntText(
            description="Line",
            min=0,
            max=0,
            tooltip="Line of the list: arrow up for the next, arrow down for the one before",
            layout=widgets.Layout(width="8em"),
            style=_STYLE_OF_NAMES,
        )
        self.labels = {
            name: _button(_pressed(name, False), f"Mark as {shorten(name, 40)}; again to take back")
            for name in labels
        }
        self.note = _box("Note", "auto")
        self.note.placeholder, self.note.layout.flex = "what you see; Enter keeps it", "1 1 18em"
        self.strip = _choice("Tokens show", ())
        self.sample = widgets.HTML()
        self.root = self._arranged()

    def _arranged(self) -> Any:
        import ipywidgets as widgets

        def row(*members: Any) -> Any:
            layout = widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="0 10px")
            return widgets.Box(members, layout=layout)

        root = widgets.VBox(
            [
                widgets.HTML(_STYLE, layout=widgets.Layout(display="none")),
                row(*self.filters, self.order, self.equal, self.reset),
                self.status,
                widgets.VBox([self.heading, self.list]),
                row(self.line, *self._moves, *self.labels.values(), self.note),
                row(self.strip),
                self.sample,
            ]
        )
        root.add_class("kit-browser")
        return root

    def filter(self) -> tuple[SampleFilter, list[str]]:
        """The filter that the widgets describe, and complaints about what cannot be understood."""
        wrong: list[str] = []

        def bound(widget: Any, words: str) -> float | None:
            text = widget.value.strip()
            if not text:
                return None
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if math.isnan(value):
                wrong.append(f"{words}: {shorten(text, 30)} is no number, so it bounds nothing")
                return None
            return value

        wanted = SampleFilter(
            reward_from=bound(self.reward_from, "Reward from"),
            reward_to=bound(self.reward_to, "Reward to"),
            length_from=bound(self.length_from, "Tokens from"),
            length_to=bound(self.length_to, "Tokens to"),
            status=None if self.status_is.value == _ALL else Status(self.status_is.value),
            text=self.text.value,
            mark=None if self.mark_is.value == _ALL else self.mark_is.value,
        )
        return wanted, wrong

    def clear(self) -> None:
        """Empty the filters, sort as generated, and show equal answers once."""
        for choice in (self.status_is, self.mark_is, self.order, self.equal):
            choice.index = 0
        for box in (*self._bounds, self.text):
            box.value = ""

    def enable(self, on: bool) -> None:
        """Switch off what needs a selected sample where there is none."""
        marks = (*self.labels.values(), self.note)
        for widget in (*self._moves, *marks, self.line, self.strip):
            widget.disabled = not on

    def show_mark(self, label: str, note: str) -> None:
        """Show the label of the selected sample, if any, and its note."""
        for name, button in self.labels.items():
            button.description = _pressed(name, name == label)
        self.note.value = note


def _box(words: str, width: str) -> Any:
    """A box to type in, which takes what is written when Enter is pressed."""
    from ipywidgets import Layout, Text

    return Text(
        description=words, placeholder="any", continuous_update=False, layout=Layout(width=width),
        style=_STYLE_OF_NAMES,
    )  # fmt: skip


def _choice(words: str, options: Sequence[Any]) -> Any:
    from ipywidgets import Dropdown, Layout

    return Dropdown(
        description=words, options=options, layout=Layout(width="auto"), style=_STYLE_OF_NAMES
    )


def _button(words: str, tip: str) -> Any:
    from ipywidgets import Button, Layout

    return Button(description=words, tooltip=tip, layout=Layout(width="auto"))


def _pressed(label: str, on: bool) -> str:
    return f"{'●' if on else '○'} {shorten(label, 20)}"


def list_heading() -> str:
    """What stands over the columns of the list."""
    names = "".join(f"{name:>{width}}" for width, name in _COLUMNS)
    return f"{names}  {'status':<{_STATUS}}{'mark':<{_MARK}}prompt → response"


def list_line(sample: Sample, mark: Mark | None, amount: int = 1) -> str:
    """A sample in one line of the list, which stands for so many with the same answer."""
    reward = "–" if sample.reward is None else number(sample.reward, 3)
    values = (str(sample.index), str(sample.group_index), reward, f"{sample.response_length:,}")
    numbers = "".join(f"{v:>{width}}" for v, (width, _) in zip(values, _COLUMNS, strict=True))
    words = shorten(mark.label or "note", _MARK - 1) if mark else ""
    texts = f"{shorten(sample.prompt_text, 34)} → {times(amount)}{shorten(sample.response, 60)}"
    line = f"{numbers}  {STATUS_SIGNS[sample.status]:<{_STATUS}}{words:<{_MARK}}{texts}"
    return line.replace(" ", _HARD_SPACE)  # a list would draw several spaces as one


ONCE, EACH = "once, with their count", "one by one"
"""How samples of one prompt with the same answer are listed."""
ANY_MARK, NO_MARK = "any mark or note", "neither"
AS_GENERATED = "as generated"
Numbers = Mapping[str, Sequence[float | None]]
"""Numbers to sort by, one a sample; None where a sample has none."""


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Conditions for a sample to be listed. Bounds are inclusive; None is no bound."""

    reward_from: float | None = None
    reward_to: float | None = None
    length_from: float | None = None
    """Response tokens."""
    length_to: float | None = None
    status: Status | None = None
    text: str = ""
    """In prompt, response, right answer or error; capitals do not matter."""
    mark: str | None = None
    """A label, `ANY_MARK` or `NO_MARK`."""

    def keeps(self, sample: Sample, mark: Mark | None) -> bool:
        """Whether this sample is listed. Without a reward it is within no bounds of rewards."""
        return (
            _within(sample.reward, self.reward_from, self.reward_to)
            and _within(sample.response_length, self.length_from, self.length_to)
            and self.status in (None, sample.status)
            and self._marked(mark)
            and self._says(sample)
        )

    def _marked(self, mark: Mark | None) -> bool:
        if self.mark is None:
            return True
        if self.mark in (ANY_MARK, NO_MARK):
            return (mark is not None) == (self.mark == ANY_MARK)
        return mark is not None and mark.label == self.mark

    def _says(self, sample: Sample) -> bool:
        wanted = self.text.casefold()
        fields = (sample.prompt_text, sample.response, sample.label_text, sample.error)
        return not wanted or any(wanted in (text or "").casefold() for text in fields)


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    if value is None or math.isnan(value):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def sortable(samples: Sequence[Sample], extra: Numbers) -> dict[str, Sequence[float | None]]:
    """What a list can be sorted by: reward, length, how sure the engine was, and `extra`."""
    return {
        "reward": [sample.reward for sample in samples],
        "length": [sample.response_length for sample in samples],
        "mean log-prob": [
            mean([*filter(math.isfinite, sample.rollout_log_probs or ())]) for sample in samples
        ],
        **extra,
    }


def orders(numbers: Numbers) -> list[str]:
    """The names of all orders, for `arranged`."""
    both = ((f"highest {name} first", f"lowest {name} first") for name in numbers)
    return [AS_GENERATED, *(name for pair in both for name in pair)]


def arranged(positions: Sequence[int], order: str, numbers: Numbers) -> list[int]:
    """Positions in this order; those without a number come last, equal ones as generated."""
    if order == AS_GENERATED:
        return sorted(positions)
    direction, name = order.removesuffix(" first").split(" ", 1)
    values, sign = numbers[name], -1.0 if direction == "highest" else 1.0

    def place(position: int) -> tuple[bool, float, int]:
        value = values[position]
        missing = value is None or math.isnan(value)
        return missing, 0.0 if value is None or missing else sign * value, position

    return sorted(positions, key=place)
