"""`Trainer`: one rank of the trainers as a Ray actor.

Every rank gets the whole batch and takes its share, so that all ranks agree on sizes without
talking. What a token counts in the loss is fixed by the whole batch (`kit.algo.loss.weights`):
the result does not depend on micro-batches or on the number of trainers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kit.cluster import progress
from kit.cluster.processes import cores
from kit.config import QuantizationConfig, TrainingConfig
from kit.messages import FIRST, ExpertRecords, TrainBatch, TrainerStatus
from kit.models import low_precision
from kit.models.heads import eagle3
from kit.models.state_dict import saved_buffers
from kit.operators.low_precision import Scheme
from kit.trainer import hf_export
from kit.trainer.backend import TrainerBackend
from kit.trainer.fsdp import FsdpBackend
from kit.trainer.offload import DeviceMemory, HostBuffer, HostOffload
from kit.trainer.probes import Probes
from kit.trainer.process_group import CancelToken, ProcessGroup
from kit.trainer.scoring import LogProbScorer
from kit.trainer.settings import OwnSettings, TrainerSettings
from kit.trainer.state import Parked, TrainerState
from kit.trainer.step import TrainStep, warm_up
from kit.weight_sync.sender import WeightSender
from kit.weight_sync.transform import EXACT, Disturbance
from kit.weight_sync.transport import ADAPTER, DRAFT, POLICY, BucketSpec, Handle


def make_backend(
    settings: TrainerSettings, device: torch.device, group: ProcessGroup, host: HostOffload
) -> TrainerBackend:
    """Choose the library that computes."""
    return FsdpBackend(settings, device, group, host)


def _scheme(quantization: QuantizationConfig | None) -> Scheme | None:
    return None if quantization is None else low_precision.scheme_of(quantization)


class Trainer:
    """Receives calls, and owns the parts that answer them.

    Parts that are the process's own live as long as it does (`group`, `memory`, `host`, `weights`);
    the others are made anew by `reset`, and those that read settings by `use`.
    """

    device: torch.device
    group: ProcessGroup
    memory: DeviceMemory
    host: HostOffload
    weights: WeightSender
    backend: TrainerBackend
    state: TrainerState
    scorer: LogProbScorer
    train_step: TrainStep
    probes: Probes
    turn: str | None
    """Of which session the networks hold the weights; None where that has ended."""
    parked: dict[str, Parked]
    """The states of all other sessions by their names."""

    def __init__(self, settings: TrainerSettings) -> None:
        if settings.cards:  # before anything asks CUDA
            os.environ["CUDA_VISIBLE_DEVICES"] = settings.cards
        self.settings = settings
        self._spare: HostBuffer | None = None
        """Host memory in which nothing waits."""
        self.ready = False

    def is_ready(self) -> bool:
        """Whether `start` and `place` have both completed."""
        return self.ready

    def start(self) -> None:
        """Meet the other ranks, and load the models into host memory."""
        settings, training = self.settings, self.settings.training
        progress.report("trainer", "loading weights")
        if settings.device == "cuda":
            torch.cuda.set_device(settings.rank % torch.cuda.device_count())
            torch.set_float32_matmul_precision("high")
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            torch.set_num_threads(max(1, cores() // training.num_trainers))
            self.device = torch.device("cpu")
        self.group = ProcessGroup(settings.device, settings.rank, training.num_trainers)
        self.group.join(settings.init_method)
        self.memory = DeviceMemory(self.device, settings.memory_limit)
        self.host = HostOffload(self.device)
        self._make_parts(settings)
        self.weights = WeightSender(
            self.device,
            self._gather,
            self._gather_together,
            feeds=settings.feeds,
            shares_memory=settings.shares_memory,
            allocation=self.memory.whole_blocks,
        )
        self.use(settings)
        self._load()

    def _gather(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A weight as engines get it; `reset` makes another backend."""
        return self.backend.gather(name, value, merged=not self.settings.sends_adapters)

    def _gather_together(self, *named: Any) -> Iterable[torch.Tensor]:
        return self.backend.gather_together(*named, merged=not self.settings.sends_adapters)

    def _make_parts(self, settings: TrainerSettings) -> None:
        self.backend = make_backend(settings, self.device, self.group, self.host)
        self.state = TrainerState(self.backend, self.group.rank, self.group.size)
        self.turn = FIRST
        self.parked = {}
        self._spare = None

    def use(self, settings: TrainerSettings) -> None:
        """Compute with other settings from now on, on the same models."""
        self.settings = settings
        self.scorer = LogProbScorer(self.backend, settings)
        self.train_step = TrainStep(self.backend, self.scorer, self.state, settings)
        self.probes = Probes(
            self.backend, self.scorer, self.train_step, self.state, self.weights, settings
        )

    def _load(self) -> None:
        self.backend.start()
        progress.report("trainer", "waiting for the engine")  # where it needs all the room first

    def place(self) -> dict[str, Any]:
        """Shard the models over the devices. Returns what the session shows of them."""
        settings = self.settings
        progress.report("trainer", "sharding")
        parameters, trained = self.backend.place()
        if settings.compile:
            progress.report("trainer", "compiling layers (kept for the next start)")
            warm_up(self.backend, settings)
        self.memory.release_cache()
        dtype = getattr(torch, settings.dtype)
        buckets = {ADAPTER: self._register_adapters(dtype)} if settings.sends_adapters else {}
        scheme = _scheme(settings.quantization)
        buckets[POLICY] = self._register(POLICY, dtype, scheme, settings.disturbance)
        if self.backend.has(DRAFT):
            buckets[DRAFT] = self._register(DRAFT, dtype)
        self.ready = True
        progress.report("trainer", progress.READY)
        return {"parameters": parameters, "trained": trained, "buckets": buckets}

    def _register(
        self,
        of: str,
        dtype: torch.dtype,
        scheme: Scheme | None = None,
        disturbance: Disturbance = EXACT,
    ) -> int:
        exact = {
            saved: value.dtype
            for name, value in saved_buffers(self.backend.module(of))
            for saved, _ in self.backend.as_saved(name, value, of)
        }
        return self.weights.register(
            of,
            lambda: self.backend.named_weights(of),
            lambda name: exact.get(name) or low_precision.sent_dtype(name, scheme) or dtype,
            bucket_bytes=self.settings.bucket_bytes,
            as_saved=partial(self._as_sent, of=of),
            disturbance=disturbance,
            compared_as_sent=scheme is not None,
        )

    def _register_adapters(self, dtype: torch.dtype) -> int:
        return self.weights.register(
            ADAPTER,
            self.backend.named_adapters,
            lambda _name: dtype,
            bucket_bytes=1 << 62,  # SGLang takes an adapter in one piece
            as_saved=self.backend.adapter_as_sent,
            compared_as_sent=True,
        )

    def _as_sent(
        self, name: str, value: torch.Tensor, of: str = POLICY
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A whole weight in the form in which engines keep it."""
        scheme = _scheme(self.settings.quantization)
        for saved, part in self.backend.as_saved(name, value, of):
            yield from low_precision.as_sent(saved, part, scheme) if scheme else [(saved, part)]

    def reset(self, settings: TrainerSettings) -> dict[str, Any]:
        """Forget everything that training made; as after `start` and `place`.

        Args:
            settings: the same or others, for the same device, rank and number of ranks.
        """
        self.wake()
        self.ready = False
        self.backend.release()
        self.release_cache()
        self._make_parts(settings)
        self.use(settings)
        self._load()
        return self.place()

    def leave_group(self) -> None:
        """Let the ranks fail that wait for this one, and this one where it waits for them."""
        self.group.leave()

    def regroup(self, rendezvous: str) -> None:
        """Meet again after a group was left; weights, optimizer and counters stay as they are."""
        self.backend.recover()
        before = self.state.copy()  # this rank's share, for which it needs no other
        self.backend.release()
        self.weights.forget_engines()
        self.use(replace(self.settings, rendezvous=rendezvous))
        self.group.rejoin(self.settings.init_method)
        self.release_cache()
        self._load()
        self.place()
        self.state.put_back(before)

    def status(self) -> TrainerStatus:
        """Where this rank is, for a driver that does not know."""
        return TrainerStatus(
            self.state.updates,
            self.state.last_update,
            self.state.update_seconds,
            bool(self.host.offloaded_bytes),
            tuple(self.state.snapshots),
            self.turn,
            tuple(self.parked),
        )

    def processes(self) -> list[int]:
        """Ids of the processes without which it cannot work: its own."""
        return [os.getpid()]

    # ---- sleeping ------------------------------------------------------------------------------

    def sleep(self) -> int:
        """Move weights, optimizers and reference to host memory; how many bytes."""
        self.weights.release()
        size = self.backend.sleep()
        self.memory.release_cache()  # what was there before is no peak of what comes next
        return size

    def wake(self) -> None:
        """Bring everything back to the device."""
        self.backend.wake()

    def release_cache(self) -> None:
        """Give back device memory that is held for the next update only."""
        self.weights.release()
        self.memory.release_cache()

    def device_memory(self) -> dict[str, int]:
        """Bytes; see `DeviceMemory.read`."""
        return self.memory.read()

    # ---- learning ------------------------------------------------------------------------------

    def log_probs(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        of: str = "policy",
        experts: ExpertRecords = None,
    ) -> list[list[float]]:
        """Log-probability of each response token under the present weights, or the reference's."""
        return self.scorer.log_probs(tokens, response_lengths, of, experts)

    def values(self, tokens: list[list[int]], response_lengths: list[int]) -> list[list[float]]:
        """What the critic expects before each response token."""
        return self.scorer.values(tokens, response_lengths)

    def update(
        self, batch: TrainBatch, update_id: str, stop: str | None = None
    ) -> tuple[list[dict[str, float]], bool]:
        """Make optimizer steps over the batch: (metrics of each step, whether anything was done).

        All of it or nothing: what fails or is stopped leaves weights and optimizer as before. The
        same `update_id` twice in a row is applied once: the second call returns the metrics of the
        first.

        Args:
            batch: what to train on.
            update_id: the batch's own.
            stop: a file; once it is there, the update stops at the next micro-batch.

        Raises:
            StackError: loss or gradient is not finite, or the device has too little memory.
            StoppedError: the file was there.
        """
        state = self.state
        if state.last_update and state.last_update[0] == update_id:
            return state.last_update[1], False
        begin = time.perf_counter()
        # A single step changes nothing before its end, so there is nothing to be put back.
        before = state.copy() if len(self.train_step.steps_of(batch)) > 1 else None
        try:
            metrics = self.train_step.update(batch, CancelToken(stop))
        except BaseException:
            self.backend.recover()
            if before:
                state.put_back(before)
            raise
        state.updates += 1
        interval = self.settings.training.ref_update_interval
        if interval and state.updates % interval == 0:
            self.backend.refresh_reference()
        state.last_update = (update_id, metrics)
        state.update_seconds = time.perf_counter() - begin
        return metrics, True

    def configure(self, training: TrainingConfig, temperature: float) -> None:
        """Train with other settings from now on; models and processes stay those of the start."""
        self.backend.configure(training)
        self.use(replace(self.settings, training=training, temperature=temperature))

    # ---- several sessions ----------------------------------------------------------------------

    def take_turn(self, own: OwnSettings) -> None:
        """Go on with a session's state and settings; the present one's waits in host memory.

        A session that is not known goes on from the present state, as a copy of it.
        """
        before, there = self.state, self.parked.get(own.name)
        if own.name != self.turn:
            copy = before.copy(self._spare)
            self.state = there.state if there else before.twin()
            if there:
                try:
                    self.state.put_back(there.copy)
                except BaseException:
                    self.state = before
                    before.put_back(copy)
                    raise
            if self.turn is not None:
                self.parked[self.turn] = Parked(before, copy)
            self.parked.pop(own.name, None)
            # Page-locked memory is dear; the next one to be parked takes it.
            self._spare = there.copy.tensors if there else None
            self.turn = own.name
        self.backend.configure(own.training)
        self.use(self.settings.with_own(own))

    def begin_anew(self) -> None:
        """Have the session whose turn it is begin as after a start."""
        self.state.begin_anew(self.settings.seed)

    def drop(self, name: str) -> None:
        """Forget a session, whose name may be given to another."""
        self.parked.pop(name, None)
        if self.turn == name:
            self.turn = None

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `Probes`; all ranks call."""
        return getattr(self.probes, name)(*arguments)

    # ---- weights to engines --------------------------------------------------------------------

    def export_weights(
        self, exact: bool = False, bucket: int = 0, *_: Any, model: str = POLICY
    ) -> Handle | None:
        """Gather a bucket of the weights; see `WeightSender.export`.

        What follows `bucket` are answers that Ray has to have before this call may begin.
        """
        return self.weights.export(model, bucket, self.state.updates, exact=exact)

    def broadcast_weights(
        self, exact: bool, bucket: int, *_: Any, give_up: str, model: str = POLICY
    ) -> bool:
        """Gather a bucket, and have rank 0 send it; see `WeightSender.broadcast`."""
        return self.weights.broadcast(model, bucket, self.state.updates, give_up, exact=exact)

    def bucket_specs(self, model: str = POLICY) -> list[BucketSpec]:
        """What each bucket of a model will carry."""
        return self.weights.specs(model)

    def listen(self, host: str, world: int) -> int:
        """Rank 0: be found by engines; see `WeightSender.listen`."""
        return self.weights.listen(host, world)

    def meet_engines(self, name: str, world: int) -> None:
        """Rank 0: wait until all engines have joined the group of this name."""
        self.weights.meet_engines(name, world)

    # ---- state ---------------------------------------------------------------------------------

    def snapshot(self, name: str) -> int:
        """Copy everything that an update changes into host memory; how many bytes."""
        return self.state.keep(name)

    def restore(self, name: str) -> None:
        """Make the trainer what it was at a snapshot, bit by bit; see `TrainerState.restore`."""
        self.state.restore(name)

    def forget(self, name: str) -> None:
        """Give back the memory of a snapshot, if there is one."""
        self.state.snapshots.pop(name, None)

    def state_bytes(self) -> int:
        """Bytes of host memory that a snapshot takes now."""
        return self.state.size()

    def export_hf(
        self,
        directory: str,
        dtype: str,
        base: str | None = None,
        quantization: QuantizationConfig | None = None,
        of: str = POLICY,
    ) -> int:
        """Write `policy` or `draft` as models are published; all ranks call. Bytes.

        With the name of a `base`, the policy's adapters alone, as PEFT reads them; with
        `quantization` the linear layers quantised.
        """
        rank, scheme = self.group.rank, _scheme(quantization)
        if base is not None:
            return hf_export.export_adapter(self.backend, directory, dtype, base, rank=rank)
        draft = self.settings.draft_path if self.settings.draft_head == "eagle3" else None
        trains_mtp = self.settings.draft_head == "mtp" and self.backend.has(DRAFT)
        return hf_export.export(
            self.backend,
            directory,
            dtype,
            of=of,
            rank=rank,
            scheme=scheme,
            trained_mtp=trains_mtp,
            mtp_of=self.settings.model_path,
            beside=eagle3.word_tables(draft) if draft else None,
        )

    def save(self, directory: str) -> None:
        """Write everything that an update changes; all ranks call, each writes its share."""
        self.state.save(directory)

    def load(self, directory: str) -> None:
        """Read what `save` wrote, with any number of trainers."""
        self.state.load(directory)
