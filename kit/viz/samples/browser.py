"""`SampleBrowser`: look through a rollout one sample at a time, and mark what you see.

    filters      reward, length, status, marks, words
    list         one line an answer, with its count, or one a sample; arrow keys move through it
    mark, note   of the selected sample
    sample       the selected one alone is drawn, with a token strip of the quantity you choose

Widgets of ipywidgets only: everything can be reached and worked from the keyboard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.errors import DataError, did_you_mean
from kit.samples import Rollout, Sample
from kit.samples.serialization import Mark, marks_table, read_marks, write_marks
from kit.utils.display import Bundle
from kit.utils.formatting import count, number, one_line
from kit.viz.html import badge, facts, fold, note, page, tag, title
from kit.viz.samples.alike import each_sample, same_answer
from kit.viz.samples.browser_widgets import (
    ANY_MARK,
    EACH,
    NO_MARK,
    Controls,
    Numbers,
    arranged,
    list_line,
    orders,
    sortable,
)
from kit.viz.samples.rollout import show_rollout
from kit.viz.samples.sample import sample_body, sample_title, strips


class SampleBrowser:
    """A rollout to look through, filter, sort and mark. Shows itself when a cell ends with it.

    In a saved notebook, and where nobody watches, it shows what the rollout shows.
    """

    def __init__(
        self,
        rollout: Rollout,
        labels: Sequence[str] = ("good", "bad", "odd"),
        numbers: Numbers | None = None,
    ) -> None:
        """Browse these samples.

        Args:
            rollout: what `session.generate()` or `session.score(...)` returned.
            labels: what a sample can be marked as.
            numbers: further numbers to show and sort by, one a sample, under their names.

        Raises:
            DataError: a row of `numbers` has another length than the rollout.
        """
        self.rollout, self.labels, self._extra = rollout, tuple(labels), dict(numbers or {})
        for name, values in self._extra.items():
            if len(values) != len(rollout):
                samples = count(len(rollout), "sample")
                raise DataError(
                    f"numbers[{name!r}] has {len(values)} values for {samples}.",
                    fix="give one number a sample, in the rollout's order; None where it has none.",
                )
        self.listed: list[int] = []
        """Positions in the rollout of the samples in the list, in order: of those that the filter
        lets through, one for each answer, unless `Equal answers` asks for each sample."""
        self._alike: dict[int, list[int]] = {}
        """Of each that is listed, the positions that its line stands for, its own first."""
        self._numbers = sortable(rollout.samples, self._extra)
        self._marks: dict[int, Mark] = {}
        self._wrong: list[str] = []
        self._quiet = False
        self.controls = Controls(
            marks=(*self.labels, ANY_MARK, NO_MARK),
            orders=orders(self._numbers),
            labels=self.labels,
        )
        self._connect()
        self._list()

    # ---- which sample --------------------------------------------------------------------------

    @property
    def position(self) -> int | None:
        """Place in the rollout of the selected sample; None where no sample is listed."""
        place = self.controls.list.index
        return self.listed[place] if place is not None and place < len(self.listed) else None

    @property
    def sample(self) -> Sample | None:
        """The selected sample; None where no sample is listed."""
        return None if self.position is None else self.rollout.samples[self.position]

    def move(self, by: int) -> None:
        """Select the sample so many lines further down the list; stops at its ends."""
        if self.position is not None:
            place = self.controls.list.index + by
            self.controls.list.index = min(max(place, 0), len(self.listed) - 1)

    def move_group(self, by: int) -> None:
        """Select the first listed sample of the next group (1) or the one before (-1)."""
        sample = self.sample
        if sample is None:
            return
        first: dict[int, int] = {}
        for place, position in enumerate(self.listed):
            first.setdefault(self.rollout.samples[position].group_index, place)
        groups = list(first)
        wanted = groups.index(sample.group_index) + by
        self.controls.list.index = first[groups[min(max(wanted, 0), len(groups) - 1)]]

    # ---- marks ---------------------------------------------------------------------------------

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The marks and notes, in the rollout's order."""
        return tuple(self._marks[position] for position in sorted(self._marks))

    def mark(self, label: str = "", note: str = "", position: int | None = None) -> None:
        """Mark a sample. Neither label nor note takes its mark away.

        Args:
            label: one of `labels`; empty for a note alone.
            note: words of your own.
            position: place in the rollout; None is the selected sample.

        Raises:
            DataError: there is no such label or sample.
        """
        if label and label not in self.labels:
            raise DataError(
                f"There is no mark {label!r}.",
                fix=f"{did_you_mean(label, self.labels)} Others: rollout.browse(labels=...).",
            )
        position = self.position if position is None else position
        if position is None or not 0 <= position < len(self.rollout):
            raise DataError(
                "There is no sample to mark.",
                why=f"Of {count(len(self.rollout), 'sample')}, position {position} was asked for.",
                fix="select one, or give its place in the rollout, from 0.",
            )
        self._keep(position, label, note)
        self._list()

    def marks_to_pandas(self) -> Any:
        """One row a mark."""
        return marks_table(self.marks)

    def save_marks(self, path: str | Path) -> Path:
        """Write the marks, one JSON line each."""
        return write_marks(self.marks, path)

    def load_marks(self, path: str | Path) -> int:
        """Take the marks of a file that fit samples of this rollout; how many did.

        Raises:
            DataError: the file is broken, has labels that this browser lacks, or no mark of it
                fits. Nothing has changed then.
        """
        marks = read_marks(path)
        fitting = {
            position: mark
            for mark in marks
            for position, sample in enumerate(self.rollout)
            if mark.fits(sample)
        }
        if marks and not fitting:
            raise DataError(
                f"{path}: none of {count(len(marks), 'mark')} fits a sample of this rollout.",
                why="A mark fits where group, index, prompt and response are the same.",
                fix="browse the rollout that was marked; `Rollout.load(path)` reads a saved one.",
            )
        unknown = sorted({m.label for m in fitting.values()} - {"", *self.labels})
        if unknown:
            raise DataError(
                f"{path} holds the mark {unknown[0]!r}, which this browser does not know.",
                fix=f"rollout.browse(labels={[*self.labels, *unknown]!r}) knows it.",
            )
        self._marks |= fitting
        self._list()
        return len(fitting)

    def _keep(self, position: int, label: str, words: str) -> None:
        if label or words:
            sample = self.rollout.samples[position]
            self._marks[position] = Mark.of(sample, self.rollout.step, label, words)
        else:
            self._marks.pop(position, None)

    # ---- what the widgets say ------------------------------------------------------------------

    def _connect(self) -> None:
        controls = self.controls
        for widget in controls.filters:
            widget.observe(self._unless_quiet(self._list), names="value")
        for choice in (controls.order, controls.equal):
            choice.observe(self._unless_quiet(self._list), names="value")
        controls.list.observe(self._unless_quiet(self._show), names="index")
        controls.strip.observe(self._unless_quiet(self._draw), names="value")
        controls.line.observe(self._unless_quiet(self._go_to_line), names="value")
        controls.note.observe(self._unless_quiet(self._noted), names="value")
        for label, button in controls.labels.items():
            button.on_click(lambda _, label=label: self._labelled(label))
        controls.reset.on_click(lambda _: self.reset())
        for button, by in ((controls.previous, -1), (controls.next, 1)):
            button.on_click(lambda _, by=by: self.move(by))
        for button, by in ((controls.previous_group, -1), (controls.next_group, 1)):
            button.on_click(lambda _, by=by: self.move_group(by))

    def _unless_quiet(self, react: Callable[[], None]) -> Callable[[Any], None]:
        """A reaction to what a person did, not to what the browser itself writes into a widget."""

        def changed(_: Any) -> None:
            if not self._quiet:
                react()

        return changed

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def reset(self) -> None:
        """List every sample, as generated."""
        with self._quietly():
            self.controls.clear()
        self._list()

    def _go_to_line(self) -> None:
        if self.listed:
            self.controls.list.index = self.controls.line.value - 1

    def _labelled(self, label: str) -> None:
        if (position := self.position) is not None:
            mark = self._marks.get(position)
            label = "" if mark and mark.label == label else label
            self._keep(position, label, mark.note if mark else "")
            self._after_marking()

    def _noted(self) -> None:
        if (position := self.position) is not None:
            mark = self._marks.get(position)
            self._keep(position, mark.label if mark else "", self.controls.note.value.strip())
            self._after_marking()

    def _after_marking(self) -> None:
        # The mark may not fit the filter any more, but the sample stays where it is looked at.
        self._write_list()
        self._write_mark()
        self._write_status()

    # ---- drawing -------------------------------------------------------------------------------

    def _list(self) -> None:
        """Filter and sort anew; the selected sample stays selected if it is still listed."""
        wanted, self._wrong = self.controls.filter()
        before = self.position
        fitting = [
            position
            for position, sample in enumerate(self.rollout)
            if wanted.keeps(sample, self._marks.get(position))
        ]
        self._alike = self._folded(arranged(fitting, self.controls.order.value, self._numbers))
        self.listed = list(self._alike)
        holds = (i for i, same in enumerate(self._alike.values()) if before in same)
        place = next(holds, 0)
        self._write_list(place if self.listed else None)
        self._show()

    def _folded(self, positions: Sequence[int]) -> dict[int, list[int]]:
        """Positions by the line that they stand in: samples of a prompt that wrote the same, and of
        which nothing else that is shown differs, share one.
        """
        if self.controls.equal.value == EACH:
            return {position: [position] for position in positions}
        lines: dict[tuple[object, ...], list[int]] = {}
        for position in positions:
            sample, mark = self.rollout.samples[position], self._marks.get(position)
            marked = (mark.label, mark.note) if mark else None
            own = (values[position] for values in self._extra.values())
            key = (sample.group_index, *same_answer(sample), sample.reward, marked, *own)
            lines.setdefault(key, []).append(position)
        return {same[0]: same for same in lines.values()}

    def _write_list(self, place: int | None = -1) -> None:
        """Write the lines of the list; -1 leaves the selection as it is."""
        samples, box = self.rollout.samples, self.controls.list
        place = box.index if place == -1 else place
        lines = [
            (list_line(samples[position], self._marks.get(position), len(same)), position)
            for position, same in self._alike.items()
        ]
        with self._quietly(), box.hold_sync():
            box.options = lines
            box.index = place

    def _show(self) -> None:
        """Fill in everything that is about the selected sample."""
        controls, sample = self.controls, self.sample
        with self._quietly():
            controls.enable(sample is not None)
            controls.line.min = 0  # first, for a bound may not pass the other on its way
            controls.line.max = len(self.listed)
            controls.line.min = min(len(self.listed), 1)
            controls.line.value = 0 if sample is None else controls.list.index + 1
            if sample is not None and (names := list(strips(sample))):
                chosen = controls.strip.value
                controls.strip.options = names
                controls.strip.value = chosen if chosen in names else names[0]
                controls.strip.layout.display = "" if len(names) > 1 else "none"
        self._write_mark()
        self._write_status()
        self._draw()

    def _write_mark(self) -> None:
        mark = self._marks.get(-1 if self.position is None else self.position, Mark())
        with self._quietly():
            self.controls.show_mark(mark.label, mark.note)

    def _draw(self) -> None:
        position, sample = self.position, self.sample
        if sample is None or position is None:
            empty = "No sample fits the filter." if len(self.rollout) else "The rollout is empty."
            self.controls.sample.value = page(note(empty))
            return
        numbers = [(name, number(values[position], 3)) for name, values in self._extra.items()]
        draw = strips(sample).get(self.controls.strip.value)
        same = [self.rollout.samples[i] for i in self._alike.get(position, [position])]
        self.controls.sample.value = page(
            title(sample_title(sample)),
            fold(f"{count(len(same), 'sample')} with this answer", each_sample(same, {}))
            if len(same) > 1
            else None,
            facts(numbers) if numbers else None,
            sample_body(sample),
            draw() if draw else None,
        )

    def _write_status(self) -> None:
        """Write the status line: samples listed, position, marks, and what is wrong."""
        listed = sum(map(len, self._alike.values()))
        words = f"{listed:,} of {count(len(self.rollout), 'sample')} listed"
        if listed > len(self.listed):
            words += f" in {count(len(self.listed), 'line')}, equal answers once"
        if self.position is not None:
            words += f", number {self.controls.list.index + 1:,} selected"
        if self._marks:
            counted = Counter(mark.label or "only a note" for mark in self.marks)
            words += "; marked: " + ", ".join(f"{n} {one_line(k)}" for k, n in counted.items())
        wrong = [badge(f"✗ {message}", "bad") for message in self._wrong]
        self.controls.status.value = page(tag("div", words, role="status"), *wrong)

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        """The rollout's own display, for front-ends that show no widgets."""
        return show_rollout(self.rollout)

    def _ipython_display_(self) -> None:
        from kit.viz.live.age import picture_of
        from kit.viz.live.frontend import show_lasting

        advice = "To filter, sort and mark samples again, run the cell again."
        note = picture_of("the sample browser", advice)
        show_lasting(self.controls.root, show_rollout(self.rollout), note)
