"""Sessions that draft, and what they write."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kit import RLSession, SessionConfig
from kit.samples import Rollout
from tests.faults.interrupts import digests

if TYPE_CHECKING:
    from tests.conftest import Shared

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


def plainly(shared: Shared) -> dict[float, Rollout]:
    """What plain decoding writes, by temperature."""
    session = shared.at(seed=0)
    found = {temperature: written(session, temperature) for temperature in TEMPERATURES}
    session.close(keep_warm=True)
    return found


def syncs_reach_their_own(session: RLSession) -> None:
    """A sync of the policy changes no head, nor one of the head the policy.

    `session` trains a head along, which drafts chains of 3 tokens, and is in its snapshot "first",
    which brings both back.
    """
    stack = session.debug.stack
    policy, before = stack.checksums(), draft_of(session)
    session.configure({"training.draft.learning_rate": 0.0})
    session.step()
    assert stack.checksums() != policy
    assert draft_of(session) == before
    session.configure({"training.draft.learning_rate": 1e-3})
    m = session.step().metrics
    assert m["train/draft_loss"] > 0
    assert 1.0 <= m["rollout/spec_accept_length"] <= 4.0
    assert draft_of(session) != before
    assert stack.compare_draft().require_equal() == len(before[0])
    assert session.check_mismatch(session.generate()).verdict == "pass"
    assert session.sync(verify=True).verified  # erases the policy, and compares both
    session.restore("first")
    session.sync()
    assert draft_of(session) == before
    assert stack.checksums() == policy


def outlives_its_engine(session: RLSession) -> None:
    """What a draft has learned is there again when the engine has died."""
    session.step()
    before, stack = draft_of(session), session.debug.stack
    os.kill(stack.engines.ask("processes")[0][1], signal.SIGKILL)
    rollout = session.generate()
    assert draft_of(session) == before
    assert session.check_mismatch(rollout).verdict == "pass"


def outlives_its_kernel(name: str, told: dict[str, str], saved: Path) -> None:
    """A session that has died goes on by `attach`, and from a checkpoint, as it would have.

    `told` are the digests that it had at its end.
    """
    with RLSession.attach(name) as session:
        assert digests(session) == told
        session.step()
        assert session.debug.stack.compare_draft().require_equal()
        there = digests(session)
        session.save(saved)
        session.step()
        further = digests(session)
    with RLSession.load(saved) as session:
        assert digests(session) == there
        session.sync()
        assert session.debug.stack.compare_draft().require_equal()
        session.step()
        assert digests(session) == further
