"""Batches of tokens, by hand and by hypothesis, for the tests of corrections."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from torch import tensor

from kit.algo.corrections import Level, Mode, Rejection, mis, opsm

LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
INF, NAN = math.inf, math.nan

token = st.tuples(
    st.floats(-5, 0), st.floats(-2, 2), st.floats(-3, 3), st.integers(0, 1)
)  # rollout log-prob, log-ratio, advantage, mask
Token = tuple[float, float, float, int]
Samples = list[list[Token]]
batches = st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=5)
settings = st.fixed_dictionaries(
    {
        "level": st.sampled_from(LEVELS),
        "mode": st.sampled_from(MODES),
        "low": st.sampled_from([None, 0.0, 0.4, 0.9]),
        "high": st.sampled_from([1.1, 2.0, 5.0]),
        "veto": st.sampled_from([None, 0.2]),
        "rs": st.sampled_from(
            [None, Rejection("token"), Rejection("sequence", 0.3), Rejection("geometric", 0.5, 3.0)]
        ),
    }
)
Settings = dict[str, Any]


def double(values: Sequence[float]) -> torch.Tensor:
    return tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Tokens:
    """A batch packed, in float64."""

    train: torch.Tensor
    rollout: torch.Tensor
    advantage: torch.Tensor
    sample: torch.Tensor
    mask: torch.Tensor

    def mis(self, **more: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        return mis(self.train, self.rollout, self.sample, self.mask, **more)

    def opsm(self, delta: float) -> tuple[torch.Tensor, dict[str, float]]:
        return opsm(self.train, self.rollout, self.advantage, self.sample, self.mask, delta)


def packed(samples: Samples) -> Tokens:
    rows = double([t for s in samples for t in s])  # type: ignore[misc]
    lengths = tensor([len(s) for s in samples])
    return Tokens(
        train=rows[:, 0] + rows[:, 1],
        rollout=rows[:, 0],
        advantage=rows[:, 2],
        sample=torch.repeat_interleave(torch.arange(len(samples)), lengths),
        mask=rows[:, 3],
    )


def ratios(*samples: list[float], mask: list[int] | None = None) -> Tokens:
    """Samples whose tokens have these ratios of trainer to engine."""
    count = sum(map(len, samples))
    batch = packed([[(-1.0, math.log(r) if r else -INF, -1.0, 1) for r in s] for s in samples])
    return Tokens(
        batch.train, batch.rollout, batch.advantage, batch.sample, tensor(mask or [1] * count)
    )
