"""Sessions that draft, and what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.samples import Rollout

PROMPTS = [f"{a}+{3 * a % 90 + 7}=" for a in range(3, 19)]
TEMPERATURES = (1.0, 0.7, 1e-5)
TINY = SessionConfig.preset("tiny")


def written(session: RLSession, temperature: float) -> Rollout:
    return session.generate(PROMPTS, temperature=temperature)


def same(rollout: Rollout, plain: Rollout) -> None:
    """The same tokens, and their log-probs but for rounding."""
    assert [s.tokens for s in rollout] == [s.tokens for s in plain]
    for sample, other in zip(rollout, plain, strict=True):
        assert sample.rollout_log_probs == pytest.approx(other.rollout_log_probs, abs=1e-4)


def drafting(draft: Path | str | None, *, train: bool = False, **settings: Any) -> SessionConfig:
    own: dict[str, Any] = {"algorithm": "standalone", "draft_model": draft and str(draft)}
    config = TINY.replace("name", "drafts").replace("engine.speculative", own | settings)
    return config.replace("training.draft", {"learning_rate": 1e-3}) if train else config


def draft_of(session: RLSession) -> list[dict[str, str]]:
    sums: list[dict[str, str]] = session.debug.stack.engines.ask("draft_checksums")
    return sums
