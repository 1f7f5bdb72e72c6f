"""`Trainer`: an FSDP2 trainer as a Ray actor; one for each rank.

Every rank gets the whole batch and takes its share, so that all ranks agree on sizes without
talking. What a token counts in the loss is fixed by the whole batch (`kit.algo.loss.weights`):
the result does not depend on micro-batches or on the number of trainers.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kit.cluster import progress
from kit.cluster.processes import cores
from kit.config import TrainingConfig
from kit.errors import SessionError
from kit.messages import TrainBatch, TrainerStatus
from kit.models.policy import Policy
from kit.models.state_dict import named_weights
from kit.trainer import hf_export, learner, probes, state
from kit.trainer.batch import optimizer_steps
from kit.trainer.fsdp import whole
from kit.trainer.learner import Making
from kit.trainer.loss import Corrections
from kit.trainer.offload import DeviceMemory, Parking
from kit.trainer.process_group import Meets
from kit.trainer.scoring import Looks
from kit.trainer.settings import TrainerSettings
from kit.trainer.state import TrainerSnapshot
from kit.trainer.step import NEVER, OptimizerSteps, StopSign
from kit.weight_sync.sender import WeightSender
from kit.weight_sync.transport import POLICY, BucketSpec, Handle


class Trainer(Meets, Looks, OptimizerSteps):
    """Holds one rank's share of policy, reference and critic, and of their optimizers."""

    def __init__(self, settings: TrainerSettings) -> None:
        if settings.cards:  # before anything asks CUDA
            os.environ["CUDA_VISIBLE_DEVICES"] = settings.cards
        self._begin(settings)

    def _begin(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.optimizer_steps = 0
        self.updates = 0
        self.last_update: tuple[str, list[dict[str, float]]] | None = None
        self.update_seconds = 0.0
        """That the last one took."""
        self.snapshots: dict[str, TrainerSnapshot] = {}
        self.stop_sign = NEVER
        self.ready = False

    def is_ready(self) -> bool:
        """Have all calls of a start been made?"""
        return self.ready

    def start(self) -> None:
        """Load the models into host memory, and meet the other ranks."""
        settings, training = self.settings, self.settings.training
        progress.report("trainer", "loading weights")
        if settings.device == "cuda":
            torch.cuda.set_device(settings.rank % torch.cuda.device_count())
            torch.set_float32_matmul_precision("high")
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            torch.set_num_threads(max(1, cores() // training.num_trainers))
            self.device = torch.device("cpu")
        self._meet()
        self.memory = DeviceMemory(self.device, settings.memory_limit)
        self.weights = WeightSender(
            self.device,
            whole,
            feeds=settings.feeds,
            shares_memory=settings.shares_memory,
            allocation=self.memory.whole_blocks,
        )
        self.parking = Parking(self.device)
        self._load()

    def _load(self) -> None:
        settings, training = self.settings, self.settings.training
        torch.manual_seed(settings.seed)
        self.making = Making(
            settings.model_path,
            training,
            getattr(torch, settings.dtype),
            settings.trust_remote_code,
            settings.recompute,
            settings.compile,
            settings.offload,
        )
        self.policy = self.making.loaded()
        progress.report("trainer", "waiting for the engine")  # where it needs all the room first

    def place(self) -> dict[str, Any]:
        """Shard the models over the devices. Returns what the session shows of them."""
        training, making = self.settings.training, self.making
        progress.report("trainer", "sharding")
        making.placed(self.policy, self.device, self.mesh)
        self.reference = self.another() if training.has_reference else None
        self.optimizer = making.adamw(self.policy, training.learning_rate)
        self.critic = None
        if training.advantage_estimator == "ppo":
            self.critic = making.critic(making.loaded(), self.device, self.mesh)
        if self.settings.sleeps:
            # The optimizer's two moments come with its first step; locking memory takes seconds.
            self.parking.reserve(3 * sum(p.numel() * p.element_size() for p in self._resident()))
        if self.settings.compile:
            progress.report("trainer", "compiling layers (kept for the next start)")
            learner.run(self)
        self.memory.settle()
        buckets = self.weights.register(
            POLICY,
            lambda: named_weights(self.policy.model),
            lambda _: making.dtype,
            bucket_bytes=self.settings.bucket_bytes,
            disturbance=self.settings.disturbance,
        )
        self.ready = True
        progress.report("trainer", progress.READY)
        return {
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            "buckets": buckets,
        }

    def begin_anew(self, settings: TrainerSettings) -> dict[str, Any]:
        """Everything that training made is forgotten; as after `start` and `place`.

        Args:
            settings: the same or others, for the same device, rank and number of ranks.
        """
        self.wake()
        self._begin(settings)
        del self.policy, self.reference, self.critic, self.optimizer
        gc.collect()  # sharded models are held by cycles
        self.settle()
        self._load()
        return self.place()

    def standing(self) -> TrainerStatus:
        """Where this rank is, for a driver that does not know."""
        asleep, kept = bool(self.parking.taken), tuple(self.snapshots)
        return TrainerStatus(self.updates, self.last_update, self.update_seconds, asleep, kept)

    def processes(self) -> list[int]:
        """Ids of those without which it cannot work: its own."""
        return [os.getpid()]

    def another(self) -> Policy:
        """The model that the session starts from, once more, without gradients."""
        model = self.making.placed(self.making.loaded(), self.device, self.mesh)
        return model.requires_grad_(False)

    # ---- sleeping ------------------------------------------------------------------------------

    def sleep(self) -> int:
        """Move weights, optimizer and reference to host memory; how many bytes."""
        self._forget_gradients()
        self.weights.release()
        self.parking.take(self._resident())
        self.memory.settle()  # what was there before is no peak of what comes next
        return self.parking.taken

    def wake(self) -> None:
        """Bring everything back to the device."""
        self.parking.give_back()

    def settle(self) -> None:
        """Give back device memory that is held for the next update only."""
        self.weights.release()
        self.memory.settle()

    def _resident(self) -> Iterator[torch.Tensor]:
        """Every tensor that stays between updates."""
        yield from self.policy.parameters()
        if self.reference:
            yield from self.reference.parameters()
        if self.critic:
            yield from self.critic.model.parameters()
        for optimizer in [self.optimizer, *([self.critic.optimizer] if self.critic else [])]:
            for moments in optimizer.state.values():
                yield from (x for x in moments.values() if isinstance(x, torch.Tensor))

    def device_memory(self) -> dict[str, int]:
        """Bytes; see `DeviceMemory.read`."""
        return self.memory.read()

    # ---- learning ------------------------------------------------------------------------------

    def update(
        self, batch: TrainBatch, update_id: str, stop: str | None = None
    ) -> tuple[list[dict[str, float]], bool]:
        """Optimizer steps over the batch: (metrics of each step, whether anything was done).

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
        if self.last_update and self.last_update[0] == update_id:
            return self.last_update[1], False
        begin = time.perf_counter()
        steps = self.steps_of(batch)
        # A single step changes nothing before its end, so there is nothing to be put back.
        before = TrainerSnapshot.of(self) if len(steps) > 1 else None
        self.stop_sign = StopSign(stop)
        try:
            metrics = self._all_steps(batch, steps)
        except BaseException:
            self._give_up()
            if before:
                before.put_back(self)
            raise
        finally:
            self.stop_sign = NEVER
        self.updates += 1
        interval = self.settings.training.ref_update_interval
        if interval and self.reference and self.updates % interval == 0:
            self._refresh_reference(self.reference)
        self.last_update = (update_id, metrics)
        self.update_seconds = time.perf_counter() - begin
        return metrics, True

    def _all_steps(self, batch: TrainBatch, steps: list[list[int]]) -> list[dict[str, float]]:
        """The optimizer steps of an update: the metrics of each."""
        training = self.settings.training
        # With one optimizer step the old weights are the present ones: nothing to compute.
        moves = len(steps) > 1 and not training.use_rollout_logprobs
        old, reference = self.log_probs_before(batch, moves or Corrections.need_old(training))
        corrections = Corrections.of(batch, old, training)
        return [
            self._optimizer_step(batch, part, old, reference, corrections) | corrections.metrics
            for part in steps
        ]

    def steps_of(self, batch: TrainBatch) -> list[list[int]]:
        """Which samples each optimizer step of the next update takes."""
        seed = f"{self.settings.seed} {self.updates}"
        return optimizer_steps(len(batch), self.settings.training, seed)

    def _refresh_reference(self, reference: Policy) -> None:
        pairs = zip(reference.parameters(), self.policy.parameters(), strict=True)
        with torch.no_grad():
            for old, new in pairs:
                old.copy_(new)

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `kit.stack.probes`; all ranks call."""
        return probes.EXPERIMENTS[name](self, *arguments)

    # ---- weights to engines --------------------------------------------------------------------

    def export_weights(
        self, version: int = 0, exact: bool = False, bucket: int = 0, *_: Any
    ) -> Handle | None:
        """Gather a bucket of the weights; a rank that feeds an engine returns where they are.

        Args:
            version: which weights they are.
            exact: without the disturbance.
            bucket: which one; with one trainer on a CPU there is only the first.
            _: answers that Ray has to have before this call may begin.
        """
        return self.weights.export(POLICY, bucket, self.updates, exact=exact)

    def broadcast_weights(
        self, version: int, exact: bool, bucket: int, give_up: str, *_: Any
    ) -> bool:
        """Gather a bucket, and have rank 0 send it to all engines; False where one is gone.

        Args:
            version: which weights they are.
            exact: without the disturbance.
            bucket: which one.
            give_up: a file; once it is there, an engine is gone and nobody has to wait for it.
            _: answers that Ray has to have before this call may begin.
        """
        return self.weights.broadcast(POLICY, bucket, self.updates, give_up, exact=exact)

    def bucket_specs(self) -> list[BucketSpec]:
        """What each bucket will carry."""
        return self.weights.specs(POLICY)

    def listen(self, host: str, world: int) -> int:
        """Rank 0: be found by engines; see `WeightSender.listen`."""
        return self.weights.listen(host, world)

    def meet_engines(self, name: str, world: int) -> None:
        """Rank 0: wait until all engines have joined the group of this name."""
        self.weights.meet_engines(name, world)

    def leave_engines(self) -> None:
        """Rank 0: end the group in which weights are broadcast."""
        self.weights.leave_engines()

    # ---- keeping -------------------------------------------------------------------------------

    def snapshot(self, name: str) -> int:
        """Copy everything that an update changes into host memory; how many bytes."""
        self.snapshots[name] = TrainerSnapshot.of(self)
        return self.snapshots[name].tensors.size

    def restore(self, name: str) -> None:
        """Make the trainer what it was at a snapshot, bit by bit.

        Raises:
            SessionError: this process has none of that name; it was started again since.
        """
        if name not in self.snapshots:
            raise SessionError(
                f"The trainer does not hold the snapshot {name!r}.",
                why="Its process was started again since; what was in its memory is gone.",
                fix="restore a snapshot that is on disk, or load a checkpoint.",
            )
        self.snapshots[name].put_back(self)

    def forget(self, name: str) -> None:
        """Give back the memory of a snapshot, if there is one."""
        self.snapshots.pop(name, None)

    def state_bytes(self) -> int:
        """Bytes of host memory that a snapshot takes now."""
        return state.size(self)

    def configure(self, training: TrainingConfig) -> None:
        """Train with other settings from now on; models and processes stay those of the start."""
        self.settings = replace(self.settings, training=training)
        self.making.configure(self.optimizer, training, training.learning_rate)
        if self.critic:
            self.critic.config = training.critic
            self.making.configure(self.critic.optimizer, training, training.critic.learning_rate)

    def export_hf(self, directory: str, dtype: str) -> int:
        """Write the policy as models are published; all ranks call. Bytes."""
        return hf_export.export(self, directory, dtype)

    def save(self, directory: str) -> None:
        """Write everything that an update changes; all ranks call, each writes its share."""
        state.save(self, directory)

    def load(self, directory: str) -> None:
        """Read what `save` wrote, with any number of trainers."""
        state.load(self, directory)
