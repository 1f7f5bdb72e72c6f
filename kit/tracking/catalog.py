"""What each metric means in plain words, what it should be, and when it deserves a second look."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kit.utils.formatting import number


@dataclass(frozen=True, slots=True)
class Meaning:
    """One metric in words."""

    words: str
    """What it measures."""
    expect: str = ""
    """What it should be in a healthy run."""
    off: Callable[[float], str] = lambda value: ""
    """Why this finite value deserves a second look; empty where it does not."""


def _above(limit: float, why: str) -> Callable[[float], str]:
    return lambda value: why if value > limit else ""


def _below(limit: float, why: str) -> Callable[[float], str]:
    return lambda value: why if value < limit else ""


def _no_gradient(value: float) -> str:
    return "" if value else "no gradient: nothing was learned; are all advantages 0?"


MEANINGS: dict[str, Meaning] = {
    "train/loss": Meaning("what the optimizer lowered", "any finite number; near 0 is usual"),
    "train/pg_loss": Meaning("the policy part of the loss", "near 0 while on-policy; not a score"),
    "train/entropy_loss": Meaning(
        "entropy: how undecided the model is, in nats a token",
        "falls slowly; at 0 it explores no more",
    ),
    "train/pg_clipfrac": Meaning(
        "share of tokens whose update was clipped",
        "0 at the first optimizer step, then below 0.3",
        _above(0.3, "the policy moves too far: lower learning_rate or take fewer steps a rollout"),
    ),
    "train/ppo_kl": Meaning(
        "distance of the new policy from the one the update began with, in nats a token",
        "0 at the first optimizer step, then small",
        lambda value: "far from the rollout's policy" if abs(value) > 0.1 else "",
    ),
    "train/kl_loss": Meaning(
        "distance from the reference model, in nats a token", "0 at the start, grows slowly"
    ),
    "train/grad_norm": Meaning(
        "length of the gradient before clipping", "above 0, without jumps", _no_gradient
    ),
    "train/ess_ratio": Meaning(
        "effective share of tokens: how evenly the probability ratios weigh them",
        "1 on-policy",
        _below(0.5, "a few tokens carry the update"),
    ),
    "train/train_rollout_logprob_abs_diff": Meaning(
        "mean |trainer - engine| log-prob of the same tokens",
        "about 1e-6 in float32, 0.01 in bfloat16",
        _above(0.02, "trainer and engine disagree: call session.check_mismatch(rollout)"),
    ),
    "train/train_rollout_kl": Meaning(
        "KL between engine and trainer, in nats a token",
        "near 0",
        _above(0.02, "trainer and engine disagree: call session.check_mismatch(rollout)"),
    ),
    "train/tis": Meaning("mean importance weight, trainer over engine", "1"),
    "train/tis_clipfrac": Meaning(
        "share of importance weights that were cut",
        "near 0",
        _above(0.3, "trainer and engine disagree: call session.check_mismatch(rollout)"),
    ),
    "train/mis/weight_mean": Meaning("mean importance weight, trainer over engine", "near 1"),
    "train/mis/weight_min": Meaning("smallest importance weight"),
    "train/mis/weight_max": Meaning("largest importance weight"),
    "train/mis/batch_norm": Meaning("what the importance weights were divided by", "near 1"),
    "train/mis/kept_fraction": Meaning(
        "share of tokens that the correction lets train",
        "near 1",
        _below(0.5, "most tokens are rejected: call session.check_mismatch(rollout)"),
    ),
    "train/mis/rs_fraction": Meaning("share of tokens rejected by rs_level", "near 0"),
    "train/mis/veto_fraction": Meaning("share of samples left out by the veto", "near 0"),
    "train/mis/truncate_fraction": Meaning("share of weights above the upper bound", "near 0"),
    "train/opsm/masked_fraction": Meaning("share of tokens left out as off-policy", "near 0"),
    "train/opsm/masked_samples": Meaning("share of samples left out as off-policy", "near 0"),
    "train/opsm/kl_mean": Meaning(
        "how far log-probs fell since generation, in nats a token", "near 0"
    ),
    "train/value_loss": Meaning("squared error of the critic, halved", "falls"),
    "train/value_clipfrac": Meaning("share of values whose update was clipped", "small"),
    "train/value_mean": Meaning("what the critic expects, on average", "follows the returns"),
    "train/return_mean": Meaning("what came, on average", "rises over a run"),
    "train/critic_grad_norm": Meaning("length of the critic's gradient before clipping"),
    "train/lr": Meaning("learning rate", "as configured"),
    "rollout/raw_reward": Meaning("mean reward of the rollout", "rises over a run"),
    "rollout/response_len/mean": Meaning("mean response length in tokens", "no sudden growth"),
    "rollout/truncated_ratio": Meaning(
        "share of responses cut at the length limit",
        "near 0",
        _above(0.3, "many never finish: raise rollout.max_response_len"),
    ),
    "rollout/new_tokens": Meaning("response tokens written for this rollout, used or not"),
    "rollout/aborted": Meaning("responses stopped because the rollout was full"),
    "rollout/partial/continued": Meaning("responses that went on where they had been stopped"),
    "rollout/partial/off_policy_frac": Meaning(
        "share of the rollout's tokens that older weights wrote", "small; the rest is on-policy"
    ),
    "rollout/partial/buffered_groups": Meaning("groups that wait for the next rollout"),
    "rollout/dynamic_sampling/rounds": Meaning("how often prompts were drawn for this step"),
    "rollout/dynamic_sampling/dropped_groups": Meaning(
        "groups left out because their rewards are all equal", "grows as prompts get too easy"
    ),
    "rollout/dynamic_sampling/missing_groups": Meaning(
        "groups that the rollout lacks",
        "0",
        _above(
            0, "too few prompts are solved sometimes: raise rollout.dynamic_sampling_max_rounds"
        ),
    ),
    "rollout/dynamic_sampling/raw_reward": Meaning(
        "mean reward of all groups that were drawn, the dropped ones included", "rises over a run"
    ),
    "rollout/repetition_frac": Meaning("share of responses that repeat themselves", "near 0"),
    "perf/rollout_time": Meaning("seconds until the last response was written"),
    "perf/actor_train_time": Meaning("seconds to train"),
    "perf/update_weights_time": Meaning("seconds to hand over weights"),
    "perf/step_time": Meaning("seconds of the whole step"),
    "perf/tokens_per_gpu_per_sec": Meaning("tokens trained a second"),
    "perf/actor_train_mfu": Meaning("share of the device's arithmetic in use", "0.3 is good"),
}


SHORT = {
    "rollout/raw_reward": "reward",
    "rollout/response_len/mean": "response length, tokens",
    "rollout/truncated_ratio": "truncated share",
    "train/entropy_loss": "entropy, nats a token",
    "train/loss": "loss",
    "train/grad_norm": "gradient norm",
    "train/pg_loss": "policy loss",
    "train/pg_clipfrac": "clipped share",
    "train/ppo_kl": "KL to the rollout policy",
    "train/kl_loss": "KL to the reference",
    "train/train_rollout_logprob_abs_diff": "trainer - engine log-prob",
    "perf/step_time": "seconds a step",
}
"""Names for the titles of plots and headline numbers."""


def meaning(name: str) -> Meaning:
    """What is known about a metric; an empty meaning for one that is not listed."""
    if name in MEANINGS:
        return MEANINGS[name]
    if name.startswith("eval/"):
        return Meaning("mean reward on held-out prompts", "rises over a run")
    if name.startswith("train/mis/"):
        return Meaning("share of importance weights outside the bounds", "near 0")
    if name.startswith("rollout/zero_std/"):
        return Meaning("groups whose rewards are all equal: nothing to learn", "few")
    return Meaning("")


def what_is_off(name: str, value: object) -> str:
    """Why a value deserves a second look, in words; empty where it looks right."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not math.isfinite(value):
        return f"{number(value)}: the update may have broken the weights"
    return meaning(name).off(float(value))


def concerns(metrics: Mapping[str, float]) -> dict[str, str]:
    """Every metric that deserves a second look, and why."""
    return {name: why for name, value in metrics.items() if (why := what_is_off(name, value))}


def short_name(name: str) -> str:
    """The metric in a word or two, for titles."""
    return SHORT.get(name, f"{name[5:]} (evaluation)" if name.startswith("eval/") else name)
