"""`FsdpBackend`: the trainer's networks under FSDP2, each sharded over all ranks."""

# ruff: noqa: D102 (what the methods do stands in `TrainerBackend`)
from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kit.config import MOMENTS_BYTES, TrainingConfig
from kit.models import four_bit, lora, low_precision, state_dict
from kit.models.heads.head import PolicyStates
from kit.models.moe import experts_of, replaying
from kit.models.packing import Packed
from kit.models.policy import Policy
from kit.models.sharding import hold_gradients, recover, reshard, whole, whole_together
from kit.trainer.backend import LossFn
from kit.trainer.learner import (
    CRITIC,
    DRAFT,
    POLICY,
    REFERENCE,
    Learner,
    ModelFactory,
    learner_settings,
)
from kit.trainer.offload import HostOffload
from kit.trainer.process_group import ProcessGroup
from kit.trainer.settings import TrainerSettings


class FsdpBackend:
    """A `TrainerBackend` of learners and a frozen reference."""

    def __init__(
        self,
        settings: TrainerSettings,
        device: torch.device,
        group: ProcessGroup,
        host: HostOffload,
    ) -> None:
        """Load nothing yet; `host` holds what `sleep` takes off the device."""
        self.device, self._group, self._host = device, group, host
        self._settings, self._training = settings, settings.training
        self._factory = ModelFactory(settings, device)
        self._adapts = settings.lora is not None
        """Whether adapters are trained: with them off, the policy is its own reference."""
        self.learners: dict[str, Learner] = {}
        self.reference: Policy | None = None
        self.experts = (0, 0)

    def start(self) -> None:
        torch.manual_seed(self._settings.seed)
        self.policy = self._factory.load()
        self.experts = experts_of(self.policy.model)
        self._adapter_layers: list[tuple[str, nn.Linear]] = []
        """Those of the policy, once they were asked for: walking through a model takes its time."""

    def place(self) -> tuple[int, int]:
        mesh, settings = self._group.mesh, learner_settings(self._training)
        self._factory.shard(self.policy, mesh)
        if self._training.has_reference and not self._adapts:
            self.reference = self._factory.load_frozen(mesh)
        self.learners[POLICY] = Learner(POLICY, self.policy, settings[POLICY])
        if CRITIC in settings:
            value_model = self._factory.load_value_model(mesh)
            self.learners[CRITIC] = Learner(CRITIC, value_model, settings[CRITIC])
        if self._settings.draft_path and DRAFT in settings:
            self.learners[DRAFT] = Learner(DRAFT, self._factory.load_draft(mesh), settings[DRAFT])
        if self._settings.sleeps:
            # The optimizer's two moments come with its first step; locking memory takes seconds.
            trained = (p for learner in self.learners.values() for p in learner.trained())
            a_number = MOMENTS_BYTES[self._training.optimizer]
            moments = int(a_number * sum(p.numel() for p in trained))
            weights = sum(p.numel() * p.element_size() for p in self.resident())
            self._host.buffer.reserve(weights + moments)
        sizes = [(p.numel(), p.requires_grad) for p in self.policy.parameters()]
        trained_ones = sum(size for size, is_trained in sizes if is_trained)
        frozen = sum(size for size, is_trained in sizes if not is_trained)
        frozen += sum(value.numel() for _, value in four_bit.named_weights(self.policy))
        return frozen or trained_ones, trained_ones

    def begin_anew(self, seed: int) -> None:
        factory = replace(self._factory, settings=replace(self._settings, seed=seed))
        torch.manual_seed(seed)
        made = {POLICY: factory.load, CRITIC: factory.value_model, DRAFT: factory.draft}
        for name, learner in self.learners.items():
            learner.begin_anew(made[name]())

    def release(self) -> None:
        del self.policy
        self._adapter_layers.clear()
        self.learners.clear()
        self.reference = None
        gc.collect()  # sharded models are held by cycles

    def configure(self, training: TrainingConfig) -> None:
        self._training = training
        for name, settings in learner_settings(training).items():
            if name in self.learners:
                self.learners[name].configure(settings)

    def has(self, name: str) -> bool:
        if name == REFERENCE:
            return self.reference is not None or self._adapts
        return name in self.learners

    def module(self, of: str = POLICY) -> nn.Module:
        model: Any = self.learners[of].model if of != POLICY else self.policy
        inner: nn.Module = model.model
        return inner

    # ---- computing -----------------------------------------------------------------------------

    def log_probs(
        self,
        packed: Packed,
        temperature: float,
        of: str = POLICY,
        *,
        dropout: bool = False,
        gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model: nn.Module | None = self.reference
        if of != REFERENCE:
            model = self.learners[of].model
        elif self._adapts:
            model = self.learners[POLICY].model
        assert model is not None
        without = lora.switched_off() if of == REFERENCE else nullcontext()
        table = packed.experts if of == POLICY else None
        with torch.set_grad_enabled(gradient), replaying(table), without:
            logp_R, entropy_R = _answer(model, packed, temperature, dropout=dropout)
        return logp_R.detach(), entropy_R.detach()

    def values(self, packed: Packed) -> torch.Tensor:
        with torch.no_grad():
            value_R: torch.Tensor = _answer(self.learners[CRITIC].model, packed, 1.0)
        return value_R

    def logits(self, packed: Packed) -> torch.Tensor:
        with torch.no_grad(), replaying(packed.experts), self._recording() as kept:
            _answer(self.policy, packed, 1.0)
            inner: Any = self.policy.model
            hidden_R = kept["hidden"][packed.predictor_R]
            return self.policy.logits_of(hidden_R, whole(inner.lm_head.weight))

    @contextmanager
    def with_reference(self) -> Iterator[None]:
        if self.reference or self._adapts:
            yield
            return
        self.reference = self._factory.load_frozen(self._group.mesh)
        try:
            yield
        finally:
            self.reference = None

    # ---- learning ------------------------------------------------------------------------------

    def forward_backward(
        self,
        packed: Packed,
        temperature: float,
        losses: Mapping[str, LossFn],
        *,
        last: bool,
        taught: Sequence[str] = (),
    ) -> dict[str, torch.Tensor]:
        ranks = self._group.size
        metrics: dict[str, torch.Tensor] = {}
        reads = DRAFT in losses and self._settings.draft_head is not None
        seen: dict[str, Any] = {}
        for name, loss_of in losses.items():
            learner = self.learners[name]
            learner.model.train()  # loaded models are not, and then recompute nothing
            hold_gradients(learner.model, ranks == 1 and not last)
            shows = name == POLICY and (bool(taught) or reads)
            further = seen if name == DRAFT else {}
            # A backward pass may compute parts of the forward pass again, by the same experts.
            with replaying(packed.experts if name == POLICY else None):
                with self._recording(wanted=shows) as kept:
                    output = learner.model(packed, temperature, **further)
                loss, values = loss_of(output)
                # FSDP averages gradients over ranks; ours are shares of one sum.
                (loss * ranks).backward()
            if shows:
                seen = self._seen(kept, packed, temperature, taught=bool(taught))
            metrics |= values
        return metrics

    @contextmanager
    def _recording(self, *, wanted: bool = True) -> Iterator[dict[str, torch.Tensor]]:
        """Keep what the policy's passes inside compute on their way, without a gradient.

        Embeddings and outputs of the last layer, (T, hidden size), and of those layers that a head
        reads. Through its own forward pass, so that FSDP gathers what it needs.
        """
        kept: dict[str, torch.Tensor] = {}
        if not wanted:
            yield kept
            return
        inner: Any = self.policy.model

        def keep_hidden(_module: Any, _inputs: Any, output: Any) -> None:
            kept["hidden"] = output.last_hidden_state[0].detach()

        def keep_embedded(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            kept["embedded"] = output[0].detach()

        def keeper(layer: int) -> Callable[[Any, Any, Any], None]:
            def keep(_module: Any, _inputs: Any, output: Any) -> None:
                made = output[0] if isinstance(output, tuple) else output
                kept[f"layer {layer}"] = made[0].detach()

            return keep

        hooks = [inner.model.register_forward_hook(keep_hidden)]
        if self._settings.draft_head:
            hooks.append(inner.get_input_embeddings().register_forward_hook(keep_embedded))
        for layer in self._read_by_head():
            hooks.append(inner.model.layers[layer].register_forward_hook(keeper(layer)))
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def _read_by_head(self) -> tuple[int, ...]:
        """The policy's layers whose output a head reads; none where it reads the last one's."""
        if not (self._settings.draft_head and DRAFT in self.learners):
            return ()
        head: Any = self.learners[DRAFT].model
        reads: tuple[int, ...] = head.model.reads
        return reads

    def _seen(
        self, kept: dict[str, torch.Tensor], packed: Packed, temperature: float, *, taught: bool
    ) -> dict[str, Any]:
        """What a draft gets of the policy's pass beside the samples; all ranks call.

        `taught`: it learns from the policy's distributions.
        """
        inner: Any = self.policy.model
        hidden_T = kept["hidden"]
        output = whole(inner.lm_head.weight.detach()).to(self.device, hidden_T.dtype)
        seen: dict[str, Any] = {}
        if self._settings.draft_head:
            layers = [kept[f"layer {layer}"] for layer in self._read_by_head()]
            read_T = torch.cat(layers, dim=-1) if layers else hidden_T
            seen["states"] = PolicyStates(read_T, kept["embedded"], output)
        if taught:
            hidden_R = hidden_T[packed.predictor_R]
            seen["target"] = self.policy.distributions(hidden_R, output, temperature)
        return seen

    def clip_gradients(self) -> dict[str, float]:
        return {name: learner.clip() for name, learner in self.learners.items()}

    def optim_step(self, rates: Mapping[str, float]) -> None:
        for name, rate in rates.items():
            self.learners[name].step(rate)
        for learner in self.learners.values():
            learner.optimizer.zero_grad()
        low_precision.drop_codes()

    def recover(self) -> None:
        low_precision.drop_codes()
        for learner in self.learners.values():
            learner.recover()
        if self.reference:
            recover(self.reference)

    def refresh_reference(self) -> None:
        if self.reference is None:
            return
        pairs = zip(self.reference.parameters(), self.policy.parameters(), strict=True)
        with torch.no_grad():
            for old, new in pairs:
                old.copy_(new)

    # ---- reading out ---------------------------------------------------------------------------

    def named_weights(self, of: str = POLICY) -> Iterator[tuple[str, torch.Tensor]]:
        return lora.base_weights(self.module(of))

    def named_trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        named = self.policy.model.named_parameters()
        return ((name, value) for name, value in named if value.requires_grad)

    def named_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        if not self._adapter_layers:
            self._adapter_layers = lora.adapter_layers(self.policy.model)
        return ((name, layer.weight) for name, layer in self._adapter_layers)

    def adapter_as_sent(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        return lora.as_engines_have(self.policy.model, name, value)

    def as_saved(
        self, name: str, value: torch.Tensor, of: str = POLICY
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return state_dict.as_saved(self.module(of), name, value)

    def gather(self, name: str, value: torch.Tensor, *, merged: bool = True) -> torch.Tensor:
        if value.is_meta:
            value = lora.base_weight(self.policy.model, name)
        if not (self._adapts and merged):
            return whole(value)
        return lora.merged(self.policy.model, name, whole(value), whole)

    def gather_together(
        self,
        named: Sequence[tuple[str, torch.Tensor]],
        dtypes: Sequence[torch.dtype | None],
        *,
        merged: bool = True,
    ) -> Iterable[torch.Tensor]:
        # One by one: sums, and weights in 4 bits that are read, take several times their memory.
        if self._adapts and (merged or any(value.is_meta for _, value in named)):
            return (self.gather(name, value, merged=merged) for name, value in named)
        return whole_together([value for _, value in named], dtypes)

    def merge_error(self) -> float:
        dtype, model = getattr(torch, self._settings.dtype), self.policy.model
        with torch.no_grad():
            sums = [
                lora.merge_error(layer, self.gather(name, value, merged=False), dtype, whole)
                for name, value in self.named_weights()
                if (layer := lora.layer_of(model, name))
            ]
            wrong, size = (float(sum(parts)) for parts in zip(*sums, strict=True))
        return math.sqrt(wrong / size) if size else math.nan

    def state_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for learner in self.learners.values():
            tensors |= learner.state_tensors()
        if self.reference and self._training.ref_update_interval:
            reshard(self.reference)
            for name, value in self.reference.named_parameters():
                tensors[f"{REFERENCE}/{name}"] = value
        return tensors

    def fill_optimizers(self, names: Iterable[str]) -> None:
        wanted = set(names)
        for learner in self.learners.values():
            learner.fill_optimizer(wanted)

    def resident(self) -> Iterator[torch.Tensor]:
        """Every tensor that stays on the device between updates."""
        if self.reference:
            yield from self.reference.parameters()
        for learner in self.learners.values():
            yield from learner.resident()

    def sleep(self) -> int:
        low_precision.drop_codes()
        for learner in self.learners.values():
            learner.optimizer.zero_grad()
        self._host.offload(self.resident())
        return self._host.offloaded_bytes

    def wake(self) -> None:
        self._host.reload()


def _answer(model: nn.Module, packed: Packed, temperature: float, *, dropout: bool = False) -> Any:
    """The model's output, in evaluation mode without dropout, and everything sharded afterwards."""
    model.train(dropout)
    answer = model(packed, temperature)
    low_precision.drop_codes()
    reshard(model)
    return answer
