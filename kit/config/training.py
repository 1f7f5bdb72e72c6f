"""`TrainingConfig`: batches, optimizer, estimator, loss and corrections."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kit.config.section import Above0, Fraction, NonNegative, Positive, Rate, Section

Estimator = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "gspo",
    "cispo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "ppo",
]
Optimizer = Literal["adamw", "adamw8bit"]
MOMENTS_BYTES: dict[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Bytes that an optimizer keeps of a weight, two moments, in 8 bits with their share of scales."""
COMPARES_A_GROUP = {"grpo", "dr_grpo", "rloo", "gspo", "cispo", "reinforce_plus_plus_baseline"}
"""Estimators whose advantage is a comparison with the other samples of the prompt."""
WHITENED = {"reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"}
"""Estimators whose advantages are normalised over the batch where the setting is left open."""

EQUAL_AT_RATIO_1 = ("grpo", "gspo", "cispo")
"""Estimators whose gradients are equal while the probability ratio is 1: they clip differently."""
CLIP_SETTINGS = ("eps_clip", "eps_clip_high", "eps_clip_c")
RATIO_STAYS_1 = (
    "an update makes one optimizer step, so the probability ratio stays 1 and nothing is clipped. "
    "To see them differ, set training.global_batch_size below the samples of a rollout, or "
    "training.epochs_per_rollout above 1"
)


class CriticConfig(Section):
    """The value model of `advantage_estimator: ppo`. Other estimators have none."""

    learning_rate: float = Field(default=1e-5, ge=0.0, lt=1.0)
    """AdamW's, of the critic alone."""
    warmup_rollouts: int = Field(default=0, ge=0)
    """Train only the critic for so many steps, so that the first advantages mean something."""
    value_clip: Above0 | None = 0.2
    """How far a value may move in one update; None does not clip."""
    clip_grad: NonNegative = 1.0
    """Largest gradient norm of the critic; 0 does not clip."""


class DraftConfig(Section):
    """The draft of `engine.speculative`, trained beside the policy on what it wrote.

    It learns from all response tokens of a batch, at the sampling temperature, by an optimizer of
    its own; an EAGLE head or the model's own MTP layer from all but the first of each response,
    which no draft gives. The policy is what it would be without it.
    """

    loss: Literal["cross_entropy", "forward_kl"] = "cross_entropy"
    """What it learns from. `cross_entropy`: the tokens that the policy wrote. `forward_kl`: the
    policy's whole distribution in each of their places, as the update's own pass has it."""

    learning_rate: float = Field(default=1e-4, ge=0.0, lt=1.0)
    """AdamW's, of the draft alone; constant."""
    clip_grad: NonNegative = 1.0
    """Largest gradient norm of the draft; 0 does not clip."""
    mtp_loss_scaling_factor: Above0 | None = None
    """Factor on the loss of `mtp`; None takes 0.2, as Miles does. The draft has an optimizer of its
    own, so that it counts where gradients are clipped (`clip_grad`) and little else:
    AdamW's steps are the same for every factor."""
    interval: Positive = 1
    """The engine gets the draft's weights with the policy's every so many updates."""

    @property
    def mtp_factor(self) -> float:
        """`mtp_loss_scaling_factor`, or what None stands for."""
        return 0.2 if self.mtp_loss_scaling_factor is None else self.mtp_loss_scaling_factor


class MisConfig(Section):
    """Importance weights between trainer and engine, and which tokens they reject."""

    level: Literal["token", "sequence", "geometric"] = "token"
    """What a ratio is of: a token, a whole response, or its geometric mean by token."""
    mode: Literal["truncate", "clip", "mask"] = "truncate"
    """truncate: at most `high`; clip: into [low, high]; mask: what is outside does not train."""
    high: Above0 = 2.0
    """Largest weight: above it a weight is lowered to it, or its token left out."""
    low: Above0 | None = None
    """None takes 1 / high."""
    veto: Above0 | None = None
    """Leave out a sample if one of its tokens has a ratio below this (1e-4 is usual)."""
    rs_level: Literal["token", "sequence", "geometric"] | None = None
    """Reject at this level as well, through the mask only."""
    rs_high: Above0 | None = None
    """None takes `high`."""
    rs_low: Above0 | None = None
    """None takes `low`."""
    batch_normalize: bool = False
    """Divide the weights by their mean over the batch."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        pairs = [("", self.low, self.high)]
        if self.rs_level:
            pairs.append(("rs_", self.rs_low or self.low, self.rs_high or self.high))
        for prefix, low, high in pairs:
            if (low if low is not None else 1 / high) > high:
                raise ValueError(
                    f"training.mis: {prefix}low ({low or f'1 / {prefix}high'}) is above "
                    f"{prefix}high ({high}). What to do: {prefix}high is 1 or more as a rule, and "
                    f"{prefix}low below it."
                )
        if self.rs_level is None and (self.rs_low or self.rs_high):
            raise ValueError(
                "training.mis has rs_low or rs_high, but no rs_level, so nothing would be "
                "rejected. What to do: set rs_level: token, sequence or geometric."
            )
        return self


Conflict = tuple[object, str, str]
"""(true where settings exclude each other, why, what to do)."""


class TrainingConfig(Section):
    """Batches, optimizer, estimator, loss and corrections."""

    num_rollout: Positive = 60
    """Steps of a whole training run: each generates once and updates at least once."""
    rollout_batch_size: Positive = 16
    """Prompts a step."""
    n_samples_per_prompt: Positive = 8
    """Responses to each prompt: the group that rewards are compared in."""
    global_batch_size: Positive | None = None
    """Samples an optimizer step; None takes the whole rollout. Must divide the rollout."""
    epochs_per_rollout: Positive = 1
    """How often an update goes over the rollout; from the second time on in a new order."""
    learning_rate: float = Field(default=1e-6, ge=0.0, lt=1.0)
    """AdamW's, after the warm-up."""
    optimizer: Optimizer = "adamw"
    """adamw keeps its two moments of each weight in float32; adamw8bit in 8 bits (torchao), a
    quarter of that. One trainer and all weights."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate after the warm-up, over `num_rollout` steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises from zero."""
    min_learning_rate: NonNegative = 0.0
    """Where linear and cosine end, after `num_rollout` steps."""
    adam_beta1: Rate = 0.9
    """Memory of the mean gradient."""
    adam_beta2: Rate = 0.98
    """Memory of the squared gradient."""
    adam_eps: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the squared gradient."""
    weight_decay: NonNegative = 0.0
    """Share of each weight, times the learning rate, that a step takes away."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 does not clip."""
    advantage_estimator: Estimator = "grpo"
    """How rewards become advantages, and which loss goes with them."""
    grpo_std_normalization: bool = True
    """Divide a group's centred rewards by their standard deviation (grpo, gspo, cispo)."""
    normalize_advantages: bool | None = None
    """Mean 0 and variance 1 over all trained tokens of the batch; None: for ppo and the
    reinforce_plus_plus ones only."""
    gamma: Fraction = 1.0
    """Discount by token (ppo, reinforce_plus_plus)."""
    lambd: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Lambda of the generalised advantage estimation (ppo)."""
    draft: DraftConfig | None = None
    """Train the draft of `engine.speculative` along; null leaves it as its files have it."""
    critic: CriticConfig = CriticConfig()
    eps_clip: Fraction = 0.2
    """How far below 1 the probability ratio counts."""
    eps_clip_high: Above0 | None = 0.28
    """Upper clip range (clip-higher); None takes eps_clip."""
    eps_clip_c: Annotated[float, Field(gt=1.0)] | None = None
    """Dual clip: bounds the loss of a negative advantage at this multiple; None leaves it open."""
    kl_loss_coef: NonNegative = 0.0
    """Weight of the KL to the reference model in the loss; above 0 loads a reference model."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the reference model in the reward; above 0 loads a reference model."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """Which estimator of the KL, in the loss and in the reward."""
    ref_update_interval: int = Field(default=0, ge=0)
    """Copy the policy into the reference model every so many updates; 0 never."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    calculate_per_token_loss: bool = False
    """Average over all tokens of a batch; otherwise over samples, each by its own length."""
    true_on_policy: bool = False
    """Compute with the same operators in engine and trainer, so that their log-probs are equal to
    the bit and the first probability ratio is exactly 1. For Llama, Qwen2 and Qwen3; Qwen3's
    mixtures of experts on a CPU only."""
    use_rollout_routing_replay: bool = False
    """Send each token to the experts that the engine sent it to, in every pass of the policy. The
    router learns on: its scores are its own. For mixtures of experts."""
    use_routing_replay: bool = False
    """Send each token to the experts of the pass that computes the old log-probs, in the passes of
    the update after it. Has no effect where an update makes one optimizer step. For mixtures of
    experts."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs as the old ones of the ratio, not the trainer's."""
    use_tis: bool | None = None
    """Weigh each token by the ratio of trainer to engine, truncated at `tis_clip`. None does so
    where `engine.quantization` gives the engine other weights and nothing else corrects for it."""
    tis_clip: Above0 = 2.0
    """Largest weight of a token under `use_tis`."""
    tis_clip_low: NonNegative = 0.0
    """Smallest weight of a token under `use_tis`."""
    mis: MisConfig | None = None
    """Importance weights at token, sequence or geometric level, with rejection; null does none."""
    opsm_delta: NonNegative | None = None
    """Leave out samples of negative advantage whose log-probs fell by more than this a token since
    they were generated (off-policy sequence masking); null does not."""
    max_tokens_per_gpu: Positive | None = None
    """Tokens packed into one micro-batch. It bounds memory; the result does not depend on it.
    None: 16384, or what one longest sample needs where that is more."""
    optimizer_cpu_offload: bool | None = None
    """Keep the trainer's float32 weights and its optimizer in host memory, and step there: for
    small cards. None does so where nothing else fits. GPU only."""
    num_trainers: Positive = 1
    """Trainer processes, each with a GPU or some cores, that share the model through FSDP2."""

    @property
    def rollout_size(self) -> int:
        """Samples per step: prompts times samples per prompt."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per update, if no group is dropped."""
        batch = self.global_batch_size or self.rollout_size
        return self.rollout_size // batch * self.epochs_per_rollout

    def as_felt(self) -> TrainingConfig:
        """Settings that compute the same update: what it does not feel has its usual value.

        With one optimizer step the probability ratio stays 1: clip ranges have no effect, and grpo,
        gspo and cispo have one gradient.
        """
        if self.steps_per_rollout > 1 or self.use_rollout_logprobs:
            return self
        without_effect = (*CLIP_SETTINGS, "use_routing_replay")
        usual = {name: type(self).model_fields[name].default for name in without_effect}
        estimator = self.advantage_estimator
        weighs_tokens = bool(self.use_tis) or self.mis is not None
        if estimator == "cispo" or (estimator == "gspo" and not weighs_tokens):
            usual["advantage_estimator"] = "grpo"
        return self.model_copy(update=usual)

    @property
    def has_reference(self) -> bool:
        """Whether a KL term needs a reference model."""
        return self.kl_loss_coef > 0 or self.kl_coef > 0

    @property
    def corrects_for_engine(self) -> bool:
        """Whether the loss weighs by the ratio of trainer to engine, in one way or another."""
        return bool(self.use_tis or self.mis or self.use_rollout_logprobs)

    @property
    def replays_routing(self) -> bool:
        """Whether passes of the policy may be told which experts to take."""
        return self.use_rollout_routing_replay or self.use_routing_replay

    @property
    def whitens(self) -> bool:
        """Whether advantages are normalised over the batch."""
        if self.normalize_advantages is None:
            return self.advantage_estimator in WHITENED
        return self.normalize_advantages

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        batch, rollout_size = self.global_batch_size, self.rollout_size
        if batch is not None and rollout_size % batch:
            raise ValueError(
                f"training.global_batch_size is {batch}, which does not divide the rollout of "
                f"{rollout_size} samples (rollout_batch_size {self.rollout_batch_size} x "
                f"n_samples_per_prompt {self.n_samples_per_prompt}). What to do: choose a "
                f"divisor of {rollout_size}, such as {_nearest_divisor(rollout_size, batch)}."
            )
        if self.n_samples_per_prompt == 1 and self.advantage_estimator in COMPARES_A_GROUP:
            raise ValueError(
                f"training.n_samples_per_prompt is 1: {self.advantage_estimator} compares the "
                f"samples of one prompt, so every advantage would be 0 and nothing would train. "
                f"What to do: set it to 2 or more (8 is usual), or take reinforce_plus_plus or ppo."
            )
        if self.num_trainers > 1 and (batch or rollout_size) % self.num_trainers:
            raise ValueError(
                f"training.num_trainers is {self.num_trainers}, which does not divide the "
                f"{batch or rollout_size} samples of an optimizer step. What to do: change "
                f"num_trainers or global_batch_size."
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.min_learning_rate {self.min_learning_rate} is above "
                f"learning_rate {self.learning_rate}. What to do: lower it."
            )
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        conflicts = self._conflicts, self._routing_conflicts, self._optimizer_conflicts
        for wrong, why, fix in (conflict for of in conflicts for conflict in of()):
            if wrong:
                raise ValueError(f"{why}. What to do: {fix}.")
        return self

    def _routing_conflicts(self) -> list[Conflict]:
        own = self.use_routing_replay
        return [
            (
                self.use_rollout_routing_replay and own,
                "training.use_rollout_routing_replay and training.use_routing_replay are both set: "
                "a token would have to go to the engine's experts and to the trainer's",
                "keep use_rollout_routing_replay, which makes the trainer agree with the engine "
                "and with itself",
            ),
            (
                self.true_on_policy and self.replays_routing,
                "training.true_on_policy makes every router of the trainer choose as the engine's, "
                "so there is nothing to replay",
                "leave the replay out",
            ),
            (
                own and self.use_rollout_logprobs,
                "training.use_routing_replay replays the pass that computes old log-probs, and "
                "with training.use_rollout_logprobs there is none",
                "take use_rollout_routing_replay, or leave one of them out",
            ),
        ]

    def _optimizer_conflicts(self) -> list[Conflict]:
        return [
            (
                self.optimizer == "adamw8bit" and self.draft,
                "training.optimizer is adamw8bit, and training.draft is set: a draft was never "
                "trained beside it",
                "leave one of them out",
            ),
            (
                self.optimizer == "adamw8bit" and self.num_trainers > 1,
                "training.optimizer is adamw8bit and training.num_trainers "
                f"{self.num_trainers}: each would have blocks of its own, which a checkpoint could "
                "not give to another number of them",
                "set num_trainers: 1, or optimizer: adamw",
            ),
            (
                self.optimizer == "adamw8bit" and self.optimizer_cpu_offload,
                "training.optimizer is adamw8bit, and training.optimizer_cpu_offload is set: a "
                "step in host memory was never tried with it",
                "leave one of them out",
            ),
        ]

    def _conflicts(self) -> list[Conflict]:
        estimator = self.advantage_estimator
        return [
            (
                self.kl_loss_coef and self.kl_coef,
                "training.kl_loss_coef and training.kl_coef are both above 0: the KL would count "
                "twice, in the loss and in the reward",
                "set one of them to 0",
            ),
            (
                self.use_tis and self.mis,
                "training.use_tis and training.mis are both set: both weigh by the ratio of "
                "trainer to engine",
                "keep one; mis with level: token, mode: truncate is use_tis",
            ),
            (
                self.use_rollout_logprobs and (self.use_tis or self.mis),
                "training.use_rollout_logprobs makes the engine's log-probs the old ones, so the "
                "ratio of the loss corrects for the engine already, and use_tis or mis would do "
                "so again",
                "set use_rollout_logprobs: false, or leave the correction out",
            ),
            (
                self.ref_update_interval and not self.has_reference,
                "training.ref_update_interval is set, but there is no reference model",
                "set kl_loss_coef or kl_coef above 0",
            ),
            (
                estimator == "dr_grpo" and self.calculate_per_token_loss,
                "training.calculate_per_token_loss averages over tokens, but dr_grpo divides by a "
                "constant length",
                "set calculate_per_token_loss: false, or advantage_estimator: grpo",
            ),
            (
                estimator == "cispo" and self.eps_clip_c,
                "training.eps_clip_c is set, but cispo's loss has no second clip",
                "set eps_clip_c: null",
            ),
            (
                estimator != "ppo" and self.critic != CriticConfig(),
                f"training.critic is set, but {estimator} has no critic",
                "set advantage_estimator: ppo, or leave the section out",
            ),
            (
                estimator not in ("ppo", "reinforce_plus_plus") and self.gamma != 1,
                f"training.gamma is {self.gamma}, but {estimator} gives every token of a sample "
                f"the same advantage",
                "set gamma: 1.0, or take ppo or reinforce_plus_plus",
            ),
            (
                estimator != "ppo" and self.lambd != 1,
                f"training.lambd is {self.lambd}, but only ppo has a lambda",
                "set lambd: 1.0, or advantage_estimator: ppo",
            ),
            (
                self.use_tis and self.tis_clip_low > self.tis_clip,
                f"training.tis_clip_low {self.tis_clip_low} is above tis_clip {self.tis_clip}",
                "swap them",
            ),
        ]


def _nearest_divisor(number: int, target: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - target))
