"""`TrainerBackend`: what a trainer needs of the library that computes; `fsdp.py` is the first.

A backend holds one rank's share of the networks under their names: those that learn (`policy`,
`critic`, `draft`), and `reference`, which does not. All ranks make the same calls in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from kit.config import TrainingConfig
from kit.models.packing import Packed

LossFn = Callable[[Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Turns a network's output for a micro-batch into (loss, metrics to be summed over all of them)."""


class TrainerBackend(Protocol):
    """One rank's networks: made, computed, changed, and read out."""

    device: torch.device
    experts: tuple[int, int]
    """(layers of the policy with experts that can be replayed, experts of a token), or zeros."""

    def start(self) -> None:
        """Load the policy into host memory."""

    def place(self) -> tuple[int, int]:
        """Put all networks on the devices, and make their optimizers.

        Returns:
            Parameters of the policy's model, and those that are trained: adapters, or all.
        """

    def begin_anew(self, seed: int) -> None:
        """Give all that is trained the values that a start with this seed gives it."""

    def release(self) -> None:
        """Drop all networks; `start` and `place` make them anew."""

    def configure(self, training: TrainingConfig) -> None:
        """Go on with other settings; networks and what optimizers hold stay."""

    def has(self, name: str) -> bool:
        """Whether there is a network of this name."""

    def module(self, of: str = "policy") -> nn.Module:
        """The Transformers model of the `policy` or the `draft`, for hooks that observe it."""

    # ---- computing -----------------------------------------------------------------------------

    def log_probs(
        self,
        packed: Packed,
        temperature: float,
        of: str = "policy",
        *,
        dropout: bool = False,
        gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp_R, entropy_R): of each response token, in nats, detached.

        Args:
            packed: the samples.
            temperature: divides the logits.
            of: `policy` or `reference`.
            dropout: in training mode, as in an update.
            gradient: with the operations that an update's forward pass uses.
        """

    def values(self, packed: Packed) -> torch.Tensor:
        """Critic's value before each response token, (R)."""

    def logits(self, packed: Packed) -> torch.Tensor:
        """Logits over the vocabulary for each response token, (R, vocabulary)."""

    def with_reference(self) -> AbstractContextManager[None]:
        """Provide a reference inside the block: the initial model if there is no other."""

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
        """Add a micro-batch to the gradients of these networks; the metrics of all losses.

        Args:
            packed: the samples.
            temperature: divides the logits of policy and draft.
            losses: by the network's name, the policy first; each is a share of a sum over all
                ranks.
            last: is it the optimizer step's last micro-batch?
            taught: networks whose loss gets their KL to the policy's distributions, (kl_R,), which
                has no gradient into the policy.
        """

    def clip_gradients(self) -> dict[str, float]:
        """Clip each network's gradient; their norms before, by name."""

    def optim_step(self, rates: Mapping[str, float]) -> None:
        """Step these networks at these learning rates; all gradients are gone afterwards."""

    def recover(self) -> None:
        """Forget gradients and unfinished passes: all networks can be used again."""

    def refresh_reference(self) -> None:
        """Give the reference, if there is one, the policy's weights."""

    # ---- reading out ---------------------------------------------------------------------------

    def named_weights(self, of: str = "policy") -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and saved buffers of `policy` or `draft` by name, each as this rank holds it.

        Adapters are none of them: `gather` adds them to their weights.
        """

    def named_trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's parameters that updates change, each as this rank holds it."""

    def named_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The matrices of all adapters by name, each as this rank holds it."""

    def adapter_as_sent(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A whole matrix of an adapter as engines have it, by the names there."""

    def as_saved(
        self, name: str, value: torch.Tensor, of: str = "policy"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A whole weight of `policy` or `draft` as its checkpoint has it, by the names there."""

    def gather(self, name: str, value: torch.Tensor, *, merged: bool = True) -> torch.Tensor:
        """A weight of `named_weights` or `named_adapters` whole, on every rank.

        `merged` with its adapter, if it has one.
        """

    def gather_together(
        self,
        named: Sequence[tuple[str, torch.Tensor]],
        dtypes: Sequence[torch.dtype | None],
        *,
        merged: bool = True,
    ) -> Iterable[torch.Tensor]:
        """As `gather` of each, in few exchanges; rounded before they travel, where a dtype says."""

    def merge_error(self) -> float:
        """Norm of what rounding to the engine's dtype adds to all adapters, by their own norm."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that an update changes by name, in the same order on every rank."""

    def fill_optimizers(self, names: Iterable[str]) -> None:
        """Fill optimizer states for exactly these names; new ones start at zero."""

    def sleep(self) -> int:
        """Move everything to host memory; how many bytes."""

    def wake(self) -> None:
        """Bring everything back to the device."""


def whole_weights(
    backend: TrainerBackend, of: str = "policy"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, gathered one after the other; all ranks iterate."""
    for name, value in backend.named_weights(of):
        yield name, backend.gather(name, value).detach()
