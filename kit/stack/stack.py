"""`Stack`: the Ray head, the engines and the trainers of one session, as plain method calls.

It owns the parts, and brings them into the state that a call needs before it makes the call:

    Cluster           Ray's head or a share of another cluster    kit/cluster/client.py
    Watch, Calls      which processes live; waiting for answers   kit/cluster/processes.py, calls.py
    EngineGroup       the engines' actors, RequestStream          engines.py
    TrainerGroup      the ranks' actors                           trainers.py
    OffloadSchedule   what is on the device, what on the host     offload.py
    Slots             several sessions, and whose turn it is      slots.py
    Sending           what a sync sends, and what is there        sending.py
    WeightSync        weights from trainers to engines            kit/weight_sync/coordinator.py

The parts do not know it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from kit.cluster import processes
from kit.cluster.client import Cluster
from kit.cluster.joined import start_cluster
from kit.cluster.placement import Layout
from kit.cluster.processes import HEAD, TRAINER, Watch
from kit.config import QuantizationConfig, SessionConfig, TrainingConfig
from kit.errors import StackError
from kit.memory import MemoryPlan
from kit.models.families.exact import refuse_others
from kit.models.source import ModelSource
from kit.operators import ladder
from kit.reports import SyncReport
from kit.stack import recovery
from kit.stack.actors import StackSettings
from kit.stack.calls import Calls, EngineDiedError, LateError, TrainerDiedError, trainer_died
from kit.stack.engines import EngineGroup, Handover, Key, Request, RequestStream
from kit.stack.offload import OffloadSchedule
from kit.stack.sending import Sending
from kit.stack.slots import Slot, Slots
from kit.stack.trainers import TrainerGroup
from kit.utils.hardware import gpu_count
from kit.utils.interrupts import held
from kit.weight_sync.coordinator import WeightSync
from kit.weight_sync.verify import BROKEN, Checksums, not_arrived

if TYPE_CHECKING:
    from kit.messages import (
        CacheUse,
        ExpertRecords,
        SamplingSettings,
        TrainBatch,
        TrainerStatus,
    )


class Stack:
    """A session's engines and trainers.

    It starts in two strokes, `launch` and `start`, so that the caller can work meanwhile.
    """

    cluster: Cluster
    watch: Watch
    calls: Calls
    """There from `launch` on, all three."""
    engines: EngineGroup
    trainers: TrainerGroup
    offload: OffloadSchedule
    weights: WeightSync
    """There from `start`, `reattach` or `reset` on, all four."""

    def __init__(
        self,
        config: SessionConfig,
        model: ModelSource,
        device: str,
        max_response_len: int,
        plan: MemoryPlan,
        loss: Callable[..., Any] | None = None,
        draft: ModelSource | None = None,
    ) -> None:
        """Start nothing; see `launch`."""
        self.model, self.device, self.plan = model, device, plan
        self.dtype = config.model.dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if device == "cuda" else "float32"
        if config.training.true_on_policy:
            attention = config.engine.attention_backend
            refuse_others(model.architecture, device, self.dtype, attention)
        self.layout = Layout.of(config, device, model.bytes)
        """Which device each trainer and each engine has."""
        self.settings = StackSettings(
            config, model, device, self.dtype, max_response_len, plan, self.layout, loss, draft
        )
        self.sending = Sending.of(config)
        self.info: dict[str, Any] = {}
        self.slots = Slots(self.settings)
        self._together = False
        """Whether the engines write for several sessions at once."""
        self._stream: RequestStream[Any] | None = None
        """The responses that were asked for last."""

    # ---- start and end -------------------------------------------------------------------------

    def launch(self, cluster: Cluster | None = None) -> None:
        """Start the head process, or take this one; returns at once."""
        config, gpus = self.settings.config, gpu_count() if self.device == "cuda" else 0
        address = config.cluster.address
        self.cluster = cluster or start_cluster(self.device, address, self.layout, gpus)
        self.watch = Watch(config.engine.health_interval, self._part_died)
        self.calls = Calls(config, self.cluster, self.watch)

    def _connect(self) -> None:
        """Join the head, and build the parts that need it."""
        timeout = self.settings.config.engine.start_timeout
        self.cluster.connect(timeout)
        self.watch.add(HEAD, self.cluster.head_members())
        placement = self.cluster.placement(self.layout, self.device)
        self.engines = EngineGroup(self.settings, placement, self.calls)
        self.trainers = TrainerGroup(self.settings, placement, self.calls)
        self.offload = OffloadSchedule(self.plan, self.engines, self.trainers)
        self.weights = WeightSync(
            self.engines, self.trainers, self.calls.get, placement, self.watch, timeout
        )
        self.slots.connect(self.trainers, self.weights)

    def start(self) -> None:
        """Join the head, start engines and trainers side by side, and wait for them."""
        self._connect()
        self.engines.create()
        self.trainers.create()
        self._describe(self._start_actors())
        self.engines.watch(range(self.layout.replicas))
        self.trainers.watch()
        if self.settings.config.engine_reads_others or self.sending.adapters:
            self.sync(0)

    def _start_actors(self) -> dict[str, Any]:
        """Start engines and trainers side by side; what they say of themselves."""
        limit, ranks = self.settings.config.engine.start_timeout, self.trainers.actors
        starts = [actor.start.remote() for actor in [*self.engines.actors, *ranks]]
        if self.plan.kv_sleeps or self.plan.trainer_sleeps:
            # The engine takes its KV cache first, as if it were alone, and then makes room.
            infos = self.calls.get(starts, "start", limit)
            self.offload.make_room_for_trainer()
            places = self.calls.get([rank.place.remote() for rank in ranks], "start", limit)
            return {**infos[0], **places[0]}
        places = [rank.place.remote() for rank in ranks]
        infos = self.calls.get([*starts, *places], "start", limit)
        return {**infos[0], **infos[-1]}

    def reattach(self, description: dict[str, Any]) -> TrainerStatus:
        """Drive a stack on from where it is; see `recovery.reattach`.

        `description` is what it had when it started.
        """
        self._connect()
        self._describe(dict(description))
        status = recovery.reattach(self.engines, self.trainers, self.offload, self.weights)
        self.sending.draft_version = None
        self.sending.base_in_place = not self.weights.interrupted
        self.trainers.turn = status.turn
        if self.slots.find({*status.parked, *filter(None, [status.turn])}):
            status = self.status()
        return status

    def status(self) -> TrainerStatus:
        """How the first trainer is, with the weights of the session whose turn it is."""
        self.offload.make_room_for_trainer()
        self._take_trainers()
        status: TrainerStatus = self.trainers.ask("status")[0]
        return status

    def reset(self) -> None:
        """Do what `start` does with processes that were started before; see `recovery.reset`."""
        self._connect()
        self._describe(recovery.reset(self.engines, self.trainers, self.offload))
        self.sending.doubt()
        self.engines.ask("forget_adapter", None)
        self.sync(0)

    def _describe(self, description: dict[str, Any]) -> None:
        """Store the start-up info that engine and trainers returned."""
        self.description = description
        self.info = {**description, "device": self.device, "dtype": self.dtype}
        self.weights.buckets = self.info.pop("buckets")

    def _part_died(self, part: str) -> None:
        """End what a death takes along. Called by whichever thread sees it."""
        if part == HEAD:
            processes.end(self.cluster.processes())
            self.calls.disconnect()

    @property
    def lost(self) -> bool:
        """Whether a part has died that only a checkpoint can bring back."""
        return self.has_lost(self.slots.present)

    def has_lost(self, slot: Slot) -> bool:
        """Whether a session's weights are gone, which only a checkpoint can bring back."""
        return self.slots.needs_load(slot) or bool({HEAD, TRAINER} & self.watch.dead())

    def halt(self) -> None:
        """Kill engines and trainers: a call that waits for one raises StackError at once."""
        import ray

        for actor in [*self.engines.actors, *self.trainers.actors]:
            ray.kill(actor)

    def leave(self, seconds: float, *, warm: bool) -> None:
        """Let it live on without this process, for so many seconds; see `Cluster.leave`."""
        with held():
            self.watch.close()  # it is not ours to end any more
            self.cluster.leave(seconds, warm=warm)

    def close(self) -> None:
        """End every process. Safe to call again, and where none was started."""
        with held():
            if hasattr(self, "cluster"):
                self.watch.close()
                self.cluster.close()

    # ---- several sessions ----------------------------------------------------------------------

    @contextmanager
    def turn(self, slot: Slot) -> Iterator[Slot | None]:
        """Work for one session in the block, when all have finished that asked before.

        Nothing is moved yet: trainers and engines get its weights when they are asked for
        something. A block inside another gives the turn back to the session of that one, which is
        the value; None where there is none.

        Raises:
            StackError: the engines are writing for the session of the block around.
        """
        with self.slots.turn(slot, busy=self._is_read) as around:
            yield around

    @contextmanager
    def give_way(self) -> Iterator[Slot | None]:
        """Let other sessions work in the block, where this thread has the turn of one: the value.

        Raises:
            StackError: the engines are writing for it.
        """
        with self.slots.give_way(busy=self._is_read) as around:
            yield around

    @property
    def _is_read(self) -> bool:
        """Whether the engines write for one session, which reads what they have written."""
        return self._stream is not None and self._stream.is_read and not self._together

    def open(self, slot: Slot, *, fresh: bool = False) -> None:
        """Let a further session share the stack; it goes on from the present one's weights.

        Args:
            slot: its own, which nobody uses yet.
            fresh: it begins as after a start, with its own seed.
        """
        self.prepare_trainers()
        if not fresh:
            slot.version = self.trainers.version
        slot.engine_version = slot.version
        with held():
            try:
                with self.turn(slot):
                    self._take_trainers()
                    if fresh:
                        self.trainers.call_all_ranks("begin_anew")
            except BaseException:
                self.trainers.drop(slot.name)
                raise
            self.slots.add(slot)

    def drop(self, slot: Slot) -> None:
        """Free what the stack holds for a session other than the first."""
        with self.turn(self.slots.first), held():
            self.slots.remove(slot)
            if not {HEAD, TRAINER} & self.watch.dead():
                self.trainers.drop(slot.name)
            if self.sending.adapters and HEAD not in self.watch.dead():
                with suppress(StackError):  # a dead engine has none any more
                    self.engines.ask("forget_adapter", slot.adapter)

    @contextmanager
    def together(self, slots: Sequence[Slot]) -> Iterator[None]:
        """Have the engines write for several sessions at once in the block.

        They get the adapters that they lack before it begins.

        Raises:
            StackError: they have the weights of one session at a time.
        """
        if not self.sending.adapters:
            raise StackError(
                "The engine has the weights of one session at a time.",
                fix="set engine.lora: adapter, or generate for one after the other.",
            )
        for slot in slots:
            with self.turn(slot):
                self.prepare_engines()
        self._together = True
        try:
            yield
        finally:
            self._together = False

    @property
    def writes_together(self) -> bool:
        """Whether the engines can write for several sessions at once."""
        return self.sending.adapters

    def _take_trainers(self) -> None:
        """Have the trainers, which are awake, hold the weights of the session whose turn it is."""
        self.trainers.take_turn(self.slots.present.name)

    # ---- before a call -------------------------------------------------------------------------

    def prepare_engines(self) -> None:
        """Make the engines ready: alive, awake, with whole weights, and without other work.

        One that was started again has the trainer's present weights, as after a `sync`.
        """
        self.calls.refuse_without_head("generate")
        left = self._stream is not None and self._stream.pending and not self._together
        if left:  # an interrupt came before anybody could stop it
            self.engines.abort()
            self._stream = None
        self._start_dead_engines()
        if self.weights.interrupted:
            self.sync(self.trainers.version, exact=self.weights.exact)
        self._wake_weights()
        self.offload.make_room_for_engine()

    def _start_dead_engines(self) -> bool:
        started = recovery.start_dead_engines(self.engines, self.offload, self.weights)
        if started:
            self.slots.in_engines.clear()
            self.sending.started_again()
        return started

    def _wake_weights(self) -> None:
        if not self.offload.engine_has_weights:
            self.sync(self.trainers.version)
        elif self.slots.present not in self.slots.in_engines:
            self.sync(self.trainers.version, exact=self.weights.exact)

    def prepare_trainers(self) -> None:
        """Make the trainers ready: alive, with their weights, and on the device."""
        if self.calls.has_died(TRAINER, "a call of the trainer"):
            cause = self.cluster.killed_for_memory(TRAINER)
            raise trainer_died("The trainer's process has died.", cause)
        if self.trainers.needs_load:
            raise trainer_died("The trainer was started again and has read no checkpoint.")
        if self.plan.kv_sleeps:
            self._start_dead_engines()
        self.offload.make_room_for_trainer()
        self._take_trainers()

    # ---- engines -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingSettings,
        seeds: list[int],
        *,
        at_once: bool = False,
    ) -> RequestStream[int]:
        """Have a response written to each prompt; iterate over the stream for them.

        Args:
            prompts: token ids; responses have their places as numbers.
            sampling: the same for all.
            seeds: one a prompt.
            at_once: hand them over when all are finished, which is faster where that is soon.
        """
        pairs = enumerate(zip(prompts, seeds, strict=True))
        requests = [Request(place, prompt, seed) for place, (prompt, seed) in pairs]
        return self.open_stream(sampling, "all" if at_once else "response", requests)

    def open_stream(
        self, sampling: SamplingSettings, handover: Handover, requests: Sequence[Request[Key]]
    ) -> RequestStream[Key]:
        """Make the engines ready to write, and ask them for these; more can be asked for later."""
        self.prepare_engines()
        with held():
            stream: RequestStream[Key] = RequestStream(
                self.engines,
                self.calls,
                replace(sampling, adapter=self.slots.present.adapter),
                handover=handover,
                timeout=self.settings.config.engine.call_timeout,
                make_ready=self.prepare_engines,
                at_end=partial(self.trainers.measure, "generate"),
            )
            stream.ask(requests)
            self._stream = stream
        return stream

    def rescore(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        *,
        cache: CacheUse,
        experts: bool = False,
    ) -> list[list[Any]]:
        """Score samples in every engine now: a `Rescored` a sample, replica by replica."""
        self.prepare_engines()
        how = {"cache": cache, "experts": experts, "adapter": self.slots.present.adapter}
        return self._ask_living("rescore", tokens, response_lengths, **how)

    def first_difference(self, tokens: list[int]) -> tuple[str, int]:
        """Name of the first part of the model in which trainer and engine differ; how many agree.

        Both read the same tokens. The name is empty where all parts put out the same bits.
        """
        self.prepare_engines()
        engine = self._ask_living("outputs", tokens)[0]
        return ladder.first_difference(self.probe("outputs", tokens), engine)

    def checksums(self) -> list[dict[str, str]]:
        """A checksum of each parameter under SGLang's names, replica by replica."""
        if self.settings.config.engine.tensor_parallel > 1:
            raise StackError(
                "Checksums of an engine with engine.tensor_parallel above 1 cannot be compared.",
                why="Each of its devices has a part of every weight, the trainer has whole ones.",
                fix="call session.check_mismatch(), which compares what they compute.",
            )
        return [devices[0] for devices in self._checksums()]

    def _checksums(self) -> list[list[dict[str, str]]]:
        """Checksums of each device of each replica."""
        self._wake_weights()
        return self._ask_living("checksums", self.slots.present.adapter)

    def _ask_living(self, method: str, *arguments: Any, **named: Any) -> list[Any]:
        """Ask all engines; once more, if one dies meanwhile."""
        try:
            return self.engines.ask(method, *arguments, **named)
        except EngineDiedError:
            self.prepare_engines()
            return self.engines.ask(method, *arguments, **named)

    # ---- weights -------------------------------------------------------------------------------

    def sync(
        self, version: int, *, exact: bool = False, flush_cache: bool = True, verify: bool = False
    ) -> SyncReport:
        """Give the engines the trainers' weights as `version`.

        An interrupt is raised when all of them have arrived.

        Args:
            version: their number.
            exact: without the disturbance.
            flush_cache: False keeps the engines' prefixes, which no longer fit the weights.
            verify: erase the engines' weights first, and compare checksums of what has arrived.

        Raises:
            StackError: they did not arrive, or differ.
        """
        begin = time.perf_counter()
        self.calls.refuse_without_head("sync")
        self._start_dead_engines()
        self.prepare_trainers()
        with held():
            lost = self._merge_error()
            try:
                tensors, size = self._send_weights(version, exact, flush_cache, erase=verify)
            except (LateError, TrainerDiedError):
                raise
            except StackError:
                if not self._start_dead_engines():
                    raise
                tensors, size = self._send_weights(version, exact, flush_cache, erase=verify)
            self.trainers.version = version
            self.trainers.measure("sync")
        seconds = time.perf_counter() - begin
        verified = self.verify_weights() if verify else None
        return SyncReport(version, seconds, tensors, size, verified, lost)

    def _merge_error(self) -> float | None:
        """What rounding does to adapters that are now on their way to the engine."""
        adapts = self.settings.config.model.lora is not None
        if not adapts or self.sending.adapters or self.dtype == "float32":
            return None
        error: float = self.trainers.call_all_ranks("probe", "merge_error")[0]
        return error if math.isfinite(error) else None

    def lost_weights(self) -> list[str]:
        """Erase every engine's parameters and sync; those that are not what they were before.

        Names are SGLang's. The engines have to hold the trainers' weights. Afterwards they do, as
        far as a sync can give them.
        """
        before = self._checksums()
        with held():
            self._send_weights(self.trainers.version, True, True, erase=True)
        pairs = [
            (old, new)
            for engine in zip(before, self._checksums(), strict=True)
            for old, new in zip(*engine, strict=True)
        ]
        return sorted({name for old, new in pairs for name in old if old[name] != new.get(name)})

    def compare_weights(self) -> Checksums:
        """Trainers' and engines' parameters side by side."""
        reshaped = self.description.get("reshaped", ())
        return Checksums.of(self.probe("checksums"), self.checksums(), self.dtype, reshaped)

    def compare_draft(self) -> Checksums:
        """Trainers' and engines' draft side by side, where one is trained."""
        engines = self._ask_living("draft_checksums")
        return Checksums.of(self.probe("draft_checksums"), engines, self.dtype)

    def verify_weights(self) -> int:
        """Count the parameters of an engine that were erased before the last sync.

        Raises:
            StackError: one was not written by it, or is not the trainer's.
        """
        engines = self._checksums()
        broken = {n for each in engines for device in each for n in device if BROKEN in device[n]}
        if broken:
            raise not_arrived(broken, len(engines[0][0]), "The sync did not write them.")
        # With more, each device has a part of every weight.
        if self.settings.config.engine.tensor_parallel == 1:
            self.compare_weights().require_equal()
        if self.settings.config.training.draft:
            self.compare_draft().require_equal()
        return len(engines[0][0])

    def _send_weights(
        self, version: int, exact: bool, flush_cache: bool, *, erase: bool
    ) -> tuple[int, int]:
        self.weights.interrupted = True  # until all is sent, nobody generates
        awake = self.offload.engine_has_weights
        self.offload.make_room_for_sync()
        self._take_trainers()
        draft = self.settings.config.training.draft
        return self.sending.send(
            self.weights,
            self.slots,
            version,
            awake=awake,
            exact=exact,
            flush_cache=flush_cache,
            erase=erase,
            draft_every=draft.interval if draft else 0,
        )

    # ---- trainers ------------------------------------------------------------------------------

    def update(self, batch: TrainBatch, update_id: str) -> tuple[list[dict[str, float]], bool]:
        """Make optimizer steps in every trainer: (metrics of each step, whether done now)."""
        self.prepare_trainers()
        return self.trainers.update(batch, update_id, self.cluster.directory / "tmp")

    def by_token(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        of: str,
        experts: ExpertRecords = None,
    ) -> list[list[float]]:
        """Log-prob of each response token by the `policy` or the `reference`, or the `values`.

        The policy follows the `experts` of these samples, where they are given.
        """
        which: tuple[Any, ...] = (of, experts if of == "policy" else None)
        method, which = ("values", ()) if of == "values" else ("log_probs", which)
        asked = tokens, response_lengths, *which
        values: list[list[float]] = self._train(method, *asked, doing=of)[0]
        return values

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `kit.trainer.probes` in every trainer; the first one's result."""
        return self._train("probe", name, *arguments, doing=name)[0]

    def snapshot(self, name: str) -> int:
        """Keep the trainers' state in host memory under this name; bytes in all."""
        return sum(self._train("snapshot", name))

    def restore(self, name: str) -> None:
        """Put the trainers back to a snapshot. Raises SessionError where one has not kept it."""
        self._train("restore", name, mutates=True)

    def forget(self, name: str) -> None:
        """Free the memory of a snapshot."""
        if self.trainers.turn != self.slots.present.name:
            self.prepare_trainers()
        self.trainers.ask("forget", name)

    def state_bytes(self) -> int:
        """Bytes of host memory that a snapshot takes now."""
        return sum(self._train("state_bytes"))

    def configure(self, training: TrainingConfig, temperature: float | None = None) -> None:
        """Have the trainers use other settings; None leaves the temperature of the policy."""
        config = self.settings.config
        rollout = config.rollout
        if temperature is not None:
            rollout = rollout.model_copy(update={"temperature": temperature})
        if self.trainers.turn == self.slots.present.name:  # else they are told at its next turn
            self.trainers.ask("configure", training, rollout.temperature)
        # For those that may have to be started again.
        changed = {"training": training, "rollout": rollout}
        self.settings.config = config.model_copy(update=changed)

    def export_hf(
        self,
        directory: str,
        dtype: str,
        base: str | None = None,
        quantization: QuantizationConfig | None = None,
        of: str = "policy",
    ) -> None:
        """Write `policy` or `draft` as models are published; see `Trainer.export_hf`."""
        self._train("export_hf", directory, dtype, base, quantization, of)

    def save(self, directory: str) -> None:
        """Write the trainers' state into a directory."""
        self._train("save", directory)

    def load(self, directory: str) -> None:
        """Read what `save` wrote; trainers that have died are started again."""
        died = self.calls.has_died(TRAINER, "load")
        if died:
            self.offload.trainer_asleep = False
        self.offload.make_room_for_trainer()
        if died:
            for slot in self.slots.all:  # what they held for the others went with them
                slot.needs_load = True
            self.trainers.restart()
        self._take_trainers()
        self.trainers.call_all_ranks("load", directory, mutates=True)
        self.trainers.needs_load = False

    def _train(
        self, method: str, *arguments: Any, doing: str = "", mutates: bool = False
    ) -> list[Any]:
        self.prepare_trainers()
        return self.trainers.call_all_ranks(method, *arguments, doing=doing, mutates=mutates)
