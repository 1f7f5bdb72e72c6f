"""Sessions as pictures: how one stands and what to call next, all that live, and snapshots."""

from __future__ import annotations

import os
import time

from markupsafe import Markup

from kit.config import LoraConfig
from kit.reports import SessionState
from kit.reports.status import (
    FirstPrompt,
    LivingSession,
    Sessions,
    SettingsChange,
    Snapshot,
    Snapshots,
)
from kit.utils.formatting import (
    columns,
    count,
    data_size,
    duration,
    letters,
    named,
    number,
    shorten,
)
from kit.viz.html import Child, Column, badge, facts, join, note, numeric, quiet, table, tag, title
from kit.viz.render import register
from kit.viz.svg import bars

STATES = {"running": ("✓ running", "good"), "closed": ("■ closed", "warn")}
MOST_STEPS = 60
"""Steps whose rewards are drawn, the last ones."""


def _session_html(state: SessionState) -> Markup:
    """Name and state, headline numbers, the rewards so far, and the calls that make sense now."""
    heads = [Column("what to call next", "fit"), Column("")]
    rows = [[tag("span", call, class_="kv-text"), quiet(words)] for call, words in state.next_calls]
    return join(
        title(f"{_kind(state)} {shorten(state.name, 60)} ", badge(*_state(state))),
        facts(_facts(state)),
        note(_behind(state)) if _behind(state) else None,
        _rewards(state),
        _prompt_html(state),
        table(heads, rows) if rows else None,
    )


def _session_plain(state: SessionState) -> str:
    lines = [
        f"{_kind(state)} {shorten(state.name, 60)}: {_state(state)[0]}",
        named(_facts(state)),
    ]
    if _behind(state):
        lines.append(f"  {_behind(state)}")
    lines += _prompt_plain(state)
    lines += ["  what to call next", columns(state.next_calls, indent="    ")]
    return "\n".join(lines)


register(SessionState, _session_html, _session_plain)


def _kind(state: SessionState) -> str:
    return "Fork" if state.fork_of else "Session"


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
    if state.lora:
        place = 2 if state.parameters else 1
        rows[place:place] = _adapters(state, state.lora)
    if state.drafts:
        rows.append(("drafts", state.drafts))
    if state.quantized:
        rows.append(("linear layers", state.quantized))
    if state.fork_of:
        rows.insert(0, ("fork of", shorten(state.fork_of, 60)))
    if state.forks:
        words = "other forks" if state.fork_of else "forks"
        rows.append((words, shorten(", ".join(state.forks), 80)))
    if state.last_reward is not None:
        rows.append(("reward, last rollout", number(state.last_reward, 3)))
    if state.waiting:
        rows.append(("to be continued", count(state.waiting, "group")))
    if state.host_memory:
        rows.append(("host memory", data_size(state.host_memory)))
    return rows


def _adapters(state: SessionState, lora: LoraConfig) -> list[tuple[str, str]]:
    """How much is trained, and where: `84 k (9.3%)`, `LoRA, rank 8`."""
    targets = lora.target_modules
    where = "all linear layers" if targets == "all-linear" else shorten(", ".join(targets), 60)
    if lora.modules_to_save:
        where += f"; whole {shorten(', '.join(lora.modules_to_save), 40)}"
    if lora.load_in_4bit:
        where += ", beside weights in 4 bits"
    rows = [(f"adapters in {where}", f"LoRA, rank {lora.r}")]
    if state.trained and state.parameters:
        share = f"{_millions(state.trained)} ({state.trained / state.parameters:.1%})"
        rows.insert(0, ("trained", share))
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


MOST_TOKENS = 160
"""Tokens of a prompt that are drawn; of a longer one its two ends."""
PROMPT = "prompt 1, as tokens"
_SAID = 500
"""Characters of a warning or note that are shown."""


def _prompt_tokens(prompt: FirstPrompt) -> list[str]:
    """Texts of the tokens that are drawn, `…` for those between."""
    shown = [letters(text, 30) for text in prompt.texts]
    if len(shown) <= MOST_TOKENS:
        return shown
    half = MOST_TOKENS // 2
    return [*shown[:half], "…", *shown[-half:]]


def _prompt_html(state: SessionState) -> Markup | None:
    prompt = state.first_prompt
    if prompt is None:
        return None
    told: list[Markup] = []
    if prompt.warnings:
        head = f"! {count(len(prompt.warnings), 'thing')} to look at in the prompts"
        items = (tag("li", shorten(words, _SAID)) for words in prompt.warnings)
        told = [tag("div", badge(head, "warn")), tag("ul", *items)]
    if state.step:
        return join(*told)
    chips = (tag("i", text) for text in _prompt_tokens(prompt))
    heading = quiet(f"{PROMPT}: {len(prompt.tokens):,}")
    notes = [note(shorten(words, _SAID)) for words in prompt.notes]
    return join(heading, tag("div", *chips, class_="kv-strip"), *told, *notes)


def _prompt_plain(state: SessionState) -> list[str]:
    prompt = state.first_prompt
    if prompt is None:
        return []
    told = [f"  ! {shorten(words, _SAID)}" for words in prompt.warnings]
    if state.step:
        return told
    tokens = "|".join(_prompt_tokens(prompt))
    notes = [f"  {shorten(words, _SAID)}" for words in prompt.notes]
    return [f"  {PROMPT}: {tokens}", *told, *notes]


LONGEST = 60
"""Characters of a name that are shown."""
NO_SESSIONS = "No session lives here: `session = RLSession.start(...)` starts one."


def _sessions_title(report: Sessions) -> str:
    """`2 sessions live here`."""
    verb = "lives" if len(report) == 1 else "live"
    return f"{count(len(report), 'session')} {verb} here"


def _sessions_html(report: Sessions) -> Markup:
    """One row a session, and below the table the calls that attach to those that wait."""
    if not len(report):
        return note(NO_SESSIONS)
    heads = [Column("", "fit"), Column("session", "fit"), Column("step", "num")]
    heads += [Column("device", "fit"), Column("driven by"), *numeric("age", "memory")]
    rows: list[list[Child]] = [
        [
            badge(*_living_state(each)),
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
    return join(title(_sessions_title(report)), table(heads, rows), *calls)


def _sessions_plain(report: Sessions) -> str:
    if not len(report):
        return NO_SESSIONS
    rows = [
        (
            f"{_living_state(each)[0]}  {shorten(each.name, LONGEST)}",
            f"step {_step(each)}, {each.device}, {duration(each.age)} old, "
            f"{data_size(each.memory)}; {shorten(driver(each), 200)}",
        )
        for each in report.sessions
    ]
    calls = (f"  {call}" for call in _calls(report))
    return "\n".join([_sessions_title(report), columns(rows), *calls])


register(Sessions, _sessions_html, _sessions_plain)


def driver(session: LivingSession) -> str:
    """`process 4711, in /home/me/work`, or how long it waits for one."""
    if session.driver is not None:
        mine = " (this one)" if session.driver == os.getpid() else ""
        return f"process {session.driver}{mine}, in {session.folder}"
    return f"nobody, ends in {duration(session.ends_in or 0.0)}"


def _living_state(session: LivingSession) -> tuple[str, str]:
    if session.driver is not None:
        return "✓ driven", "good"
    return ("○ warm", "good") if session.warm else ("! waits", "warn")


def _step(session: LivingSession) -> str:
    return "–" if session.step is None else f"{session.step:,}"


def _calls(report: Sessions) -> list[str]:
    """Calls to copy, whole; a session with a name too long for that goes by its id."""
    waiting = [s for s in report.sessions if s.can_be_attached]
    return [f"RLSession.attach({(s.name if len(s.name) <= LONGEST else s.id)!r})" for s in waiting]


NO_SNAPSHOTS = "No snapshots yet: session.snapshot('before') keeps this moment."


def _change_html(change: SettingsChange) -> Markup:
    heads = [Column("setting", "fit"), Column("before"), Column("now")]
    rows: list[list[Child]] = [
        [shorten(name, 60), _setting(old), _setting(new)] for name, old, new in change.changes
    ]
    if not rows:
        return join(note("Nothing changed: the settings were so already."))
    return join(title(f"Settings changed at step {change.step:,}"), table(heads, rows))


def _change_plain(change: SettingsChange) -> str:
    """What was changed, a setting a line."""
    if not change.changes:
        return "Nothing changed: the settings were so already."
    lines = [
        f"  {shorten(name, 60)}: {_setting(old)} -> {_setting(new)}"
        for name, old, new in change.changes
    ]
    return "\n".join([f"Settings changed at step {change.step:,}", *lines])


def _setting(value: object) -> str:
    return shorten("none" if value is None else str(value), 80)


register(SettingsChange, _change_html, _change_plain)


def _snapshot_line(snapshot: Snapshot) -> str:
    """`Snapshot 'before' of step 4: 8.1 MB in host memory; session.restore('before') ...`."""
    return (
        f"Snapshot {snapshot.name!r} of step {snapshot.step:,}: {data_size(snapshot.bytes)} "
        f"{_where(snapshot)}; session.restore({snapshot.name!r}) comes back to it"
    )


register(Snapshot, lambda snapshot: tag("div", f"✓ {_snapshot_line(snapshot)}"), _snapshot_line)


def _snapshots_html(snapshots: Snapshots) -> Markup:
    """One row a snapshot, and what they hold together."""
    if not snapshots:
        return note(NO_SNAPSHOTS)
    heads = [Column("name", "fit"), *numeric("step", "weights", "reward"), Column("taken", "fit")]
    heads += [Column("holds", "num"), Column("where"), Column("", "fit")]
    rows: list[list[Child]] = [
        [
            tag("b", snapshot.name),
            f"{snapshot.step:,}",
            f"version {snapshot.weight_version:,}",
            number(snapshot.reward, 3),
            _when(snapshot),
            data_size(snapshot.bytes),
            _where(snapshot),
            badge("= now", "good") if snapshot.weight_version == snapshots.now else None,
        ]
        for snapshot in snapshots
    ]
    words = f"{count(len(snapshots), 'snapshot')}, the oldest first"
    return join(title(words), table(heads, rows), note(_together(snapshots)))


def _snapshots_plain(snapshots: Snapshots) -> str:
    if not snapshots:
        return NO_SNAPSHOTS
    rows = [
        [
            snapshot.name,
            f"step {snapshot.step:,}",
            f"weights {snapshot.weight_version:,}",
            f"reward {number(snapshot.reward, 3)}",
            _when(snapshot),
            data_size(snapshot.bytes),
            _where(snapshot),
            "= now" if snapshot.weight_version == snapshots.now else "",
        ]
        for snapshot in snapshots
    ]
    return f"{columns(rows)}\n  {_together(snapshots)}"


register(Snapshots, _snapshots_html, _snapshots_plain)


def _together(snapshots: Snapshots) -> str:
    return (
        f"{data_size(snapshots.host_bytes)} of host memory in all; session.restore(name) goes "
        "back, session.forget(name) gives the room back."
    )


def _where(snapshot: Snapshot) -> str:
    return f"in {shorten(str(snapshot.folder), 120)}" if snapshot.folder else "in host memory"


def _when(snapshot: Snapshot) -> str:
    return time.strftime("%H:%M:%S", time.localtime(snapshot.made))
