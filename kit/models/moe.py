"""Routers of a mixture of experts: which experts each token takes, and given ones in their place.

A router computes a score for each expert, and sends the token to those with the highest. Where two
are nearly equal, rounding decides, and then another network computes the token. To replay the
choice of another pass, a router is given it: it computes its scores afresh, with their gradient,
and takes those of the experts that it is told. The choice itself never had a gradient.

`make_replayable` puts that into a model's routers. `replaying` is where a table of experts is in
force: around a forward pass and its backward pass, which may compute the forward pass once more.

The table of a pass lies in this module and not in the routers, as compiled layers would take the
length of what lies in a module for fixed. It is the process' own, since the backward pass of a GPU
runs in a thread of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from kit.errors import ModelError

UNKNOWN = -1
"""In a table: the token's own router chooses."""


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Experts of the T rows of one pass in the L layers that have some, K to each."""

    given_TLK: torch.Tensor
    """Those that the rows are sent to, int64; `UNKNOWN` where the router chooses."""
    own_TLK: torch.Tensor
    """Those that the routers would choose; each pass under this table writes them."""
    followed: bool = True
    """Whether routers take what they are given; otherwise it is only compared with."""

    @classmethod
    def of(cls, given_TLK: torch.Tensor, *, followed: bool = True) -> ExpertTable:
        """A table before its first pass."""
        return cls(given_TLK, torch.full_like(given_TLK, UNKNOWN), followed)

    def to(self, device: torch.device) -> ExpertTable:
        """Copy to a device."""
        return replace(self, given_TLK=self.given_TLK.to(device), own_TLK=self.own_TLK.to(device))

    @property
    def taken(self) -> torch.Tensor:
        """Those that the last pass sent the rows to."""
        if not self.followed:
            return self.own_TLK
        return torch.where(self.given_TLK < 0, self.own_TLK, self.given_TLK)

    def of_rows(self, rows: Sequence[int]) -> np.ndarray[Any, Any]:
        """Those that the last pass sent some rows to, as a record: uint16."""
        taken = self.taken[torch.tensor(rows, device=self.own_TLK.device)]
        return taken.numpy(force=True).astype(np.uint16)

    def changed(self) -> torch.Tensor:
        """Given experts of each row that its routers would not choose, over all layers; 0 without.

        (T), float32.
        """
        shared_TLK = (self.given_TLK[..., None] == self.own_TLK[..., None, :]).any(-1)
        known_TLK = self.given_TLK >= 0
        return (known_TLK & ~shared_TLK).sum((1, 2)).float()

    def agreement(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How far the routers of the last pass agree with what they were given.

        Returns:
            Sums in float64, as tensors of one number: the share of each row's given experts that it
            would choose itself; rows of which at least one layer would choose others; rows.
        """
        given, own = self.given_TLK, self.own_TLK
        known_T = (given[:, 0, 0] >= 0).double()
        shared_TLK = (given[..., None] == own[..., None, :]).any(-1)
        share_T = shared_TLK.double().mean((1, 2))
        changed_T = (~shared_TLK).any(-1).any(-1).double()
        return (share_T * known_T).sum(), (changed_T * known_T).sum(), known_T.sum()


@dataclass(frozen=True, slots=True)
class Recorded:
    """Records of some samples' experts, that a pass is to follow."""

    samples: Sequence[np.ndarray[Any, Any] | None]
    """(tokens - 1, L, K) of each, unsigned; the largest number of the dtype where a token has none,
    None where a sample has none."""
    layers: int
    top_k: int
    followed: bool = True
    """Whether the policy's routers follow them; otherwise they are only compared with."""

    def table(self, rows_of: Sequence[Sequence[int]], size: int) -> tuple[ExpertTable, int]:
        """Table for packed samples, and in how many (row, layer) their records contradict.

        Of a row that several samples share, the first one's record counts.

        Args:
            rows_of: row of each token of each sample.
            size: rows of the pass.
        """
        given_TLK = np.full((size, self.layers, self.top_k), UNKNOWN, np.int64)
        contradicted = np.zeros((size, self.layers), bool)
        for rows, record in zip(rows_of, self.samples, strict=True):
            fits = record is not None and record.shape[1:] == (self.layers, self.top_k)
            if record is None or not (fits or self.followed):
                continue  # what another number of experts says cannot be compared
            self._check(record, len(rows))
            places = np.asarray(rows[: len(record)], np.int64)
            told = np.where(record == np.iinfo(record.dtype).max, UNKNOWN, record.astype(np.int64))
            before = given_TLK[places]
            both = (before >= 0).all(-1) & (told >= 0).all(-1)
            contradicted[places] |= both & (np.sort(before) != np.sort(told)).any(-1)
            given_TLK[places] = np.where(before < 0, told, before)
        table = ExpertTable.of(torch.from_numpy(given_TLK), followed=self.followed)
        return table, int(contradicted.sum())

    def _check(self, record: np.ndarray[Any, Any], tokens: int) -> None:
        wanted = (tokens - 1, self.layers, self.top_k)
        if record.shape != wanted:
            raise ModelError(
                f"A sample's record of experts is {record.shape}, and {wanted} is what the "
                "trainer's model has: (tokens - 1, layers with experts, experts of a token).",
                fix="train on samples that an engine with this model wrote, or leave the replay "
                "out.",
            )


class _Current:
    """The table in force, if any; its parts by themselves.

    Where compiled layers look at a tensor of an object, torch cannot compile them anew for the case
    that there is no object.
    """

    given: torch.Tensor | None = None
    own: torch.Tensor | None = None
    followed = True


_CURRENT = _Current()


@contextmanager
def replaying(table: ExpertTable | None) -> Iterator[None]:
    """Have replayable routers follow a table, and write their own choice into it; None: no table.

    A policy's layers are computed one pass after the other, so there is one table at a time.
    """
    before = _CURRENT.given, _CURRENT.own, _CURRENT.followed
    parts = (
        (None, None, True) if table is None else (table.given_TLK, table.own_TLK, table.followed)
    )
    _CURRENT.given, _CURRENT.own, _CURRENT.followed = parts
    try:
        yield
    finally:
        _CURRENT.given, _CURRENT.own, _CURRENT.followed = before


def routers(model: nn.Module) -> dict[int, Any]:
    """The routers by the number of their layer, ascending; empty for a model without experts.

    Where the block around a router chooses by the scores that the router gives, it is the block.
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number and (_chooses(module) or type(module).__name__.endswith("Router")):
            found.setdefault(int(number[1]), module)  # a block comes before what is in it
    return dict(sorted(found.items()))


def _chooses(module: nn.Module) -> bool:
    """Whether it is a block that chooses experts by its router's scores."""
    return callable(getattr(module, "route_tokens_to_experts", None))


def replayable_layers(model: nn.Module) -> tuple[int, ...]:
    """Numbers of the layers whose routers follow a table; empty before `make_replayable`."""
    found = routers(model)
    return tuple(found) if all(hasattr(r, "column") for r in found.values()) else ()


def experts_of(model: nn.Module) -> tuple[int, int]:
    """(layers with replayable routers, experts of a token); (0, 0) for other models."""
    found = [*routers(model).values()] if replayable_layers(model) else []
    return (len(found), int(found[0].top_k)) if found else (0, 0)


@dataclass(frozen=True, slots=True)
class Weighing:
    """How a router makes weights of the scores of a token's experts."""

    sigmoid: bool
    """Of each score by itself; else by a softmax over those of all experts."""
    normalizes: bool
    """Whether the weights are then made to sum to 1."""
    factor: float = 1.0
    """What they are multiplied by in the end."""

    def weights(
        self, logits: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weights of the chosen experts, (rows, K)."""
        logits = logits.float()
        scores = logits.sigmoid() if self.sigmoid else torch.softmax(logits, dim=-1)
        weights = scores.gather(-1, chosen)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * self.factor if self.factor != 1 else weights).to(dtype)


def make_replayable(model: nn.Module) -> None:
    """Have every router of a model follow the table in force; without one nothing changes.

    Layer by layer in ascending order, the routers take the columns of a table.

    Raises:
        ModelError: a router weighs experts in a way that is not known.
    """
    found = routers(model)
    kinds = {number: _weighing(router) for number, router in found.items()}
    for column, (number, router) in enumerate(found.items()):
        weighing = kinds[number]
        if weighing is None:
            raise ModelError(
                f"The experts of layer {number} cannot be replayed: {type(router).__name__} weighs "
                "them neither by a softmax over all nor by a sigmoid of each.",
                fix="leave training.use_rollout_routing_replay and training.use_routing_replay "
                "out, or train a model of a family that docs/models.md has with replay.",
            )
        router.register_buffer("column", torch.tensor([column]), persistent=False)
        kind: Any = type(router)
        made = _choosing if _chooses(router) else _replayable
        router.__class__ = made(kind, weighing)


def _weighing(router: Any) -> Weighing | None:
    """How the router weighs a token's experts; None if it is in a way that is not known.

    It is tried on random numbers.
    """
    weight = getattr(router.gate if _chooses(router) else router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, weight.shape[1], generator=draw).to(weight)
    with torch.no_grad():
        try:
            logits, scores, chosen = _tried(router, hidden, weight)
        except (TypeError, ValueError, RuntimeError):
            return None
        factors = {1.0, float(getattr(router, "routed_scaling_factor", None) or 1.0)}
        for each in (Weighing(*how) for how in product((False, True), (True, False), factors)):
            again = each.weights(logits, chosen, scores.dtype)
            # A softmax over the chosen alone is the same but for its rounding.
            if again.shape == scores.shape and torch.allclose(again, scores, rtol=1e-5, atol=1e-7):
                return each
    return None


def _tried(
    router: Any, hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, weights, chosen experts) of a router for some rows."""
    if _chooses(router):
        logits = nn.functional.linear(hidden.float(), weight.float())
        chosen, scores = router.route_tokens_to_experts(logits)
        return logits, scores, chosen
    # Some are given the bias of their scores, which weighs nothing.
    further = [hidden.new_zeros(len(weight))] if _parameters(router.forward) > 1 else []
    logits, scores, chosen = router(hidden, *further)
    return logits, scores, chosen


def _parameters(function: Any) -> int:
    return len(signature(function).parameters)


def _followed(
    router: Any, own: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor, how: Weighing
) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts, weights) by the table in force, which gets the router's own choice."""
    own_TLK, given_TLK = _CURRENT.own, _CURRENT.given
    if own_TLK is None or given_TLK is None:
        return own, weights
    own_TLK.index_copy_(1, router.column, own[:, None])
    if not _CURRENT.followed:
        return own, weights
    given = given_TLK.index_select(1, router.column)[:, 0]
    chosen = torch.where(given < 0, own, given)
    return chosen, how.weights(logits, chosen, weights.dtype)


@cache
def _replayable(kind: Any, weighing: Weighing) -> Any:
    """Subclass of a router that follows the table in force.

    One class for all layers lets them share compiled code; so does the column of the table, which
    is a tensor and no number.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits, weights, own = kind.forward(self, *args, **kwargs)
        chosen, weights = _followed(self, own, weights, logits, weighing)
        return logits, weights, chosen

    return type(kind.__name__, (kind,), {"forward": forward})


@cache
def _choosing(kind: Any, weighing: Weighing) -> Any:
    """Subclass of a block that chooses by the table in force; see `_replayable`."""

    def route_tokens_to_experts(self: Any, router_logits: torch.Tensor) -> Any:
        own, weights = kind.route_tokens_to_experts(self, router_logits)
        return _followed(self, own, weights, router_logits, weighing)

    return type(kind.__name__, (kind,), {"route_tokens_to_experts": route_tokens_to_experts})
