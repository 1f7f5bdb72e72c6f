"""`Stack`: the Ray head, the engine and the trainers of one session, as plain method calls."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kit.cluster import processes
from kit.cluster.client import Cluster
from kit.cluster.placement import JoinedPlacement, Layout, OwnPlacement, start_cluster
from kit.cluster.processes import HEAD, TRAINER, Watch
from kit.config import SessionConfig
from kit.errors import StackError, StoppedError
from kit.memory import MemoryPlan
from kit.memory.plan import PhaseName
from kit.models.source import ModelSource
from kit.stack import recovery
from kit.stack.actors import make_engine, make_trainers
from kit.stack.calls import Calls, EngineDiedError, LateError, TrainerDiedError, trainer_died
from kit.stack.offload import Residency
from kit.stack.trainers import KeepsTrainers, together
from kit.utils.hardware import shares
from kit.utils.interrupts import held
from kit.weight_sync.coordinator import BroadcastGroup, hand_over

if TYPE_CHECKING:
    from kit.stack.engines import Parts, Underway


class Stack(KeepsTrainers):
    """Starts in two strokes, `launch` and `start`, so that the caller can do other work while the
    first one runs.
    """

    cluster: Cluster
    watch: Watch
    calls: Calls
    """There from `launch` on, all three."""

    def __init__(
        self,
        config: SessionConfig,
        model: ModelSource,
        device: str,
        max_response_len: int,
        plan: MemoryPlan,
    ) -> None:
        """Starts nothing; see `launch`."""
        self.config, self.model, self.device, self.plan = config, model, device, plan
        self._measured: dict[str, int] = {}
        self._looks: list[tuple[PhaseName, Any]] = []
        self.trainer_version = self.engine_version = 0
        """Which weights either side has: a number that is given to no others."""
        self.newest_version = 0
        """The last number that was given: after an undo the trainer's is a smaller one."""
        self.max_response_len = max_response_len
        self.dtype = config.model.dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if device == "cuda" else "float32"
        self.info: dict[str, Any] = {}
        self._unsettled: list[Any] = []
        """Calls of an update whose answer nobody has taken."""
        self._half_synced = False
        """Has the engine perhaps got some of the new weights and not all?"""
        self._parts: Parts | None = None
        """The responses that were asked for last."""
        self._exact = False
        """Was the last hand-over without the disturbance?"""
        self._bare = False
        """Have the trainers been started again, and read no checkpoint yet?"""
        self.layout = Layout.of(config, device, model.bytes)
        """Which device each trainer and each engine has."""
        self.replicas = len(self.layout.engines)
        self.placement: OwnPlacement | JoinedPlacement = OwnPlacement(self)
        self.channel: BroadcastGroup | None = None
        """The group in which weights are broadcast, where they are."""
        self._engines: list[Any] = []
        self._trainers: list[Any] = []

    def launch(self, cluster: Cluster | None = None) -> None:
        """Start the head process, or take this one; returns at once."""
        self.cluster = cluster or start_cluster(self)
        self.watch = Watch(self.config.engine.health_interval, self._part_died)
        self.calls = Calls(self.config, self.cluster, self.watch)

    def start(self) -> None:
        """Join the head, start engine and trainers side by side, and wait for them."""
        config = self.config
        self.cluster.connect(config.engine.start_timeout)
        self.watch.add(HEAD, self.cluster.head_members())
        self.placement = self.cluster.placement(self)
        engines = [make_engine(self, index) for index in range(self.replicas)]
        self.join(engines, make_trainers(self))
        self.described(self._start_actors())
        recovery.look_after(self, [*range(self.replicas)], trainers=True)
        if config.engine.disturbed:
            self.sync(0)  # the engine has read the exact weights

    def join(self, engines: list[Any], trainers: list[Any]) -> None:
        """These are the stack's actors from now on."""
        self._engines, self._trainers = engines, trainers
        self.residency = Residency(
            self.plan, engines, trainers, self._get, lambda: self.sync(self.trainer_version)
        )

    def described(self, info: dict[str, Any]) -> None:
        """This is what they say of themselves."""
        self.description = info
        self.info = {**info, "device": self.device, "dtype": self.dtype}
        self.buckets = self.info.pop("buckets")

    def _start_actors(self) -> dict[str, Any]:
        """Start engine and trainers side by side; what the session shows of them."""
        limit = self.config.engine.start_timeout
        starts = [actor.start.remote() for actor in [*self._engines, *self._trainers]]
        crowded = self.plan.kv_sleeps or self.plan.trainer_sleeps
        if crowded:
            # The engine takes its KV cache first, as if it were alone, and then makes room.
            infos = self._get(starts, "start", limit)
            self.residency.for_trainer()
            places = self._get([t.place.remote() for t in self._trainers], "start", limit)
            return {**infos[0], **places[0]}
        places = [trainer.place.remote() for trainer in self._trainers]
        infos = self._get([*starts, *places], "start", limit)
        return {**infos[0], **infos[-1]}

    def generate(
        self, prompts: list[list[int]], sampling: Any, seeds: list[int], *, at_once: bool = False
    ) -> Parts:
        """Have a response written to each prompt; iterate over the result for them.

        Args:
            prompts: token ids.
            sampling: `SamplingSettings`, the same for all.
            seeds: one a prompt.
            at_once: hand them over when all are finished, which is faster where that is soon.
        """
        from kit.stack.engines import Parts

        def ask(places: list[int]) -> dict[Any, list[int]]:
            """Neighbours go to one engine: they have their prompt in common."""
            calls = {}
            parts = shares(len(places), self.replicas)
            for engine, part in zip(self._engines, parts, strict=False):
                method = engine.generate if at_once else engine.generate_in_parts
                own = places[part]
                asked = [prompts[i] for i in own], sampling, [seeds[i] for i in own]
                calls[method.remote(*asked)] = own
            return calls

        self.engine_in_order()
        with held():
            self._parts = Parts(self, ask, len(prompts), at_once=at_once)
        return self._parts

    def engine_in_order(self) -> None:
        """Before the engine works: it lives, is awake, has whole weights, and has no other work.

        One that was started again has the trainer's present weights, as after a `sync`.
        """
        self.calls.refuse_without_head("generate")
        if self._parts and self._parts.left:  # an interrupt came before anybody could stop it
            self.abort()
            self._parts = None
        if recovery.start_dead_engines(self) or self._half_synced:
            self.sync(self.trainer_version, exact=self._exact)
        self.residency.for_engine()

    def trainer_in_order(self) -> None:
        """Before the trainers work: they live, have their weights, and are on the device."""
        if self.calls.has_died(TRAINER, "a call of the trainer"):
            raise trainer_died("The trainer's process has died.")
        if self._bare:
            raise trainer_died("The trainer was started again and has read no checkpoint.")
        if self.plan.kv_sleeps and recovery.start_dead_engines(self):
            self._half_synced = True
        self.residency.for_trainer()

    def underway(self, sampling: Any) -> Underway:
        """For groups of requests of which each is handed over as soon as it is finished."""
        from kit.stack.engines import Underway

        self.engine_in_order()
        return Underway(self, self._engines, sampling)

    def abort(self) -> None:
        """Stop everything that is being generated."""
        with suppress(EngineDiedError):  # a dead one writes nothing
            self._get([engine.abort.remote() for engine in self._engines], "abort")

    def update(self, batch: Any, update_id: str) -> tuple[list[dict[str, float]], bool]:
        """Optimizer steps on every trainer; (metrics of each step, whether it was done now)."""
        import ray

        self.trainer_in_order()
        shared = ray.put(batch)
        stop = self.cluster.directory / "tmp" / f"stop-{secrets.token_hex(8)}"
        with held(stop.touch):
            sent = (shared, update_id, str(stop))
            self._unsettled = [trainer.update.remote(*sent) for trainer in self._trainers]
            try:
                metrics, applied = self._settle()
            except StoppedError as stopped:
                raise KeyboardInterrupt(str(stopped)) from None
            self._measure("update")
        return metrics, applied

    def settle(self) -> bool:
        """Was an update made from which a third interrupt or a time limit had turned away?

        Waits for its end, so that nobody works with weights whose number he does not know.
        """
        try:
            return bool(self._unsettled) and self._settle()[1]
        except StoppedError:
            return False

    def _settle(self) -> tuple[list[dict[str, float]], bool]:
        try:
            metrics, applied = together(self, self._unsettled, "update", changes=True)[0]
        except (LateError, KeyboardInterrupt):
            raise
        except BaseException:
            self._unsettled = []
            raise
        self._unsettled = []
        if applied:
            self.newest_version += 1
            self.trainer_version = self.newest_version
        return metrics, applied

    def by_token(
        self, tokens: list[list[int]], response_lengths: list[int], of: str
    ) -> list[list[float]]:
        """A number for each response token: log-probs of the `policy` or the `reference`, or the
        critic's `values`.
        """
        self.trainer_in_order()
        if of == "values":
            calls = [t.values.remote(tokens, response_lengths) for t in self._trainers]
        else:
            calls = [t.log_probs.remote(tokens, response_lengths, of) for t in self._trainers]
        values: list[list[float]] = together(self, calls, of)[0]
        return values

    def rescore(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        *,
        cached: bool,
        experts: bool = False,
    ) -> list[list[Any]]:
        """What each replica makes of the samples now: a `Rescored` a sample, replica by replica."""
        how = {"cached": cached, "experts": experts}
        return self._ask_living_engines("rescore", tokens, response_lengths, **how)

    def checksums(self) -> list[dict[str, str]]:
        """A checksum of each parameter under SGLang's names, replica by replica."""
        if self.config.engine.tensor_parallel > 1:
            raise StackError(
                "Checksums of an engine with engine.tensor_parallel above 1 cannot be compared.",
                why="Each of its devices has a part of every weight, the trainer has whole ones.",
                fix="call session.check_mismatch(), which compares what they compute.",
            )
        self.residency.for_weights()
        return self._ask_living_engines("checksums", awake=False)

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `kit.stack.probes` in every trainer; the first one's result."""
        self.trainer_in_order()
        return together(self, [t.probe.remote(name, *arguments) for t in self._trainers], name)[0]

    def sync(
        self, version: int, *, exact: bool = False, flush_cache: bool = True
    ) -> tuple[int, int]:
        """Hand the trainer's weights to the engine as `version`: (tensors, bytes).

        An interrupt is raised when all of them have arrived.
        """
        self.calls.refuse_without_head("sync")
        recovery.start_dead_engines(self)
        self.trainer_in_order()
        with held():
            self._half_synced = True
            try:
                answer = hand_over(self, version, exact, flush_cache)
            except (LateError, TrainerDiedError):
                raise
            except StackError:
                if not recovery.start_dead_engines(self):
                    raise
                answer = hand_over(self, version, exact, flush_cache)
            self._half_synced, self._exact = False, exact
            self.trainer_version = self.engine_version = version
            self._measure("sync")
        return answer

    def _measure(self, phase: PhaseName) -> None:
        """Have somebody look how much of the device is taken; `measured` asks what was seen."""
        if self.device == "cuda":
            self._looks += [(phase, trainer.device_memory.remote()) for trainer in self._trainers]
            if len(self._looks) > 100:
                _ = self.measured

    @property
    def measured(self) -> dict[str, int]:
        """Most bytes that were seen on a trainer's device, by phase of the plan; empty on a CPU."""
        looks, self._looks = self._looks, []
        for (phase, _), seen in zip(looks, self._get([x for _, x in looks], "look"), strict=True):
            self._measured[phase] = max(self._measured.get(phase, 0), seen["peak"])
        return dict(self._measured)

    def ask_engines(self, method: str, *arguments: Any, **named: Any) -> list[Any]:
        """A method's answer from each engine."""
        calls = [getattr(engine, method).remote(*arguments, **named) for engine in self._engines]
        answers: list[Any] = self._get(calls, method)
        return answers

    def _ask_living_engines(
        self, method: str, *arguments: Any, awake: bool = True, **named: Any
    ) -> list[Any]:
        """The same of engines that are in order; asked again, once, if one dies meanwhile."""
        for last in (False, True):
            if last or awake:
                self.engine_in_order()
            try:
                return self.ask_engines(method, *arguments, **named)
            except EngineDiedError:
                if last:
                    raise
        raise AssertionError("answered or raised above")

    def ask_trainers(self, method: str, argument: Callable[[int], Any] | None = None) -> list[Any]:
        """A method's answer from each trainer; `argument` makes what each rank is given."""
        calls = [
            getattr(trainer, method).remote(*([argument(rank)] if argument else []))
            for rank, trainer in enumerate(self._trainers)
        ]
        answers: list[Any] = self._get(calls, method)
        return answers

    def _get(self, calls: Any, doing: str, timeout: float | None = None) -> Any:
        return self.calls.get(calls, doing, timeout)

    def _part_died(self, part: str) -> None:
        """What a death takes along. Called by whichever thread sees it."""
        if part == HEAD:
            processes.end(self.cluster.processes())
            self.calls.disconnect()

    @property
    def lost(self) -> bool:
        """Has a part died that only a checkpoint can bring back?"""
        return bool({HEAD, TRAINER} & self.watch.dead()) or self._bare

    def host_memory(self) -> int:
        """Bytes of host memory that the stack's processes hold for themselves."""
        return self.cluster.host_memory()

    def halt(self) -> None:
        """Kill engine and trainers: a call that waits for one raises StackError at once."""
        import ray

        for actor in [*self._engines, *self._trainers]:
            ray.kill(actor)

    def leave(self, seconds: float, *, warm: bool) -> None:
        """Let it live on without us, for so many seconds; see `Cluster.leave`."""
        with held():
            self.watch.close()  # it is not ours to end any more
            self.cluster.leave(seconds, warm=warm)

    def close(self) -> None:
        """End every process. Safe to call again, and where none was started."""
        with held():
            if hasattr(self, "cluster"):
                self.watch.close()
                self.cluster.close()
