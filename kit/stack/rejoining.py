"""A stack that lives already, taken over: as it is, or to begin anew.

rejoin(stack, info)    the same engine, trainers and weights, whoever drove them before
begin_anew(stack)      the same processes; weights, optimizer, caches and counters of a start
fingerprint(stack)     what the processes were started with; equal ones can be begun anew
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import StackError
from kit.stack import repair
from kit.stack.actors import engine_name, engine_settings, trainer_name, trainer_settings
from kit.stack.calls import HeadDiedError, LateError
from kit.stack.cluster import PACKAGE_ROOT
from kit.stack.standing import NEVER_HANDED
from kit.stack.watch import HEAD, TRAINER, engine

if TYPE_CHECKING:
    from kit.stack.stack import Stack
    from kit.stack.standing import EngineStanding, TrainerStanding


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
                repair.forget(engine_actor, engine_name(index))
    try:
        ranks = [ray.get_actor(trainer_name(rank)) for rank in range(trainers)]
    except ValueError as error:
        raise _trainer_gone(error) from None
    if not all(_is_ready(stack, rank) for rank in ranks):
        raise _trainer_gone("The last kernel ended while it was started again.")
    stack.join(engines, ranks)
    repair.look_after(stack, [i for i, e in enumerate(engines) if e is not None], trainers=True)
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
