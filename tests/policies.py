"""The running session with rollout policies, and responses and rewards that give them work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import RLSession, Rollout, Sample, SessionConfig
from kit.rollout.sampler import PromptSampler

SURPLUS = {"over_sampling_batch_size": 24, "partial_rollout": True}
LONGEST = 120
FEW = {"rollout_batch_size": 4, "n_samples_per_prompt": 4}
"""A rollout of 16 samples: most of a surplus is not finished when it is full."""


def set_policies(session: RLSession, **settings: Any) -> None:
    tree = session.config.model_dump()
    tree["rollout"] |= settings
    if settings.get("partial_rollout"):
        tree["training"] |= FEW
    session.debug.state.config = SessionConfig(**tree)


@pytest.fixture
def policies(session: RLSession) -> Callable[..., RLSession]:
    """Gives the running session with these settings of `rollout`."""

    def with_settings(**settings: Any) -> RLSession:
        set_policies(session, **settings)
        return session

    return with_settings


def rambles(
    session: RLSession, monkeypatch: pytest.MonkeyPatch, temperature: float, longest: int
) -> None:
    """Have the engine sample at this temperature, whatever the session's settings say.

    The stack is told that its trainer computes at it too: an update would refuse such samples.
    """
    plain = PromptSampler.sampling

    def sampling(self: PromptSampler, asked: float | None = None, *rest: Any) -> Any:
        return plain(self, temperature if asked is None else asked, *rest)

    monkeypatch.setattr(PromptSampler, "sampling", sampling)
    monkeypatch.setattr(session.debug.sampler, "max_response_len", longest)
    settings = session.debug.stack.settings
    changed = settings.config.replace("rollout.temperature", temperature)
    monkeypatch.setattr(settings, "config", changed)


@pytest.fixture
def rambling(session: RLSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses of very different lengths: noise that ends when it happens to."""
    rambles(session, monkeypatch, 6.0, LONGEST)


def luck(sample: Sample) -> float:
    """A reward that differs in nearly every group, whatever the model writes."""
    return float(sum(sample.response_tokens) % 2)


def rewards_by_group(rollout: Rollout) -> list[set[float | None]]:
    return [{s.reward for s in group} for group in rollout.groups()]
