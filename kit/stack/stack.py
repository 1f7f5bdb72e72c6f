"""`Stack`: the Ray head, the engine and the trainers of one session, as plain method calls."""

from __future__ import annotations

import ctypes
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.errors import KitError, StackError, StoppedError
from kit.interrupts import held
from kit.memory import MemoryPlan
from kit.memory.plan import PhaseName
from kit.model.source import ModelSource
from kit.stack.buckets import SLOTS
from kit.stack.cluster import Cluster
from kit.stack.keeping import KeepsTrainers
from kit.stack.residency import Residency

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


class LateError(StackError):
    """A call did not end within its time limit; it may still."""


class Stack(KeepsTrainers):
    """Starts in two strokes, so that the caller can do other work while the first one runs."""

    def __init__(
        self,
        config: SessionConfig,
        model: ModelSource,
        device: str,
        max_response_len: int,
        plan: MemoryPlan,
    ) -> None:
        """Start the head process; returns at once."""
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
        self._updates_sent = 0
        self._half_synced = False
        """Has the engine perhaps got some of the new weights and not all?"""
        self._parts: Parts | None = None
        """The responses that were asked for last."""
        self.cluster = Cluster(device, gpus=gpu_count() if device == "cuda" else 0)
        self.replicas = config.engine.replicas or default_replicas(device, model.bytes)
        self._engines: list[Any] = []
        self._trainers: list[Any] = []

    def start(self) -> None:
        """Join the head, start engine and trainers side by side, and wait for them."""
        config = self.config
        self.cluster.connect(config.engine.start_timeout)
        import ray

        from kit.stack.engine import Engine
        from kit.stack.trainer import Trainer

        # On a GPU all of them share the first card; Ray only counts the shares.
        world = config.training.num_trainers
        share = 1.0 / (self.replicas + world) if self.device == "cuda" else 0.0
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": share, "max_restarts": 0}
        # A group of its own call each, and room for the call that aborts them.
        calls = 1000 + (config.rollout.over_sampling_batch_size or 0)
        engine = ray.remote(Engine)
        self._engines = [
            engine.options(**options, name=f"engine-{index}", max_concurrency=calls).remote(
                self._engine_settings()
            )
            for index in range(self.replicas)
        ]
        trainer = ray.remote(Trainer)
        self._trainers = [
            trainer.options(**options, name=f"trainer-{rank}").remote(self._trainer_settings(rank))
            for rank in range(world)
        ]
        self.residency = Residency(
            self.plan,
            self._engines,
            self._trainers,
            self._get,
            lambda: self.sync(self.trainer_version),
        )
        self.info = {**self._start_actors(), "device": self.device, "dtype": self.dtype}
        self._buckets = self.info.pop("buckets")
        if config.engine.disturbed:
            self.sync(0)  # the engine has read the exact weights

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

    def _engine_settings(self) -> Any:
        from kit.stack.engine import EngineSettings

        config, engine = self.config, self.config.engine
        requests = engine.max_running_requests or max(config.samples_at_once, 256)
        requests = -(-requests // self.replicas)
        tokens = engine.max_total_tokens
        if tokens is None:
            tokens = self.plan.kv_tokens
            if self.device == "cpu":
                tokens = min(requests, 512) * min(self.model.context_length, 1024)
        return EngineSettings(
            model_path=self.model.path,
            device=self.device,
            dtype=self.dtype,
            context_length=self.model.context_length,
            max_running_requests=requests,
            seed=config.seed,
            attention_backend=engine.attention_backend,
            max_total_tokens=tokens,
            # The plan says how large the KV cache is; this only has to leave room for it.
            mem_fraction_static=engine.mem_fraction_static or 0.95,
            saves_memory=self.device == "cuda" and config.memory.sleep != "never",
            needs_tokenizer=bool(config.rollout.stop),
            threads=max(1, (os.cpu_count() or 1) // self.replicas),
            trust_remote_code=config.model.trust_remote_code,
            extra=dict(engine.extra),
        )

    def _trainer_settings(self, rank: int) -> Any:
        from kit.stack.disturbance import Disturbance
        from kit.stack.trainer import TrainerSettings

        config = self.config
        return TrainerSettings(
            model_path=self.model.path,
            training=config.training,
            temperature=config.rollout.temperature,
            device=self.device,
            dtype=self.dtype,
            seed=config.seed,
            rank=rank,
            rendezvous=str(self.cluster.directory / "tmp" / "rendezvous"),
            max_response_len=self.max_response_len,
            disturbance=Disturbance(
                config.engine.weight_bits, config.engine.weight_noise, config.seed
            ),
            trust_remote_code=config.model.trust_remote_code,
            recompute=self.plan.recompute,
            compile=self.plan.compile,
            offload=self.plan.optimizer_cpu_offload,
            max_tokens=self.plan.max_tokens_per_gpu,
            bucket_bytes=config.engine.update_weight_buffer_size
            if self.device == "cuda"
            else 1 << 62,
            sleeps=self.plan.trainer_sleeps,
            memory_limit=self.plan.trainer_limit if config.memory.device_gib else None,
        )

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

        self._engine_in_order()
        with held():
            # Neighbours go to one engine: they have their prompt in common.
            calls = {}
            for engine, part in zip(
                self._engines, shares(len(prompts), self.replicas), strict=False
            ):
                method = engine.generate if at_once else engine.generate_in_parts
                calls[method.remote(prompts[part], sampling, seeds[part])] = part.start
            get, measure = partial(self._get, doing="generate"), partial(self._measure, "generate")
            self._parts = Parts(self, calls, get, measure, at_once=at_once)
        return self._parts

    def _engine_in_order(self) -> None:
        """Before the engine works: it is awake, has whole weights, and writes for nobody else."""
        if self._parts and self._parts.left:  # an interrupt came before anybody could stop it
            self.abort()
            self._parts = None
        if self._half_synced:
            self.sync(self.trainer_version)
        self.residency.for_engine()

    def underway(self, sampling: Any) -> Underway:
        """For groups of requests of which each is handed over as soon as it is finished."""
        from kit.stack.underway import Underway

        self._engine_in_order()
        return Underway(self, self._engines, partial(self._get, doing="generate"), sampling)

    def abort(self) -> None:
        """Stop everything that is being generated."""
        self._get([engine.abort.remote() for engine in self._engines], "abort")

    def update(self, batch: Any, update_id: str) -> tuple[list[dict[str, float]], bool]:
        """Optimizer steps on every trainer; (metrics of each step, whether it was done now)."""
        import ray

        self.residency.for_trainer()
        shared = ray.put(batch)
        self._updates_sent += 1
        stop = self.cluster.directory / "tmp" / f"stop-{self._updates_sent}"
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
        self.residency.for_trainer()
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
        self._engine_in_order()
        calls = [
            engine.rescore.remote(tokens, response_lengths, cached=cached, experts=experts)
            for engine in self._engines
        ]
        found: list[list[Any]] = self._get(calls, "rescore")
        return found

    def checksums(self) -> list[dict[str, str]]:
        """A checksum of each parameter under SGLang's names, replica by replica."""
        self.residency.for_weights()
        found: list[dict[str, str]] = self._get(
            [engine.checksums.remote() for engine in self._engines], "checksums"
        )
        return found

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `kit.stack.probes` in every trainer; the first one's result."""
        self.residency.for_trainer()
        return self._get([t.probe.remote(name, *arguments) for t in self._trainers], name)[0]

    def sync(
        self, version: int, *, exact: bool = False, flush_cache: bool = True
    ) -> tuple[int, int]:
        """Hand the trainer's weights to the engine as `version`: (tensors, bytes).

        An interrupt is raised when all of them have arrived.
        """
        with held():
            self._half_synced = True
            self.residency.for_sync()
            answer = self._hand_over(version, exact, flush_cache)
            self._half_synced = False
        return answer

    def _hand_over(self, version: int, exact: bool, flush_cache: bool) -> tuple[int, int]:
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

    def _get(self, calls: Any, doing: str, timeout: float | None = None) -> Any:
        """Wait for answers. What went wrong in an actor is raised here as if it went wrong here."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        limit = timeout or self.config.engine.call_timeout
        try:
            return ray.get(calls, timeout=limit)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, StackError) and doing == "start":
                # What SGLang's processes had to say is in their log, which goes with the stack.
                why = "\n".join(part for part in (cause.why, self.cluster.log_tail()) if part)
                raise StackError(cause.what, why=why, fix=cause.fix) from None
            if isinstance(cause, KitError):
                raise cause from None
            last = str(error).strip().splitlines()
            raise StackError(f"{doing} failed: {last[-1] if last else cause!r}") from error
        except RayActorError as error:
            raise StackError(
                f"A process of the stack died during {doing}.",
                why="\n".join([*str(error).strip().splitlines()[:4], self.cluster.log_tail()]),
                fix="close the session and start it again; if it was killed for memory, lower "
                "engine.max_total_tokens or training.max_tokens_per_gpu.",
            ) from error
        except GetTimeoutError as error:
            setting = "engine.start_timeout" if timeout else "engine.call_timeout"
            raise LateError(
                f"{doing} did not finish within {limit:.0f} s.",
                why=self.cluster.log_tail(),
                fix=f"raise {setting}, or look at what keeps the machine busy.",
            ) from error

    def host_memory(self) -> int:
        """Bytes of host memory that the stack's processes hold for themselves."""
        return self.cluster.host_memory()

    def halt(self) -> None:
        """Kill engine and trainers: a call that waits for one raises StackError at once."""
        import ray

        for actor in [*self._engines, *self._trainers]:
            ray.kill(actor)

    def close(self) -> None:
        """End every process. Safe to call again."""
        with held():
            self.cluster.close()
