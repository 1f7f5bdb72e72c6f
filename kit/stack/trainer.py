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
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from kit.algo.schedule import learning_rate
from kit.config import TrainingConfig
from kit.errors import StackError
from kit.model.packing import Packed, pack
from kit.model.policy import Policy, load
from kit.stack import probes, trainer_state
from kit.stack.batches import TrainBatch, flat, optimizer_steps, packed_parts, rank_share
from kit.stack.corrections import Corrections
from kit.stack.critic import Critic, ValueModel
from kit.stack.disturbance import EXACT, Disturbance, HandedOver
from kit.stack.fsdp import clip_gradients, shard, without_gradient
from kit.stack.policy_loss import LossSettings, TokenInputs, finish, policy_loss
from kit.stack.unsharded import as_saved, whole
from kit.stack.weights import Handle, Outbox

Of = Literal["policy", "reference"]


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
    max_response_len: int = 1
    """What a loss over a constant length divides by."""
    disturbance: Disturbance = EXACT
    """What is done to the weights on their way to the engine."""
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False


class Trainer:
    """Holds one rank's share of policy, reference and critic, and of their optimizers."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.optimizer_steps = 0
        self.updates = 0
        self.last_update: tuple[str, list[dict[str, float]]] | None = None
        self.handed_over = HandedOver(EXACT, 0)

    def start(self) -> dict[str, Any]:
        """Load the models and shard them. Returns what the session shows of them."""
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
        self.reference = self._load().requires_grad_(False) if training.has_reference else None
        self.optimizer = self._adamw(self.policy, training.learning_rate)
        self.critic = self._critic() if training.advantage_estimator == "ppo" else None
        self.outbox = Outbox(self.device, getattr(torch, settings.dtype))
        return {"parameters": sum(p.numel() for p in self.policy.parameters())}

    def _load(self) -> Policy:
        policy = self._unsharded()
        inner: Any = policy.model
        shard(policy, inner.model.layers, self.mesh, getattr(torch, self.settings.dtype))
        return policy

    def _unsharded(self) -> Policy:
        settings = self.settings
        policy = load(settings.model_path, trust_remote_code=settings.trust_remote_code)
        policy.to(self.device)
        inner: Any = policy.model
        if settings.gradient_checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        return policy

    def _critic(self) -> Critic:
        inner: Any = self._unsharded().model
        config = self.settings.training.critic
        model = ValueModel(inner.model, inner.config.hidden_size).to(self.device)
        shard(model, inner.model.layers, self.mesh, getattr(torch, self.settings.dtype))
        return Critic(model, config, self._adamw(model, config.learning_rate))

    def _adamw(self, model: nn.Module, rate: float) -> torch.optim.AdamW:
        training = self.settings.training
        return torch.optim.AdamW(
            model.parameters(),
            lr=rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            fused=True,
        )

    # ---- looking -------------------------------------------------------------------------------

    def log_probs(
        self, tokens: list[list[int]], response_lengths: list[int], of: Of = "policy"
    ) -> list[list[float]]:
        """Log-probability of each response token under the present weights, or the reference's."""
        model = self.policy if of == "policy" else self.reference
        if model is None:
            raise StackError(
                "There is no reference model.",
                fix="set training.kl_loss_coef or training.kl_coef above 0.",
            )
        return [row.tolist() for row in self._all_log_probs(tokens, response_lengths, model)]

    def values(self, tokens: list[list[int]], response_lengths: list[int]) -> list[list[float]]:
        """What the critic expects before each response token."""
        if self.critic is None:
            raise StackError(
                "There is no critic.", fix="set training.advantage_estimator: ppo to have one."
            )
        rows: list[list[float]] = [[] for _ in tokens]
        for members, packed in self.parts(tokens, response_lengths):
            parts = self.critic.values(packed).split([response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                rows[index] = part.tolist()
        return rows

    def _all_log_probs(
        self, tokens: list[list[int]], response_lengths: list[int], model: Policy
    ) -> list[torch.Tensor]:
        """By sample, on the device; computed on every rank for all samples."""
        out = [torch.empty(0)] * len(tokens)
        for members, packed in self.parts(tokens, response_lengths):
            logp_R = without_gradient(model, packed, self.settings.temperature)[0]
            parts = logp_R.split([response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                out[index] = part
        return out

    def parts(
        self, tokens: list[list[int]], response_lengths: list[int]
    ) -> Iterator[tuple[list[int], Packed]]:
        """All samples in micro-batches: (indices, packed)."""
        return packed_parts(tokens, response_lengths, self.settings.training, self.device)

    # ---- learning ------------------------------------------------------------------------------

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
        training = self.settings.training
        steps = self.steps_of(batch)
        # With one optimizer step the old weights are the present ones: nothing to compute.
        moves = len(steps) > 1 and not training.use_rollout_logprobs
        old = None
        if moves or Corrections.need_old(training):
            old = self._all_log_probs(batch.tokens, batch.response_lengths, self.policy)
        reference = self.reference_log_probs(batch)
        corrections = Corrections.of(batch, old, training)
        metrics = [
            self._optimizer_step(batch, part, old, reference, corrections) | corrections.metrics
            for part in steps
        ]
        self.updates += 1
        interval = training.ref_update_interval
        if interval and self.reference and self.updates % interval == 0:
            self._refresh_reference(self.reference)
        self.last_update = (update_id, metrics)
        return metrics, True

    def steps_of(self, batch: TrainBatch) -> list[list[int]]:
        """Which samples each optimizer step of the next update takes."""
        seed = f"{self.settings.seed} {self.updates}"
        return optimizer_steps(len(batch), self.settings.training, seed)

    def reference_log_probs(self, batch: TrainBatch) -> list[torch.Tensor] | None:
        """By sample; None where the loss has no KL."""
        if not (self.settings.training.kl_loss_coef and self.reference):
            return None
        return self._all_log_probs(batch.tokens, batch.response_lengths, self.reference)

    def _optimizer_step(
        self,
        batch: TrainBatch,
        part: Sequence[int],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        corrections: Corrections,
    ) -> dict[str, float]:
        training = self.settings.training
        settings = self.loss_settings(batch, part)
        learns = not (self.critic and self.updates < self.critic.config.warmup_rollouts)
        sums: dict[str, float] = {}
        self._forget_gradients()  # an update that broke off half-way leaves gradients behind
        for members in rank_share(batch, part, training, self.settings.rank):
            indices = members or [part[0]]
            packed = pack(
                [batch.tokens[i] for i in indices], [batch.response_lengths[i] for i in indices]
            ).to(self.device)
            inputs = self.inputs(batch, indices, old, reference, corrections, bool(members))
            logp_R, entropy_R = self.policy(packed, self.settings.temperature)
            loss, values = policy_loss(logp_R, entropy_R, packed.sample_R, inputs, settings)
            # FSDP averages gradients over ranks; ours are shares of one sum.
            (loss * training.num_trainers * learns).backward()
            if self.critic:
                values |= self._critic_backward(batch, indices, packed, inputs, settings)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        return self._apply(sums, learns=learns)

    def loss_settings(self, batch: TrainBatch, part: Sequence[int]) -> LossSettings:
        """What the loss of an optimizer step over these samples needs to know of all of them."""
        return LossSettings(
            self.settings.training,
            total_samples=len(part),
            total_tokens=sum(sum(batch.loss_masks[i]) for i in part),
            constant_length=self.settings.max_response_len,
        )

    def _critic_backward(
        self,
        batch: TrainBatch,
        indices: list[int],
        packed: Packed,
        inputs: TokenInputs,
        settings: LossSettings,
    ) -> dict[str, float]:
        assert self.critic
        if batch.values is None or batch.returns is None:
            raise StackError(
                "The batch has no values for the critic to learn.",
                fix="make it with `session.advantages(rollout)` of this session.",
            )
        old, returns = (flat(x, indices).to(self.device) for x in (batch.values, batch.returns))
        weight_R = settings.weights(inputs.mask_R, packed.sample_R)
        return self.critic.backward(
            packed, old, returns, weight_R, self.settings.training.num_trainers
        )

    def inputs(
        self,
        batch: TrainBatch,
        indices: list[int],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        corrections: Corrections,
        counts: bool = True,
    ) -> TokenInputs:
        """What is known of each response token of these samples; `counts` False masks them all."""
        mask = torch.tensor([m for i in indices for m in batch.loss_masks[i]], dtype=torch.float32)
        rollout = None
        if batch.rollout_log_probs is not None:
            rollout = flat(batch.rollout_log_probs, indices).to(self.device)
        weight, keep = corrections.of_samples(indices)
        return TokenInputs(
            advantage_R=batch.flat_advantages(indices).to(self.device),
            mask_R=(mask if counts else torch.zeros_like(mask)).to(self.device),
            old_logp_R=torch.cat([old[i] for i in indices]) if old else None,
            ref_logp_R=torch.cat([reference[i] for i in indices]) if reference else None,
            rollout_logp_R=rollout,
            weight_R=weight,
            keep_R=keep,
        )

    def _apply(self, sums: dict[str, float], *, learns: bool) -> dict[str, float]:
        """Clip, step, and return the step's metrics, summed over ranks."""
        training = self.settings.training
        names = sorted(sums)
        total = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        dist.all_reduce(total)
        metrics = finish(dict(zip(names, total.tolist(), strict=True)))
        metrics["train/grad_norm"] = clip_gradients(self.policy, training.clip_grad)
        if self.critic:
            metrics["train/critic_grad_norm"] = self.critic.clip()
        checked = ("train/loss", "train/grad_norm", "train/value_loss", "train/critic_grad_norm")
        if wrong := [n for n in checked if n in metrics and not math.isfinite(metrics[n])]:
            self._forget_gradients()
            raise StackError(
                "The update was refused: "
                + ", ".join(f"{name.removeprefix('train/')} is {metrics[name]}" for name in wrong)
                + f" (loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}).",
                why="A step with them would have destroyed the weights, which are unchanged.",
                fix="look at the batch's rewards and log-probs, or lower training.learning_rate.",
            )
        rate = learning_rate(
            self.optimizer_steps,
            peak=training.learning_rate,
            lowest=training.min_learning_rate,
            warmup=training.warmup_steps,
            total=training.num_rollout * training.steps_per_rollout,
            schedule=training.lr_schedule,
        )
        if learns:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer_steps += 1
        if self.critic:
            self.critic.step()
        self._forget_gradients()
        return metrics | {"train/lr": rate if learns else 0.0}

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.critic:
            self.critic.optimizer.zero_grad()

    def _refresh_reference(self, reference: Policy) -> None:
        pairs = zip(reference.parameters(), self.policy.parameters(), strict=True)
        with torch.no_grad():
            for old, new in pairs:
                old.copy_(new)

    # ---- handing over --------------------------------------------------------------------------

    def export_weights(self, version: int = 0, exact: bool = False) -> Handle | None:
        """Gather the weights for the engine; rank 0 returns where they are."""
        inner: Any = self.policy.model
        tied = inner.config.tie_word_embeddings
        self.handed_over = HandedOver(EXACT if exact else self.settings.disturbance, version)
        named = (
            entry
            for name, value in inner.named_parameters()
            if not (tied and name == "lm_head.weight")
            for entry in as_saved(name, self.handed_over.as_engine_has(name, whole(value).detach()))
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
        """Write weights and optimizers; all ranks call, rank 0 writes."""
        trainer_state.save(self, directory)

    def load(self, directory: str) -> None:
        """Read what `save` wrote, with any number of trainers."""
        trainer_state.load(self, directory)
