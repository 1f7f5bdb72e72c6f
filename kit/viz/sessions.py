"""`SessionState`: a session as it stands, and what to call next."""

from __future__ import annotations

from markupsafe import Markup

from kit.reports import SessionState
from kit.viz.bars import bars
from kit.viz.html import Column, badge, facts, join, note, table, tag, title
from kit.viz.text import columns, count, data_size, number, shorten

STATES = {"running": ("✓ running", "good"), "closed": ("■ closed", "warn")}
MOST_STEPS = 60
"""Steps whose rewards are drawn, the last ones."""


def session_html(state: SessionState) -> Markup:
    """Name and state, headline numbers, the rewards so far, and the calls that make sense now."""
    heads = [Column("what to call next", "fit"), Column("")]
    rows = [
        [tag("span", call, class_="kv-text"), tag("span", words, class_="kv-muted")]
        for call, words in state.next_calls
    ]
    return join(
        (
            title(f"Session {shorten(state.name, 60)} ", badge(*_state(state))),
            facts(_facts(state)),
            note(_behind(state)) if _behind(state) else None,
            _rewards(state),
            table(heads, rows) if rows else None,
        )
    )


def session_plain(state: SessionState) -> str:
    """The same for a terminal."""
    lines = [
        f"Session {shorten(state.name, 60)}: {_state(state)[0]}",
        "  " + "   ".join(f"{name} {value}" for name, value in _facts(state)),
    ]
    if _behind(state):
        lines.append(f"  {_behind(state)}")
    lines += ["  what to call next", columns(state.next_calls, indent="    ")]
    return "\n".join(lines)


def _state(state: SessionState) -> tuple[str, str]:
    return STATES.get(state.state, (f"○ {state.state}", "warn"))


def _facts(state: SessionState) -> list[tuple[str, str]]:
    rows = [
        ("model", shorten(state.model, 60)),
        ("device", f"{state.device}, {state.dtype}"),
        ("step", f"{state.step:,} of {state.planned:,}"),
        ("engine's weights", f"version {state.engine_version:,}"),
    ]
    if state.parameters:
        rows.insert(1, ("parameters", _millions(state.parameters)))
    if state.last_reward is not None:
        rows.append(("reward, last rollout", number(state.last_reward, 3)))
    if state.waiting:
        rows.append(("to be continued", count(state.waiting, "group")))
    if state.host_memory:
        rows.append(("host memory", data_size(state.host_memory)))
    return rows


def _millions(parameters: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def _behind(state: SessionState) -> str:
    if state.state != "running" or state.engine_version == state.weight_version:
        return ""
    return (
        f"! The trainer is at weights version {state.weight_version}, the engine at "
        f"{state.engine_version}: what it writes now is off-policy."
    )


def _rewards(state: SessionState) -> Markup | None:
    if len(state.rewards) < 2:
        return None
    first = max(len(state.rewards) - MOST_STEPS, 0)
    points = [(str(i), reward) for i, reward in enumerate(state.rewards[first:], start=first + 1)]
    return bars(points, f"mean reward, {'last ' if first else ''}{count(len(points), 'step')}")
