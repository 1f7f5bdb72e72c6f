"""Experiments in the trainer: the same computation with one thing changed.

`kit.mismatch` asks for them by name to find out why trainer and engine disagree, `check` to see
whether a session starts in health, and `annotate` to show what is known of each token. None of
them changes weights, optimizer or randomness. All ranks run each one; rank 0's result counts.

What the trainer knows of each response token, for people to look at.

Nothing here changes weights, optimizer or randomness. All ranks run it, each for all samples, so
that every one has all the numbers; rank 0's count.

Which experts the trainer's mixture of experts sends each token to, and the same with its choice
replaced by somebody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kit.messages import TrainBatch
from kit.models.log_probs import KEPT_LOGITS
from kit.models.moe import Experts, Routed, _watched
from kit.models.packing import pack
from kit.trainer.fsdp import full_logits, gathered, without_gradient
from kit.trainer.loss import Corrections, token_terms
from kit.trainer.startup_check import startup
from kit.trainer.state import digest
from kit.weight_sync.transport import POLICY

if TYPE_CHECKING:
    from kit.trainer.actor import Trainer


Rows = list[list[float]]
"""A number for each response token, sample by sample."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What is computed again."""

    tokens: list[list[int]]
    response_lengths: list[int]


def recompute(
    trainer: Trainer,
    samples: Samples,
    temperature: float,
    packed: bool = True,
    training_mode: bool = False,
    seed: int = 0,
) -> Rows:
    """Log-probs of the response tokens once more.

    Args:
        trainer: whose policy computes.
        samples: the tokens.
        temperature: divides the logits.
        packed: several samples in a row, as in an update; else each by itself.
        training_mode: with dropout, where the model has any, as in an update.
        seed: of what is dropped at random; the trainer's own randomness stays as it is.
    """
    lengths = samples.response_lengths
    out: Rows = [[] for _ in lengths]
    policy: Any = trainer.policy
    policy.train(training_mode)
    with torch.random.fork_rng(devices=_cards(trainer)), torch.no_grad():
        torch.manual_seed(seed)
        for members, row in _packs(trainer, samples, packed):
            logp_R = policy(row, temperature)[0].cpu()
            policy.reshard()
            parts = logp_R.split([lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                out[index] = part.tolist()
    policy.train()
    return out


def _cards(trainer: Trainer) -> list[int]:
    return [trainer.device.index] if trainer.device.type == "cuda" else []


def _packs(trainer: Trainer, samples: Samples, packed: bool) -> Iterator[tuple[list[int], Any]]:
    tokens, lengths = samples.tokens, samples.response_lengths
    if packed:
        yield from trainer.parts(tokens, lengths)
        return
    for index, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        yield [index], pack([row], [length], share=False).to(trainer.device)


def plainly(
    trainer: Trainer, samples: Samples, dtypes: Sequence[str], temperature: float
) -> list[Rows]:
    """The same from Transformers alone, in each dtype: no packing, no FSDP, its own attention."""
    from transformers import AutoModelForCausalLM

    inner: Any = trainer.policy.model
    state = gathered(inner)
    found = []
    for dtype in dtypes:
        model: Any = AutoModelForCausalLM.from_pretrained(
            trainer.settings.model_path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            trust_remote_code=trainer.settings.trust_remote_code,
        )
        model.to(trainer.device).eval()
        model.load_state_dict(state, strict=False)
        found.append(_alone(model, samples, temperature, trainer.device))
    return found


def _alone(model: Any, samples: Samples, temperature: float, device: torch.device) -> Rows:
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


@dataclass(frozen=True, slots=True)
class Way:
    """How log-probs are made of logits."""

    temperature: float
    top_p: float = 1.0
    """Keep the likeliest tokens up to this share, and renormalise."""
    top_k: int = -1
    """Keep so many of the likeliest, and renormalise; -1 keeps all."""


def sampled(trainer: Trainer, samples: Samples, ways: Sequence[Way]) -> list[Rows]:
    """Log-probs of the response tokens in several ways, from one pass over each sample."""
    out: list[Rows] = [[] for _ in ways]
    policy: Any = trainer.policy
    policy.eval()
    with torch.no_grad():
        for row, length in zip(samples.tokens, samples.response_lengths, strict=True):
            one = pack([row], [length], share=False).to(trainer.device)
            logits = full_logits(policy, one).float()
            for rows, way in zip(out, ways, strict=True):
                logp = _processed(logits, way).log_softmax(-1)
                rows.append(logp.gather(-1, one.target_R[:, None])[:, 0].tolist())
    policy.train()
    return out


def _processed(logits: torch.Tensor, way: Way) -> torch.Tensor:
    logits = logits / way.temperature
    if 0 < way.top_k < logits.shape[-1]:
        least = logits.topk(way.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if way.top_p < 1:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True)
        drop = ranked.cumsum(-1) - ranked > way.top_p
        logits = logits.masked_fill(drop.gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def checksums(trainer: Trainer) -> dict[str, dict[str, list[str]]]:
    """Checksums of the policy as the engine was given it, by SGLang's parameter name and dtype."""
    return trainer.weights.checksums(POLICY)


def dropouts(trainer: Trainer) -> list[str]:
    """The model's settings and layers that drop something at random in training."""
    inner: Any = trainer.policy.model
    named = [
        f"{key}: {value}"
        for key, value in inner.config.to_dict().items()
        if "dropout" in key and value
    ]
    return named + [
        f"{name} (Dropout, p {module.p})"
        for name, module in inner.named_modules()
        if isinstance(module, torch.nn.Dropout) and module.p
    ]


def disturbance(trainer: Trainer) -> str:
    """What was done to the weights that the engine has, in words; empty where they are exact."""
    return str(trainer.weights.transform(POLICY).disturbance)


def annotate_samples(
    trainer: Trainer, tokens: list[list[int]], response_lengths: list[int]
) -> dict[str, Rows]:
    """Log-prob and entropy of each response token under the present weights, in nats."""
    logp, entropy = _policy(trainer, tokens, response_lengths)
    return {"trainer_log_prob": _rows(logp), "entropy": _rows(entropy)}


def annotate_batch(trainer: Trainer, batch: TrainBatch, update_id: str) -> dict[str, Rows]:
    """The same, and what each token adds to the loss of the optimizer step that takes it.

    The loss is that of the first epoch, with the weights as they are now; the sum over an optimizer
    step's samples is its `train/loss` where the update makes only one, and that of its first step.
    There is none for a batch that the last update has been made with: the weights that its loss
    was of are gone.
    """
    logp, entropy = _policy(trainer, batch.tokens, batch.response_lengths)
    found = {"trainer_log_prob": _rows(logp), "entropy": _rows(entropy)}
    if trainer.last_update and trainer.last_update[0] == update_id:
        return found
    return found | {"loss": _loss(trainer, batch, logp, entropy)}


def routing(
    trainer: Trainer,
    samples: Samples,
    temperature: float,
    forced: list[Experts] | None = None,
) -> Routed | None:
    """Experts and log-probs of each sample by itself; None for a model without experts.

    Args:
        trainer: whose policy computes.
        samples: the tokens.
        temperature: divides the logits.
        forced: experts to send the tokens to instead; tokens at the end that it lacks choose
            themselves.
    """
    policy: Any = trainer.policy
    routers = [
        module
        for name, module in policy.named_modules()
        if type(module).__name__.endswith("Router")
    ]
    if not routers:
        return None
    experts, log_probs = [], []
    policy.eval()
    with torch.no_grad():
        for index, (row, length) in enumerate(
            zip(samples.tokens, samples.response_lengths, strict=True)
        ):
            one = pack([row], [length], share=False).to(trainer.device)
            with _watched(routers, forced[index] if forced else None) as seen:
                log_probs.append(policy(one, temperature)[0].tolist())
            policy.reshard()
            experts.append(torch.stack(seen, dim=1).tolist())
    policy.train()
    return Routed(experts, log_probs)


EXPERIMENTS: dict[str, Callable[..., Any]] = {
    "recompute": recompute,
    "plainly": plainly,
    "sampled": sampled,
    "checksums": checksums,
    "digest": digest,
    "disturbance": disturbance,
    "dropouts": dropouts,
    "routing": routing,
    "startup": startup,
    "annotate_samples": annotate_samples,
    "annotate_batch": annotate_batch,
}


def _policy(
    trainer: Trainer, tokens: list[list[int]], response_lengths: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-prob and entropy by sample, on the device."""
    found: tuple[list[torch.Tensor], ...] = tuple([torch.empty(0)] * len(tokens) for _ in range(2))
    for members, packed in trainer.parts(tokens, response_lengths):
        answer = without_gradient(trainer.policy, packed, trainer.settings.temperature)
        for rows, value_R in zip(found, answer, strict=True):
            parts = value_R.split([response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                rows[index] = part
    return found[0], found[1]


def _loss(
    trainer: Trainer, batch: TrainBatch, logp: list[torch.Tensor], entropy: list[torch.Tensor]
) -> Rows:
    training = trainer.settings.training
    old = logp if Corrections.need_old(training) else None
    corrections = Corrections.of(batch, old, training)
    _, reference = trainer.log_probs_before(batch)
    rows: Rows = [[] for _ in logp]
    for part in trainer.steps_of(batch):
        if rows[part[0]]:  # a later epoch
            break
        lengths = [batch.response_lengths[i] for i in part]
        sample_R = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(lengths))
        terms, _ = token_terms(
            torch.cat([logp[i] for i in part]),
            torch.cat([entropy[i] for i in part]),
            sample_R.to(trainer.device),
            trainer.inputs(batch, part, old, reference, corrections),
            trainer.loss_settings(batch, part),
        )
        for index, share in zip(part, terms.loss(training).split(lengths), strict=True):
            rows[index] = share.tolist()
    return rows


def _rows(values: list[torch.Tensor]) -> Rows:
    return [value.tolist() for value in values]
