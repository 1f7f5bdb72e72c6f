"""`Learner`: one network that is trained. `ModelFactory`: how a trainer's networks are made.

The optimizer is AdamW, also with moments in 8 bits (torchao): codes, a byte a number, and a scale
for each 256 of them. Moments of fewer than 4,096 numbers, or whose number is no multiple of 256,
stay in float32, and so do weights. Dettmers et al., https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kit.algo.schedule import learning_rate
from kit.cluster.lean_imports import bring_back
from kit.config import Optimizer, TrainingConfig
from kit.errors import ModelError
from kit.models import families, four_bit, lora, low_precision
from kit.models.adapters import adapter_directory
from kit.models.compile import compile_layers, recompute
from kit.models.dropout import switch_off
from kit.models.heads import eagle, eagle3, mtp
from kit.models.heads.head import Head
from kit.models.moe import make_replayable
from kit.models.policy import Policy, ValueModel, load
from kit.models.sharding import fill, local, recover, reshard, shard, whole
from kit.trainer.settings import TrainerSettings

POLICY, CRITIC, REFERENCE, DRAFT = "policy", "critic", "reference", "draft"
"""Names of a trainer's networks, in checkpoints too."""


MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""What is kept of each parameter beside the number of steps, and whether it has a sign."""
PARTS = ("codes", "scale")
"""Tensors that a moment in 8 bits is kept in."""


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """Training settings of one network, and the names of its metrics."""

    rate: Callable[[int], float]
    """Learning rate by the number of optimizer steps before."""
    clip_grad: float
    """Largest gradient norm; 0 does not clip."""
    adam: dict[str, Any]
    loss_metric: str
    norm_metric: str
    optimizer: Optimizer = "adamw"
    first_update: int = 0
    """Updates before this one leave it as it is."""


def learner_settings(training: TrainingConfig) -> dict[str, LearnerSettings]:
    """Settings of every network that learns, by name."""
    adam = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
    }
    has_critic = training.advantage_estimator == "ppo"
    schedule = partial(
        learning_rate,
        peak=training.learning_rate,
        lowest=training.min_learning_rate,
        warmup=training.warmup_steps,
        total=training.num_rollout * training.steps_per_rollout,
        schedule=training.lr_schedule,
    )
    settings = {
        POLICY: LearnerSettings(
            schedule,
            training.clip_grad,
            adam,
            "train/loss",
            "train/grad_norm",
            training.optimizer,
            first_update=training.critic.warmup_rollouts if has_critic else 0,
        )
    }
    if has_critic:
        settings[CRITIC] = LearnerSettings(
            lambda _: training.critic.learning_rate,
            training.critic.clip_grad,
            adam,
            "train/value_loss",
            "train/critic_grad_norm",
            training.optimizer,
        )
    if draft := training.draft:
        settings[DRAFT] = LearnerSettings(
            lambda _: draft.learning_rate,
            draft.clip_grad,
            adam,
            "train/draft_loss",
            "train/draft_grad_norm",
            training.optimizer,
        )
    return settings


class Learner:
    """A sharded model with its optimizer, gradient clipping and step."""

    def __init__(self, name: str, model: nn.Module, settings: LearnerSettings) -> None:
        self.name, self.model, self.settings = name, model, settings
        rate, adam = settings.rate(0), settings.adam
        self.optimizer = make_optimizer(settings.optimizer, self.trained(), rate, adam)

    def trained(self) -> list[nn.Parameter]:
        """Parameters that training changes: with adapters not the frozen ones."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those by their names in the model."""
        return ((n, value) for n, value in self.model.named_parameters() if value.requires_grad)

    def begin_anew(self, start: nn.Module) -> None:
        """Take what is trained of a model as it was loaded, and begin with an empty optimizer."""
        reshard(self.model)
        values = dict(start.named_parameters())
        for name, value in self.named_trained():
            fill(value, values[name])
        self.fill_optimizer(set())

    def configure(self, settings: LearnerSettings) -> None:
        """Go on with other settings; what the optimizer holds stays."""
        self.settings = settings
        for group in self.optimizer.param_groups:
            group.update(settings.adam)

    def clip(self) -> float:
        """Scale the gradient down to the limit over all ranks; its norm before."""
        limit = self.settings.clip_grad or math.inf
        return float(whole(torch.nn.utils.clip_grad_norm_(self.trained(), limit)))

    def step(self, rate: float) -> None:
        """Apply the gradient at this learning rate."""
        take_step(self.optimizer, rate)

    def recover(self) -> None:
        """Forget the gradient, and where a pass stood that broke off."""
        recover(self.model)
        self.optimizer.zero_grad()

    def resident(self) -> Iterator[torch.Tensor]:
        """Every tensor that stays on the device between updates."""
        yield from self.model.parameters()
        yield from four_bit.tensors(self.model)
        for state in self.optimizer.state.values():
            yield from (tensor for _, tensor in kept_tensors(state))

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is trained, and what the optimizer holds of it, by the names of a checkpoint."""
        reshard(self.model)
        for parameter, value in self.named_trained():
            yield f"{self.name}/{parameter}", value
            for key, moment in kept_tensors(self.optimizer.state.get(value, {})):
                yield f"{self.name}.optimizer/{parameter}//{key}", moment

    def fill_optimizer(self, names: set[str]) -> None:
        """Fill the optimizer's state for exactly these names; new ones start at zero."""
        for parameter, value in self.named_trained():
            if f"{self.name}.optimizer/{parameter}//step" not in names:
                self.optimizer.state.pop(value, None)
            elif not self.optimizer.state.get(value):
                self.optimizer.state[value] = empty_state(self.optimizer, value)


def make_optimizer(
    kind: Optimizer, parameters: Sequence[nn.Parameter], rate: float, adam: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer with nothing kept yet.

    Args:
        kind: `adamw` or `adamw8bit`.
        parameters: what it steps.
        rate: learning rate of the first step.
        adam: betas, eps and weight_decay.
    """
    if kind == "adamw8bit":
        bring_back("torchao")
        from torchao.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(parameters, lr=rate, **adam)
        return eight_bit
    # Its arithmetic in one kernel.
    return torch.optim.AdamW(parameters, lr=rate, fused=True, **adam)


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Apply the gradient at this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.step()
    elif optimizer.param_groups[0]["params"][0].is_cuda:
        step_compiled(optimizer)
    else:
        # Compiling torchao's arithmetic takes minutes on a CPU, for no gain. To make the stance is
        # to take it: made for another optimizer it would hold for the model's layers.
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()


def step_compiled(optimizer: Any) -> None:
    """`AdamW8bit.step` of torchao on this rank's tensors, compiled for each of their shapes.

    torchao calls the same code with DTensors, which takes the host more than twice as long.
    """
    from torchao.optim.adam import single_param_adam

    step: Any = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
    with torch.no_grad(), torch._dynamo.utils.disable_cache_limit():
        for group in optimizer.param_groups:
            adam = (*group["betas"], group["weight_decay"], group["eps"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = optimizer.state[parameter]
                if not state:
                    state.update(empty_state(optimizer, parameter))
                state["step"] += 1
                # Not detached: that would copy the levels of the codes each time.
                moments = (_own(state[key]) for key in MOMENTS)
                own = local(parameter), local(parameter.grad), state["step"], *moments
                step(*own, None, group["lr"], *adam, IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False)


def _own(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, where nothing has a gradient."""
    return value.to_local() if isinstance(value, DTensor) else value


def kept_tensors(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in which an optimizer's state of one parameter is kept, by name."""
    for key, value in state.items():
        own = _own(value) if isinstance(value, torch.Tensor) else value
        if all(hasattr(own, part) for part in PARTS):
            for part in PARTS:
                yield f"{key}.{part}", getattr(own, part)
        elif isinstance(value, torch.Tensor):
            yield key, value


def empty_state(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of a parameter before its first step, to be filled."""
    if isinstance(optimizer, torch.optim.AdamW):
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        device = parameter.device
    else:
        moments = {k: optimizer._new_buffer(parameter, sign) for k, sign in MOMENTS.items()}
        device = torch.device("cpu")
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}


@dataclass(frozen=True, slots=True)
class ModelFactory:
    """Loads and shards the networks of a trainer."""

    settings: TrainerSettings
    device: torch.device

    def load(self) -> Policy:
        """Load the model into host memory, float32."""
        settings = self.settings
        policy = load(settings.model_path, trust_remote_code=settings.trust_remote_code)
        switch_off(policy.model)
        if settings.training.true_on_policy:
            policy.share_operators(self.device, settings.attention_backend)
        inner: Any = policy.model
        if settings.quantization and settings.trains_quantized:
            scheme = low_precision.scheme_of(settings.quantization)
            by_kernels = self.device.type == "cuda" and scheme.method == "fp8"
            low_precision.use(inner, scheme, self.device if by_kernels else None)
        if settings.lora:
            exact = settings.training.true_on_policy
            lora.inject(inner, settings.lora, settings.seed, whole_products=exact)
            if settings.lora.adapter_path is not None:
                lora.read_adapter(inner, adapter_directory(settings.lora))
        with nullcontext() if settings.training.replays_routing else suppress(ModelError):
            make_replayable(inner)
        feed_forward = families.find(type(inner).__name__).feed_forward
        recompute(inner, inner.model.layers, settings.recompute, feed_forward)
        if settings.compile:
            compile_layers(inner.model.layers, rounds=settings.training.true_on_policy)
        return policy

    def shard(self, policy: Policy, mesh: Any) -> Policy:
        """Move a loaded model to the device, and shard it."""
        inner: Any = policy.model
        self._shard(policy, inner.model.layers, mesh)
        return policy

    def load_draft(self, mesh: Any) -> Policy | Head:
        """Load and shard the draft."""
        draft = self.draft()
        if isinstance(draft, Policy):
            return self.shard(draft, mesh)
        self._shard(draft, (), mesh)  # in one piece: its layer computes twice in a pass
        return draft

    def load_frozen(self, mesh: Any) -> Policy:
        """Load and shard the model that the session starts from.

        Its parameters could have gradients, so that it computes with the policy's kernels.
        """
        return self.shard(self.load(), mesh)

    def draft(self) -> Policy | Head:
        """Load the draft into host memory: a model of its own, without adapters, or a head."""
        assert self.settings.draft_path is not None
        if kind := self.settings.draft_head:
            if kind == "eagle3":
                return eagle3.load(self.settings.draft_path, self.settings.model_path)
            return (eagle.load if kind == "eagle" else mtp.load)(self.settings.draft_path)
        own = replace(self.settings, model_path=self.settings.draft_path, lora=None)
        return replace(self, settings=own).load()

    def value_model(self) -> ValueModel:
        """Load a value model with the policy's layers into host memory."""
        inner: Any = self.load().model
        return ValueModel(inner.model, inner.config.hidden_size)

    def load_value_model(self, mesh: Any) -> ValueModel:
        """Load and shard a value model."""
        model = self.value_model()
        self._shard(model, model.backbone.layers, mesh)
        return model

    def _shard(self, model: nn.Module, layers: Any, mesh: Any) -> None:
        settings, dtype = self.settings, getattr(torch, self.settings.dtype)
        if settings.lora and settings.lora.load_in_4bit:
            four_bit.quantize(layers, self.device, dtype)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in frozen:  # what is never stepped needs no more digits than it computes with
            parameter.data = parameter.data.to(dtype)
        if not settings.offload:
            model.to(self.device)
        # Sums of weight and adapter are made in float32, of float32.
        exact = settings.lora and settings.training.true_on_policy
        whole_here = mesh.size() == 1 and not settings.offload
        shard(
            model,
            layers,
            mesh,
            None if exact else dtype,
            offload=settings.offload,
            as_it_is=frozen if whole_here else (),
        )
