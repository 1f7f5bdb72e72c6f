"""Where a session stands: what it shows of itself, and what to call next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.reports import REWARD, SessionState

if TYPE_CHECKING:
    from kit.lifecycle import Lifecycle


def overview(session: Lifecycle) -> SessionState:
    """Everything that is known without asking a process of the stack, which may be busy."""
    stack, last = session._stack, session.last_rollout
    rewards = tuple(row[REWARD] for row in session.history if REWARD in row)
    return SessionState(
        name=session.config.name,
        state=session._state,
        model=session.config.model.name,
        parameters=stack.info.get("parameters") if stack else None,
        device=stack.device if stack else session.config.device,
        dtype=stack.dtype if stack else session.config.model.dtype,
        step=session.step_count,
        planned=session.config.training.num_rollout,
        weight_version=session.weight_version,
        engine_version=session.engine_version,
        last_reward=last.mean_reward() if last and last.rewards() else None,
        rewards=rewards,
        waiting=len(session._buffer),
        host_memory=stack.host_memory() if stack else None,
        next_calls=_next(session),
    )


def _next(session: Lifecycle) -> tuple[tuple[str, str], ...]:
    """Calls that make sense now, each with what it does; the most likely one first."""
    if session._state != "running":
        again = ("session = RLSession.start(...)", "start a session")
        load = ("session = RLSession.load(path)", "continue a saved one")
        return (again, load) if session._state == "closed" else (again,)
    calls = []
    if session.engine_version != session.weight_version:
        calls.append(("session.sync()", "the engine still generates with older weights"))
    last = session.last_rollout
    if last is None or not last.written_by({session.weight_version}):
        calls.append(("rollout = session.generate()", "write responses with the present weights"))
    elif not last.rewards():
        calls.append(("rollout = session.score(rollout)", "give the last rollout its rewards"))
    else:
        calls.append(("batch = session.advantages(rollout)", "what an update would see"))
        calls.append(("session.update(batch)", "train on it"))
    calls.append(("session.train(20)", "whole steps, shown live"))
    calls.append(("session.snapshot()", "keep this moment, to undo what comes next"))
    if session.step_count:
        calls.append(("session.evaluate()", "accuracy on held-out prompts"))
        calls.append(("session.save()", "keep where it stands"))
    return tuple(calls)
