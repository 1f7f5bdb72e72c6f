"""What one running session is asked: the same session for all of it, as a user has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.gpu_parts.children import Report
from benchmarks.gpu_parts.workload import Workload, reward
from kit import RLSession
from kit.stack.stack import Stack

CHOSEN = (
    "kv_tokens",
    "max_tokens_per_gpu",
    "recompute",
    "compile",
    "kv_sleeps",
    "engine_weights_sleep",
    "trainer_sleeps",
)
"""Of the session's memory plan."""


@contextmanager
def host(work: Workload, report: Report) -> Iterator[RLSession]:
    """A running session of the workload."""
    report.say("starting the session")
    session = RLSession.start(work.config(), data=work.rows(), reward=reward)
    try:
        yield session
    finally:
        session.close()


def start(session: RLSession, work: Workload, report: Report) -> None:
    """How long the first start of this run took."""
    report.put("cold_seconds", session.start_seconds)
    report.put("info", {name: str(value) for name, value in stack_of(session).info.items()})
    report.say(f"started in {session.start_seconds:.1f} s")


def generate(session: RLSession, work: Workload, report: Report) -> None:
    """Seconds of responses, by requests decoded together: at the stack, and as a user calls it."""
    from kit.messages import SamplingSettings

    stack = stack_of(session)
    sampling = SamplingSettings(temperature=1.0, max_new_tokens=work.response_tokens)
    for count in work.requests:
        ask = partial(_all, stack, work.token_rows(count), sampling, list(range(count)))
        report.put(f"stack_{count}", seconds := _after_syncs(session, ask, work.repeats))
        report.say(f"{count} requests at the stack: {min(seconds):.2f} s")
    check_lengths(session, work)
    report.put("session", seconds := _after_syncs(session, session.generate, work.repeats))
    report.say(f"session.generate: {min(seconds):.2f} s")


def _after_syncs(session: RLSession, ask: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each call after a first one; as in training, the engine's cache is empty then."""
    seconds = []
    for _ in range(1 + times):
        session.sync()
        seconds.append(_timed(ask))
    return seconds[1:]


def _all(stack: Stack, *request: Any) -> None:
    """Generate, and take every part."""
    for _ in stack.generate(*request):
        pass


def check_lengths(session: RLSession, work: Workload) -> None:
    """Raise where responses or prompts are not as long as the workload says."""
    # A model of random weights draws from all of its vocabulary, where a real one uses a small part
    # of it: the texts of all tokens are looked up before anything is timed.
    for token in range(work.shape["vocab_size"]):
        session.debug.sampler.token_text(token)
    rollout = session.generate()
    lengths = {(len(s.tokens) - s.response_length, s.response_length) for s in rollout}
    if lengths != {(work.prompt_tokens, work.response_tokens)}:
        raise ValueError(f"(prompt, response) tokens are {lengths}, not what was asked for")


def log_probs(session: RLSession, work: Workload, report: Report) -> None:
    """Seconds of the trainer's log-probs of a whole rollout, there and back."""
    samples = (session.last_rollout or session.generate()).samples
    session.log_probs(samples)
    report.put("seconds", [_timed(lambda: session.log_probs(samples)) for _ in range(work.repeats)])
    report.put("tokens", sum(len(sample.tokens) for sample in samples))


def sync_and_sleep(session: RLSession, work: Workload, report: Report) -> None:
    """Seconds of syncs, and of engine and trainer going to sleep and coming back."""
    seconds = [session.sync().seconds for _ in range(6)]
    report.put("sync_first", seconds[0])
    report.put("sync", seconds[1:])
    report.say(f"sync: {min(seconds) * 1000:.0f} ms")
    report.put("verified", [_timed(lambda: session.sync(verify=True))])
    if work.device == "cpu":
        report.say("without a card nothing sleeps")
        return
    offload = stack_of(session).offload
    for who in ("engine", "trainer"):
        getattr(offload, f"make_room_for_{who}")()
        pairs = []
        for _ in range(1 + work.repeats):
            asleep = _timed(getattr(offload, f"sleep_{who}"))
            pairs.append((asleep, _timed(getattr(offload, f"wake_{who}"))))
        report.put(f"{who}_first", pairs[0])
        report.put(f"sleep_{who}", [pair[0] for pair in pairs[1:]])
        report.put(f"wake_{who}", [pair[1] for pair in pairs[1:]])
        best = min(a + b for a, b in pairs) * 1000
        report.say(f"{who} asleep and awake: {best:.0f} ms")


def iteration(session: RLSession, work: Workload, report: Report) -> None:
    """Whole steps: a list of their metrics, `wall` among them; the first one apart."""
    steps: list[dict[str, float]] = []
    for number in range(1 + work.steps):
        begin = time.perf_counter()
        metrics = dict(session.step().metrics) | {"wall": time.perf_counter() - begin}
        if number:
            steps.append(metrics)
            report.put("steps", steps)
        else:
            report.put("first", metrics)
        report.say(f"step {number}: {metrics['wall']:.2f} s")
        if report.left() < 1.5 * metrics["wall"]:
            break


def memory(session: RLSession, work: Workload, report: Report) -> None:
    """Peaks by phase: (name, bytes predicted, bytes measured or null); and what the plan chose."""
    stack = stack_of(session)
    if work.device == "cuda" and len(stack.trainers.measured) < len(stack.plan.phases):
        session.step()  # so that each phase was there
    plan = stack.plan.with_measured(stack.trainers.measured)
    report.put("phases", [(p.name, p.total, p.measured) for p in plan.phases])
    report.put("chosen", {name: getattr(plan, name) for name in CHOSEN})


def phases_of(session: RLSession) -> list[tuple[str, int, int | None]]:
    """Of the memory plan: (name, bytes predicted, bytes measured or None)."""
    return [(phase.name, phase.total, phase.measured) for phase in session.memory_plan().phases]


def decoding_speed(session: RLSession, work: Workload, count: int, length: int) -> float:
    """Tokens a second of so many responses of this length, written at once: the best repeat."""
    from kit.messages import SamplingSettings

    sampling = SamplingSettings(temperature=1.0, max_new_tokens=length)
    asked = work.token_rows(count), sampling, list(range(count))
    seconds = _after_syncs(session, partial(_all, stack_of(session), *asked), work.repeats)
    return count * length / min(seconds)


def stack_of(session: RLSession) -> Stack:
    """What is below the session: verbs hide it, a benchmark looks there."""
    return session.debug.stack


def _timed(work_once: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work_once()
    return time.perf_counter() - begin
