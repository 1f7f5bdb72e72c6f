"""`Residency`: who is on the device now, and who has to leave it for what comes next.

    generate    for_engine()     trainer to the host, if the plan says so; engine awake
    update      for_trainer()    engine asleep, if the plan says so; trainer awake
    sync        for_sync()       both sides' weights; the KV cache stays as it is

Each step is made only where something has to change: on a large card none ever is. An engine's
weights that were let go of are not kept anywhere: the trainer gives its present ones, which are
newer where it has trained since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit.memory import MemoryPlan
from kit.utils.interrupts import held

KV_CACHE = ("kv_cache", "cuda_graph")


WEIGHTS = ("weights",)


Get = Callable[[list[Any], str], Any]
"""Waits for the answers of actors."""


class Residency:
    """Moves engine and trainers between device and host."""

    def __init__(
        self,
        plan: MemoryPlan,
        engines: list[Any],
        trainers: list[Any],
        get: Get,
        give_weights: Callable[[], Any],
    ) -> None:
        """Everybody is awake; `give_weights` hands the trainer's weights to the engine."""
        self.plan, self._engines, self._trainers, self._get = plan, engines, trainers, get
        self._give_weights = give_weights
        self.asleep: set[str] = set()
        """SGLang's names for what of the engine is asleep."""
        self.trainer_asleep = False

    def found(self, asleep: set[str], *, trainer_asleep: bool) -> None:
        """This is how they are, where somebody else has moved them."""
        self.asleep, self.trainer_asleep = asleep, trainer_asleep

    def for_engine(self) -> None:
        """Before requests are written or scored by the engine."""
        self.for_weights()
        if self.plan.trainer_sleeps:
            self.sleep_trainer()
        elif set(KV_CACHE) & self.asleep:
            self._settle_trainer()
        self.wake_engine()

    def for_trainer(self) -> None:
        """Before anything is computed by the trainer."""
        if self.plan.kv_sleeps:
            self.sleep_engine(weights=self.plan.engine_weights_sleep)
        self.wake_trainer()

    def for_weights(self) -> None:
        """Before anybody looks at the engine's weights."""
        if set(WEIGHTS) & self.asleep:
            self._give_weights()

    def for_sync(self) -> None:
        """Before weights travel."""
        self.wake_trainer()
        if set(WEIGHTS) & self.asleep:
            self._settle_trainer()
        self.wake_engine(kv_cache=False)

    def sleep_engine(self, *, weights: bool = True) -> None:
        """Let the engine go of its KV cache, its graphs and, if asked, its weights."""
        tags = [*KV_CACHE, *(WEIGHTS if weights else ())]
        self._engine("sleep", [tag for tag in tags if tag not in self.asleep])

    def wake_engine(self, *, kv_cache: bool = True) -> None:
        """Give the engine back what it let go of, or its weights only."""
        tags = [*WEIGHTS, *(KV_CACHE if kv_cache else ())]
        self._engine("wake", [tag for tag in tags if tag in self.asleep])

    def _engine(self, what: str, tags: list[str]) -> None:
        if not tags:
            return
        with held():
            self._get([getattr(engine, what).remote(tags) for engine in self._engines], what)
            self.asleep = self.asleep | set(tags) if what == "sleep" else self.asleep - set(tags)

    def _settle_trainer(self) -> None:
        """Have it give back what its last update took."""
        self._get([trainer.settle.remote() for trainer in self._trainers], "settle")

    def sleep_trainer(self) -> None:
        """Move the trainer's weights and optimizer to host memory."""
        if not self.trainer_asleep:
            with held():
                self._get([trainer.sleep.remote() for trainer in self._trainers], "sleep")
                self.trainer_asleep = True

    def wake_trainer(self) -> None:
        """Bring them back."""
        if self.trainer_asleep:
            with held():
                self._get([trainer.wake.remote() for trainer in self._trainers], "wake")
                self.trainer_asleep = False
