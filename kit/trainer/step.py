"""`TrainStep`: the optimizer steps of an update.

Each adds up the gradients of all micro-batches, refuses what is not finite, clips and steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
import torch.distributed as dist

from kit.errors import StackError
from kit.messages import TrainBatch
from kit.models.moe import Recorded
from kit.models.packing import Packed, pack, to_device
from kit.trainer.backend import LossFn, TrainerBackend
from kit.trainer.batch import flat, optimizer_steps, rank_share, worth_sharing
from kit.trainer.learner import CRITIC, DRAFT, POLICY, REFERENCE, LearnerSettings, learner_settings
from kit.trainer.loss import (
    Corrections,
    LossSettings,
    ScoredBatch,
    TokenInputs,
    draft_loss,
    finish,
    policy_loss,
    routing_sums,
    token_terms,
    value_loss,
)
from kit.trainer.offload import out_of_memory
from kit.trainer.process_group import NEVER, CancelToken
from kit.trainer.scoring import LogProbScorer, TokenScores
from kit.trainer.settings import TrainerSettings
from kit.trainer.state import TrainerState


@dataclass(slots=True)
class MetricAccumulator:
    """Metrics summed over micro-batches on the device, and over ranks at the end, in float64.

    Reading a number makes the host wait for the device; here that happens once an optimizer step.
    """

    device: torch.device
    _names: tuple[str, ...] = field(default=())
    _total: torch.Tensor | None = None

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the values of a micro-batch; the same names each time."""
        self._names = tuple(sorted(values))
        row = torch.stack([values[name].double() for name in self._names])
        self._total = row if self._total is None else self._total + row

    def total(self) -> dict[str, float]:
        """The sums over all ranks; all of them call."""
        assert self._total is not None
        total = self._total.cpu()
        dist.all_reduce(total)
        return dict(zip(self._names, total.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Trains every network that the settings name on a batch."""

    backend: TrainerBackend
    scorer: LogProbScorer
    state: TrainerState
    settings: TrainerSettings

    def update(self, batch: TrainBatch, cancel: CancelToken) -> list[dict[str, float]]:
        """All optimizer steps over a batch: the metrics of each. What fails leaves it half done."""
        training, steps = self.settings.training, self.steps_of(batch)
        if training.replays_routing and not self.backend.experts[0]:
            raise StackError(
                "Experts are to be replayed, and the model has no routers that can be told them.",
                why="It is dense, or weighs its experts in a way that the trainer does not know.",
                fix="call session.configure with use_rollout_routing_replay=False and "
                "use_routing_replay=False.",
            )
        # With one optimizer step the old weights are the present ones: nothing to compute.
        moves = len(steps) > 1 and not training.use_rollout_logprobs
        models = [POLICY] if moves or Corrections.need_old(training) else []
        taken: dict[int, Any] | None = {} if training.use_routing_replay and models else None
        old, reference = self.log_probs_before(batch, models, taken, cancel=cancel)
        if taken:
            own = [taken[i] for i in range(len(batch))]
            batch = replace(batch, experts=own, replayed=True)
        corrections = Corrections.of(batch, old, training)
        scored = ScoredBatch(batch, old if moves else None, reference, corrections)
        meter = self._meter(batch, steps, old)
        rows = [self._step(scored, part, cancel, meter) | corrections.metrics for part in steps]
        after = self._log_probs_of(batch, meter.few)
        moved = {"train/update_kl": meter.kl(after, batch.loss_masks)}
        return [row | moved for row in rows]

    def _meter(
        self, batch: TrainBatch, steps: Sequence[Sequence[int]], old: list[torch.Tensor] | None
    ) -> UpdateMeter:
        """What measures how far the update moves the policy, by a few samples.

        In float32 the update's own forward pass tells what they were before. In bfloat16 its
        kernels round otherwise than those of the pass afterwards, by as much as an update moves.
        """
        few = spread(batch.tokens)
        if self.settings.dtype != "float32":
            return UpdateMeter(few, self._log_probs_of(batch, few))
        if old:
            return UpdateMeter(few, {i: old[i].cpu() for i in few})
        first = steps[0]
        return UpdateMeter([first[i] for i in spread([batch.tokens[i] for i in first])])

    def _log_probs_of(self, batch: TrainBatch, few: Sequence[int]) -> dict[int, torch.Tensor]:
        """Log-probs of the response tokens of a few samples, under the present weights."""
        lengths = [batch.response_lengths[i] for i in few]
        experts = [batch.experts[i] for i in few] if batch.experts and batch.replayed else None
        (scores,) = self.scorer.score([batch.tokens[i] for i in few], lengths, experts=experts)
        return {i: logp_T.cpu() for i, logp_T in zip(few, scores.log_probs, strict=True)}

    def log_probs_before(
        self,
        batch: TrainBatch,
        models: Sequence[str] = (),
        taken: dict[int, Any] | None = None,
        *,
        cancel: CancelToken = NEVER,
    ) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
        """(of the policy, if it is named; of the reference, where the loss has a KL), by sample.

        In the micro-batches of the update and with its operations: other shapes, or the kernels of
        a pass without gradients, round otherwise, and no ratio would begin at 1. `taken` gets the
        experts that the policy sent each sample to.
        """
        names = {*models, REFERENCE} if self.settings.training.kl_loss_coef else set(models)
        known = [name for name in (POLICY, REFERENCE) if name in names and self.backend.has(name)]
        if not known:
            return None, None
        scores = self.score_as_updated(batch, known, cancel, taken)
        by_model = {name: s.log_probs for name, s in zip(known, scores, strict=True)}
        return by_model.get(POLICY), by_model.get(REFERENCE)

    def score_as_updated(
        self,
        batch: TrainBatch,
        models: Sequence[str],
        cancel: CancelToken = NEVER,
        taken: dict[int, Any] | None = None,
    ) -> list[TokenScores]:
        """Scores of a batch's samples as the forward passes of the next update would give them."""
        try:
            return self.scorer.score(
                batch.tokens,
                batch.response_lengths,
                models,
                parts=self._parts(batch, taken),
                dropout=True,
                gradient=True,
                cancel=cancel,
            )
        finally:
            self.backend.recover()  # the gradients that these passes were ready for do not come

    def _parts(
        self, batch: TrainBatch, taken: dict[int, Any] | None
    ) -> Iterator[tuple[list[int], Packed]]:
        """All samples in the micro-batches of the next update, of all ranks.

        After its pass, each of them adds to `taken` the experts that its samples were sent to.
        """
        world, limit = self._division()
        share = worth_sharing(batch.tokens, batch.response_lengths, self.backend.device)
        done: set[int] = set()
        for part, rank in product(self.steps_of(batch), range(world)):
            for members in rank_share(batch, part, world, limit, rank, share=share):
                if not done.issuperset(members):
                    recorded = None if taken is None else self._recording(len(members))
                    packed = self._packed(batch, members, share=share, recorded=recorded)
                    yield members, packed
                    done.update(members)
                    if taken is not None and packed.experts:
                        rows = zip(members, packed.rows_of, strict=True)
                        taken |= {i: packed.experts.of_rows(of[:-1]) for i, of in rows}

    def _recording(self, samples: int) -> Recorded:
        """No records of so many samples, so that a pass writes down its own choice."""
        return Recorded([None] * samples, *self.backend.experts)

    def _division(self) -> tuple[int, int]:
        """(ranks, tokens of a micro-batch)."""
        return self.settings.training.num_trainers, self.settings.max_tokens

    def _packed(
        self,
        batch: TrainBatch,
        members: Sequence[int],
        *,
        share: bool,
        recorded: Recorded | None = None,
    ) -> Packed:
        rows = [batch.tokens[i] for i in members], [batch.response_lengths[i] for i in members]
        if recorded is None and batch.experts and self.backend.experts[0]:
            records = [batch.experts[i] for i in members]
            recorded = Recorded(records, *self.backend.experts, followed=batch.replayed)
        return pack(*rows, share=share, experts=recorded).to(self.backend.device)

    def steps_of(self, batch: TrainBatch) -> list[list[int]]:
        """Which samples each optimizer step of the next update takes."""
        seed = f"{self.settings.seed} {self.state.updates}"
        return optimizer_steps(len(batch), self.settings.training, seed)

    def loss_settings(self, batch: TrainBatch, part: Sequence[int]) -> LossSettings:
        """What the loss of an optimizer step over these samples needs to know of all of them."""
        tokens = sum(sum(batch.loss_masks[i]) for i in part)
        return LossSettings(
            self.settings.training,
            len(part),
            tokens,
            self.settings.max_response_len,
            self.settings.loss,
        )

    def _networks(self) -> dict[str, LearnerSettings]:
        """Networks that learn: settings may be restored that name one which was not started."""
        settings = learner_settings(self.settings.training)
        return {name: own for name, own in settings.items() if self.backend.has(name)}

    @property
    def _taught(self) -> tuple[str, ...]:
        """Networks that learn from the policy's distributions, not from its tokens."""
        draft = self.settings.training.draft
        return (DRAFT,) if draft and draft.loss == "forward_kl" else ()

    @property
    def _draft_factor(self) -> float:
        """Factor on the draft's loss."""
        draft, is_mtp = self.settings.training.draft, self.settings.draft_head == "mtp"
        return draft.mtp_factor if draft and is_mtp else 1.0

    def _step(
        self, scored: ScoredBatch, part: Sequence[int], cancel: CancelToken, meter: UpdateMeter
    ) -> dict[str, float]:
        """One optimizer step over these samples: its metrics."""
        networks = self._networks()
        updates, warms_up = self.state.updates, CRITIC in networks
        learning = {n for n, own in networks.items() if not warms_up or updates >= own.first_update}
        self.backend.recover()  # what broke off half-way leaves gradients behind
        with out_of_memory(self.settings.max_tokens, self.backend.recover):
            sums = self._backward(scored, part, learning, cancel, meter)
        metrics = finish(sums.total())
        norms = self.backend.clip_gradients()
        metrics |= {own.norm_metric: norms[name] for name, own in networks.items()}
        # A step with one of these that is no number would destroy the weights.
        checked = [name for own in networks.values() for name in (own.loss_metric, own.norm_metric)]
        wrong = {name: metrics[name] for name in checked if not math.isfinite(metrics[name])}
        if wrong:
            self.backend.recover()
            raise refused(wrong, self._first_non_finite_token(scored, part))
        rates = {name: networks[name].rate(self.state.optimizer_steps) for name in learning}
        self.backend.optim_step(rates)
        self.state.optimizer_steps += POLICY in learning
        return metrics | {"train/lr": rates.get(POLICY, 0.0)}

    def _backward(
        self,
        scored: ScoredBatch,
        part: Sequence[int],
        learning: set[str],
        cancel: CancelToken,
        meter: UpdateMeter,
    ) -> MetricAccumulator:
        """Add up the gradients of an optimizer step, micro-batch by micro-batch."""
        batch = scored.batch
        device, rank = self.backend.device, self.settings.rank
        settings, sums = self.loss_settings(batch, part), MetricAccumulator(device)
        share = worth_sharing(batch.tokens, batch.response_lengths, device)
        parts = rank_share(batch, part, *self._division(), rank, share=share)
        for number, members in enumerate(parts):
            cancel.check()
            indices = members or [part[0]]
            packed = self._packed(batch, indices, share=share)
            inputs = scored.inputs(indices, device, counts=bool(members))
            losses = self._losses(
                batch, indices, packed, inputs, settings, meter if members else None, part=part
            )
            losses = {n: loss if n in learning else _muted(loss) for n, loss in losses.items()}
            last = number == len(parts) - 1
            temperature = self.settings.temperature
            sums.add(
                self.backend.forward_backward(
                    packed, temperature, losses, last=last, taught=self._taught
                )
            )
        cancel.check()
        return sums

    def _losses(
        self,
        batch: TrainBatch,
        indices: Sequence[int],
        packed: Packed,
        inputs: TokenInputs,
        settings: LossSettings,
        meter: UpdateMeter | None,
        *,
        part: Sequence[int],
    ) -> dict[str, LossFn]:
        """The loss of each network for one micro-batch of an optimizer step over `part`, by name.

        `meter` is None where the samples only keep other ranks company.
        """

        def of_policy(out: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if meter:
                meter.note(indices, batch.response_lengths, out[0])
            loss, sums = policy_loss(out[0], out[1], packed.sample_R, inputs, settings)
            return loss, sums | routing_sums(packed, counts=meter is not None)

        losses: dict[str, LossFn] = {POLICY: of_policy}
        if CRITIC in self._networks():
            if batch.values is None or batch.returns is None:
                raise StackError(
                    "The batch has no values for the critic to learn.",
                    fix="make it with `session.advantages(rollout)` of this session.",
                )
            losses[CRITIC] = partial(
                value_loss,
                old_value_R=to_device(flat(batch.values, indices), self.backend.device),
                return_R=to_device(flat(batch.returns, indices), self.backend.device),
                weight_R=settings.weights(inputs.mask_R, packed.sample_R),
                value_clip=settings.training.critic.value_clip,
            )
        if DRAFT in self._networks():
            first = int(self.settings.draft_head is not None)  # which no head drafts
            tokens = sum(max(batch.response_lengths[i] - first, 0) for i in part)
            counts = meter is not None

            def of_draft(out: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                loss_R = out[0] if self._taught else -out[0]
                return draft_loss(loss_R, tokens, counts=counts, factor=self._draft_factor)

            losses[DRAFT] = of_draft
        return losses

    def _first_non_finite_token(self, scored: ScoredBatch, part: Sequence[int]) -> str:
        """The first token of an optimizer step with a number that is not finite, in words.

        Empty where every token's are finite: then the gradient is what went wrong. All ranks call.
        """
        batch, settings = scored.batch, self.loss_settings(scored.batch, part)
        samples = [batch.tokens[i] for i in part], [batch.response_lengths[i] for i in part]
        records = [batch.experts[i] for i in part] if batch.experts and batch.replayed else None
        for members, packed in self.scorer.parts(*samples, experts=records):
            indices = [part[i] for i in members]
            inputs = scored.inputs(indices, self.backend.device)
            logp_R, entropy_R = self.backend.log_probs(packed, self.settings.temperature)
            terms, _ = token_terms(logp_R, entropy_R, packed.sample_R, inputs, settings)
            numbers = {
                "advantage": inputs.advantage_R,
                "log-prob": logp_R,
                "log-prob in the engine": inputs.rollout_logp_R,
                "log-prob before": inputs.old_logp_R,
                "log-prob of the reference": inputs.ref_logp_R,
                "share of the loss": terms.loss(settings.training),
            }
            where = [(i, t) for i in indices for t in range(batch.response_lengths[i])]
            active_R = inputs.mask_R != 0
            for name, value_R in numbers.items():
                if value_R is None:
                    continue
                wrong = (~value_R.isfinite() & active_R).nonzero()
                if len(wrong):
                    row = int(wrong[0])
                    index, token = where[row]
                    return (
                        f"sample {index} of the batch, token {token} of its response: its {name} "
                        f"is {float(value_R[row])}"
                    )
        return ""


@dataclass(slots=True)
class UpdateMeter:
    """Measures an update by a few samples: KL of the policy before it to the one after it."""

    few: list[int]
    before: dict[int, torch.Tensor] = field(default_factory=dict)
    """Log-probs before the update by sample; those of this rank, where the update notes them."""

    def note(self, indices: Sequence[int], lengths: Sequence[int], logp_R: torch.Tensor) -> None:
        """Note the samples that it is after, where nobody has yet."""
        parts = logp_R.detach().split([lengths[i] for i in indices])
        for index, logp_T in zip(indices, parts, strict=True):
            if index in self.few and index not in self.before:
                self.before[index] = logp_T.cpu()

    def kl(self, after: Mapping[int, torch.Tensor], masks: Sequence[Sequence[int]]) -> float:
        """Nats a token, over the samples of all ranks, which all call.

        Of tokens that the former policy has drawn; the estimator k3 of
        http://joschu.net/blog/kl-approx.html.
        """
        total = torch.zeros(2, dtype=torch.float64)
        for index, before_T in self.before.items():
            change_T = (after[index] - before_T).double().clamp(-20.0, 20.0)
            change_T = change_T[torch.tensor(masks[index]) != 0]
            total[0] += (change_T.expm1() - change_T).sum()
            total[1] += len(change_T)
        dist.all_reduce(total)
        return float(total[0] / total[1].clamp_min(1.0))


FEW_SAMPLES, FEW_TOKENS = 16, 2048
"""Most samples and tokens that `train/update_kl` is measured on."""


def spread(tokens: Sequence[Sequence[int]]) -> list[int]:
    """Indices of a few samples, spread over the batch; at least one."""
    few = list(range(0, len(tokens), max(1, math.ceil(len(tokens) / FEW_SAMPLES))))
    sums = accumulate(len(tokens[i]) for i in few)
    return [i for i, total in zip(few, sums, strict=True) if total <= FEW_TOKENS] or few[:1]


def _muted(loss: LossFn) -> LossFn:
    """A loss with the same metrics and no gradient."""

    def muted(output: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value, metrics = loss(output)
        return value * 0.0, metrics

    return muted


def refused(wrong: dict[str, float], token: str) -> StackError:
    """The error of an update whose loss or gradient is no number, with the token to blame."""
    numbers = ", ".join(f"{name.removeprefix('train/')} is {x}" for name, x in wrong.items())
    return StackError(
        f"The update was refused: {numbers}"
        + (f". The first to blame is {token}." if token else "; every token's own loss is finite."),
        why="A step with it would have destroyed the weights. Weights and optimizer are unchanged, "
        "earlier steps of the same update taken back.",
        fix="look at it in `session.last_batch`"
        + (", and at what made its reward" if "advantage" in token else "")
        + ("." if token else ", and lower training.learning_rate if the gradient overflows."),
    )


PROMPT = 32
FEW = 2048
"""Rows of a small micro-batch, which is compiled apart; enough to have logits made in pieces."""
SAMPLES = 8


def warm_up(backend: TrainerBackend, settings: TrainerSettings) -> None:
    """Compile what a first update needs, by a pass of each kind; nothing else is left of it.

    Raises:
        StackError: the device has too little memory for the planned micro-batches.
    """
    temperature, most = settings.temperature, settings.max_tokens

    def loss(output: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logp_R, entropy_R = output
        value = logp_R.mean()
        if settings.training.entropy_coef:  # the gradient of logits is compiled for it
            value = value + 0.0 * entropy_R.mean()
        return value, {}

    def packed(rows: int, *, share: bool) -> Packed:
        """About so many tokens, two samples to each prompt and no two of one length."""
        longest = max(rows // SAMPLES - PROMPT, SAMPLES)
        lengths = [longest - number for number in range(SAMPLES)]
        tokens = [[1 + i // 2] * PROMPT + [2 + i] * lengths[i] for i in range(SAMPLES)]
        replays = settings.training.replays_routing
        recorded = Recorded([None] * SAMPLES, *backend.experts) if replays else None
        return pack(tokens, lengths, share=share, experts=recorded).to(backend.device)

    with out_of_memory(most, backend.recover):
        for share in (True, False):
            for rows in sorted({min(FEW, most), settings.max_tokens_forward}):
                backend.log_probs(packed(rows, share=share), temperature)
        for rows, share in product(sorted({min(FEW, most), most}), (True, False)):
            sample = packed(rows, share=share)
            backend.forward_backward(sample, temperature, {POLICY: loss}, last=True)
    backend.recover()
