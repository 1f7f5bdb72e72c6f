"""Attach to a session whose kernel is gone; list the sessions that are alive."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint.inputs import Inputs
from kit.errors import KitError, SessionError, StackError, did_you_mean
from kit.lifecycle import forks, journal, running, step
from kit.lifecycle.start import SessionParts
from kit.reports import EvalReport, SyncReport, UpdateReport
from kit.reports.status import LivingSession, Sessions
from kit.rollout.batch import means
from kit.utils.files import working_folder
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.cluster.registry import Entry
    from kit.messages import TrainerStatus
    from kit.stack.slots import Slot
    from kit.stack.stack import Stack


LEFT_SECONDS = 300.0
"""How long a session waits again that could not be attached."""

NONE_LEFT = (
    "start one, `RLSession.start(...)`, or continue from a checkpoint: `RLSession.load(path)`."
)


@dataclass(frozen=True, slots=True)
class UnfinishedStep:
    """A step whose update was made before its kernel ended."""

    note: dict[str, Any]
    trainers: TrainerStatus


def sessions() -> Sessions:
    """The sessions that live now, of all processes of this person."""
    from kit.cluster import lease, processes, registry

    living = []
    for entry in registry.living():
        state = lease.state_of(entry.folder)
        if state is None:
            continue
        members = processes.of_stack(entry.stack, entry.head)
        step = None
        if entry.ready and not state["warm"]:
            with suppress(SessionError):
                step = int(journal.noted(entry.folder)["now"]["step_count"])
        living.append(
            LivingSession(
                name=entry.name,
                id=entry.stack,
                device=entry.device,
                step=step,
                driver=state["driver"],
                folder=state["folder"],
                warm=state["warm"],
                ends_in=state["ends_in"],
                age=max(registry.since_boot() - entry.created, 0.0),
                processes=len(members),
                memory=processes.own_memory(members),
                directory=entry.folder,
            )
        )
    return Sessions(tuple(living))


def own_session(name: str | None, passed: Mapping[str, Any]) -> SessionParts | None:
    """The session that runs in this very process, where it is the one that is asked for.

    None where something is passed as well, which it might not have.
    """
    own = running.here()
    if (
        own is None
        or own.phase != "running"
        or own.is_lost
        or any(v is not None for v in passed.values())
    ):
        return None
    cluster = own.stack.cluster
    return own if name in (None, own.state.config.name, cluster.stack) else None


def attach(
    name: str | None, passed: Mapping[str, Any], of_forks: Mapping[str, Mapping[str, Any] | None]
) -> list[tuple[SessionParts, UnfinishedStep | None]]:
    """Attach to a session and its forks.

    Args:
        name: of the session; None takes the only one.
        passed: data and functions for it, by argument.
        of_forks: those of forks, by the forks' names; None leaves a fork behind.

    Returns:
        The parts of each, the session's own first, and the step to `complete`, if there is one.

    Raises:
        SessionError: there is none, a living process drives it, or something has to be passed
            again.
    """
    from kit.cluster import registry
    from kit.cluster.joined import take_cluster
    from kit.config import SessionConfig

    running.refuse_a_second_one()
    working_folder()
    begin = time.perf_counter()
    entry = _chosen(name)
    start = journal.started_with(entry.folder)
    given = Inputs.of_state(start).again(
        passed,
        SessionError,
        f"The session {entry.name!r}",
        f"RLSession.attach({entry.name!r}, ...)",
    )
    wanted = forks.wanted(entry.folder, entry.name, start, given, of_forks)
    with registry.locked():
        _refuse_if_driven(entry)
        try:
            cluster = take_cluster(entry)
        except StackError as error:
            raise SessionError(
                f"The session {entry.name!r} ended just now.",
                why=str(error),
                fix="start a new one, or load a checkpoint: `RLSession.load(path)`.",
            ) from None
    with ExitStack() as undo:
        undo.callback(cluster.leave, LEFT_SECONDS, warm=False)
        notes = journal.noted(entry.folder)
        parts = SessionParts(SessionConfig(**journal.settings(entry.folder, notes["now"])))
        undo.callback(parts.abandon)
        stack = parts.prepare(**given)
        stack.launch(cluster)
        undo.callback(stack.watch.close)
        parts.sampler.load_tokenizer()
        trainers = stack.reattach(start["info"])
        found = [(parts, _restore(parts, stack, entry.folder, entry.name, trainers))]
        if stack.slots.found:
            stack.weights.engine_version = stack.trainers.version
        if stack.weights.interrupted:
            stack.sync(stack.trainers.version)
        with held():
            parts.run(stack)
        undo.pop_all()
    for fork, slot in forks.found(parts, stack, entry.folder, wanted):
        with suppress(KitError):  # of which `_rejoin` has warned
            found.append((fork, _rejoin(parts, fork, stack, slot, entry.folder)))
    parts.start_seconds = time.perf_counter() - begin
    return found


def _rejoin(
    root: SessionParts, fork: SessionParts, stack: Stack, slot: Slot, folder: Path
) -> UnfinishedStep | None:
    """Have a fork again beside the session that it was forked from."""
    stack.slots.add(slot)
    try:
        with stack.turn(slot):
            status, own = stack.status(), journal.of_fork(folder, slot.name)
            unfinished = _restore(fork, stack, own, slot.config.name, status)
            stack.weights.engine_version = stack.trainers.version
            with held():
                fork.run_fork(root, stack, slot)
                fork.note()
    except KitError as error:
        stack.drop(slot)
        warnings.warn(f"The fork {slot.name!r} was not taken up again. {error}", stacklevel=4)
        raise
    return unfinished


def _restore(
    parts: SessionParts, stack: Stack, folder: Path, name: str, trainers: TrainerStatus
) -> UnfinishedStep | None:
    """Put a session where its journal and its trainers say that it was."""
    notes = journal.noted(folder)
    finished = _update_was_made(notes, trainers)
    row = notes["then"]["state"] if finished else notes["now"]
    _refuse_other_updates(name, row["step_count"], trainers.updates)
    kept, newest = trainers.snapshots, stack.trainers.newest_version
    journal.restore(folder, row, parts.state, stack.trainers, parts.snapshots, kept)
    stack.trainers.newest_version = max(newest, stack.trainers.newest_version)
    for unknown in set(kept) - parts.snapshots.keys():
        stack.forget(unknown)
    recorded = finished and parts.state.last_rollout is not None
    return UnfinishedStep(notes["then"], trainers) if recorded else None


def complete(
    parts: SessionParts,
    unfinished: UnfinishedStep,
    sync: Callable[[], SyncReport],
    evaluate: Callable[[], EvalReport],
) -> None:
    """Finish a step whose update was made before the kernel ended.

    One that was made by hand is written down; its sync is left to whoever goes on.
    """
    with parts.turn():
        _complete(parts, unfinished, sync, evaluate)


def _complete(
    parts: SessionParts,
    unfinished: UnfinishedStep,
    sync: Callable[[], SyncReport],
    evaluate: Callable[[], EvalReport],
) -> None:
    note, trainers, rollout = unfinished.note, unfinished.trainers, parts.state.last_rollout
    if rollout is None or not trainers.last_update:
        return
    per_step = trainers.last_update[1]
    report = UpdateReport(
        step=parts.state.step - 1,
        metrics=means(per_step),
        per_step=tuple(per_step),
        samples=note["samples"],
        tokens=note["tokens"],
        seconds=trainers.update_seconds,
        left_out=tuple(note["left_out"]),
    )
    if not note["in_step"]:
        step.record(parts.state, parts.tracker, rollout, report)
        parts.note()
        return
    begin = time.perf_counter() - rollout.seconds - trainers.update_seconds
    with held():
        done = step.hand_over(parts.state, sync, rollout, report, None, begin)
    step.finish(parts.state, parts.stack, parts.tracker, evaluate, done)
    parts.note()


def _refuse_other_updates(name: str, noted: int, made: int) -> None:
    if made != noted:
        raise SessionError(
            f"The trainers of {name!r} have made {made} updates, and {noted} were noted.",
            why="Its kernel ended while other weights were being loaded or tried.",
            fix=f"end it with `kit doctor --stop {name}`, and load the checkpoint again.",
        )


def _chosen(name: str | None) -> Entry:
    """Find the session of this name, or the only one that waits."""
    from kit.cluster import lease, registry

    living = [(entry, lease.state_of(entry.folder)) for entry in registry.living() if entry.ready]
    there = [(entry, state) for entry, state in living if state and not state["warm"]]
    names = [entry.name for entry, _ in there]
    if name is not None:
        for entry, _ in there:
            if name in (entry.name, entry.stack):
                return entry
        raise SessionError(
            f"There is no session {name!r} to attach to.",
            why="It has ended, or it never was. Sessions wait `stack.lease` seconds for a kernel.",
            fix=f"{did_you_mean(name, names)} `RLSession.sessions()` shows them."
            if there
            else NONE_LEFT,
        )
    waiting = [entry for entry, state in there if state["driver"] is None]
    if len(waiting) == 1:
        return waiting[0]
    if waiting:
        raise SessionError(
            f"{len(waiting)} sessions wait for a kernel: {', '.join(e.name for e in waiting)}.",
            fix=f"name the one you mean: `RLSession.attach({waiting[0].name!r})`.",
        )
    if len(there) == 1:
        _refuse_if_driven(there[0][0])
    raise SessionError(
        "There is no session to attach to.",
        why=f"Those that live are driven by other processes: {', '.join(map(repr, names))}."
        if there
        else "",
        fix=NONE_LEFT,
    )


def _refuse_if_driven(entry: Entry) -> None:
    from kit.cluster import lease

    state = lease.state_of(entry.folder)
    if state and state["driver"] is not None:
        raise SessionError(
            f"The session {entry.name!r} is driven by process {state['driver']}, which lives.",
            why=f"It works in {state['folder']}. A session has one driver at a time.",
            fix="go on there; or close it there (`session.close()`, or shut its kernel down), or "
            f"end it with `kit doctor --stop {entry.name}`.",
        )


def _update_was_made(notes: dict[str, Any], trainers: TrainerStatus) -> bool:
    """Whether the trainers have made the update before which the kernel wrote its last notes."""
    then = notes.get("then")
    if not then or not trainers.last_update:
        return False
    same = bool(then["update"] == trainers.last_update[0])
    return same and bool(trainers.updates == then["state"]["step_count"])
