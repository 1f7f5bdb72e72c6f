"""What a scored rollout on held-out prompts says of the model."""

from __future__ import annotations

from kit.metrics import pass_at_k
from kit.reports import EvalReport
from kit.samples import Rollout

KS = (1, 2, 4, 8, 16, 32, 64)


def summarize(
    rollout: Rollout,
    *,
    dataset: str,
    n_samples_per_prompt: int,
    temperature: float,
    step: int,
    seconds: float,
) -> EvalReport:
    """Accuracy and pass@k. A response is right where its reward is 1 or more."""
    groups = rollout.groups()
    whole = [g for g in groups if all(s.reward is not None for s in g)]
    right = [sum((s.reward or 0.0) >= 1.0 for s in group) for group in whole]
    return EvalReport(
        dataset=dataset,
        accuracy=rollout.mean_reward(),
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
