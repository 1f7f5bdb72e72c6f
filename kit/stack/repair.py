"""Starting again what has died: an engine that the next call needs, trainers that will be loaded.

An engine holds nothing that is not elsewhere: it gets the trainer's weights, and what it was asked
is asked again. A trainer holds what is learned, so it is started again only to read a checkpoint.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kit.interrupts import held
from kit.stack import processes
from kit.stack.actors import engine_name, make_engine, make_trainers, trainer_name
from kit.stack.standing import NEVER_HANDED
from kit.stack.watch import TRAINER, Elsewhere, engine

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def look_after(stack: Stack, engines: list[int], *, trainers: bool) -> None:
    """Have these watched from now on; they are started."""
    actors = [stack._engines[index] for index in engines]
    actors += stack._trainers if trainers else []
    limit = stack.config.engine.start_timeout
    pids: list[list[int]] = stack._get([a.processes.remote() for a in actors], "start", limit)
    for index, found in zip(engines, pids, strict=False):
        place = stack.layout.engines[index][0]
        stack.watch.add(engine(index), _members(stack, stack._engines[index], place, found))
    if trainers:
        ranks = zip(stack._trainers, stack.layout.trainers, pids[len(engines) :], strict=True)
        stack.watch.add(TRAINER, [one for rank in ranks for one in _members(stack, *rank)])


def _members(stack: Stack, actor: Any, place: int, pids: list[int]) -> list[int | Elsewhere]:
    """What can be watched of an actor from here."""
    from kit.stack.joined import RemoteActor

    return [*pids] if stack.placement.is_here(place) else [RemoteActor(actor)]


def start_dead_engines(stack: Stack) -> bool:
    """Start engines whose processes died, with the weights of the model's files: were there any?

    Raises:
        StackError: one could not start; none is left half started.
    """
    dead = [i for i in range(stack.replicas) if stack.calls.has_died(engine(i), "generate")]
    if not dead:
        return False
    residency = stack.residency
    living = [actor for i, actor in enumerate(stack._engines) if i not in dead]
    if residency.asleep and living:
        stack._get([e.wake.remote(sorted(residency.asleep)) for e in living], "wake")
    residency.asleep = set()
    if stack.plan.trainer_sleeps:
        residency.sleep_trainer()  # an engine takes its KV cache as if it were alone
    before = {p.pid for p in stack.cluster.processes()}
    try:
        for index in dead:
            with held():  # an actor without a handle would keep its name
                forget(stack._engines[index], engine_name(index))
                stack._engines[index] = make_engine(stack, index, NEVER_HANDED)
        started = [stack._engines[index].start.remote() for index in dead]
        stack._get(started, "start", stack.config.engine.start_timeout)
        look_after(stack, dead, trainers=False)
    except BaseException:
        for index in dead:
            forget(stack._engines[index], engine_name(index))
        processes.end([p for p in stack.cluster.processes() if p.pid not in before])
        raise
    return True


def restart_trainers(stack: Stack) -> None:
    """Start all trainers anew, with the weights of the model's files: load them before any use."""
    with held():
        for rank, actor in enumerate(stack._trainers):
            forget(actor, trainer_name(rank))
        stack._trainers[:] = make_trainers(stack)
    stack.residency.trainer_asleep = False
    limit = stack.config.engine.start_timeout
    calls = [t.start.remote() for t in stack._trainers]
    calls += [t.place.remote() for t in stack._trainers]
    stack._get(calls, "start", limit)
    look_after(stack, [], trainers=True)


def forget(actor: Any, name: str) -> None:
    """Have Ray give its name free, whether it lives or not, and whoever has it by now."""
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)
    with contextlib.suppress(Exception):
        ray.kill(ray.get_actor(name))
