"""Going on with a session whose kernel is gone, and the list of sessions that there are."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from kit.errors import SessionError, StackError, did_you_mean
from kit.reports import UpdateReport
from kit.reports.status import LivingSession, Sessions
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.cluster.registry import Entry
    from kit.lifecycle.start import Lifecycle
    from kit.messages import TrainerStanding
    from kit.rewards.runner import Reward


Session = TypeVar("Session", bound="Lifecycle")


def sessions() -> Sessions:
    """Those that live now."""
    from kit.cluster import lease, processes, registry
    from kit.lifecycle import journal

    found = []
    for entry in registry.living():
        state = lease.state_of(entry.folder)
        if state is None:
            continue
        members = processes.of_stack(entry.stack, entry.head)
        step = None
        if entry.ready and not state["warm"]:
            with suppress(SessionError):
                step = int(journal.noted(entry.folder)["now"]["step_count"])
        found.append(
            LivingSession(
                name=entry.name,
                id=entry.stack,
                device=entry.device,
                step=step,
                driver=state["driver"],
                folder=state["folder"],
                warm=state["warm"],
                ends_in=state["ends_in"],
                age=time.time() - entry.created,
                processes=len(members),
                memory=processes.own_memory(members),
                directory=entry.folder,
            )
        )
    return Sessions(tuple(found))


def attach(
    kind: type[Session], name: str | None, data: Any, eval_data: Any, reward: Reward | None
) -> Session:
    """What `RLSession.attach` does."""
    from kit.cluster import registry
    from kit.cluster.client import Cluster
    from kit.config import SessionConfig
    from kit.lifecycle import journal
    from kit.stack.recovery import rejoin

    begin = time.perf_counter()
    entry = _chosen(name)
    start = journal.started_with(entry.folder)
    reward = _passed_again(entry.name, start["passed"], data, eval_data, reward)
    with registry.locked():
        _refuse_if_driven(entry)
        try:
            cluster = Cluster.taken(entry)
        except StackError as error:
            raise SessionError(
                f"The session {entry.name!r} ended just now.",
                why=str(error),
                fix="start a new one, or load a checkpoint: `RLSession.load(path)`.",
            ) from None
    try:
        notes = journal.noted(entry.folder)
        tree = journal.settings(entry.folder, notes["now"])
        session = kind(SessionConfig(**tree))
        stack = session._prepare(data, eval_data, reward)
        stack.launch(cluster)
        session._prompting.load_tokenizer()
        found = rejoin(stack, start["info"])
        trainers = found.trainers
        finished = _update_was_made(notes, trainers)
        state = notes["then"]["state"] if finished else notes["now"]
        if trainers.updates != state["step_count"]:
            raise SessionError(
                f"The trainers of {entry.name!r} have made {trainers.updates} updates, and "
                f"{state['step_count']} were noted.",
                why="Its kernel ended while other weights were being loaded or tried.",
                fix=f"end it with `kit doctor --stop {entry.name}`, and load the checkpoint again.",
            )
        journal.restore(session, entry.folder, state, trainers.snapshots)
        for nobodys in set(trainers.snapshots) - session._snapshots.keys():
            stack.forget(nobodys)
        stack.trainer_version, stack.newest_version = (
            int(state[key]) for key in ("weight_version", "newest_version")
        )
        if found.torn:
            stack.sync(stack.trainer_version)
        session._run(stack)
    except BaseException:
        cluster.leave(LEFT_SECONDS, warm=False)
        raise
    if finished:
        _complete(session, notes["then"], trainers)
    session.start_seconds = time.perf_counter() - begin
    return session


LEFT_SECONDS = 300.0
"""How long a session waits again that could not be attached."""


def _chosen(name: str | None) -> Entry:
    """The session of this name, or the only one that waits."""
    from kit.cluster import lease, registry

    entries = [entry for entry in registry.living() if entry.ready]
    states = {entry.stack: lease.state_of(entry.folder) for entry in entries}
    there = [e for e in entries if (state := states[e.stack]) and not state["warm"]]
    names = ", ".join(repr(entry.name) for entry in there)
    if name is not None:
        for entry in there:
            if name in (entry.name, entry.stack):
                return entry
        raise SessionError(
            f"There is no session {name!r} to attach to.",
            why="It has ended, or it never was. Sessions wait `stack.lease` seconds for a kernel.",
            fix=f"{did_you_mean(name, [e.name for e in there])} `RLSession.sessions()` shows them."
            if there
            else NONE_LEFT,
        )
    waiting = [e for e in there if (state := states[e.stack]) and state["driver"] is None]
    if len(waiting) == 1:
        return waiting[0]
    if waiting:
        raise SessionError(
            f"{len(waiting)} sessions wait for a kernel: {', '.join(e.name for e in waiting)}.",
            fix=f"name the one you mean: `RLSession.attach({waiting[0].name!r})`.",
        )
    if len(there) == 1:
        _refuse_if_driven(there[0])
    raise SessionError(
        "There is no session to attach to.",
        why=f"Those that live are driven by other processes: {names}." if there else "",
        fix=NONE_LEFT,
    )


NONE_LEFT = (
    "start one, `RLSession.start(...)`, or continue from a checkpoint: `RLSession.load(path)`."
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


def _passed_again(
    name: str, passed: dict[str, Any], data: Any, eval_data: Any, reward: Reward | None
) -> Reward | None:
    """The reward to go on with. Raises SessionError where something was passed and is not now."""
    given = {"data": data, "eval_data": eval_data, "reward": reward}
    missing = [key for key, was in passed.items() if was is True and given[key] is None]
    if missing:
        words = {
            "data": "training prompts",
            "eval_data": "held-out prompts",
            "reward": "a reward function",
        }
        call = ", ".join([repr(name), *(f"{key}=..." for key in missing)])
        raise SessionError(
            f"The session {name!r} was started with {' and '.join(words[key] for key in missing)} "
            "of its own.",
            why="They were objects of the kernel that is gone, and went with it.",
            fix=f"make them again and pass them: `RLSession.attach({call})`.",
        )
    if reward is None and isinstance(passed["reward"], str):
        return str(passed["reward"])
    return reward


def _update_was_made(notes: dict[str, Any], trainers: TrainerStanding) -> bool:
    """Have the trainers made the update before which the kernel wrote its last notes?"""
    then = notes.get("then")
    if not then or not trainers.last_update:
        return False
    same = bool(then["update"] == trainers.last_update[0])
    return same and bool(trainers.updates == then["state"]["step_count"])


def _complete(session: Any, then: dict[str, Any], trainers: TrainerStanding) -> None:
    """What would have followed on the update, had the kernel lived: a step is completed."""
    from kit.lifecycle import step
    from kit.rollout import batch

    if not then["in_step"] or session.last_rollout is None or not trainers.last_update:
        return
    per_step = trainers.last_update[1]
    report = UpdateReport(
        step=session.step_count - 1,
        metrics=batch.means(per_step),
        per_step=tuple(per_step),
        samples=then["samples"],
        tokens=then["tokens"],
        seconds=trainers.update_seconds,
        left_out=tuple(then["left_out"]),
    )
    rollout = session.last_rollout
    begin = time.perf_counter() - rollout.seconds - trainers.update_seconds
    with held():
        done = step.hand_over(session, rollout, report, None, begin)
    step.finish(session, done)
    session._note()
