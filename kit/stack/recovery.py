"""Taking over a stack that lives, and starting again the engines that have died.

reattach    go on with the same engines, trainers and weights, whoever drove them before
reset       the same processes, with weights, optimizer, caches and counters as after a start

An engine holds nothing that is not elsewhere: it gets the trainers' weights, and what it was asked
is asked again. A trainer holds what is learned, so it is started again only to read a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kit.errors import StackError
from kit.messages import NEVER_HANDED, EngineStatus, TrainerStatus
from kit.stack.engines import EngineGroup
from kit.stack.offload import OffloadSchedule
from kit.stack.trainers import TrainerGroup
from kit.weight_sync.coordinator import WeightSync


@dataclass(frozen=True, slots=True)
class Reattached:
    """State in which a stack was found that had lost its driver."""

    trainers: TrainerStatus
    interrupted_sync: bool
    """Whether a sync was under way, or an engine is dead: it has to be made again."""


def start_dead_engines(engines: EngineGroup, offload: OffloadSchedule) -> bool:
    """Start engines that died, with the weights of the model's files; returns whether any had.

    Raises:
        StackError: one could not start; none is left half started.
    """
    dead = engines.dead()
    if not dead:
        return False
    living = [index for index in range(len(engines.actors)) if index not in dead]
    if offload.asleep and living:
        engines.ask_some(living, "wake", sorted(offload.asleep))
    offload.asleep = set()
    if offload.plan.trainer_sleeps:
        offload.sleep_trainer()  # an engine takes its KV cache as if it were alone
    engines.restart(dead)
    return True


def reattach(
    engines: EngineGroup, trainers: TrainerGroup, offload: OffloadSchedule, weights: WeightSync
) -> Reattached:
    """Find the actors, stop what their last driver had asked for, and note how they are.

    Raises:
        StackError: a trainer is gone, or something does not answer.
    """
    living = engines.find()
    trainers.find()
    dead = engines.dead()
    found = _settle(engines, [index for index in living if index not in dead])
    ranks = trainers.statuses()
    first = ranks[0]
    if any((r.updates, r.last_update) != (first.updates, first.last_update) for r in ranks):
        raise StackError(
            "The trainers disagree on how many updates they have made: "
            f"{', '.join(str(rank.updates) for rank in ranks)}.",
            why="The process that drove them ended while it handed an update to them.",
            fix="load the last checkpoint: `RLSession.load(path)`.",
        )
    offload.asleep = set(found[0].asleep) if found else set()
    offload.trainer_asleep = first.asleep
    versions = {status.weight_version for status in found}
    weights.engine_version = max(versions, default=0)
    complete = len(found) == len(engines.actors) and len(versions) == 1
    interrupted = any(status.interrupted for status in found) or NEVER_HANDED in versions
    return Reattached(first, interrupted_sync=interrupted or not complete)


def reset(engines: EngineGroup, trainers: TrainerGroup, offload: OffloadSchedule) -> dict[str, Any]:
    """Find the actors, and have the trainers begin as after a start; what all say of themselves.

    The engines have old weights after it.

    Raises:
        StackError: a process is gone or does not answer.
    """
    living = engines.find()
    trainers.find()
    if len(living) < len(engines.actors) or engines.dead():
        raise StackError("An engine of the stack has died meanwhile.")
    found = _settle(engines, living)
    offload.asleep, offload.trainer_asleep = set(found[0].asleep), trainers.statuses()[0].asleep
    offload.make_room_for_trainer()
    return {**engines.ask("info")[0], **trainers.reset()}


def _settle(engines: EngineGroup, indices: Sequence[int]) -> list[EngineStatus]:
    """Stop what engines are doing; the status of each."""
    return engines.ask_some(indices, "settle")
