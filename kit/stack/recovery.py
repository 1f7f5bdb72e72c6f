"""Taking over a stack that lives, and starting again the engines that have died.

reattach    go on with the same engines, trainers and weights, whoever drove them before
reset       the same processes, with weights, optimizer, caches and counters as after a start

An engine holds nothing that is not elsewhere: it gets the trainers' weights, and what it was asked
is asked again. A trainer holds what is learned, so it is started again only to read a checkpoint.
"""

from __future__ import annotations

from typing import Any

from kit.errors import StackError
from kit.messages import NEVER_HANDED, EngineStatus, TrainerStatus
from kit.stack.engines import EngineGroup
from kit.stack.offload import OffloadSchedule
from kit.stack.trainers import TrainerGroup
from kit.weight_sync.coordinator import WeightSync


def start_dead_engines(engines: EngineGroup, offload: OffloadSchedule, weights: WeightSync) -> bool:
    """Start engines that died; returns whether any had.

    They have the weights of the model's files: `weights.interrupted` holds until the next sync.

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
    weights.interrupted = True
    if offload.plan.trainer_sleeps:
        offload.sleep_trainer()  # an engine takes its KV cache as if it were alone
    engines.restart(dead)
    return True


def reattach(
    engines: EngineGroup, trainers: TrainerGroup, offload: OffloadSchedule, weights: WeightSync
) -> TrainerStatus:
    """Find the actors, stop what their last driver had asked for, and note how they are.

    `weights.interrupted` says whether a sync was under way, or an engine is dead: it has to be made
    again.

    Raises:
        StackError: a trainer is gone, or something does not answer.
    """
    living = engines.find()
    trainers.find()
    dead = engines.dead()
    found: list[EngineStatus]
    found = engines.ask_some([index for index in living if index not in dead], "settle")
    ranks: list[TrainerStatus] = trainers.ask("status")
    first = ranks[0]
    if any((r.updates, r.last_update) != (first.updates, first.last_update) for r in ranks):
        raise StackError(
            "The trainers disagree on how many updates they have made: "
            f"{', '.join(str(rank.updates) for rank in ranks)}.",
            why="The process that drove them ended while it handed an update to them.",
            fix="load the last checkpoint: `RLSession.load(path)`.",
        )
    offload.asleep = {tag for status in found for tag in status.asleep}
    offload.trainer_asleep = first.asleep
    versions = {status.weight_version for status in found}
    weights.engine_version = max(versions, default=0)
    complete = len(found) == len(engines.actors) and len(versions) == 1
    interrupted = any(status.interrupted for status in found) or NEVER_HANDED in versions
    weights.interrupted = interrupted or not complete
    return first


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
    offload.asleep = set(engines.ask_some(living, "settle")[0].asleep)
    offload.trainer_asleep = trainers.ask("status")[0].asleep
    offload.make_room_for_trainer()
    return {**engines.ask("info")[0], **trainers.reset()}
