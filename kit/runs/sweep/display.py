"""Display of a sweep in a terminal: a live table, or a line for each event."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kit.runs.progress import planned_steps, say
from kit.runs.sweep.state import SIGNS, STYLES, Member, SweepRecord
from kit.utils.formatting import count, duration, number, shorten

_AROUND = 8
"""Lines of a terminal that are not members' rows."""


class SweepDisplay:
    """Shows a sweep while it runs, and what came of it."""

    def __init__(
        self, console: Console, folder: Path, record: SweepRecord, room: Sequence[str]
    ) -> None:
        self._console, self._folder, self._record, self._room = console, folder, record, room
        self._planned: dict[int, int | None] = {}
        # Drawn by hand: a thread would not go together with starting processes.
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="visible"
        )

    def __enter__(self) -> Self:
        record = self._record
        waiting = count(len(record.in_state("waiting")), "member")
        words = f"{waiting} to run, {len(self._room)} at a time ({', '.join(self._room)} each)"
        if len({*self._room}) == 1 or len(self._room) == 1:
            words = f"{waiting} to run, {len(self._room)} at a time, {self._room[0]} each"
        self.say(f"Sweeping {Path(record.notebook).name} in {self._folder}")
        self.say(words)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self) -> None:
        """Draw the table anew."""
        if self._console.is_terminal:
            seconds = Text(duration(self._record.seconds), style="dim")
            self._live.update(Group(self._table(short=True), seconds), refresh=True)

    def started(self, member: Member, place: str) -> None:
        """Show that a member starts."""
        self._line(member, f"started on {place}")

    def ended(self, member: Member) -> None:
        """Show that a member has ended."""
        rewards = _change(member.reward_first, member.reward_last)
        words = f"{member.state} after {duration(member.seconds)}, "
        words += f"{count(member.steps, 'step')}" + (f", reward {rewards}" if rewards else "")
        self._line(member, words + (f": {shorten(member.why, 200)}" if member.why else ""))

    def say(self, words: str) -> None:
        """Print a line as it is."""
        say(self._console, words)

    def summary(self) -> None:
        """Print the whole table, and what to do next."""
        record = self._record
        self._console.print(self._table())
        states = [member.state for member in record.members]
        tally = ", ".join(f"{states.count(state)} {state}" for state in SIGNS if state in states)
        self.say(f"{tally}. The sweep took {duration(record.seconds)}. Everything is in")
        self.say(f"  {self._folder}")
        if record.status != "completed":
            self.say(f"Run what is not completed: kit sweep --resume {self._folder}")
        if (self._folder / "comparison.html").is_file():
            self.say("Read it in a browser: comparison.html. A table of its runs: kit runs FOLDER.")

    def _line(self, member: Member, words: str) -> None:
        if not self._console.is_terminal:
            record = self._record
            named = " ".join(f"{k}={member.parameters[k]}" for k in record.varied)
            self.say(f"[{member.number}/{len(record.members)}] {named}: {words}")

    def _table(self, short: bool = False) -> Table:
        record = self._record
        table = Table(box=None, pad_edge=False)
        table.add_column("#", justify="right")
        for name in record.varied:
            table.add_column(Text(name), overflow="fold")
        table.add_column("state", no_wrap=True)
        for name in ("step", "reward", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for member in self._shown(short):
            table.add_row(
                str(member.number),
                *(Text(shorten(str(member.parameters[name]), 40)) for name in record.varied),
                Text(f"{SIGNS[member.state]} {member.state}", style=STYLES.get(member.state, "")),
                self._step(member),
                _change(member.reward_first, member.reward_last),
                duration(member.seconds) if member.attempts else "",
                Text(shorten(member.why, 120), style="dim"),
            )
        return table

    def _shown(self, short: bool) -> list[Member]:
        """Members to show: all, or where the terminal is too low those that run and like ones."""
        members, room = self._record.members, max(self._console.height - _AROUND, 5)
        if not short or len(members) <= room:
            return members
        rank = {"running": 0, "failed": 1, "killed": 1, "completed": 2, "stopped": 2}
        first = sorted(members, key=lambda m: (rank.get(m.state, 3), m.number))[:room]
        return sorted(first, key=lambda m: m.number)

    def _step(self, member: Member) -> str:
        if not member.attempts:
            return ""
        planned = self._planned.get(member.number)
        if planned is None:
            planned = planned_steps(self._folder / (member.folder or ""), member.parameters)
            self._planned[member.number] = planned
        return f"{member.steps}/{planned}" if planned else str(member.steps)


def _change(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return ""
    return f"{number(first, 3)} → {number(last, 3)}"
