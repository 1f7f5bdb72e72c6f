"""Finds a stack for a starting session, a warm or a new one, and settles whose device it is.

On a CPU several sessions run side by side, each under a name of its own. A GPU has one session,
unless each of them was given a share of it (`memory.device_gib`).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kit.cluster import lease, registry
from kit.cluster.joined import take_cluster
from kit.cluster.registry import Entry
from kit.config import UNNAMED
from kit.config.presets import PRESETS
from kit.errors import SessionError, StackError
from kit.lifecycle import journal
from kit.tracking.recorder import current_group
from kit.utils.formatting import duration, in_gib
from kit.utils.hardware import GIB, Card, gpu_uuids

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def acquire_stack(stack: Stack, *, fresh: bool = False) -> bool:
    """Give a stack its first process; whether it is one that was left warm and has to be reset.

    Its configuration gets a number behind the name, where it has a preset's and another session of
    this name runs.

    Args:
        stack: where nothing was started yet.
        fresh: take none that is warm.

    Raises:
        SessionError: another session has the device or the name.
    """
    from kit.stack.actors import fingerprint

    with registry.locked():
        others = [(entry, lease.state_of(entry.folder)) for entry in registry.living()]
        idle = {entry.stack for entry, state in others if state and _idle(entry, state)}
        wanted = fingerprint(stack.settings)
        taken = None
        for entry, _ in others:
            if not fresh and entry.stack in idle and entry.fingerprint == wanted:
                with suppress(StackError):  # another process was quicker
                    taken = take_cluster(entry)
                    stack.launch(taken)  # closing the stack ends it from here on
                    break
        rest = [pair for pair in others if taken is None or pair[0].stack != taken.stack]
        group = current_group()
        if group and not taken:  # the next notebook will rather want what this one starts
            for entry, _ in rest:
                if entry.stack in idle and entry.group == group:
                    registry.terminate(entry)
        config = stack.settings.config
        address = config.cluster.address or ""
        taken_cards = "" if address else ",".join(gpu_uuids(stack.layout.count))
        if stack.device == "cuda" and not address:  # a cluster keeps its own accounts
            mine = set(taken_cards.split(","))
            make_room(stack, [p for p in rest if mine & set(p[0].card.split(","))], idle)
        driven = [pair for pair in rest if pair[0].stack not in idle]
        name = _free_name(config.name, driven)
        stack.settings.config = config.model_copy(update={"name": name})
        about: dict[str, Any] = {"device_gib": config.memory.device_gib, "group": group}
        if taken:
            taken.rename(name, **about)
        else:
            stack.launch()
            own = taken_cards if stack.device == "cuda" else ""
            stack.cluster.register(name, stack.device, card=own, address=address, **about)
        return taken is not None


def _idle(entry: Entry, state: dict[str, Any]) -> bool:
    """Whether ending it loses nothing: it was left warm, or lost its kernel before a step."""
    if state["driver"] is not None or not entry.ready:
        return False
    if state["warm"]:
        return True
    with suppress(SessionError):
        notes = journal.noted(entry.folder)
        return not notes["now"]["step_count"] and "then" not in notes
    return False


def _free_name(name: str, driven: Iterable[tuple[Entry, dict[str, Any] | None]]) -> str:
    """Free name for a session: its own, or with a number appended."""
    used = {entry.name: (entry, state) for entry, state in driven}
    if name not in used:
        return name
    entry, state = used[name]
    if name not in (*PRESETS, UNNAMED) and not current_group():
        raise SessionError(
            f"There is a session {name!r} already.",
            why=_whose(entry, state),
            fix=_fixes(entry, state) + " Or choose another `name` in the configuration.",
        )
    free = next(f"{name}-{i}" for i in itertools.count(2) if f"{name}-{i}" not in used)
    if state and state["driver"] is None:
        warnings.warn(
            f"{_whose(entry, state)} RLSession.attach({name!r}) goes on with it. The session that "
            f"starts now is named {free!r}.",
            stacklevel=5,
        )
    return free


def make_room(
    stack: Stack, others: list[tuple[Entry, dict[str, Any] | None]], idle: set[str]
) -> None:
    """See that the GPU is free, or that the shares of all fit. Raises SessionError."""
    for entry, _ in others:
        if entry.stack in idle:
            registry.terminate(entry)
    others = [pair for pair in others if pair[0].stack not in idle]
    if not others:
        return
    entry, state = others[0]
    own, total = stack.settings.config.memory.device_gib, (Card.gpu() or Card.host()).total
    shares = [other.device_gib for other, _ in others]
    if own is None or None in shares:
        share = "its session has all of it" if None in shares else f"it has {shares[0]:g} GiB"
        raise SessionError(
            f"The GPU belongs to the session {entry.name!r}: {share}.",
            why=_whose(entry, state),
            fix=_fixes(entry, state) + " To have both side by side, start each with "
            "`memory.device_gib`, its share.",
        )
    if (needed := own + sum(share for share in shares if share)) * GIB > total:
        raise SessionError(
            f"The shares of all sessions would be {needed:g} GiB; the GPU has {in_gib(total)}.",
            why=_whose(entry, state),
            fix=f"lower memory.device_gib, which is {own:g}. Or: {_fixes(entry, state)}",
        )


def _whose(entry: Entry, state: dict[str, Any] | None) -> str:
    """Sentence on who drives a session."""
    if state and state["driver"] is not None:
        return f"Process {state['driver']} drives {entry.name!r}, from {state['folder']}."
    ends = f" and ends by itself in {duration(state['ends_in'])}" if state else ""
    return f"The kernel that drove {entry.name!r} is gone; it waits for another one{ends}."


def _fixes(entry: Entry, state: dict[str, Any] | None) -> str:
    if state and state["driver"] is not None:
        return (
            "close it there (`session.close()`, or shut its kernel down), or end it with "
            f"`kit doctor --stop {entry.name}`."
        )
    return (
        f"go on with it: `session = RLSession.attach({entry.name!r})`; or end it with "
        f"`kit doctor --stop {entry.name}`."
    )
