"""`OffloadSchedule`: what is on the device now, and what has to leave it for the next call.

    generate    make_room_for_engine()     trainer to the host, if the plan says so; engine awake
    update      make_room_for_trainer()    engine asleep, if the plan says so; trainer awake
    sync        make_room_for_sync()       both sides' weights; the KV cache stays as it is

Each step is made only where something has to change: on a large GPU none ever is. An engine's
weights that were released are not kept anywhere: a sync gives it the trainer's present ones, which
are newer where it has trained since.
"""

from __future__ import annotations

from kit.memory import MemoryPlan
from kit.stack.engines import EngineGroup
from kit.stack.trainers import TrainerGroup
from kit.utils.interrupts import held

KV_CACHE = ("kv_cache", "cuda_graph")
WEIGHTS = ("weights",)


class OffloadSchedule:
    """Moves engines and trainers between device and host."""

    def __init__(self, plan: MemoryPlan, engines: EngineGroup, trainers: TrainerGroup) -> None:
        """All of them are awake."""
        self.plan, self._engines, self._trainers = plan, engines, trainers
        self.asleep: set[str] = set()
        """SGLang's names for what the engines have released."""
        self.trainer_asleep = False

    @property
    def engine_has_weights(self) -> bool:
        """False where the engines need a sync before they can be used."""
        return not set(WEIGHTS) & self.asleep

    def make_room_for_engine(self) -> None:
        """Before the engines write or score requests; they have their weights."""
        if self.plan.trainer_sleeps:
            self.sleep_trainer()
        elif set(KV_CACHE) & self.asleep:
            self._trainers.ask("release_cache")
        self.wake_engine()

    def make_room_for_trainer(self) -> None:
        """Before the trainers compute anything."""
        if self.plan.kv_sleeps:
            self.sleep_engine(weights=self.plan.engine_weights_sleep)
        self.wake_trainer()

    def make_room_for_sync(self) -> None:
        """Before weights are sent."""
        self.wake_trainer()
        if not self.engine_has_weights:
            self._trainers.ask("release_cache")
        self.wake_engine(kv_cache=False)

    def sleep_engine(self, *, weights: bool = True) -> None:
        """Have the engines release their KV cache, their graphs and, if asked, their weights."""
        tags = [*KV_CACHE, *(WEIGHTS if weights else ())]
        self._move_engines("sleep", [tag for tag in tags if tag not in self.asleep])

    def wake_engine(self, *, kv_cache: bool = True) -> None:
        """Give the engines room for all that they have released, or for their weights only."""
        tags = [*WEIGHTS, *(KV_CACHE if kv_cache else ())]
        self._move_engines("wake", [tag for tag in tags if tag in self.asleep])

    def _move_engines(self, method: str, tags: list[str]) -> None:
        if not tags:
            return
        with held():
            self._engines.ask(method, tags)
            self.asleep = self.asleep | set(tags) if method == "sleep" else self.asleep - set(tags)

    def sleep_trainer(self) -> None:
        """Move the trainers' weights and optimizer to host memory."""
        self._move_trainers("sleep", asleep=True)

    def wake_trainer(self) -> None:
        """Move them back to the device."""
        self._move_trainers("wake", asleep=False)

    def _move_trainers(self, method: str, *, asleep: bool) -> None:
        if self.trainer_asleep is not asleep:
            with held():
                self._trainers.ask(method)
                self.trainer_asleep = asleep
