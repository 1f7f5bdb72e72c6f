"""Links of estimator, loss and corrections."""

from __future__ import annotations

from typing import Any

from kit.config import CriticConfig, SessionConfig
from kit.config.training import WHITENED
from kit.miles.links import GRPO, Given, Link, Words, switch, value, words_if

NEAREST = {"dr_grpo": "grpo", "rloo": "grpo", "cispo": "grpo"}
"""Estimators that Miles has not, and the nearest one that it has."""


def _estimator_note(config: SessionConfig, backend: str) -> str:
    name = config.training.advantage_estimator
    if name not in NEAREST:
        return ""
    note = f"Miles has no {name}; {NEAREST[name]} is the nearest"
    if name == "dr_grpo":
        note += "; Miles' example DrGRPO/custom_reducer.py and --disable-grpo-std-normalization "
        note += "make it"
    return note


def _write_estimator(config: SessionConfig, backend: str) -> Words:
    name = config.training.advantage_estimator
    return ["--advantage-estimator", NEAREST.get(name, name)]


def _read_whitens(given: Given) -> bool | None:
    on = given.has("--normalize-advantages")
    usual = given.text("--advantage-estimator", "grpo") in WHITENED
    return None if on == usual else on


def _whitens_note(config: SessionConfig, backend: str) -> str:
    training = config.training
    if training.normalize_advantages is None:
        return ""
    usual = training.advantage_estimator in WHITENED
    return "the same as null" if training.normalize_advantages == usual else ""


def _read_kl_loss(given: Given) -> float:
    coef = given.number("--kl-loss-coef", 0.0)
    if given.has("--use-kl-loss") and not coef:
        given.remarks.append(
            "--use-kl-loss with a coefficient of 0 only logs the KL; the kit loads no reference "
            "model for that"
        )
    if coef and not given.has("--use-kl-loss"):
        given.remarks.append("--kl-loss-coef does nothing without --use-kl-loss")
        return 0.0
    return coef


def _critic(setting: str, flag: str, default: str) -> Link:
    """Link of a setting of the critic, which only `ppo` has."""
    usual = getattr(CriticConfig(), setting)

    def write(config: SessionConfig, backend: str) -> Words:
        found = getattr(config.training.critic, setting)
        is_ppo = config.training.advantage_estimator == "ppo"
        return words_if(is_ppo and found is not None, flag, found)

    def read(given: Given) -> Any:
        if given.text("--advantage-estimator", "grpo") != "ppo":
            return usual
        if isinstance(usual, int):
            return given.whole(flag, usual)
        # Without a rate of its own, Miles' critic has the actor's.
        absent = given.number("--lr", 1e-6) if setting == "learning_rate" else usual
        return given.number(flag, absent)

    def note(config: SessionConfig, backend: str) -> str:
        is_open = getattr(config.training.critic, setting) is None
        return "Miles always clips values" if is_open else ""

    return Link(f"training.critic.{setting}", (flag,), GRPO, write, read, note, default)


ESTIMATOR = [
    Link(
        "training.advantage_estimator",
        ("--advantage-estimator",),
        GRPO,
        _write_estimator,
        lambda given: given.text("--advantage-estimator", "grpo"),
        _estimator_note,
        "grpo",
        "`ppo` needs Miles' Megatron trainer",
    ),
    switch("training.grpo_std_normalization", "--disable-grpo-std-normalization", GRPO, off=True),
    Link(
        "training.normalize_advantages",
        ("--normalize-advantages",),
        GRPO,
        lambda c, backend: words_if(c.training.whitens, "--normalize-advantages"),
        _read_whitens,
        _whitens_note,
        "off",
        "`null` is on for `ppo` and the `reinforce_plus_plus` ones, as Miles asks for",
    ),
    value("training.gamma", "--gamma", GRPO, 1.0),
    value("training.lambd", "--lambd", GRPO, 1.0),
    _critic("learning_rate", "--critic-lr", "the actor's"),
    _critic("warmup_rollouts", "--num-critic-only-steps", "0"),
    _critic("value_clip", "--value-clip", "0.2"),
    value("training.eps_clip", "--eps-clip", GRPO, 0.2, explicit=True),
    value("training.eps_clip_high", "--eps-clip-high", GRPO, None),
    value("training.eps_clip_c", "--eps-clip-c", GRPO, None),
    Link(
        "training.kl_loss_coef",
        ("--kl-loss-coef", "--use-kl-loss", "--ref-load"),
        GRPO,
        lambda c, backend: words_if(
            c.training.kl_loss_coef, "--use-kl-loss", "--kl-loss-coef", c.training.kl_loss_coef
        ),
        _read_kl_loss,
        default="0.0, off",
        remark="the kit's reference model is the model it starts from",
    ),
    value("training.kl_coef", "--kl-coef", GRPO, 0.0),
    value("training.kl_loss_type", "--kl-loss-type", GRPO, "k1", explicit=True),
    value("training.ref_update_interval", "--ref-update-interval", GRPO, None, absent=0),
    value("training.entropy_coef", "--entropy-coef", GRPO, 0.0, explicit=True),
    switch("training.calculate_per_token_loss", "--calculate-per-token-loss", GRPO),
    switch("training.use_rollout_logprobs", "--use-rollout-logprobs", GRPO),
    Link(
        "training.true_on_policy",
        (
            "--true-on-policy-mode",
            "--deterministic-mode",
            "--sglang-enable-deterministic-inference",
            "--sglang-rl-on-policy-target",
        ),
        GRPO,
        lambda c, backend: words_if(
            c.training.true_on_policy,
            "--true-on-policy-mode",
            "--deterministic-mode",
            "--sglang-enable-deterministic-inference",
            "--sglang-rl-on-policy-target",
            "fsdp",
        ),
        lambda given: given.has("--true-on-policy-mode"),
        default="off",
        remark="Miles has it with its FSDP backend and FlashAttention 3",
    ),
    switch("training.use_rollout_routing_replay", "--use-rollout-routing-replay", GRPO),
    Link(
        "training.use_routing_replay",
        ("--use-routing-replay",),
        GRPO,
        lambda c, backend: words_if(c.training.use_routing_replay, "--use-routing-replay"),
        lambda given: (
            given.has("--use-routing-replay") and not given.has("--use-rollout-routing-replay")
        ),
        default="off",
        remark="Miles switches it on with --use-rollout-routing-replay; here they exclude each "
        "other",
    ),
    Link(
        "training.use_tis",
        ("--use-tis",),
        GRPO,
        lambda c, backend: words_if(bool(c.training.use_tis), "--use-tis"),
        lambda given: given.has("--use-tis") or None,
        default="off",
    ),
    value("training.tis_clip", "--tis-clip", GRPO, 2.0),
    value("training.tis_clip_low", "--tis-clip-low", GRPO, 0.0),
    Link(
        "training.opsm_delta",
        ("--opsm-delta", "--use-opsm"),
        GRPO,
        lambda c, backend: words_if(
            c.training.opsm_delta is not None, "--use-opsm", "--opsm-delta", c.training.opsm_delta
        ),
        lambda given: given.number("--opsm-delta", 1e-4) if given.has("--use-opsm") else None,
        default="1e-4, off",
    ),
]
