"""`Trainer`: an FSDP2 trainer as a Ray actor; one for each rank.

Every rank gets the whole batch and takes its share, so that all ranks agree on sizes without
talking. What a token counts in the loss is fixed by the whole batch (`kit.algo.loss.weights`):
the result does not depend on micro-batches or on the number of trainers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kit.algo.schedule import learning_rate
from kit.config import TrainingConfig
from kit.errors import StackError
from kit.model.packing import Packed, micro_batches, pack
from kit.model.policy import Policy, load
from kit.stack import probes, trainer_state
from kit.stack.policy_loss import LossSettings, TokenInputs, policy_loss
from kit.stack.unsharded import as_saved, whole
from kit.stack.weights import Handle, Outbox

MAX_TOKENS = 16384
"""Tokens a micro-batch where `training.max_tokens_per_gpu` is not set."""


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """What one rank needs to know."""

    model_path: str
    training: TrainingConfig
    temperature: float
    device: str
    dtype: str
    seed: int
    rank: int
    rendezvous: str
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What an update trains on: N samples."""

    tokens: list[list[int]]
    response_lengths: list[int]
    loss_masks: list[list[int]]
    advantages: list[float]
    rollout_log_probs: list[list[float]] | None

    def __len__(self) -> int:
        return len(self.tokens)


class Trainer:
    """Holds one rank's share of the policy, the reference, and the optimizer."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.optimizer_steps = 0
        self.last_update: tuple[str, list[dict[str, float]]] | None = None

    def start(self) -> dict[str, Any]:
        """Load the model and shard it. Returns what the session shows of it."""
        settings, training = self.settings, self.settings.training
        torch.manual_seed(settings.seed)
        if settings.device == "cuda":
            torch.cuda.set_device(settings.rank % torch.cuda.device_count())
            torch.set_float32_matmul_precision("high")
            self.device = torch.device("cuda", torch.cuda.current_device())
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // training.num_trainers))
            self.device = torch.device("cpu")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if settings.device == "cuda" else "gloo",
            init_method=f"file://{settings.rendezvous}",
            rank=settings.rank,
            world_size=training.num_trainers,
        )
        self.mesh = init_device_mesh(settings.device, (training.num_trainers,))
        self.policy = self._load()
        self.reference = self._load().requires_grad_(False) if training.kl_loss_coef else None
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.outbox = Outbox(self.device, getattr(torch, settings.dtype))
        return {"parameters": sum(p.numel() for p in self.policy.parameters())}

    def _load(self) -> Policy:
        settings = self.settings
        policy = load(settings.model_path, trust_remote_code=settings.trust_remote_code)
        policy.to(self.device)
        inner: Any = policy.model
        if settings.gradient_checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        mixed = MixedPrecisionPolicy(
            param_dtype=getattr(torch, settings.dtype), reduce_dtype=torch.float32
        )
        for layer in inner.model.layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=mixed)
        fully_shard(policy, mesh=self.mesh, mp_policy=mixed)
        return policy

    def log_probs(
        self, tokens: list[list[int]], response_lengths: list[int], *, reference: bool = False
    ) -> list[list[float]]:
        """Log-probability of each response token under the current (or reference) weights."""
        model = self.reference if reference else self.policy
        if model is None:
            raise StackError(
                "There is no reference model.", fix="set training.kl_loss_coef above 0."
            )
        out: list[list[float]] = [[] for _ in tokens]
        for members, packed in self._micro_batches(tokens, response_lengths, range(len(tokens))):
            logp_R = self._no_grad(model, packed).cpu()
            parts = torch.split(logp_R, [response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                out[index] = part.tolist()
        return out

    def _no_grad(self, model: Policy, packed: Packed) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            logp_R: torch.Tensor = model(packed, self.settings.temperature)[0]
        # Only a backward pass makes FSDP shard the root's own parameters again.
        sharded: Any = model
        sharded.reshard()
        model.train()
        return logp_R

    def update(self, batch: TrainBatch, update_id: str) -> tuple[list[dict[str, float]], bool]:
        """Optimizer steps over the batch: (metrics of each step, whether anything was done).

        The same `update_id` twice in a row is applied once: the second call returns the metrics of
        the first.

        Raises:
            StackError: loss or gradient is not finite; the weights are as they were before the
                optimizer step that failed.
        """
        if self.last_update and self.last_update[0] == update_id:
            return self.last_update[1], False
        size = self.settings.training.global_batch_size or len(batch)
        slices = [range(i, min(i + size, len(batch))) for i in range(0, len(batch), size)]
        # With one optimizer step the old weights are the present ones: nothing to compute.
        old = self._all_log_probs(batch, self.policy) if len(slices) > 1 else None
        reference = self._all_log_probs(batch, self.reference) if self.reference else None
        metrics = [self._optimizer_step(batch, part, old, reference) for part in slices]
        self.last_update = (update_id, metrics)
        return metrics, True

    def _all_log_probs(self, batch: TrainBatch, model: Policy) -> list[torch.Tensor]:
        """By sample, on the device; computed on every rank for all samples."""
        out = [torch.empty(0)] * len(batch)
        whole = self._micro_batches(batch.tokens, batch.response_lengths, range(len(batch)))
        for members, packed in whole:
            parts = self._no_grad(model, packed).split([batch.response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                out[index] = part
        return out

    def _micro_batches(
        self, tokens: Sequence[Sequence[int]], response_lengths: Sequence[int], part: Sequence[int]
    ) -> Iterator[tuple[list[int], Packed]]:
        limit = self.settings.training.max_tokens_per_gpu or MAX_TOKENS
        own = [tokens[i] for i in part], [response_lengths[i] for i in part]
        for members in micro_batches(*own, limit):
            indices = [part[i] for i in members]
            packed = pack([tokens[i] for i in indices], [response_lengths[i] for i in indices])
            yield indices, packed.to(self.device)

    def _shares(self, batch: TrainBatch, part: range) -> list[list[int]]:
        """This rank's micro-batches; an empty one where another rank has more of them.

        FSDP ranks run in step: each must call the model as often as the others.
        """
        training = self.settings.training
        limit = training.max_tokens_per_gpu or MAX_TOKENS
        world = training.num_trainers
        by_rank = []
        for rank in range(world):
            # Neighbours, so that the samples of a prompt mostly stay with one rank.
            own = part[rank * len(part) // world : (rank + 1) * len(part) // world]
            bins = micro_batches(
                [batch.tokens[i] for i in own], [batch.response_lengths[i] for i in own], limit
            )
            by_rank.append([[own[i] for i in members] for members in bins])
        most = max(len(bins) for bins in by_rank)
        mine = by_rank[self.settings.rank]
        return mine + [[]] * (most - len(mine))

    def _optimizer_step(
        self,
        batch: TrainBatch,
        part: range,
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
    ) -> dict[str, float]:
        training = self.settings.training
        settings = LossSettings(
            training,
            total_samples=len(part),
            total_tokens=sum(sum(batch.loss_masks[i]) for i in part),
        )
        sums: dict[str, float] = {}
        self.optimizer.zero_grad()  # an update that broke off half-way leaves gradients behind
        for members in self._shares(batch, part):
            indices = members or [part[0]]
            packed = pack(
                [batch.tokens[i] for i in indices], [batch.response_lengths[i] for i in indices]
            ).to(self.device)
            inputs = self._inputs(batch, indices, old, reference, counts=bool(members))
            logp_R, entropy_R = self.policy(packed, self.settings.temperature)
            loss, values = policy_loss(logp_R, entropy_R, packed.sample_R, inputs, settings)
            # FSDP averages gradients over ranks; ours are shares of one sum.
            (loss * training.num_trainers).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        return self._apply(sums)

    def _inputs(
        self,
        batch: TrainBatch,
        indices: list[int],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        *,
        counts: bool,
    ) -> TokenInputs:
        lengths = torch.tensor([batch.response_lengths[i] for i in indices])
        advantage_N = torch.tensor([batch.advantages[i] for i in indices], dtype=torch.float32)
        mask = torch.tensor([m for i in indices for m in batch.loss_masks[i]], dtype=torch.float32)
        rollout = None
        if batch.rollout_log_probs is not None:
            flat = [x for i in indices for x in batch.rollout_log_probs[i]]
            rollout = torch.tensor(flat, dtype=torch.float32).to(self.device)
        return TokenInputs(
            advantage_R=torch.repeat_interleave(advantage_N, lengths).to(self.device),
            mask_R=(mask if counts else torch.zeros_like(mask)).to(self.device),
            old_logp_R=torch.cat([old[i] for i in indices]) if old else None,
            ref_logp_R=torch.cat([reference[i] for i in indices]) if reference else None,
            rollout_logp_R=rollout,
        )

    def _apply(self, sums: dict[str, float]) -> dict[str, float]:
        """Clip, step, and return the step's metrics, summed over ranks."""
        training = self.settings.training
        names = sorted(sums)
        total = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        dist.all_reduce(total)
        metrics = dict(zip(names, total.tolist(), strict=True))
        limit = training.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        rate = learning_rate(
            self.optimizer_steps,
            peak=training.learning_rate,
            lowest=training.min_learning_rate,
            warmup=training.warmup_steps,
            total=self._total_steps(),
            schedule=training.lr_schedule,
        )
        if not (math.isfinite(metrics["train/loss"]) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            raise StackError(
                f"The update was refused: loss {metrics['train/loss']}, gradient norm {grad_norm}.",
                why="A step with them would have destroyed the weights, which are unchanged.",
                fix="look at the batch's rewards and log-probs, or lower training.learning_rate.",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        return metrics | {"train/grad_norm": grad_norm, "train/lr": rate}

    def _total_steps(self) -> int:
        training = self.settings.training
        rollout = training.rollout_batch_size * training.n_samples_per_prompt
        return training.num_rollout * (rollout // (training.global_batch_size or rollout))

    def export_weights(self) -> Handle | None:
        """Gather the weights for the engine; rank 0 returns where they are."""
        inner: Any = self.policy.model
        tied = inner.config.tie_word_embeddings
        named = (
            entry
            for name, value in inner.named_parameters()
            if not (tied and name == "lm_head.weight")
            for entry in as_saved(name, whole(value))
        )
        if self.settings.rank == 0:
            return self.outbox.fill(named)
        for _ in named:  # gathering takes all ranks
            pass
        return None

    def probe(self, name: str, *arguments: Any) -> Any:
        """Run an experiment of `kit.stack.probes`; all ranks call."""
        return probes.EXPERIMENTS[name](self, *arguments)

    def save(self, directory: str) -> None:
        """Write weights and optimizer; all ranks call, rank 0 writes."""
        trainer_state.save(self, directory)

    def load(self, directory: str) -> None:
        """Read what `save` wrote, with any number of trainers."""
        trainer_state.load(self, directory)
