"""Starting again what has died: an engine that the next call needs, trainers that will be loaded.

An engine holds nothing that is not elsewhere: it gets the trainer's weights, and what it was asked
is asked again. A trainer holds what is learned, so it is started again only to read a checkpoint.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kit.stack import processes
from kit.stack.actors import make_engine, make_trainers
from kit.stack.watch import TRAINER, engine

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def look_after(stack: Stack, engines: list[int], *, trainers: bool) -> None:
    """Have these watched from now on; they are started."""
    actors = [stack._engines[index] for index in engines]
    actors += stack._trainers if trainers else []
    limit = stack.config.engine.start_timeout
    pids: list[list[int]] = stack._get([a.processes.remote() for a in actors], "start", limit)
    for index, found in zip(engines, pids, strict=False):
        stack.watch.add(engine(index), found)
    if trainers:
        stack.watch.add(TRAINER, [pid for found in pids[len(engines) :] for pid in found])


def start_dead_engines(stack: Stack) -> bool:
    """Start engines whose processes died, with the weights of the model's files: were there any?

    Raises:
        StackError: one could not start; none is left half started.
    """
    dead = [i for i in range(stack.replicas) if engine(i) in stack.watch.dead()]
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
            _forget(stack._engines[index])
            stack._engines[index] = make_engine(stack, index)
        started = [stack._engines[index].start.remote() for index in dead]
        stack._get(started, "start", stack.config.engine.start_timeout)
        look_after(stack, dead, trainers=False)
    except BaseException:
        for index in dead:
            _forget(stack._engines[index])
        processes.end([p for p in stack.cluster.processes() if p.pid not in before])
        raise
    return True


def restart_trainers(stack: Stack) -> None:
    """Start all trainers anew, with the weights of the model's files: load them before any use."""
    for actor in stack._trainers:
        _forget(actor)
    stack._trainers[:] = make_trainers(stack)
    stack.residency.trainer_asleep = False
    limit = stack.config.engine.start_timeout
    calls = [t.start.remote() for t in stack._trainers]
    calls += [t.place.remote() for t in stack._trainers]
    stack._get(calls, "start", limit)
    look_after(stack, [], trainers=True)


def _forget(actor: Any) -> None:
    """Have Ray give its name free, whether it lives or not."""
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)
