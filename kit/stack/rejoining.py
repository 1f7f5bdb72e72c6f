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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import StackError
from kit.stack import repair
from kit.stack.actors import engine_settings, trainer_settings
from kit.stack.cluster import PACKAGE_ROOT
from kit.stack.watch import HEAD

if TYPE_CHECKING:
    from kit.stack.stack import Stack
    from kit.stack.standing import EngineStanding, TrainerStanding


def connect(stack: Stack) -> None:
    """Find the actors of a stack that lives."""
    stack.cluster.connect(stack.config.engine.start_timeout)
    import ray

    stack.watch.add(HEAD, stack.cluster.head_processes())
    trainers = stack.config.training.num_trainers
    try:
        stack.join(
            [ray.get_actor(f"engine-{index}") for index in range(stack.replicas)],
            [ray.get_actor(f"trainer-{rank}") for rank in range(trainers)],
        )
    except ValueError as error:
        raise StackError(
            "The stack lives, but its engine or trainer does not.",
            why=str(error),
            fix="end it with `kit doctor --stop`, and load the last checkpoint: "
            "`RLSession.load(path)`.",
        ) from None
    repair.look_after(stack, [*range(stack.replicas)], trainers=True)


@dataclass(frozen=True, slots=True)
class Found:
    """How a stack was that lost its driver."""

    trainers: TrainerStanding
    torn: bool
    """Was a hand-over of weights under way? It has to be made again."""


def rejoin(stack: Stack, info: dict[str, Any]) -> Found:
    """Drive a stack on from where it is, and stop what its last driver had asked for.

    Args:
        stack: made for the same settings, over a cluster that was `taken`.
        info: what the stack said of itself when it started.

    Raises:
        StackError: a process of it is gone or does not answer.
    """
    connect(stack)
    stack.described(dict(info))
    engines = _settled(stack)
    ranks: list[TrainerStanding] = stack.ask_trainers("standing")
    first = ranks[0]
    if any((r.updates, r.last_update) != (first.updates, first.last_update) for r in ranks):
        raise StackError(
            "The trainers disagree on how many updates they have made: "
            f"{', '.join(str(rank.updates) for rank in ranks)}.",
            why="The process that drove them ended while it handed an update to them.",
            fix="load the last checkpoint: `RLSession.load(path)`.",
        )
    stack.residency.found(set(engines[0].asleep), trainer_asleep=first.asleep)
    stack.engine_version = engines[0].weight_version
    stack.ask_trainers("forget_all")  # snapshots, of which the driver knew what belongs to them
    whole = len({engine.weight_version for engine in engines}) == 1
    return Found(first, torn=not whole or any(engine.interrupted for engine in engines))


def begin_anew(stack: Stack) -> None:
    """What `Stack.start` does, with processes that were started before.

    Raises:
        StackError: a process of it is gone or does not answer.
    """
    connect(stack)
    engines = _settled(stack)
    ranks: list[TrainerStanding] = stack.ask_trainers("standing")
    stack.residency.found(set(engines[0].asleep), trainer_asleep=ranks[0].asleep)
    stack.residency.for_trainer()
    info = stack.ask_engines("info")[0]
    places = stack.ask_trainers("begin_anew", partial(trainer_settings, stack))
    stack.described({**info, **places[0]})
    stack.sync(0)
    stack.newest_version = 0


def _settled(stack: Stack) -> list[EngineStanding]:
    return stack.ask_engines("settle")


def fingerprint(stack: Stack) -> str:
    """Of everything that cannot be changed in a running process."""
    config = stack.config
    engine = asdict(engine_settings(stack))
    del engine["seed"]  # each request brings its own
    what = {
        "engine": engine,
        "replicas": stack.replicas,
        "trainers": config.training.num_trainers,
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
