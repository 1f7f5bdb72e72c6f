"""Every metric that is logged: its meaning, its range in a healthy run, when to look twice.

Names are Miles'. A name that is logged anywhere and not listed here fails a test, so that no
metric is shown unexplained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kit.utils.formatting import number


@dataclass(frozen=True, slots=True)
class Meaning:
    """A metric's meaning and healthy range, in words."""

    words: str
    """What it measures."""
    expect: str = ""
    """What it should be in a healthy run."""
    off: Callable[[float], str] = lambda value: ""
    """Why this finite value deserves a second look; empty where it does not."""
    short: str = ""
    """Short name for titles and headline numbers; empty if the full one serves."""


def _above(limit: float, why: str) -> Callable[[float], str]:
    return lambda value: why if value > limit else ""


def _below(limit: float, why: str) -> Callable[[float], str]:
    return lambda value: why if value < limit else ""


_DISAGREE = "trainer and engine disagree: call session.check_mismatch(rollout)"
_TRAIN = {
    "loss": Meaning(
        "what the optimizer lowered", "any finite number; near 0 is usual", short="loss"
    ),
    "pg_loss": Meaning(
        "the policy part of the loss", "near 0 while on-policy; not a score", short="policy loss"
    ),
    "entropy_loss": Meaning(
        "entropy: how undecided the model is, in nats a token",
        "falls slowly; at 0 it explores no more",
        short="entropy, nats a token",
    ),
    "pg_clipfrac": Meaning(
        "share of tokens whose update was clipped",
        "0 at the first optimizer step, then below 0.3",
        _above(0.3, "the policy moves too far: lower learning_rate or take fewer steps a rollout"),
        "clipped share",
    ),
    "ppo_kl": Meaning(
        "distance of the new policy from the one the update began with, in nats a token, while it "
        "trains",
        "0 at the first optimizer step, so always 0 where there is only one; then small",
        lambda value: "far from the rollout's policy" if abs(value) > 0.1 else "",
        "KL to the rollout policy",
    ),
    "update_kl": Meaning(
        "how far the whole update moved the policy: KL from old to new, in nats a token, on a few "
        "samples",
        "0.0001 to 0.01",
        _above(0.05, "the update moved the policy far: lower learning_rate"),
        "KL old to new",
    ),
    "draft_loss": Meaning(
        "what the draft learns by, in nats a token: cross-entropy of the policy's tokens, or KL "
        "from the policy's distribution (training.draft.loss)",
        "falls: cross-entropy towards the policy's own entropy, KL towards 0",
        short="draft's loss",
    ),
    "draft_grad_norm": Meaning(
        "size of the draft's gradient before clipping",
        "steady, around 1",
        _above(
            10.0,
            "the draft is thrown about rather than learning: lower training.draft.learning_rate, "
            "and make the draft anew",
        ),
    ),
    "merge_error": Meaning(
        "what rounding does to the adapters as the engine gets them, as a share of their size",
        "falls as the adapters grow; near 1 only at the first steps",
        short="lost by rounding",
    ),
    "kl_loss": Meaning(
        "distance from the reference model, in nats a token",
        "0 at the start, grows slowly",
        short="KL to the reference",
    ),
    "grad_norm": Meaning(
        "length of the gradient before clipping",
        "above 0, without jumps",
        lambda value: "" if value else "no gradient: nothing was learned; are all advantages 0?",
        "gradient norm",
    ),
    "ess_ratio": Meaning(
        "effective share of tokens: how evenly the probability ratios weigh them",
        "1 on-policy",
        _below(0.8, "some tokens count far more than others: the samples are off-policy"),
    ),
    "train_rollout_logprob_abs_diff": Meaning(
        "mean |trainer - engine| log-prob of the same tokens",
        "about 1e-6 in float32, 0.01 in bfloat16",
        _above(0.02, _DISAGREE),
        "trainer - engine log-prob",
    ),
    "train_rollout_kl": Meaning(
        "KL between engine and trainer, in nats a token", "near 0", _above(0.02, _DISAGREE)
    ),
    "tis": Meaning("mean importance weight, trainer over engine", "1"),
    "tis_clipfrac": Meaning(
        "share of importance weights that were cut", "near 0", _above(0.3, _DISAGREE)
    ),
    "mis/weight_mean": Meaning("mean importance weight, trainer over engine", "near 1"),
    "mis/weight_min": Meaning("smallest importance weight", "not far below 1"),
    "mis/weight_max": Meaning("largest importance weight", "not far above 1"),
    "mis/batch_norm": Meaning("what the importance weights were divided by", "near 1"),
    "mis/kept_fraction": Meaning(
        "share of tokens that the correction lets train",
        "near 1",
        _below(0.5, "most tokens are rejected: call session.check_mismatch(rollout)"),
    ),
    "mis/rs_fraction": Meaning("share of tokens rejected by rs_level", "near 0"),
    "mis/veto_fraction": Meaning("share of samples left out by the veto", "near 0"),
    "mis/truncate_fraction": Meaning("share of weights above the upper bound", "near 0"),
    **{
        f"mis/{mode}_fraction_{bound}": Meaning(
            "share of importance weights outside the bounds", "near 0"
        )
        for mode in ("clip", "mask")
        for bound in ("low", "high")
    },
    "opsm/masked_fraction": Meaning("share of tokens left out as off-policy", "near 0"),
    "opsm/masked_samples": Meaning("share of samples left out as off-policy", "near 0"),
    "opsm/kl_mean": Meaning("how far log-probs fell since generation, in nats a token", "near 0"),
    "routing/overlap": Meaning(
        "share of the recorded experts that the trainer's own routers would choose, by token and "
        "layer",
        "near 1; the rest is what a replay takes away",
        _below(0.8, "both sides route differently: call session.check_mismatch(rollout)"),
        "experts in common",
    ),
    "routing/changed_frac": Meaning(
        "share of tokens that the trainer would send to other experts than recorded, in one layer "
        "or more",
        "small; with training.use_rollout_routing_replay they go to the recorded ones",
        short="tokens of other experts",
    ),
    "routing/contradicted_frac": Meaning(
        "share of tokens and layers of which samples that share them have different records; the "
        "first one's counts",
        "near 0",
        _above(
            0.05,
            "many samples are computed with another's experts: set engine.extra "
            "{disable_radix_cache: false}, so that a prompt is read once",
        ),
    ),
    "value_loss": Meaning("squared error of the critic, halved", "falls"),
    "value_clipfrac": Meaning("share of values whose update was clipped", "small"),
    "value_mean": Meaning("what the critic expects, on average", "follows the returns"),
    "return_mean": Meaning("what came, on average", "rises over a run"),
    "critic_grad_norm": Meaning(
        "length of the critic's gradient before clipping", "above 0, without jumps"
    ),
    "own/*": Meaning("a metric of the session's own loss function, mean over its tokens"),
    "lr": Meaning("learning rate", "as configured"),
    "step": Meaning("optimizer steps so far, over which train/... is logged"),
}
_ROLLOUT = {
    "raw_reward": Meaning("mean reward of the rollout", "rises over a run", short="reward"),
    "reward/*": Meaning("mean of one part of the reward, before weighing", "as the part has it"),
    "response_len/mean": Meaning(
        "mean response length in tokens", "no sudden growth", short="response length, tokens"
    ),
    "response_len/median": Meaning("median response length in tokens", "no sudden growth"),
    "response_len/max": Meaning(
        "longest response in tokens", "below rollout.max_response_len, where all of them finish"
    ),
    "response_len/min": Meaning("shortest response in tokens", "above 0"),
    "truncated_ratio": Meaning(
        "share of responses cut at the length limit",
        "near 0",
        _above(0.3, "many never finish: raise rollout.max_response_len"),
        "truncated share",
    ),
    "failed_ratio": Meaning("share of responses whose reward could not be computed", "0"),
    "new_tokens": Meaning("response tokens written for this rollout, used or not"),
    "aborted": Meaning("responses stopped because the rollout was full"),
    "partial/continued": Meaning("responses that went on where they had been stopped"),
    "partial/off_policy_frac": Meaning(
        "share of the rollout's tokens that older weights wrote", "small; the rest is on-policy"
    ),
    "partial/buffered_groups": Meaning("groups that wait for the next rollout"),
    "dynamic_sampling/rounds": Meaning("how often prompts were drawn for this step"),
    "dynamic_sampling/dropped_groups": Meaning(
        "groups left out because their rewards are all equal", "grows as prompts get too easy"
    ),
    "dynamic_sampling/missing_groups": Meaning(
        "groups that the rollout lacks",
        "0",
        _above(
            0, "too few prompts are solved sometimes: raise rollout.dynamic_sampling_max_rounds"
        ),
    ),
    "dynamic_sampling/raw_reward": Meaning(
        "mean reward of all groups that were drawn, the dropped ones included", "rises over a run"
    ),
    "zero_std/count_*": Meaning("groups whose rewards are all equal: nothing to learn", "few"),
    "zero_std_ratio": Meaning(
        "share of groups whose rewards are all equal: nothing to learn from them",
        "below a half; grows as prompts get too easy",
        _above(
            0.75,
            "most groups teach nothing: choose prompts that are solved sometimes, or set "
            "rollout.dynamic_sampling",
        ),
        "groups without signal",
    ),
    "spec_accept_length": Meaning(
        "tokens that a pass of the model gave where it verified drafts, its own one included",
        "1 is plain decoding; above about 1.5 drafts pay, and more the fewer responses are written "
        "at once",
        _below(
            1.05,
            "drafts are hardly ever right, and only cost time: leave engine.speculative "
            "out, or train the draft",
        ),
        "accepted length",
    ),
    "spec_accept_rate": Meaning(
        "share of the drafted tokens that the model would have written, too",
        "near its start; it falls as the policy leaves a draft that does not learn along",
        short="accepted drafts",
    ),
    "spec_draft_frac": Meaning(
        "share of the passes that verified drafts",
        "1, or what engine.speculative.when: auto found to pay",
        short="passes with drafts",
    ),
    "spec_speedup": Meaning(
        "time that passes without drafts would have taken for these tokens, over that of the "
        "passes that there were; both as the engine measured them beside each other",
        "above 1; 1 where drafts do not pay; not given on a GPU",
        short="speed-up by drafts",
    ),
    "routing/recorded_frac": Meaning(
        "share of tokens whose experts the engine has recorded",
        "1; others choose their experts in the trainer",
        _below(0.99, "requests were retracted, or written by an engine without a record"),
    ),
    "routing/busiest_expert": Meaning(
        "tokens of a layer's busiest expert, over those of each if all were even; of the layer "
        "where that is most",
        "above 1, far below the number of experts",
    ),
    "repetition_frac": Meaning("share of responses that repeat themselves", "near 0"),
    "step": Meaning("rollouts so far, over which rollout/... and perf/... are logged"),
}
_PERF = {
    "rollout_time": Meaning("seconds until the last response was written"),
    "actor_train_time": Meaning("seconds to train"),
    "update_weights_time": Meaning("seconds to hand over weights"),
    "step_time": Meaning("seconds of the whole step", short="seconds a step"),
    "tokens_per_gpu_per_sec": Meaning("response tokens generated a second", short="tokens/s"),
}
_EVAL = {
    "step": Meaning("rollouts before the evaluation, over which eval/... is logged"),
    "*-pass@*": Meaning("chance that at least one of so many responses is right", "rises"),
    "*": Meaning("mean reward on held-out prompts", "rises over a run"),
}
MEANINGS: dict[str, Meaning] = {
    f"{side}/{name}": meaning
    for side, metrics in (
        ("train", _TRAIN), ("rollout", _ROLLOUT), ("perf", _PERF), ("eval", _EVAL)
    )
    for name, meaning in metrics.items()
}  # fmt: skip
"""By name. A `*` stands for what differs within a family of names, such as a data set."""


def meaning(name: str) -> Meaning:
    """Meaning of a metric; an empty one for an unknown name."""
    if name in MEANINGS:
        return MEANINGS[name]
    families = (family for family in MEANINGS if "*" in family and fnmatchcase(name, family))
    return MEANINGS.get(next(families, ""), Meaning(""))


def what_is_off(name: str, value: object) -> str:
    """Reason why a value deserves a second look; "" if it looks right."""
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
    evaluated = f"{name[5:]} (evaluation)" if name.startswith("eval/") else name
    return meaning(name).short or evaluated
