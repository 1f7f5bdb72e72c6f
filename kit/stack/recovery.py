"""Starting again what has died: an engine that the next call needs, trainers that will be loaded.

An engine holds nothing that is not elsewhere: it gets the trainer's weights, and what it was asked
is asked again. A trainer holds what is learned, so it is started again only to read a checkpoint.

A stack that lives already, taken over: as it is, or to begin anew.

rejoin(stack, info)    the same engine, trainers and weights, whoever drove them before
begin_anew(stack)      the same processes; weights, optimizer, caches and counters of a start
fingerprint(stack)     what the processes were started with; equal ones can be begun anew
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.cluster import processes
from kit.cluster.client import PACKAGE_ROOT
from kit.cluster.processes import HEAD, TRAINER, Elsewhere, engine
from kit.errors import StackError
from kit.messages import NEVER_HANDED
from kit.stack.actors import (
    engine_name,
    engine_settings,
    make_engine,
    make_trainers,
    trainer_name,
    trainer_settings,
)
from kit.stack.calls import HeadDiedError, LateError
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.messages import EngineStanding, TrainerStanding
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
    from kit.cluster.joined import RemoteActor

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


def connect(stack: Stack) -> None:
    """Find the actors of a stack that lives."""
    stack.cluster.connect(stack.config.engine.start_timeout)
    import ray

    stack.watch.add(HEAD, stack.cluster.head_members())
    stack.placement = stack.cluster.placement(stack)
    trainers = stack.config.training.num_trainers
    engines: list[Any] = [None] * stack.replicas
    for index in range(stack.replicas):
        with suppress(ValueError):  # it died; the next hand-over starts another
            engine_actor = ray.get_actor(engine_name(index))
            if _is_ready(stack, engine_actor):
                engines[index] = engine_actor
            else:
                forget(engine_actor, engine_name(index))
    try:
        ranks = [ray.get_actor(trainer_name(rank)) for rank in range(trainers)]
    except ValueError as error:
        raise _trainer_gone(error) from None
    if not all(_is_ready(stack, rank) for rank in ranks):
        raise _trainer_gone("The last kernel ended while it was started again.")
    stack.join(engines, ranks)
    look_after(stack, [i for i, e in enumerate(engines) if e is not None], trainers=True)
    for index, actor in enumerate(engines):
        if actor is None:
            stack.watch.gone(engine(index))
    if TRAINER in stack.watch.dead():
        raise _trainer_gone("A process of it has ended.")


def _is_ready(stack: Stack, actor: Any) -> bool:
    """False where a kernel ended in the midst of starting it, or it dies now."""
    try:
        return bool(stack._get(actor.is_ready.remote(), "start", stack.config.engine.start_timeout))
    except (HeadDiedError, LateError):
        raise
    except StackError:
        return False


def _trainer_gone(why: object) -> StackError:
    return StackError(
        "The stack lives, but its trainer does not, and what it had learned is gone.",
        why=str(why),
        fix="end it with `kit doctor --stop`, and load the last checkpoint: "
        "`RLSession.load(path)`.",
    )


@dataclass(frozen=True, slots=True)
class Found:
    """How a stack was that lost its driver."""

    trainers: TrainerStanding
    torn: bool
    """Was a hand-over of weights under way, or is an engine dead? It has to be made again."""


def rejoin(stack: Stack, info: dict[str, Any]) -> Found:
    """Drive a stack on from where it is, and stop what its last driver had asked for.

    Args:
        stack: made for the same settings, over a cluster that was `taken`.
        info: what the stack said of itself when it started.

    Raises:
        StackError: a trainer is gone, or something does not answer.
    """
    connect(stack)
    stack.described(dict(info))
    dead = stack.watch.dead()
    engines = _settled(stack, [i for i in range(stack.replicas) if engine(i) not in dead])
    ranks: list[TrainerStanding] = stack.ask_trainers("standing")
    first = ranks[0]
    if any((r.updates, r.last_update) != (first.updates, first.last_update) for r in ranks):
        raise StackError(
            "The trainers disagree on how many updates they have made: "
            f"{', '.join(str(rank.updates) for rank in ranks)}.",
            why="The process that drove them ended while it handed an update to them.",
            fix="load the last checkpoint: `RLSession.load(path)`.",
        )
    asleep = set(engines[0].asleep) if engines else set()
    stack.residency.found(asleep, trainer_asleep=first.asleep)
    versions = {each.weight_version for each in engines}
    stack.engine_version = max(versions, default=0)
    whole = len(engines) == stack.replicas and len(versions) == 1 and NEVER_HANDED not in versions
    return Found(first, torn=not whole or any(each.interrupted for each in engines))


def begin_anew(stack: Stack) -> None:
    """What `Stack.start` does, with processes that were started before.

    Raises:
        StackError: a process of it is gone or does not answer.
    """
    connect(stack)
    if stack.watch.dead():
        raise StackError("An engine of the stack has died meanwhile.")
    engines = _settled(stack, [*range(stack.replicas)])
    ranks: list[TrainerStanding] = stack.ask_trainers("standing")
    stack.residency.found(set(engines[0].asleep), trainer_asleep=ranks[0].asleep)
    stack.residency.for_trainer()
    info = stack.ask_engines("info")[0]
    places = stack.ask_trainers("begin_anew", partial(trainer_settings, stack))
    stack.described({**info, **places[0]})
    stack.sync(0)
    stack.newest_version = 0


def _settled(stack: Stack, living: list[int]) -> list[EngineStanding]:
    found: list[EngineStanding]
    found = stack._get([stack._engines[i].settle.remote() for i in living], "settle")
    return found


def fingerprint(stack: Stack) -> str:
    """Of everything that cannot be changed in a running process."""
    config = stack.config
    engine = asdict(engine_settings(stack))
    del engine["seed"]  # each request brings its own
    what = {
        "engine": engine,
        "replicas": stack.replicas,
        "layout": asdict(stack.layout),
        "cluster": config.cluster.address,
        "calls": config.rollout.over_sampling_batch_size or 0,
        "device": stack.device,
        "sleeps": [stack.plan.kv_sleeps, stack.plan.trainer_sleeps],
        "memory": config.memory.device_gib,
        "model": _files(Path(stack.model.path), "*"),
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "python": sys.executable,
        "kit": _files(PACKAGE_ROOT / "kit", "**/*.py"),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _files(folder: Path, pattern: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each: the kit's own code may have changed since a process took it."""
    found = []
    for file in sorted(folder.glob(pattern)):
        if file.is_file():
            status = file.stat()
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
