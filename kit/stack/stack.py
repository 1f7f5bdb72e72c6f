"""`Stack`: the Ray head, the engine and the trainers of one session, as plain method calls."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.errors import StackError, StoppedError
from kit.interrupts import held
from kit.memory import MemoryPlan
from kit.memory.plan import PhaseName
from kit.model.source import ModelSource
from kit.stack import processes, repair
from kit.stack.actors import make_engine, make_trainers
from kit.stack.buckets import SLOTS
from kit.stack.calls import Calls, EngineDiedError, LateError, trainer_died
from kit.stack.cluster import Cluster
from kit.stack.keeping import KeepsTrainers
from kit.stack.residency import Residency
from kit.stack.watch import HEAD, TRAINER, Watch

if TYPE_CHECKING:
    from kit.stack.underway import Parts, Underway


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`. Raises StackError where CUDA is asked for and there is none."""
    count = gpu_count()
    if wanted == "cuda" and not count:
        raise StackError(
            "device is cuda, but no GPU can be used here.",
            why="The NVIDIA driver (libcuda.so.1) is missing or sees no card.",
            fix="set device: cpu (or auto), or install the driver and check `nvidia-smi`.",
        )
    return "cuda" if wanted == "cuda" or (wanted == "auto" and count) else "cpu"


def gpu_count() -> int:
    """How many GPUs the driver shows to this process; asks the driver, so torch stays unloaded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


SMALL_MODEL = 64 << 20
"""Bytes of weights. Handling requests costs a model of this size more than its arithmetic does."""


def default_replicas(device: str, model_bytes: int) -> int:
    """How many engines to start where the configuration leaves it open."""
    small = device == "cpu" and model_bytes <= SMALL_MODEL
    return 2 if small and (os.cpu_count() or 1) > 1 else 1


def shares(count: int, among: int) -> list[slice]:
    """Neighbouring stretches of `count` things, as even as can be; none is empty."""
    among = min(among, count)
    return [slice(i * count // among, (i + 1) * count // among) for i in range(among)]


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
        self.replicas = config.engine.replicas or default_replicas(device, model.bytes)
        self._engines: list[Any] = []
        self._trainers: list[Any] = []

    def launch(self, cluster: Cluster | None = None) -> None:
        """Start the head process, or take this one; returns at once."""
        gpus = gpu_count() if self.device == "cuda" else 0
        self.cluster = cluster or Cluster(self.device, gpus=gpus)
        self.watch = Watch(self.config.engine.health_interval, self._part_died)
        self.calls = Calls(self.config, self.cluster, self.watch)

    def start(self) -> None:
        """Join the head, start engine and trainers side by side, and wait for them."""
        config = self.config
        self.cluster.connect(config.engine.start_timeout)
        self.watch.add(HEAD, self.cluster.head_processes())
        engines = [make_engine(self, index) for index in range(self.replicas)]
        self.join(engines, make_trainers(self))
        self.described(self._start_actors())
        repair.look_after(self, [*range(self.replicas)], trainers=True)
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
        self._buckets = self.info.pop("buckets")

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
        from kit.stack.underway import Parts

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
        if repair.start_dead_engines(self) or self._half_synced:
            self.sync(self.trainer_version, exact=self._exact)
        self.residency.for_engine()

    def trainer_in_order(self) -> None:
        """Before the trainers work: they live, have their weights, and are on the device."""
        self.calls.refuse_without_head("a call of the trainer")
        if TRAINER in self.watch.dead():
            raise trainer_died("The trainer's process has died.")
        if self._bare:
            raise trainer_died("The trainer was started again and has read no checkpoint.")
        if self.plan.kv_sleeps and repair.start_dead_engines(self):
            self._half_synced = True
        self.residency.for_trainer()

    def underway(self, sampling: Any) -> Underway:
        """For groups of requests of which each is handed over as soon as it is finished."""
        from kit.stack.underway import Underway

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
            metrics, applied = self._get(self._unsettled, "update")[0]
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
        values: list[list[float]] = self._get(calls, of)[0]
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
        return self._ask_engines("rescore", tokens, response_lengths, **how)

    def checksums(self) -> list[dict[str, str]]:
        """A checksum of each parameter under SGLang's names, replica by replica."""
        self.residency.for_weights()
        return self._ask_engines("checksums")

    def _ask_engines(self, doing: str, *args: Any, **kwargs: Any) -> list[Any]:
        """What each engine answers to a call that changes nothing; twice, if one dies of age."""
        for last in (False, True):
            if last or doing != "checksums":
                self.engine_in_order()
            calls = [getattr(e, doing).remote(*args, **kwargs) for e in self._engines]
            try:
                found: list[Any] = self._get(calls, doing)
            except EngineDiedError:
                if last:
                    raise
            else:
                break
        return found

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `kit.stack.probes` in every trainer; the first one's result."""
        self.trainer_in_order()
        return self._get([t.probe.remote(name, *arguments) for t in self._trainers], name)[0]

    def sync(
        self, version: int, *, exact: bool = False, flush_cache: bool = True
    ) -> tuple[int, int]:
        """Hand the trainer's weights to the engine as `version`: (tensors, bytes).

        An interrupt is raised when all of them have arrived.
        """
        self.calls.refuse_without_head("sync")
        repair.start_dead_engines(self)
        self.trainer_in_order()
        with held():
            self._half_synced = True
            try:
                answer = self._hand_over(version, exact, flush_cache)
            except EngineDiedError:
                repair.start_dead_engines(self)
                answer = self._hand_over(version, exact, flush_cache)
            self._half_synced, self._exact = False, exact
        return answer

    def _hand_over(self, version: int, exact: bool, flush_cache: bool) -> tuple[int, int]:
        self.residency.for_sync()
        taken: list[list[Any]] = []
        waits: list[Any] = []
        for bucket in range(self._buckets):
            # A buffer is filled again when every engine has read it.
            free = taken[bucket - SLOTS] if bucket >= SLOTS else []
            filled = [
                t.export_weights.remote(version, exact, bucket, *free) for t in self._trainers
            ]
            before = taken[-1] if taken else [None] * self.replicas
            how = {"last": bucket == self._buckets - 1, "flush_cache": flush_cache}
            taken.append(
                [
                    engine.receive_weights.remote(filled[0], version, after=done, **how)
                    for engine, done in zip(self._engines, before, strict=True)
                ]
            )
            waits += [taken[-1][0], *filled, *taken[-1][1:]]
        try:
            answers = self._get(waits, "sync")
        except BaseException:
            for engine in self._engines:  # else it would stay paused
                engine.go_on.remote()
            raise
        self.trainer_version = self.engine_version = version
        self._measure("sync")
        a_bucket = len(waits) // self._buckets
        firsts = answers[::a_bucket]
        return sum(tensors for tensors, _ in firsts), sum(size for _, size in firsts)

    def _measure(self, phase: PhaseName) -> None:
        """Have somebody look how much of the device is taken; `measured` asks what was seen."""
        if self.device == "cuda":
            self._looks.append((phase, self._trainers[0].device_memory.remote()))
            if len(self._looks) > 100:
                _ = self.measured

    @property
    def measured(self) -> dict[str, int]:
        """Most bytes that were seen on the device, by phase of the plan; empty on a CPU."""
        looks, self._looks = self._looks, []
        for (phase, _), seen in zip(looks, self._get([x for _, x in looks], "look"), strict=True):
            self._measured[phase] = max(self._measured.get(phase, 0), seen["peak"])
        return dict(self._measured)

    def ask_engines(self, method: str) -> list[Any]:
        """A method's answer from each engine."""
        answers: list[Any] = self._get([getattr(e, method).remote() for e in self._engines], method)
        return answers

    def ask_trainers(self, method: str, argument: Callable[[int], Any] | None = None) -> list[Any]:
        """A method's answer from each trainer; `argument` makes what each rank is given."""
        calls = [
            getattr(trainer, method).remote(*([argument(rank)] if argument else []))
            for rank, trainer in enumerate(self._trainers)
        ]
        answers: list[Any] = self._get(calls, method)
        return answers

    def load(self, directory: str) -> None:
        """Have the trainers read what `save` wrote; those that have died are started again."""
        if TRAINER in self.watch.dead():
            self._bare = True
            repair.restart_trainers(self)
        self.residency.for_trainer()
        self._get([t.load.remote(directory) for t in self._trainers], "load")
        self._bare = False

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
        """End every process. Safe to call again."""
        with held():
            self.watch.close()
            self.cluster.close()
