"""Sessions that are forked, and what is compared of them."""

from __future__ import annotations

from typing import Any

from kit import RLSession, SessionConfig
from kit.samples import Sample

CONFIG = SessionConfig.preset("tiny-lora").replace("name", "adapters")
CONFIG = CONFIG.replace("training.rollout_batch_size", 4)
CONFIG = CONFIG.replace("training.n_samples_per_prompt", 4).replace("rollout.max_response_len", 16)


def shorter(sample: Sample) -> float:
    return 1.0 / (1 + len(sample.response))


OTHER = {"data": "tiny:chain", "eval_data": [{"prompt": "1+2=", "label": "3"}], "reward": shorter}


def rows(session: RLSession) -> list[dict[str, float]]:
    """Metrics of all steps, without times."""
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in session.history]


def digest(session: RLSession) -> str:
    """Weights, optimizer and counters of the trainer, as one word."""
    with session.debug.turn():
        word: str = session.debug.stack.probe("digest")
    return word


def samples(session: RLSession) -> list[tuple[Any, ...]]:
    rollout = session.last_rollout or []
    return [(s.tokens, s.response, s.rollout_log_probs, s.reward) for s in rollout]


def everything(session: RLSession) -> tuple[Any, ...]:
    place = session.debug.state.stream.state(), session.debug.state.rollouts_drawn
    return session.step_count, digest(session), rows(session), samples(session), place


def alone(config: SessionConfig, steps: int, **inputs: Any) -> tuple[Any, ...]:
    """What a session of its own gives."""
    session = RLSession.start(config, **inputs)
    for _ in range(steps):
        session.step()
    found = everything(session)
    session.close(keep_warm=True)
    return found
