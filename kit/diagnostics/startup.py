"""`session.check()`: the invariants of a healthy start. It leaves the session unchanged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kit.errors import DataError
from kit.reports import CheckReport, Invariant, MismatchReport
from kit.rollout.batch import train_batch
from kit.samples import Batch, Rollout

if TYPE_CHECKING:
    from kit.checkpoint.state import TrainState
    from kit.rollout.sampler import PromptSampler
    from kit.stack.stack import Stack


PROMPTS, RESPONSES = 8, 4
"""Written for the check: enough to see a fault, little enough to wait for."""
KL_BOUND = 1e-9
REFERENCE_BOUND = 1e-8


def check(
    state: TrainState,
    stack: Stack,
    sampler: PromptSampler,
    compare: Callable[[Rollout], MismatchReport],
) -> CheckReport:
    """Check every invariant."""
    begin = time.perf_counter()
    rows = state.stream.peek(min(PROMPTS, state.config.training.rollout_batch_size))
    seed = f"{state.config.seed} check"
    rollout = sampler.write(stack, rows, RESPONSES, sampler.sampling(), seed, state.step).complete()
    samples = [s for s in rollout if s.response_length and s.rollout_log_probs]
    if not samples:
        raise DataError(
            "The model ended every response before its first token.",
            fix="look at the chat template, and at session.generate().",
        )
    compared = compare(rollout.with_samples(samples))
    # A gradient, whatever the rewards would be.
    signs = tuple((-1.0) ** index for index in range(len(samples)))
    started = stack.probe(
        "startup", train_batch(Batch(tuple(samples), signs), stack.settings.config.training)
    )
    return CheckReport(
        invariants=(*_of_the_update(started), _of_the_engine(compared), _of_the_sync(stack)),
        mismatch=compared,
        seconds=time.perf_counter() - begin,
    )


def _of_the_update(started: Any) -> list[Invariant]:
    gap = started.reference_gap
    return [
        Invariant(
            "ppo_kl at the first step",
            started.ppo_kl,
            f"0 within {KL_BOUND:g}",
            abs(started.ppo_kl) <= KL_BOUND,
            "the update scores its own tokens as they were scored before; dropout breaks it",
        ),
        Invariant(
            "clip fraction at the first step",
            started.clip_fraction,
            "0",
            started.clip_fraction == 0,
            "no ratio has moved yet",
        ),
        Invariant(
            "|actor - reference| log-prob, largest",
            gap,
            f"0 within {REFERENCE_BOUND:g}",
            None if gap is None else gap <= REFERENCE_BOUND,
            "not looked at: the actor has been trained, they differ rightly"
            if gap is None
            else "training starts from the reference",
        ),
        Invariant(
            "entropy, nats a token",
            started.entropy,
            "finite and above 0",
            math.isfinite(started.entropy) and started.entropy > 0,
            "a policy that is sure of every token explores nothing",
        ),
        Invariant(
            "weights changed by learning rate 0",
            float(started.changed_values),
            f"0 of {started.values:,}",
            started.changed_values == 0,
            "compared bit by bit, and put back",
        ),
    ]


def _of_the_engine(compared: MismatchReport) -> Invariant:
    return Invariant(
        "mean |trainer - rollout| log-prob",
        compared.mean_abs_diff,
        f"up to {compared.warn_above:g}",
        compared.verdict == "pass",
        "" if compared.verdict == "pass" else compared.cause,
    )


def _of_the_sync(stack: Stack) -> Invariant:
    """Sync twice, if the engine has the trainer's weights, so that nothing changes."""
    name, bound = "parameters changed by two syncs in a row", "0"
    if stack.weights.engine_version != stack.trainers.version:
        note = (
            f"not looked at: the engine holds version {stack.weights.engine_version}, the trainer "
            f"{stack.trainers.version}; call session.sync() first"
        )
        return Invariant(name, None, bound, None, note)
    before, sums = stack.checksums(), stack.compare_weights()
    if sums.different:
        note = f"not synced: the engine's {', '.join(sums.different[:3])} differ from the trainer's"
        return Invariant(name, float(len(sums.different)), bound, False, note)
    stack.sync(stack.weights.engine_version)
    once = stack.checksums()
    stack.sync(stack.weights.engine_version)
    twice = stack.checksums()
    changed = {
        parameter
        for a, b, c in zip(before, once, twice, strict=True)
        for parameter in a
        if not a[parameter] == b.get(parameter) == c.get(parameter)
    }
    note = f"{sums.compared} parameters by checksum, equal on both sides"
    return Invariant(name, float(len(changed)), bound, not changed, note)
