"""`RLSession.sessions()`: what lives, who drives it, and until when it waits."""

from __future__ import annotations

import os

from markupsafe import Markup

from kit.attaching import LivingSession, Sessions
from kit.viz.html import Child, Column, badge, join, note, table, tag, title
from kit.viz.text import columns, count, data_size, duration, shorten

LONGEST = 60
"""Characters of a name that are shown."""
NONE = "No session lives here: `session = RLSession.start(...)` starts one."


def sessions_title(report: Sessions) -> str:
    """`2 sessions live here`."""
    verb = "lives" if len(report) == 1 else "live"
    return f"{count(len(report), 'session')} {verb} here"


def sessions_html(report: Sessions) -> Markup:
    """A row a session, and below it what to call to have it."""
    if not len(report):
        return note(NONE)
    heads = [
        Column("", "fit"),
        Column("session", "fit"),
        Column("step", "num"),
        Column("device", "fit"),
        Column("driven by"),
        Column("age", "num"),
        Column("memory", "num"),
    ]
    rows: list[list[Child]] = [
        [
            badge(*_state(each)),
            shorten(each.name, LONGEST),
            _step(each),
            each.device,
            shorten(driver(each), 200),
            duration(each.age),
            data_size(each.memory),
        ]
        for each in report.sessions
    ]
    calls = [tag("div", call, class_="kv-text") for call in _calls(report)]
    return join((title(sessions_title(report)), table(heads, rows), *calls))


def sessions_plain(report: Sessions) -> str:
    """The same for a terminal."""
    if not len(report):
        return NONE
    rows = [
        (
            f"{_state(each)[0]}  {shorten(each.name, LONGEST)}",
            f"step {_step(each)}, {each.device}, {duration(each.age)} old, "
            f"{data_size(each.memory)}; {shorten(driver(each), 200)}",
        )
        for each in report.sessions
    ]
    lines = [sessions_title(report), columns(rows, indent="  ")]
    return "\n".join([*lines, *(f"  {call}" for call in _calls(report))])


def driver(session: LivingSession) -> str:
    """`process 4711, in /home/me/work`, or how long it waits for one."""
    if session.driver is not None:
        mine = " (this one)" if session.driver == os.getpid() else ""
        return f"process {session.driver}{mine}, in {session.folder}"
    return f"nobody, ends in {duration(session.ends_in or 0.0)}"


def _state(session: LivingSession) -> tuple[str, str]:
    if session.driver is not None:
        return "✓ driven", "good"
    return ("○ warm", "good") if session.warm else ("! waits", "warn")


def _step(session: LivingSession) -> str:
    return "–" if session.step is None else f"{session.step:,}"


def _calls(report: Sessions) -> list[str]:
    """Whole, to be copied; by its id where a name is too long for that."""
    waiting = [s for s in report.sessions if s.can_be_attached]
    return [f"RLSession.attach({(s.name if len(s.name) <= LONGEST else s.id)!r})" for s in waiting]
