"""`Probes`: experiments in the trainer, and what it knows of each token.

Each computes what the trainer computes with one thing changed. The mismatch check asks for them by
name to find out why trainer and engine disagree, `check` to see whether a session starts in health,
and `annotate` to show the numbers of each token. None of them changes weights, optimizer or
randomness. All ranks run each one for all samples; rank 0's result counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kit.errors import StackError
from kit.messages import ExpertRecords, ExpertRows, TrainBatch
from kit.models import lora, low_precision, own
from kit.models.log_probs import KEPT_LOGITS
from kit.models.packing import Packed
from kit.models.state_dict import named_weights
from kit.operators.ladder import Recorder
from kit.operators.low_precision import Scheme
from kit.trainer.backend import TrainerBackend, whole_weights
from kit.trainer.loss import Corrections, ScoredBatch, token_terms
from kit.trainer.offload import forget_peak
from kit.trainer.scoring import LogProbScorer, Rows, TokenScores, as_rows
from kit.trainer.settings import TrainerSettings
from kit.trainer.startup_check import Startup, startup
from kit.trainer.state import TrainerState, forked_random
from kit.trainer.step import TrainStep
from kit.weight_sync import transform
from kit.weight_sync.sender import WeightSender
from kit.weight_sync.transport import ADAPTER, DRAFT, POLICY

Quantized = Literal["own", "nothing", "weights", "all"]
"""What of a model's linear layers is quantised."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples whose log-probs are recomputed."""

    tokens: list[list[int]]
    response_lengths: list[int]
    experts: ExpertRecords = None
    """Records of their experts."""
    followed: bool = True
    """Whether the policy's routers follow them; otherwise they are only compared with."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Experts and log-probs of one forward pass, sample by sample."""

    experts: list[ExpertRows]
    """Those that the tokens were sent to."""
    log_probs: Rows


@dataclass(frozen=True, slots=True)
class SamplingTransform:
    """Temperature, top-p and top-k that turn logits into log-probs."""

    temperature: float
    top_p: float = 1.0
    """Keep the likeliest tokens up to this share, and renormalise."""
    top_k: int = -1
    """Keep so many of the likeliest, and renormalise; -1 keeps all."""


@dataclass(frozen=True, slots=True)
class Probes:
    """The experiments by name: each public method is one."""

    backend: TrainerBackend
    scorer: LogProbScorer
    train_step: TrainStep
    state: TrainerState
    weights: WeightSender
    settings: TrainerSettings

    # ---- log-probs in another way --------------------------------------------------------------

    def recompute(
        self,
        samples: Samples,
        temperature: float,
        packed: bool = True,
        training_mode: bool = False,
        seed: int = 0,
    ) -> Rows:
        """Log-probs of the response tokens once more.

        Args:
            samples: the tokens.
            temperature: divides the logits.
            packed: several samples in a row, as in an update; else each by itself.
            training_mode: with dropout, where the model has any, as in an update.
            seed: of what is dropped at random; the trainer's own randomness stays as it is.
        """
        tokens, experts = (samples.tokens, samples.response_lengths), samples.experts
        scorer = self.scorer
        with forked_random(self.backend.device):
            torch.manual_seed(seed)
            (scores,) = scorer.score(
                *tokens,
                parts=scorer.parts(*tokens, experts=experts)
                if packed
                else scorer.one_by_one(*tokens, experts),
                temperature=temperature,
                dropout=training_mode,
            )
        return as_rows(scores.log_probs)

    def outputs(self, tokens: list[int]) -> dict[str, str]:
        """A digest of what each part of the policy puts out as it reads these tokens."""
        recorder = Recorder(self.backend.module())
        try:
            self.recompute(Samples([tokens], [len(tokens) - 1]), 1.0, packed=False)
        finally:
            digests = recorder.digests()
        return digests

    def plainly(
        self,
        samples: Samples,
        dtypes: Sequence[str],
        temperature: float,
        from_files: bool = False,
        rounded_to: str | None = None,
        quantized: Quantized = "own",
        cache: str = "auto",
        both: bool = False,
    ) -> list[Rows]:
        """Log-probs from Transformers alone, in each dtype: no packing, no FSDP, no own kernels.

        Args:
            samples: the tokens.
            dtypes: of weights and computation.
            temperature: divides the logits.
            from_files: with the weights that the files hold of the model, and of the adapter that
                the session starts from; not with the present ones.
            rounded_to: dtype that all weights are rounded to first, whatever computes with them.
            quantized: what of its linear layers is quantised as the engine's are: nothing, the
                weights, the activations too where its method does that, or what the trainer does.
            cache: `engine.kv_cache_dtype`, to which keys and values are rounded.
            both: after those of each dtype, once more with other signs, as a sync after
                `turn_signs` has them.
        """
        weights = None
        if not from_files:  # on the host: with adapters each is a new tensor, in float32
            weights = {name: value.cpu() for name, value in whole_weights(self.backend)}
        try:
            asked = samples, temperature, weights, rounded_to, quantized, cache, both
            return [rows for dtype in dtypes for rows in self._plainly(dtype, *asked)]
        finally:
            forget_peak(self.backend.device)  # a whole model more, which no phase of the plan has

    def _plainly(
        self,
        dtype: str,
        samples: Samples,
        temperature: float,
        weights: dict[str, torch.Tensor] | None,
        rounded_to: str | None,
        quantized: Quantized,
        cache: str,
        both: bool,
    ) -> list[Rows]:
        from transformers import AutoModelForCausalLM

        own.register(self.settings.model_path)
        low_precision.register_rounded_cache()
        adapters, wanted = self.settings.lora, getattr(torch, dtype)
        rounds = weights is None and adapters is not None and adapters.load_in_4bit
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.settings.model_path,
            dtype=torch.float32 if rounds else wanted,  # in which they are rounded to 4 bits
            attn_implementation="eager" if cache == "auto" else low_precision.ROUNDED_CACHE,
            experts_implementation="eager",  # the others do not compute in float64
            trust_remote_code=self.settings.trust_remote_code,
        )
        model.eval()
        if weights is None:
            model = lora.by_peft(model, adapters, self.backend.device).to(wanted)
        elif unknown := model.load_state_dict(weights, strict=False).unexpected_keys:
            raise StackError(f"Transformers' model has no weights named {', '.join(unknown[:3])}.")
        if rounded_to:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(getattr(torch, rounded_to)).to(parameter.dtype)
        if scheme := self._scheme(quantized):
            low_precision.use(model, scheme)
        rows = [self._alone(model, samples, temperature)]
        if both:
            for _, value in named_weights(model):
                value.data = transform.turned(value.data)
            rows.append(self._alone(model, samples, temperature))
        return rows

    def _alone(self, model: Any, samples: Samples, temperature: float) -> Rows:
        """Log-probs of each sample by itself, without TF32."""
        device, precision = self.backend.device, torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return _alone(model.to(device), samples, temperature, device)
        except torch.OutOfMemoryError:  # the engine may have taken the rest of the card
            return _alone(model.to("cpu"), samples, temperature, torch.device("cpu"))
        finally:
            torch.set_float32_matmul_precision(precision)

    def _scheme(self, quantized: Quantized) -> Scheme | None:
        how = self.settings.quantization
        if quantized == "own":
            quantized = "all" if self.settings.trains_quantized else "nothing"
        if how is None or quantized == "nothing":
            return None
        return replace(low_precision.scheme_of(how), activations=quantized == "all")

    def sampled(self, samples: Samples, ways: Sequence[SamplingTransform]) -> list[Rows]:
        """Log-probs of the response tokens in several ways, from one pass over each sample."""
        rows: list[Rows] = [[] for _ in ways]
        asked = samples.tokens, samples.response_lengths, samples.experts
        for _, one in self.scorer.one_by_one(*asked):
            logits = self.backend.logits(one).float()
            for by_sample, way in zip(rows, ways, strict=True):
                logp = _processed(logits, way).log_softmax(-1)
                by_sample.append(logp.gather(-1, one.target_R[:, None])[:, 0].tolist())
        return rows

    def routing(self, samples: Samples, temperature: float) -> Routed | None:
        """Experts and log-probs of each sample by itself; None where they cannot be told.

        Args:
            samples: the tokens; with records, those that the tokens are sent to.
            temperature: divides the logits.
        """
        if not self.backend.experts[0]:
            return None
        count = len(samples.tokens)
        asked = samples.tokens, samples.response_lengths, samples.experts or [None] * count
        experts, log_probs = [], []
        for _, one in self.scorer.one_by_one(*asked):
            log_probs.append(self.backend.log_probs(one, temperature)[0].tolist())
            assert one.experts is not None
            experts.append(one.experts.of_rows(one.rows_of[0][:-1]))
        return Routed(experts, log_probs)

    # ---- facts ---------------------------------------------------------------------------------

    def draft_checksums(self) -> dict[str, dict[str, list[str]]]:
        """Checksums of the draft that is trained; as `checksums`."""
        return self.weights.checksums(DRAFT)

    def checksums(self) -> dict[str, dict[str, list[str]]]:
        """Checksums of the policy as the engine was given it, by SGLang's name and dtype."""
        sums = self.weights.checksums(POLICY)
        if self.settings.sends_adapters:
            sums |= self.weights.checksums(ADAPTER)
        return sums

    def digest(self) -> str:
        """See `TrainerState.digest`."""
        return self.state.digest()

    def disturbance(self) -> str:
        """Description of the disturbance in the engine's weights; empty if exact."""
        return str(self.weights.transform(POLICY).disturbance)

    def turn_signs(self, on: bool) -> None:
        """Have syncs send the policy with other signs, from now on or no longer."""
        (self.weights.turned.add if on else self.weights.turned.discard)(POLICY)

    def merge_error(self) -> float:
        """Size of what rounding does to the adapters as the engine gets them, as a share of them.

        0 where nothing is lost, about 1 where all of it is; NaN while the adapters add nothing.
        """
        return self.backend.merge_error()

    def dropouts(self) -> list[str]:
        """The model's settings and layers that drop something at random in training."""
        model: Any = self.backend.module()
        named = [
            f"{key}: {value}"
            for key, value in model.config.to_dict().items()
            if "dropout" in key and value
        ]
        return named + [
            f"{name} (Dropout, p {module.p})"
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Dropout) and module.p
        ]

    def startup(self, batch: TrainBatch) -> Startup:
        """See `startup_check.startup`."""
        return startup(self.backend, self.train_step, self.state, batch)

    # ---- numbers of each token -----------------------------------------------------------------

    def annotate_samples(self, samples: Samples) -> dict[str, Rows]:
        """Log-prob and entropy of each response token under the present weights, in nats.

        With records of experts, also how many of them the trainer would choose otherwise.
        """
        scores, changed = self._scores(samples)
        return _annotation(scores) | changed

    def annotate_batch(self, batch: TrainBatch, update_id: str) -> dict[str, Rows]:
        """Log-prob, entropy, and what each token adds to the loss of its optimizer step.

        The loss is that of the first epoch, with the weights as they are now; the sum over an
        optimizer step's samples is its `train/loss` where the update makes only one, and that of
        its first step. There is none for a batch that the last update has been made with: the
        weights that its loss was of are gone.
        """
        own = Samples(batch.tokens, batch.response_lengths, batch.experts, batch.replayed)
        scores, changed = self._scores(own)
        annotation = _annotation(scores) | changed
        if self.state.last_update and self.state.last_update[0] == update_id:
            return annotation
        return annotation | {"loss": self._loss(batch, scores)}

    def _scores(self, samples: Samples) -> tuple[TokenScores, dict[str, Rows]]:
        """Scores by the micro-batches of an update, so that they are its numbers bit by bit.

        The second result has, with records, the experts of each token that would be others.
        """
        asked = samples.tokens, samples.response_lengths
        changed: Rows = [[] for _ in samples.tokens]
        experts, followed = samples.experts, samples.followed

        def parts() -> Iterator[tuple[list[int], Packed]]:
            for members, packed in self.scorer.parts(*asked, experts=experts, followed=followed):
                yield members, packed
                if packed.experts:
                    by_row = packed.experts.changed()[packed.predictor_R]
                    lengths = [samples.response_lengths[i] for i in members]
                    for index, row in zip(members, by_row.split(lengths), strict=True):
                        changed[index] = row.tolist()

        scores = self.scorer.score(*asked, parts=parts())[0]
        known = samples.experts is not None and self.backend.experts[0]
        return scores, {"experts_changed": changed} if known else {}

    def _loss(self, batch: TrainBatch, scores: TokenScores) -> Rows:
        training, device = self.settings.training, self.backend.device
        old = scores.log_probs if Corrections.need_old(training) else None
        _, reference = self.train_step.log_probs_before(batch)
        scored = ScoredBatch(batch, old, reference, Corrections.of(batch, old, training))
        rows: Rows = [[] for _ in batch.tokens]
        for part in self.train_step.steps_of(batch):
            if rows[part[0]]:  # a later epoch
                break
            lengths = [batch.response_lengths[i] for i in part]
            sample_R = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(lengths))
            terms, _ = token_terms(
                torch.cat([scores.log_probs[i] for i in part]),
                torch.cat([scores.entropies[i] for i in part]),
                sample_R.to(device),
                scored.inputs(part, device),
                self.train_step.loss_settings(batch, part),
            )
            for index, share in zip(part, terms.loss(training).split(lengths), strict=True):
                rows[index] = share.tolist()
        return rows


def _annotation(scores: TokenScores) -> dict[str, Rows]:
    return {"trainer_log_prob": as_rows(scores.log_probs), "entropy": as_rows(scores.entropies)}


def _alone(model: Any, samples: Samples, temperature: float, device: torch.device) -> Rows:
    """Log-probs of the response tokens from a Transformers model, some padded samples at a time."""
    tokens, lengths = samples.tokens, samples.response_lengths
    longest = max(map(len, tokens))
    size = max(1, KEPT_LOGITS // (longest * model.config.vocab_size))
    out: Rows = []
    for start in range(0, len(tokens), size):
        rows = tokens[start : start + size]
        # Padding comes last, where no token looks.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        wide = logits if logits.dtype is torch.float64 else logits.float()
        logp = torch.log_softmax(wide / temperature, dim=-1)
        for row, length, of_row in zip(rows, lengths[start : start + size], logp, strict=True):
            targets = torch.tensor(row[-length:], device=device)
            predicted = of_row[len(row) - length - 1 : len(row) - 1]
            out.append(predicted.gather(-1, targets[:, None])[:, 0].tolist())
    return out


def _processed(logits: torch.Tensor, way: SamplingTransform) -> torch.Tensor:
    logits = logits / way.temperature
    if 0 < way.top_k < logits.shape[-1]:
        least = logits.topk(way.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if way.top_p < 1:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True)
        drop = ranked.cumsum(-1) - ranked > way.top_p
        logits = logits.masked_fill(drop.gather(-1, order.argsort(-1)), -torch.inf)
    return logits
