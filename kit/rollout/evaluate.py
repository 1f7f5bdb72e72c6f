"""`session.evaluate`: mean reward, accuracy and pass@k on held-out prompts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from kit.config import SessionConfig
from kit.reports import EvalReport
from kit.rewards import score_samples
from kit.samples import Rollout
from kit.tracking.metrics import pass_at_k
from kit.utils.arguments import at_least_one
from kit.utils.arguments import temperature as checked_temperature

if TYPE_CHECKING:
    from kit.rewards.signature import Reward
    from kit.rollout.sampler import PromptSampler
    from kit.stack.stack import Stack


KS = (1, 2, 4, 8, 16, 32, 64)


def evaluate(
    stack: Stack,
    sampler: PromptSampler,
    reward: Reward,
    config: SessionConfig,
    step: int,
    n_samples_per_prompt: int | None = None,
    temperature: float | None = None,
) -> EvalReport:
    """Generate and score responses to held-out prompts. Raises DataError without any.

    A response is right if its reward is 1 or more. None takes what `evaluation` configures. The
    report is that of the first held-out set; it has those of the others in `others`.
    """
    settings = config.evaluation
    if n_samples_per_prompt is None:
        n_samples_per_prompt = settings.n_samples_per_prompt
    count = at_least_one(n_samples_per_prompt, "n_samples_per_prompt")
    heat = checked_temperature(settings.temperature if temperature is None else temperature)
    reports: list[EvalReport] = []
    for name, rows in sampler.held_out_rows(settings.max_prompts).items():
        begin = time.perf_counter()
        seed = f"{config.seed} evaluation" + (f" {name}" if reports else "")
        stream = sampler.write(stack, rows, count, sampler.sampling(heat), seed, step)
        rollout = stream.complete()
        rollout = rollout.with_samples(score_samples(rollout.samples, reward))
        seconds = time.perf_counter() - begin
        reports.append(report_of(name, rollout, count, heat, step, seconds))
    return replace(reports[0], others=tuple(reports[1:]))


def report_of(
    dataset: str,
    rollout: Rollout,
    n_samples_per_prompt: int,
    temperature: float,
    step: int,
    seconds: float,
) -> EvalReport:
    """Report of one held-out set, from its scored responses."""
    groups = rollout.groups()
    whole = [g for g in groups if all(s.reward is not None for s in g)]
    right = [sum((s.reward or 0.0) >= 1.0 for s in group) for group in whole]
    return EvalReport(
        dataset=dataset,
        mean_reward=rollout.mean_reward(),
        prompts=len(groups),
        n_samples_per_prompt=n_samples_per_prompt,
        temperature=temperature,
        pass_at_k={
            k: sum(pass_at_k(n, n_samples_per_prompt, k) for n in right) / len(right)
            for k in KS
            if k <= n_samples_per_prompt and right
        },
        rollout=rollout,
        step=step,
        seconds=seconds,
        left_out=len(rollout.failed()),
    )
